"""Train a causal language model: `python train.py experiment=fix`. See configs/ for every knob."""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from causal_lm import cli


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def train(cfg: DictConfig) -> float:
    """One run; returns its validation loss, which is what sweepers minimise."""
    from causal_lm.run import run  # torch and lightning load once the configuration is known good

    return cli.job(run, cfg)


if __name__ == "__main__":
    with cli.one_line_errors():
        cli.check(sys.argv[1:], Path(__file__).parent.resolve() / "configs")
        train()

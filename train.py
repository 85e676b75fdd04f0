"""Train a causal language model: `python train.py experiment=fix`. The settings are in configs/."""

import hydra
from omegaconf import DictConfig

from causal_lm import cli


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def train(cfg: DictConfig) -> float:
    """Run once; return the validation loss, which sweepers minimize."""
    return cli.job(cfg)


if __name__ == "__main__":
    cli.start(train)

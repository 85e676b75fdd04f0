"""The commands: ``causal-lm-train`` or ``python -m causal_lm``, ``causal-lm-evaluate`` or
``python -m causal_lm evaluate``, and so on.

All but ``train`` are files of scripts/, which a wheel holds beside the configurations.
"""

import os
import sys
from functools import partial

import hydra
from omegaconf import DictConfig

from causal_lm import cli
from causal_lm.config import CONFIG_DIR


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="train")
def _job(cfg: DictConfig) -> float:
    return cli.job(cfg)


def train() -> None:
    """Do what ``train.py`` of a checkout does; classes are found in the working directory too."""
    sys.path.append(os.getcwd())
    cli.start(_job)


def run_script(name: str) -> None:
    """Run ``scripts/NAME.py`` as the main program, with the arguments of this one."""
    path = CONFIG_DIR.parent / "scripts" / f"{name}.py"
    exec(compile(path.read_text(encoding="utf-8"), path, "exec"), {"__name__": "__main__"})


SCRIPTS = ("evaluate", "export", "generate", "preflight")
evaluate, export, generate, preflight = (partial(run_script, name) for name in SCRIPTS)

if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1] in SCRIPTS:
        sys.argv[:2] = [f"causal-lm-{sys.argv[1]}"]
        run_script(sys.argv[0].removeprefix("causal-lm-"))
    else:
        train()

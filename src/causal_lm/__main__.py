"""The console commands, such as ``causal-lm-train``; ``python -m causal_lm`` trains."""

import os
import sys
from functools import partial

import hydra

from causal_lm import cli
from causal_lm.config import CONFIG_DIR


def train() -> None:
    """Do what train.py of a checkout does; classes are found in the working directory too."""
    sys.path.append(os.getcwd())
    main = hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="train")
    cli.start(main(cli.job))


def run_script(name: str) -> None:
    """Run ``scripts/NAME.py``, which a wheel holds too, with the arguments of this command."""
    path = CONFIG_DIR.parent / "scripts" / f"{name}.py"
    exec(compile(path.read_text(encoding="utf-8"), path, "exec"), {"__name__": "__main__"})


evaluate, export = partial(run_script, "evaluate"), partial(run_script, "export")
generate, preflight = partial(run_script, "generate"), partial(run_script, "preflight")

if __name__ == "__main__":
    train()

"""The command line around a run: quick answers to bad input, and errors in one line."""

import contextlib
import json
import logging
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from causal_lm import config

# Read when torch loads: threads that wait spin a little, then sleep. To spin on, the default, is no
# faster on an idle machine and costs a busy one dear (docs/NOTES.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}

log = logging.getLogger(__name__)
FULL, ASKED = "HYDRA_FULL_ERROR", "CAUSAL_LM_FULL_ERROR"


class _JobFailedError(BaseException):
    """Carries an error past Hydra, which has lines of its own to add to an ``Exception``."""


@contextlib.contextmanager
def one_line_errors(failed: int = 1) -> Iterator[None]:
    """Whatever goes wrong inside is one line on stderr.

    Exit code 2 where the configuration is at fault, ``failed`` where the run is; the traceback is
    shown where ``HYDRA_FULL_ERROR=1``.
    """
    os.environ.setdefault(ASKED, os.environ.get(FULL, ""))  # other ranks inherit what was asked for
    os.environ[FULL] = "1"  # so that Hydra hands its errors on to us instead of printing them
    try:
        yield
    except (Exception, _JobFailedError) as failure:
        error = failure.__cause__ if isinstance(failure, _JobFailedError) else failure
        assert error is not None
        if os.environ[ASKED] == "1":
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {describe(error)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, config.ConfigError) else failed)


def check(argv: list[str], config_dir: Path = config.CONFIG_DIR) -> None:
    """Validate a Hydra command line before Hydra makes directories for it.

    Raises:
        ConfigError: naming the key, preset or value at fault.
    """
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    args = parser.parse_args(argv)
    if args.help or args.hydra_help or args.cfg or args.info or args.config_dir or args.config_name:
        return  # Hydra's own business, or somebody's own configuration
    (config.load_sweep if args.multirun else config.load)(args.overrides, config_dir)


def _refuse(message: str) -> NoReturn:
    raise config.ConfigError(f"{message}: options such as -m come before the overrides")


def describe(error: BaseException) -> str:
    """One line: the message, with the kind of error where that helps."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = " ".join(lines) or "no message"
    if isinstance(error, ValueError | OSError | FloatingPointError) or not lines:
        return message
    return f"{type(error).__name__}: {message} ({FULL}=1 shows the traceback)"


def job(run: Callable[[DictConfig, Path], dict[str, Any]], cfg: DictConfig) -> float:
    """Run one Hydra job in its directory and return its ``val/loss``.

    In a sweep, a job that fails gives NaN, and the others go on: the table at the end names it.
    """
    hydra_cfg = HydraConfig.get()
    directory = Path(hydra_cfg.runtime.output_dir)
    # Lightning's advice on workers and checkpoint folders is not for the reader of this run.
    warnings.filterwarnings("ignore", module="lightning")
    try:
        if hydra_cfg.mode == RunMode.MULTIRUN and cfg.trainer.devices != 1:
            return _alone(list(hydra_cfg.overrides.task), directory)
        return run(cfg, directory)["val/loss"]
    except Exception as error:
        log.debug("the run failed", exc_info=True)
        if hydra_cfg.mode != RunMode.MULTIRUN:
            raise _JobFailedError from error
        log.error(f"error: {describe(error)}")
        return math.nan


def _alone(overrides: list[str], directory: Path) -> float:
    """One job of a sweep as a command of its own.

    Lightning starts the other ranks by repeating the command line. That of a sweep would have each
    rank replay the whole sweep, and train different configurations against each other.
    """
    command = [sys.executable, sys.argv[0], *overrides, f"hydra.run.dir='{directory}'"]
    path = directory / "summary.json"
    path.unlink(missing_ok=True)
    code = subprocess.run(command, check=False).returncode
    if not path.exists():
        raise ValueError(f"the job ended with exit code {code} before it could write {path}")
    summary = json.loads(path.read_text(encoding="utf-8"))
    if code:
        raise ValueError(summary["error"] or f"the job ended with exit code {code}")
    return summary["val/loss"]

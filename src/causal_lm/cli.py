"""The command line: errors in one line, validation before the run, one Hydra job."""

import argparse
import contextlib
import logging
import math
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from causal_lm.config import (
    ConfigError,
    as_config_error,
    rename_overrides,
    validate,
    validate_sweep,
)
from causal_lm.report.files import HYDRA_FILES, claim_directory, is_rank_zero, read_summary
from causal_lm.signals import STOP_SIGNALS, stop_at_once

# Read when torch loads: waiting OpenMP threads spin briefly, then sleep. Endless spinning, the
# default, slows a busy machine down (docs/NOTES.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}

log = logging.getLogger(__name__)
FULL_ERROR, USER_FULL_ERROR = "HYDRA_FULL_ERROR", "CAUSAL_LM_FULL_ERROR"
PROGRAM = "CAUSAL_LM_PROGRAM"  # arguments of Python, by lines; also for the workers of a launcher


class _BypassHydraError(BaseException):
    """Wraps an error, its cause, so that Hydra neither prints nor swallows it."""


@contextlib.contextmanager
def _bypass_hydra() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise _BypassHydraError from error


@contextlib.contextmanager
def one_line_errors(exit_code: int = 1) -> Iterator[None]:
    """Print an error on stderr in one line (``HYDRA_FULL_ERROR=1``: the traceback), and exit.

    The exit code is 2 where the configuration is not valid, otherwise ``exit_code``.
    """
    os.environ.setdefault(USER_FULL_ERROR, os.environ.get(FULL_ERROR, ""))  # for other ranks too
    os.environ[FULL_ERROR] = "1"  # Hydra then raises its errors instead of printing them
    try:
        yield
    except (Exception, _BypassHydraError) as failure:
        error: Any = failure.__cause__ if isinstance(failure, _BypassHydraError) else failure
        if os.environ[USER_FULL_ERROR] == "1":
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {describe(error)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else exit_code)


def describe(error: BaseException) -> str:
    """The message of an error as one line, with its type unless it is a common one."""
    message = " ".join(str(error).split())
    if message and isinstance(error, ValueError | OSError | FloatingPointError):
        return message
    kind = type(error).__name__
    return f"{kind}: {message or 'no message'} ({FULL_ERROR}=1 shows the traceback)"


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add ``--trust``, the classes that a checkpoint may name besides those of causal_lm."""
    sys.path.append(os.getcwd())  # where train.py found such a class; Python has the script's own
    parser.add_argument(
        "--trust", action="append", default=[], metavar="package.module.Class",
        help="open a checkpoint of this model class, which is not part of causal_lm",
    )  # fmt: skip


def start(main: Callable[[], Any]) -> None:
    """Call a ``hydra.main`` function; an error of Hydra is one line, exit code 2."""
    spec = sys.modules["__main__"].__spec__
    os.environ[PROGRAM] = f"-m\n{spec.name}" if spec else sys.argv[0]
    for number in STOP_SIGNALS:  # while torch is loaded
        signal.signal(number, stop_at_once)
    with one_line_errors():
        sys.argv[1:] = rename_overrides(sys.argv[1:])
        with as_config_error(sys.argv[1:]):
            main()


class ValidateConfig(Callback):
    """Validate before Hydra makes a directory; in a sweep, every value of every axis.

    The directory of a single run is claimed here, before Hydra writes into it.
    """

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        with _bypass_hydra():
            validate(config)
            if not config.hydra.run.dir:
                raise ConfigError("hydra.run.dir must be the path of a directory, not ''")
            if is_rank_zero():
                claim_directory(Path(config.hydra.run.dir))

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        given = config.hydra.overrides
        axes = OmegaConf.select(config, "hydra.sweeper.params") or {}
        # The command line comes last, as it overrides the sweeper's own axes.
        overrides = [*(f"{key}={axis}" for key, axis in axes.items()), *given.hydra, *given.task]
        with _bypass_hydra():
            validate_sweep(overrides, config.hydra.job.config_name)


def job(cfg: DictConfig) -> float:
    """Run one Hydra job in its directory and return its ``val/loss``.

    In a sweep, a job that fails returns NaN and the others run; the table at the end names it.
    """
    hydra_cfg = HydraConfig.get()
    is_sweep, directory = hydra_cfg.mode == RunMode.MULTIRUN, Path(hydra_cfg.runtime.output_dir)
    # Silence Lightning's advice on workers and existing checkpoint folders.
    warnings.filterwarnings("ignore", module="lightning")
    exit_code = 1
    try:
        validate(cfg)  # the user's own main configuration may lack ValidateConfig
        if OmegaConf.select(cfg, "extras.print_config") and is_rank_zero():
            print(OmegaConf.to_yaml(cfg, resolve=True))
        if is_sweep and cfg.trainer.devices != 1:
            loss = _run_in_subprocess(hydra_cfg, directory)["val/loss"]
        else:
            from causal_lm.fit import run  # loads torch and lightning

            loss = run(cfg, directory)["val/loss"]
        exit_code = 0
        return math.nan if loss is None else loss  # None: stopped before the first evaluation
    except Exception as error:
        log.debug("the run failed", exc_info=True)
        if not is_sweep:
            raise _BypassHydraError from error
        log.error(f"error: {describe(error)}")
        return math.nan
    finally:
        if wandb := sys.modules.get("wandb"):  # the next job of a sweep begins a run of its own
            wandb.finish(exit_code)


def _run_in_subprocess(hydra_cfg: Any, directory: Path) -> dict[str, Any]:
    """Run one job of a sweep as a command of its own, and return its summary.

    Lightning starts the other ranks by repeating the command line; in a sweep, each rank would run
    the whole sweep, and the ranks would train different configurations.
    """
    start = os.environ.get(PROGRAM, sys.argv[0]).split("\n")
    command = [sys.executable, *start, f"--config-name={hydra_cfg.job.config_name}"]
    sources = hydra_cfg.runtime.config_sources
    command.append("hydra.mode=RUN")  # a configuration may say MULTIRUN
    command += [f"--config-dir={s.path}" for s in sources if s.provider == "command-line"]
    quoted = str(directory).replace("'", "\\'")
    command += [*hydra_cfg.overrides.task, f"hydra.run.dir='{quoted}'"]
    claim_directory(directory, ignored=HYDRA_FILES)
    path = directory / "summary.json"
    path.unlink(missing_ok=True)
    code = subprocess.run(command, check=False, cwd=hydra_cfg.runtime.cwd).returncode
    ended = f"the job ended with exit code {code}"
    if not path.exists():
        raise ValueError(f"{ended} before it could write {path}")
    summary = read_summary(path)
    if code:
        raise ValueError(summary["error"] or ended)
    return summary

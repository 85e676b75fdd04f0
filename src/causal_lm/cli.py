"""The command line: errors in one line, validation before the run, one Hydra job."""

import argparse
import contextlib
import logging
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write

from causal_lm.config import (
    ConfigError,
    as_config_error,
    group_overrides,
    leaves,
    validate,
    validate_sweep,
)
from causal_lm.ledger import Ledger, outcome, replace_text, settings_of
from causal_lm.report.files import claim_directory, is_rank_zero, read_summary, write_json
from causal_lm.report.seeds import seed_table
from causal_lm.report.table import sweep_table
from causal_lm.signals import STOP_SIGNALS, StoppedRun, stop_at_once

# Read when torch loads: waiting OpenMP threads spin briefly, then sleep. Endless spinning, the
# default, slows a busy machine down (docs/NOTES.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}

# Options that begin with _ are parts of others: Hydra's help and completion leave them out.
list_options = ConfigLoaderImpl.get_group_options
ConfigLoaderImpl.get_group_options = lambda *args, **kwargs: [  # type: ignore[method-assign]
    name for name in list_options(*args, **kwargs) if not name.startswith("_")
]
log = logging.getLogger(__name__)
TORCHRUN = "TORCHELASTIC_USE_AGENT_STORE"  # set by it; "True": ranks share its key-value store
FULL_ERROR, USER_FULL_ERROR = "HYDRA_FULL_ERROR", "CAUSAL_LM_FULL_ERROR"
ONE_DEVICE = r"1|[0-9]+,|\[[0-9]+\]"  # as values of trainer.devices
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
        sys.argv[1:] = group_overrides(sys.argv[1:])
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
            if os.environ.get(TORCHRUN) == "True":
                _share_directory(config.hydra)
            if is_rank_zero():
                claim_directory(Path(config.hydra.run.dir))

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        given: Any = OmegaConf.to_container(config.hydra.overrides)  # interpolations as typed
        axes = OmegaConf.select(config, "hydra.sweeper.params") or {}
        # The command line comes last, as it overrides the sweeper's own axes.
        overrides = [f"{key}={axis}" for key, axis in axes.items()]
        with _bypass_hydra():
            if TORCHRUN in os.environ:
                todo = "start it without torchrun, and set trainer.devices"
                raise ConfigError(f"under torchrun, each rank would run the whole sweep: {todo}")
            name = config.hydra.job.config_name
            validate_sweep([*overrides, *given["hydra"], *given["task"]], name)


class SweepTable(Callback):
    """Print one row per job at the end of a sweep, for any launcher, from its ledger."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        with _bypass_hydra():
            self._ledger, self._started = Ledger(config.get("ledger"), config.hydra), time.time()

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Print the table; exit with code 1 where a job failed, after all of them have run."""
        with _bypass_hydra():
            runs = list(self._ledger.summaries(since=self._started))
        where = f"written below {config.hydra.sweep.dir}, and listed in {self._ledger.path}"
        tables = [text for text in (sweep_table(runs), seed_table(runs), where) if text]
        print("\n" + "\n\n".join(tables))
        if any(run["status"] in ("failed", "interrupted") for run in runs):
            sys.exit(1)


def _share_directory(hydra_cfg: DictConfig) -> None:
    """Under torchrun, set the directory of the first rank: each rank has composed one of its own,
    with the current time. (Lightning passes it on to the ranks that it starts.)"""
    from torch.distributed import rendezvous  # slow to load

    store, rank, _ = next(rendezvous("env://"))
    if rank == 0:
        store.set("causal_lm_run_dir", hydra_cfg.run.dir)
    with read_write(hydra_cfg):
        hydra_cfg.run.dir = store.get("causal_lm_run_dir").decode()
        hydra_cfg.job.name += f"_rank_{rank}" * (rank > 0)  # the name of its log


def job(cfg: DictConfig) -> float:
    """Run one Hydra job in its directory and return its ``val/loss``, NaN where there is none.

    In a sweep, a complete run of the ledger is not repeated, a job that fails returns NaN and the
    others run, and a signal ends the sweep.
    """
    # Silence Lightning's advice on workers and existing checkpoint folders.
    warnings.filterwarnings("ignore", module="lightning")
    hydra_cfg = HydraConfig.get()
    run = _run_in_sweep if hydra_cfg.mode == RunMode.MULTIRUN else _run
    with _bypass_hydra():
        loss = run(cfg, Path(hydra_cfg.runtime.output_dir))["val/loss"]
    return math.nan if loss is None else loss  # None: stopped before the first evaluation


def _run_in_sweep(cfg: DictConfig, own_directory: Path) -> dict[str, Any]:
    """Run what is not complete in the ledger; an error of the ledger ends the sweep."""
    hydra_cfg, raw = HydraConfig.get(), OmegaConf.to_container(cfg)
    config: Any = OmegaConf.to_container(cfg, resolve=True)  # once, as values may be sampled
    ledger = Ledger(cfg.get("ledger"), hydra_cfg)
    directory = ledger.claim(settings_of(config, own_directory), hydra_cfg)
    summary = outcome(directory)
    if summary["status"] not in ("failed", "interrupted"):
        log.info(f"{directory} is {summary['status']}: nothing to do")
        return summary
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.close()  # it opens the other file at the next line
            handler.baseFilename = str(directory / Path(handler.baseFilename).name)
    config = replace_text(config, str(own_directory), str(directory))
    # From its own checkpoint; also where another process runs it in this very moment.
    if config.get("ckpt_path") is None or any(directory.glob("checkpoints/*.ckpt")):
        config["ckpt_path"] = "auto"
    try:
        is_single = re.fullmatch(ONE_DEVICE, str(cfg.trainer.devices))
        command = [] if is_single else _command(raw, config, directory)
        summary = _run(OmegaConf.create(config), directory, command)
    except Exception as error:
        if (summary := outcome(directory))["status"] != "running":  # by another, faster process
            log.error(f"error: {describe(error)}")
            if not (directory / "summary.json").exists():
                summary |= {"status": "failed", "error": describe(error)}
                write_json(directory / "summary.json", summary)
        return summary | {"val/loss": None}
    reason, _, name = str(summary["stopped_because"]).partition(" ")
    if reason == "signal":
        log.info(f"the sweep ends; the same command with ledger={ledger.path} goes on")
        raise StoppedRun(signal.Signals[name])
    return summary


def _run(cfg: DictConfig, directory: Path, command: Sequence[str] = ()) -> dict[str, Any]:
    """Run a configuration, by a command if there is one, and return its summary."""
    exit_code = 1
    try:
        validate(cfg)  # the user's own main configuration may lack ValidateConfig
        if OmegaConf.select(cfg, "extras.print_config") and is_rank_zero():
            print(OmegaConf.to_yaml(cfg, resolve=True))
        if command:
            summary = _run_command(command, directory)
        else:
            from causal_lm.fit import run  # loads torch and lightning

            summary = run(cfg, directory)
        exit_code = 0
        return summary
    except Exception:
        log.debug("the run failed", exc_info=True)  # into the log file, not on the terminal
        raise
    finally:
        if wandb := sys.modules.get("wandb"):  # the next job of a sweep begins a run of its own
            wandb.finish(exit_code)


def _command(raw: Any, config: Any, directory: Path) -> list[str]:
    """The command that runs one job of a sweep, with the values that ``raw`` interpolates.

    Lightning starts the other ranks by repeating the command line; in a sweep, each rank would run
    the whole sweep, and the ranks would train different configurations.
    """
    hydra_cfg, given = HydraConfig.get(), dict(leaves(raw))
    start = os.environ.get(PROGRAM, sys.argv[0]).split("\n")
    command = [sys.executable, *start, f"--config-name={hydra_cfg.job.config_name}"]
    sources = hydra_cfg.runtime.config_sources
    command.append("hydra.mode=RUN")  # a configuration may say MULTIRUN
    command += [f"--config-dir={s.path}" for s in sources if s.provider == "command-line"]
    command += cast(list[str], OmegaConf.to_container(hydra_cfg.overrides.task))  # as typed
    values = {k: v for k, v in leaves(config) if k == "ckpt_path" or "${" in str(given.get(k))}
    for key, value in {**values, "hydra.run.dir": str(directory)}.items():
        if isinstance(value, str):
            value = QuotedString(value, Quote.single).with_quotes()
        command.append(f"{key}={'null' if value is None else value}")
    return command


def _run_command(command: Sequence[str], directory: Path) -> dict[str, Any]:
    """Run a job as a command that gets the signals of this process, and return its summary."""
    received: list[int] = []

    def forward(number: int, frame: Any) -> None:
        received.append(number)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    # A group of its own: a signal of the terminal reaches it once, from here.
    process = subprocess.Popen(command, cwd=HydraConfig.get().runtime.cwd, process_group=0)
    handlers = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
    code = process.wait()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if received:
        raise StoppedRun(received[0])
    if code:
        raise ValueError(f"the job ended with exit code {code}")
    return read_summary(directory / "summary.json")

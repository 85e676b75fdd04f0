"""What loggers get besides metrics: hyperparameters, samples, the preflight page; and trackio's."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import (
    CometLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)
from lightning.pytorch.utilities import rank_zero_only

from causal_lm import extras
from causal_lm.callbacks.preflight import Preflight
from causal_lm.metrics_csv import MetricsCSV
from causal_lm.report.files import sample_files


class RunFiles(L.Callback):
    """Sends the loggers the configuration at the start of the fit, and files of the run as they are
    written: ``preflight.html`` after the preflight, the samples after each evaluation.

    Args:
        directory: of the run.
        config: plain values, the hyperparameters.
        preflight: the callback of the run, which comes before this one.
    """

    def __init__(self, directory: Path, config: Any, preflight: Preflight) -> None:
        self.directory, self.config, self.preflight = directory, config, preflight
        self.sent, self.with_table = set[Path](), list[Logger]()

    def on_fit_start(self, trainer: L.Trainer, *_: Any) -> None:
        for logger in _others(trainer):
            logger.log_hyperparams(self.config)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if not self.sent and self.preflight.report:
            self.send(trainer, "preflight", "preflight.html", self.preflight.report.summary())

    def on_exception(self, trainer: L.Trainer, *_: Any) -> None:
        self.on_train_batch_start(trainer)  # a fault may have ended the run

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        for entry in sample_files(self.directory)[-1:]:
            self.send(trainer, "samples", str(entry[1]))
        loss, step = trainer.callback_metrics.get("val/loss"), trainer.global_step - 1
        for logger in _others(trainer) if loss is not None else ():
            if isinstance(logger, TensorBoardLogger) and logger not in self.with_table:
                self.with_table.append(logger)  # of hyperparameters, which needs a metric
                logger.log_hyperparams(self.config, {"val/loss": float(loss)}, step)

    def send(self, trainer: L.Trainer, name: str, file: str, text: str = "") -> None:
        """Send a file of the run once; ``text`` stands in where a logger cannot show the file."""
        path = self.directory / file
        if path in self.sent or not trainer.is_global_zero or not path.exists():
            return
        self.sent.add(path)
        for logger in _others(trainer):
            send_file(logger, name, path, text, trainer.global_step)
            logger.save()


def _others(trainer: L.Trainer) -> list[Any]:
    """The loggers besides ``metrics.csv``, whose directory has all files."""
    return [logger for logger in trainer.loggers if not isinstance(logger, MetricsCSV)]


def send_file(logger: Any, name: str, path: Path, text: str, step: int) -> None:
    """Send a text or an HTML page by the logger's own way; one without any gets nothing.

    A logger of your own gets it if it has a method ``log_file(name, path, step)``.
    """
    text = text or path.read_text(encoding="utf-8")
    match logger:
        case TensorBoardLogger():
            logger.experiment.add_text(name, f"```\n{text}\n```", step)
        case WandbLogger() if path.suffix == ".html":
            html = extras.load("wandb", "wandb").Html(path.read_text(encoding="utf-8"))
            logger.log_metrics({name: html}, step)
        case WandbLogger():
            logger.log_text(name, ["step", "text"], [[str(step), text]], step=step)
        case MLFlowLogger():
            logger.experiment.log_artifact(logger.run_id, str(path), name)
        case CometLogger():
            logger.experiment.log_asset(str(path), path.name, step=step)
        case _ if hasattr(logger, "log_file"):
            logger.log_file(name, path, step)


class TrackioLogger(Logger):
    """Logs to `trackio <https://huggingface.co/docs/trackio>`_, on this machine unless told
    otherwise.

    Args:
        project: the name under which ``trackio show`` lists the run.
        options: of ``trackio.init``, such as ``name``, ``group`` or ``space_id``.
    """

    def __init__(self, project: str, **options: Any) -> None:
        super().__init__()
        self.trackio: Any = extras.load("trackio", "trackio")
        self.project, self.options = project, {"embed": False} | options
        self._run: Any = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of trackio, which begins with the first call."""
        self._run = self._run or self.trackio.init(self.project, **self.options)
        return self._run

    @property
    def name(self) -> str:
        return self.project

    @property
    def version(self) -> str | None:
        return self._run and self._run.name

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.experiment.config |= self.trackio.utils.to_json_safe(params)

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.experiment.log(dict(metrics), step=step)

    @rank_zero_only
    def log_file(self, name: str, path: Path, step: int) -> None:
        """A page as an artifact; a text as Markdown, at its step."""
        if path.suffix == ".html":
            self.experiment.log_artifact(str(path), name=name, type="report")
        else:
            text = f"```\n{path.read_text(encoding='utf-8')}\n```"
            self.experiment.log({name: self.trackio.Markdown(text)}, step=step)

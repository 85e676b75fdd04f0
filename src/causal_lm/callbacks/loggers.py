"""What loggers get besides metrics, and a logger for trackio."""

from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch import loggers
from lightning.pytorch.utilities import rank_zero_only

from causal_lm import extras
from causal_lm.report.files import sample_files


class RunFiles(L.Callback):
    """Sends the loggers the configuration, ``preflight.html`` and the samples of a run.

    Args:
        directory: of the run.
        config: plain values, the hyperparameters.
    """

    def __init__(self, directory: Path, config: Any) -> None:
        self.directory, self.config, self.sent = directory, config, set[Path]()

    def on_fit_start(self, trainer: L.Trainer, *_: Any) -> None:
        for logger in trainer.loggers:
            # TensorBoard's table of hyperparameters names a metric; it has no value yet.
            is_table = isinstance(logger, loggers.TensorBoardLogger)
            metrics: Any = {"metrics": {"val/loss": {}}} if is_table else {}
            logger.log_hyperparams(self.config, **metrics)

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.send(trainer)

    def on_exception(self, trainer: L.Trainer, *_: Any) -> None:
        self.send(trainer)  # the preflight may have ended the run

    def send(self, trainer: L.Trainer) -> None:
        """Send the files that were written since the last call."""
        names = {path: "samples" for _, path in sample_files(self.directory)[-1:]}
        names[self.directory / "preflight.html"] = "preflight"
        names[self.directory / "samples.txt"] = "final_samples"
        for path in names if trainer.is_global_zero else ():
            if path.exists() and path not in self.sent:
                self.sent.add(path)
                for logger in trainer.loggers:
                    send_file(logger, names[path], path, trainer.global_step)
                    logger.save()


def send_file(logger: Any, name: str, path: Path, step: int) -> None:
    """Send a text or an HTML page by the logger's own way; one of your own gets it if it has a
    method ``log_file(name, path, step)``."""
    text, is_page = path.read_text(encoding="utf-8"), path.suffix == ".html"
    match logger:
        case loggers.TensorBoardLogger():  # it shows no pages
            shown = path.with_suffix(".json").read_text(encoding="utf-8") if is_page else text
            logger.experiment.add_text(name, f"```\n{shown}\n```", step)
        case loggers.WandbLogger():
            wandb = extras.load("wandb", "wandb")
            value = wandb.Html(text) if is_page else wandb.Table(["text"], [[text]])
            logger.log_metrics({name: value}, step)
        case loggers.MLFlowLogger():
            logger.experiment.log_artifact(logger.run_id, str(path), name)
        case loggers.CometLogger() if is_page:
            logger.experiment.log_asset(str(path), f"{name}.html", step=step)
        case loggers.CometLogger():
            logger.experiment.log_text(text, step, {"name": name})
        case TrackioLogger() if is_page:
            logger.experiment.log_artifact(str(path), name, "report")
        case TrackioLogger():
            markdown = extras.load("trackio", "trackio").Markdown(f"```\n{text}\n```")
            logger.log_metrics({name: markdown}, step)
        case _ if hasattr(logger, "log_file"):
            logger.log_file(name, path, step)


class TrackioLogger(loggers.Logger):
    """Logs to `trackio <https://huggingface.co/docs/trackio>`_; ``options`` of ``trackio.init``."""

    name = version = "trackio"

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    @cached_property
    def experiment(self) -> Any:
        """The run of trackio, which begins when something is first logged."""
        return extras.load("trackio", "trackio").init(**self.options)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.experiment.config.update(params)

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.experiment.log(metrics, step=step)

"""Configuration -> objects -> fit, validate, samples, summary."""

import csv
import json
import logging
import math
import os
import time
from copy import deepcopy
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from hydra.errors import InstantiationException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.seed import isolate_rng
from omegaconf import DictConfig, OmegaConf

from causal_lm.callbacks import checkpoint
from causal_lm.callbacks.gradient_report import GradientReport
from causal_lm.callbacks.progress import StepBar
from causal_lm.callbacks.run_statistics import RunStatistics
from causal_lm.callbacks.sample_monitor import SampleMonitor, final_samples
from causal_lm.callbacks.stop import StopAfterStep
from causal_lm.data.datamodule import DataModule
from causal_lm.data.documents import Corpus
from causal_lm.data.tokenizers import Tokenizer, from_state, show
from causal_lm.module import CausalLM
from causal_lm.nonfinite import NonFiniteGuard
from causal_lm.objective import LossConfig
from causal_lm.report import samples
from causal_lm.report.files import write_json, write_text
from causal_lm.report.table import LEAKS_BELOW, run_table
from causal_lm.schema import is_float16
from causal_preflight import Report
from causal_preflight.lightning import Preflight, audit_batch

log = logging.getLogger(__name__)

FIGURES = (
    "experiment", "seed", "status", "error", "stopped_because", "steps", "loss/reduction",
    "train/loss", "val/loss", "val/ppl", "val/bpb", "val/loss_as_trained",
    "floor/loss", "floor/ppl", "val/ppl_over_floor",
    "sample/legal_rate", "sample/pad_eos_share", "sample/repeat_share", "train/tokens",
    "train/tokens_per_second", "train/pad_share", "train/skipped", "preflight/faults",
    "seconds/total", "seconds/fit", "seconds/train", "seconds/preflight", "seconds/writing",
    "checkpoint/best", "checkpoint/steady", "checkpoint/last",
    *(f"writing/{field.name}" for field in fields(samples.SampleStatistics)),
    "writing/repetition_spread", "writing/consistency_hidden", "writing/consistency_sentences",
)  # fmt: skip
"""Every key of ``summary.json``; one that does not apply is null, never absent."""


CHANGE = {
    "shift": "loss, or objective.py",
    "pad": "model, or objective.py and masks.py",
    "causal": "model, or masks.py",
    "norm": "loss.reduction, or objective.py",
    "eos": "data, or objective.py",
    "position": "model, or data/collate.py",
}
"""Label of a fault that no pitfall explains -> where to look."""


FILES = (
    "metrics.csv", "config.yaml", "summary.json", "preflight.json", "preflight.html", "samples.txt",
)  # fmt: skip
"""What a run writes beside its checkpoints."""


LARGE, CHUNK = 8192, 256
"""``loss.chunk_tokens=auto``: from this vocabulary on, so many tokens at a time."""


def build(node: DictConfig, **more: Any) -> Any:
    """Make the object that a ``_target_`` names (the one place that asks Hydra to)."""
    try:
        return hydra.utils.instantiate(node, _convert_="all", **more)
    except InstantiationException as error:  # what the object itself said is the better message
        raise (error.__cause__ or error) from None


def make_module(cfg: DictConfig, tokenizer: Tokenizer) -> CausalLM:
    """The module of a configuration: the correct class, unless a pitfall is switched on."""
    kind = CausalLM
    if any((cfg.get("pitfalls") or {}).values()):
        from causal_lm.pitfalls import faulty_module

        kind = faulty_module(cfg.pitfalls, tokenizer.pad_id)
    model = build(cfg.model, vocab_size=tokenizer.vocab_size)
    chunk = cfg.loss.chunk_tokens
    if chunk == "auto":
        chunk = CHUNK if tokenizer.vocab_size >= LARGE and model.lm_head is not None else None
    loss = LossConfig(cfg.loss.reduction, cfg.loss.length, chunk)
    guard = NonFiniteGuard(cfg.gradients.on_nonfinite, cfg.gradients.max_skipped)
    optimizer, schedule = make_optimizer(cfg), build(cfg.scheduler)
    return kind(model, optimizer, schedule, tokenizer.token_bytes(), loss, guard)


def make_optimizer(cfg: DictConfig) -> Any:
    """Parameter groups -> optimizer; ``optimizer.fused=auto`` is answered by the precision.

    A fused one would undo the loss scale of float16 by itself, after the gradients were clipped.
    """
    auto = cfg.optimizer.get("fused") == "auto"
    return build(
        cfg.optimizer, **({"fused": not is_float16(cfg.trainer.precision)} if auto else {})
    )


def restore(path: str | Path) -> tuple[CausalLM, Tokenizer, dict[str, Any]]:
    """The model of a checkpoint, in eval mode on the CPU, its tokenizer and its configuration.

    The correct class carries it, whatever it was trained with: pitfalls are about training.

    Raises:
        FileNotFoundError, ValueError: see :func:`causal_lm.callbacks.checkpoint.read`.
    """
    saved = checkpoint.read(path)
    config = saved[checkpoint.CONFIG]
    target = config["model"]["_target_"]
    if not target.startswith("causal_lm.models."):  # a file may not say what code to run
        raise ValueError(f"{path} names {target}, which is no model of this project")
    tokenizer = from_state(saved[checkpoint.TOKENIZER])
    model = build(OmegaConf.create(config["model"]), vocab_size=tokenizer.vocab_size)
    module = CausalLM(model, token_bytes=tokenizer.token_bytes())
    module.load_state_dict(saved["state_dict"], strict=True)
    return module.eval(), tokenizer, config


def make_preflight(cfg: DictConfig, tokenizer: Tokenizer, directory: Path | None) -> Preflight:
    """The audit of a configured run, with the key to change for each fault that was asked for."""
    keys = dict(CHANGE)
    if any((cfg.get("pitfalls") or {}).values()):
        from causal_lm.pitfalls import PITFALLS

        keys |= {
            PITFALLS[name].label: f"pitfalls.{name}" for name, on in cfg.pitfalls.items() if on
        }
    return Preflight(
        cfg.preflight.on_fault,
        pad_id=tokenizer.pad_id,
        eos_id=tokenizer.eos_id,
        directory=directory,
        keys=keys,
        name=partial(show, tokenizer),
    )


def make_writing(cfg: DictConfig, corpus: Corpus, directory: Path) -> SampleMonitor:
    """What looks at the model's writing at each evaluation."""
    wanted = dict(cfg.samples, length=min(cfg.samples.length, cfg.data.max_length))
    del wanted["self_check"]
    return SampleMonitor(corpus, seed=cfg.seed, directory=directory, **wanted)


def prepare(cfg: DictConfig) -> tuple[DataModule, Corpus, CausalLM]:
    """Seed, load the data, make the module."""
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    data: DataModule = build(cfg.data)
    corpus = data.load()
    return data, corpus, make_module(cfg, corpus.tokenizer)


def audit(cfg: DictConfig, **options: Any) -> Report:
    """The preflight of a configured run on its first batch, with no training."""
    data, corpus, module = prepare(cfg)
    ids = {"pad_id": corpus.tokenizer.pad_id, "eos_id": corpus.tokenizer.eos_id}
    batch = next(iter(data.train_dataloader()))
    parted = cfg.trainer.accumulate_grad_batches > 1
    return audit_batch(module, batch, module.accumulated_loss, parted=parted, **ids, **options)


def run(cfg: DictConfig, directory: Path) -> dict[str, Any]:
    """One whole run; writes the files of its contract into ``directory``.

    Returns:
        The summary, as written to ``summary.json``. A run that fails leaves one too, with
        ``status: failed`` and the error, before it raises. Where the run in ``directory`` is
        finished already, its summary, and nothing is done.

    Raises:
        RefusedError: ``ckpt_path`` is of another model or tokenizer; nothing is touched.
    """
    started = time.perf_counter()
    summary: dict[str, Any] = dict.fromkeys(FIGURES)
    summary |= {"experiment": cfg.experiment, "seed": cfg.seed, "status": "failed",
                "preflight/faults": [], "loss/reduction": cfg.loss.reduction}  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    untouched = False
    if cfg.ckpt_path == "auto":
        cfg, last = deepcopy(cfg), directory / "checkpoints" / "last.ckpt"
        cfg.ckpt_path = str(last) if last.exists() else None
        before = _finished(directory, cfg.trainer.max_steps)
        if cfg.ckpt_path and before:
            log.info(f"{directory} is finished at step {before['steps']}: there is nothing to do")
            return before
    try:
        with StopAfterStep() as stop:
            _run(cfg, directory, summary, stop)
        _verify_floor(summary)
    except BaseException as error:
        untouched = isinstance(error, checkpoint.RefusedError)
        summary["status"], summary["error"] = "failed", str(error) or type(error).__name__
        raise
    finally:
        summary["seconds/total"] = time.perf_counter() - started
        if _is_rank_zero() and not untouched:
            write_json(directory / "summary.json", summary)
    if _is_rank_zero():
        print(f"\n{run_table(summary)}\nwritten to {directory}\n")
    return summary


def _run(cfg: DictConfig, directory: Path, summary: dict[str, Any], stop: StopAfterStep) -> None:
    """Fit, validate, sample; ``summary`` is filled on the way, so that a failure keeps its part."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no tips, no adverts
    data, corpus, module = prepare(cfg)
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    # A checkpoint is to be read without the files that its model started from.
    config["model"] |= module.model.standalone_config()
    origin = checkpoint.CheckpointMetadata(config, corpus.tokenizer.state())
    folder = directory / "checkpoints"
    step = origin.check_continues(cfg.ckpt_path) if cfg.ckpt_path else 0
    goes_on = Path(cfg.ckpt_path or "/").resolve().is_relative_to(directory.resolve())
    if _is_rank_zero():
        clear(directory, step if goes_on else 0)
        write_text(directory / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))

    preflight = make_preflight(cfg, corpus.tokenizer, directory)
    kept = partial(checkpoint.EvalCheckpoint, folder, goes_on=goes_on)
    best, last = kept("best", "val/loss"), kept("last", "val/loss", latest=True)
    steady, meter = kept("steady", "writing/repetition_spread"), RunStatistics()
    optional: list[L.Callback] = [StepBar()] if cfg.trainer.enable_progress_bar else []
    if cfg.gradients.report_every:
        optional.append(GradientReport(cfg.gradients.report_every))
    writing = make_writing(cfg, corpus, directory)
    trainer = make_trainer(
        cfg,
        logger=make_logger(directory, step),
        callbacks=[preflight, meter, stop, origin, writing, best, steady, last, *optional],
    )
    try:
        trainer.fit(module, data, ckpt_path=cfg.ckpt_path)
    finally:
        summary |= preflight.figures()
        summary |= {"steps": trainer.global_step, "train/skipped": module.guard.skipped}
    if stop.requested:  # whoever sent the signal may not wait for an evaluation
        trainer.save_checkpoint(folder / "last.ckpt")
    because = "a signal asked for it" if stop.requested else writing.stopped_because
    summary |= {"status": "stopped" if because else "finished", "stopped_because": because}
    summary |= meter.figures(trainer)

    with isolate_rng():  # who goes on from here draws as if there had been no end
        (figures,) = trainer.validate(module, data, verbose=False)
    summary |= {k: v if math.isfinite(v) else None for k, v in figures.items() if k in FIGURES}
    summary |= writing.figures()
    if not math.isfinite(figures["val/loss"]):
        raise FloatingPointError(
            "val/loss is not finite after the last step: lower optimizer.lr, and go on from "
            "best.ckpt, if there is one"
        )
    summary |= floor(corpus, figures["val/ppl"])
    lowest = math.inf if best.best_model_score is None else float(best.best_model_score)
    if figures["val/loss"] < lowest:
        lowest = figures["val/loss"]
        best.best_model_score = torch.tensor(lowest)
        trainer.save_checkpoint(folder / "best.ckpt")
    trainer.save_checkpoint(folder / "last.ckpt")
    if trainer.is_global_zero:
        summary |= checkpoint.figures(folder, lowest, steady.best_model_score is not None)
        options = dict(cfg.samples.self_check, seed=cfg.seed, batch_size=cfg.samples.batch_size)
        summary |= final_samples(module, corpus, directory, **options)


def _finished(directory: Path, max_steps: int) -> dict[str, Any] | None:
    """The summary of a run of so many steps that ended here, if there is one."""
    path = directory / "summary.json"
    summary = json.loads(path.read_text()) if path.exists() else {}
    over = summary.get("status") == "finished" and summary["steps"] >= max_steps
    return summary if over else None


def clear(directory: Path, step: int) -> None:
    """Away with what an earlier run left but its checkpoints, and its history up to ``step``."""
    for name in FILES[1:] if step else FILES:
        (directory / name).unlink(missing_ok=True)
    for path in (directory / "samples").glob("step_*.txt"):
        if not step or int(path.stem.removeprefix("step_")) > step:
            path.unlink()


def make_logger(directory: Path, step: int) -> CSVLogger:
    """Of ``metrics.csv``: it keeps the rows of its first steps, which Lightning would delete."""
    logger, path = CSVLogger(directory, name="", version=""), directory / "metrics.csv"
    if _is_rank_zero() and path.exists():
        with path.open(newline="") as file:
            rows: list[Any] = [row for row in csv.DictReader(file) if int(row["step"]) < step]
        logger.experiment.metrics = rows
        logger.save()
    return logger


NO_ACCELERATOR = ("can not run on your system", "No supported gpu backend")
"""What Lightning says where the machine lacks what was asked for."""


def make_trainer(cfg: DictConfig, **objects: Any) -> L.Trainer:
    """Lightning's Trainer, or a line on what to type where the machine lacks the accelerator."""
    try:
        return build(
            cfg.trainer,
            **objects,
            num_sanity_val_steps=0,
            enable_model_summary=False,
            use_distributed_sampler=False,  # ours repeats no document
            max_epochs=-1,  # a run is measured in steps, as its schedule is
        )
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        if any(words in str(error) for words in NO_ACCELERATOR):
            raise ValueError(
                f"trainer.accelerator={cfg.trainer.accelerator} is not available on this machine: "
                f"type trainer=cpu, or trainer=auto for what there is"
            ) from error
        raise


def floor(corpus: Corpus, ppl: float) -> dict[str, float]:
    """The exact lowest expected loss on the validation documents, where the source knows it."""
    if corpus.language is None:
        return {}
    nats, tokens = corpus.language.nll(corpus.val)
    lowest = torch.tensor(nats / tokens, dtype=torch.float64)
    return {
        "floor/loss": float(lowest),
        "floor/ppl": float(lowest.exp()),
        "val/ppl_over_floor": ppl / float(lowest.exp()),
    }


def _verify_floor(summary: dict[str, Any]) -> None:
    over = summary["val/ppl_over_floor"]
    if over is not None and over < LEAKS_BELOW:
        raise ValueError(
            f"the validation perplexity is {over:.3f} of the floor, and nothing honest is below "
            f"it: the evaluation leaks; look at masks.py, objective.py and the split of the data"
        )


def _is_rank_zero() -> bool:
    return int(os.environ.get("LOCAL_RANK", 0)) == 0 and int(os.environ.get("NODE_RANK", 0)) == 0

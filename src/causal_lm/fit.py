"""One run: fit, validate, sample, write the summary."""

import logging
import math
import time
from dataclasses import fields
from functools import partial
from pathlib import Path
from signal import SIGUSR1
from typing import Any

import torch.distributed
from lightning.pytorch.callbacks import LambdaCallback
from omegaconf import DictConfig, OmegaConf

from causal_lm import build
from causal_lm.callbacks import checkpoint
from causal_lm.callbacks.checkpoint import CheckpointMetadata, EvalCheckpoint, StepCheckpoint
from causal_lm.callbacks.gradient_report import GradientReport
from causal_lm.callbacks.loggers import RunFiles
from causal_lm.callbacks.preflight import make_preflight
from causal_lm.callbacks.progress import StepBar
from causal_lm.callbacks.run_statistics import RunStatistics
from causal_lm.callbacks.sample_monitor import SampleMonitor, final_samples
from causal_lm.callbacks.stop import StopAfterStep
from causal_lm.checkpoint_file import RefusedError, read_checkpoint
from causal_lm.config import ConfigError, leaves
from causal_lm.data.datamodule import document_fingerprint
from causal_lm.data.documents import Corpus
from causal_lm.failures import explain
from causal_lm.ledger import settings_of
from causal_lm.metrics_csv import MetricsCSV
from causal_lm.models.base import blocks_of
from causal_lm.module import CausalLM
from causal_lm.report.files import is_rank_zero
from causal_lm.report.samples import SampleStatistics
from causal_lm.report.table import LEAKS_BELOW, run_table
from causal_lm.run_dir import RunDir
from causal_lm.sharding import load_weights
from causal_lm.signals import StoppedRun, requeue

log = logging.getLogger(__name__)

SUMMARY_KEYS = (
    "experiment", "seed", "status", "error", "stopped_because", "steps", "epochs",
    "loss/reduction", "train/loss", "val/loss", "val/ppl", "val/bpb", "val/loss_as_trained",
    "test/loss", "test/ppl", "test/bpb", "test/step", "floor/loss",
    "floor/ppl", "val/ppl_over_floor", "sample/legal_rate", "sample/pad_eos_share",
    "sample/repeat_share", "train/tokens", "train/tokens_per_second", "train/pad_share",
    "train/skipped", "preflight/faults", "preflight/audited",
    "seconds/total", "seconds/fit", "seconds/train", "seconds/preflight", "seconds/writing",
    "checkpoint/best", "checkpoint/stable", "checkpoint/last",
    *(f"writing/{field.name}" for field in fields(SampleStatistics)),
    "writing/repetition_spread", "writing/consistency_hidden", "writing/consistency_sentences",
)  # fmt: skip
"""Keys that ``summary.json`` always has, besides what was logged; null where one does not apply."""


def run(cfg: DictConfig, directory: Path) -> dict[str, Any]:
    """Run a configuration and write the files of the run into ``directory``.

    Returns the summary, as written to ``summary.json``. A run that fails writes one too before it
    raises. Where ``ckpt_path=auto`` finds the run finished, only its summary is returned.

    Raises ConfigError where ``directory`` has files, but is not that of a run; RefusedError, before
    a file is changed, where ``ckpt_path`` cannot be continued, or another run writes there.
    """
    with RunDir(directory) as run_dir:
        cfg = cfg.copy()
        if "paths" in cfg and OmegaConf.is_interpolation(cfg.paths, "output_dir"):
            cfg.paths.output_dir = str(directory)  # also where no Hydra job says it
        OmegaConf.resolve(cfg)  # once, as a resolver may return another value each time
        if cfg.ckpt_path == "auto":
            earlier = run_dir.finished_summary(cfg)
            cfg.ckpt_path = run_dir.latest_checkpoint()
            if cfg.ckpt_path and earlier:
                log.info(f"{directory} is finished at step {earlier['steps']}: nothing to do")
                return earlier
            if not cfg.ckpt_path and is_rank_zero():
                start = "no checkpoint is there, so the run starts at step 0"
                log.info(f"ckpt_path=auto in {directory}: {start}")
        return _run_with_summary(cfg, run_dir)


def _run_with_summary(cfg: DictConfig, run_dir: RunDir) -> dict[str, Any]:
    """Run, and write ``summary.json`` however the run ends."""
    started = time.perf_counter()
    summary: dict[str, Any] = dict.fromkeys(SUMMARY_KEYS)
    summary |= {"experiment": cfg.experiment, "seed": cfg.seed, "status": "failed",
                "preflight/faults": [], "loss/reduction": cfg.loss.reduction}  # fmt: skip
    try:
        with StopAfterStep() as stop:
            _run(cfg, run_dir, summary, stop)
    except RefusedError:
        raise
    except StoppedRun as error:
        if summary["steps"] is not None:  # the directory is prepared
            summary |= {"status": "stopped", "stopped_because": f"signal {error.signal.name}"}
            run_dir.write_summary(summary, started)
        raise
    except BaseException as error:
        summary |= {"status": "failed", "error": str(error) or type(error).__name__}
        run_dir.write_summary(summary, started)
        raise
    run_dir.write_summary(summary, started)
    if is_rank_zero():
        what = f"stopped by a signal at step {summary['steps']}; continue with ckpt_path=auto"
        print(f"\n{what if stop.signal else run_table(summary)}\nwritten to {run_dir.path}\n")
        if stop.signal == SIGUSR1:  # at the very end, as SLURM then ends this process
            requeue()
    return summary


def _run(cfg: DictConfig, run_dir: RunDir, summary: dict[str, Any], stop: StopAfterStep) -> None:
    """Fill ``summary`` as the run proceeds, so that a failed run keeps what is known."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if not isinstance(cfg.trainer.get("val_check_interval"), int):  # a fraction of each epoch
        cfg.trainer.check_val_every_n_epoch = cfg.trainer.get("check_val_every_n_epoch") or 1
    data, corpus, module = build.prepare(cfg)
    if cfg.get("compile"):
        parts: list[Any] = blocks_of(module.model) or [module.model]
        for part in parts:
            part.compile()
    if cfg.get("test"):
        data.test_dataloader()  # raises where there is no test split
    metadata, step = _prepare(cfg, run_dir, corpus, module)
    summary["steps"] = step
    metrics = MetricsCSV(run_dir.path, step, **cfg.get("metrics") or {})
    preflight, statistics = make_preflight(cfg, corpus.tokenizer, run_dir.path), RunStatistics()
    samples = dict(cfg.samples, length=min(cfg.samples.length, cfg.data.max_length), seed=cfg.seed)
    final = dict(samples.pop("self_check"), seed=cfg.seed, batch_size=cfg.samples.batch_size)
    monitor = SampleMonitor(corpus, directory=run_dir.path, **samples)
    best = EvalCheckpoint(run_dir.checkpoints / "best.ckpt", "val/loss")
    stable = EvalCheckpoint(run_dir.checkpoints / "stable.ckpt", "writing/repetition_spread")
    options = OmegaConf.select(cfg, "callbacks.checkpoint") or {}
    stop.checkpoint = last = StepCheckpoint(run_dir.checkpoints / "last.ckpt", **options)
    files = RunFiles(run_dir.path, metadata.config)
    callbacks = [metrics, preflight, statistics, stop, metadata, monitor, best, stable, last, files]
    compare = partial(_compare_ranks, settings_of(metadata.config, run_dir.path))
    callbacks.append(LambdaCallback(setup=compare))
    if cfg.trainer.enable_progress_bar:
        callbacks.append(StepBar())
    if cfg.gradients.report_every:
        callbacks.append(GradientReport(cfg.gradients.report_every))
    trainer = build.make_trainer(cfg, callbacks, [metrics])
    figures: Any = {}
    try:
        trainer.fit(module, data, ckpt_path=cfg.ckpt_path)
        if not stop.signal:
            # Nothing is measured under trainer.limit_val_batches=0.
            (figures,) = trainer.validate(module, data, verbose=False) or [{}]
    except StoppedRun:
        if stop.at_once:  # before the first step there is nothing to save
            raise
    except Exception as error:
        raise explain(error, cfg, trainer) from error
    finally:
        summary |= preflight.figures()
        summary |= {"steps": trainer.global_step, "train/skipped": module.guard.skipped}
    stopped_because = monitor.stopper.stopped_because or stop.reason(trainer)
    summary["epochs"] = data.save_position(0)["start"][1]
    status = "stopped" if stopped_because else "finished"
    summary |= {"status": status, "stopped_because": stopped_because}
    summary |= metrics.earlier | statistics.logged | figures
    summary |= statistics.figures(trainer) | monitor.figures()
    if stop.signal:  # the process may be killed soon: no further validation, no samples
        summary["checkpoint/last"] = f"step {trainer.global_step}: {stopped_because}"
        return
    if not math.isfinite(figures.get("val/loss", 0)):
        todo = "lower optimizer.lr, and continue from best.ckpt if there is one"
        raise FloatingPointError(f"val/loss is not finite after the last step: {todo}")
    last.save(trainer)
    summary["checkpoint/last"] = f"step {trainer.global_step}: the end of the run"
    summary |= _compare_with_floor(corpus, figures)
    stop.at_once = True  # the checkpoints are written
    summary |= final_samples(module, corpus, run_dir.path if is_rank_zero() else None, **final)
    if trainer.is_global_zero:
        summary |= checkpoint.figures(best, stable)
        files.send(trainer)
    if cfg.get("test"):
        saved = read_checkpoint(best.path if best.lowest < math.inf else last.path)
        load_weights(module, saved["state_dict"])
        (tested,) = trainer.test(module, data, verbose=False) or [{}]
        summary |= {**tested, "test/step": saved["global_step"]}
    ratio = summary["val/ppl_over_floor"]
    if ratio is not None and ratio < LEAKS_BELOW:
        below = f"the validation perplexity is {ratio:.3f}× that of the entropy floor"
        todo = "check masks.py, objective.py and the split of the data"
        raise ValueError(f"{below}: the evaluation leaks its targets; {todo}")


def _prepare(
    cfg: DictConfig, run_dir: RunDir, corpus: Corpus, module: CausalLM
) -> tuple[CheckpointMetadata, int]:
    """Check ``ckpt_path``, then prepare the directory; no file of it is changed before.

    Returns what a checkpoint has of the run, and the step at which the directory's run goes on.
    """
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    # A checkpoint can then be read without the files that its model started from.
    config["model"] |= module.model.standalone_config()
    validation = [*document_fingerprint(corpus.val), cfg.data.max_length]
    metadata = CheckpointMetadata(config, corpus.tokenizer.state(), validation)
    is_continued, step = run_dir.contains(cfg.ckpt_path), None
    if cfg.ckpt_path:
        is_finished = run_dir.finished_summary(cfg) is not None
        step = metadata.check_continues(cfg.ckpt_path, is_continued and not is_finished)
        cfg.optimizer = config["optimizer"]
        module.make_optimizer = build.make_optimizer(cfg)
    if not is_continued:  # best.ckpt of the other run, if any, is not in this directory
        metadata.forget_best, step = True, None
    run_dir.prepare(cfg, step)
    return metadata, step or 0


def _compare_ranks(settings: dict[str, Any], trainer: Any, *_: Any, **__: Any) -> None:
    """Raise ConfigError on all ranks where one has other settings than rank zero, as by an
    environment variable or a random choice."""
    ranks: list[Any] = [{key: repr(value) for key, value in leaves(settings)}] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(ranks, ranks[0])
    for rank, other in enumerate(ranks):
        if keys := [k for k in {**ranks[0], **other} if ranks[0].get(k) != other.get(k)]:
            named = ", ".join(f"{k}={other.get(k)}, not {ranks[0].get(k)}" for k in keys[:3])
            raise ConfigError(f"rank {rank} differs from rank 0 in {len(keys)} keys: {named}")


def _compare_with_floor(corpus: Corpus, figures: dict[str, float]) -> dict[str, float]:
    """The entropy floor of a synthetic language, and the validation perplexity over it."""
    if corpus.language is None:
        return {}
    nats, tokens = corpus.language.nll(corpus.val)
    floor = {"floor/loss": nats / tokens, "floor/ppl": math.exp(nats / tokens)}
    if figures:
        floor["val/ppl_over_floor"] = figures["val/ppl"] / floor["floor/ppl"]
    return floor

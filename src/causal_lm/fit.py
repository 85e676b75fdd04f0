"""One run: fit, validate, sample, write the summary."""

import logging
import math
import time
from dataclasses import fields
from functools import partial
from pathlib import Path
from signal import SIGUSR1
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from omegaconf import DictConfig, OmegaConf

from causal_lm import build
from causal_lm.callbacks import checkpoint
from causal_lm.callbacks.gradient_report import GradientReport
from causal_lm.callbacks.preflight import make_preflight
from causal_lm.callbacks.progress import StepBar
from causal_lm.callbacks.run_statistics import RunStatistics
from causal_lm.callbacks.sample_monitor import SampleMonitor, final_samples
from causal_lm.callbacks.stop import StopAfterStep
from causal_lm.checkpoint_file import RefusedError
from causal_lm.data.datamodule import fingerprint
from causal_lm.failures import explain
from causal_lm.metrics_csv import MetricsCSV
from causal_lm.report.files import is_rank_zero
from causal_lm.report.samples import SampleStatistics
from causal_lm.report.table import LEAKS_BELOW, run_table
from causal_lm.run_dir import RunDir
from causal_lm.signals import StoppedRun, requeue

log = logging.getLogger(__name__)

SUMMARY_KEYS = (
    "experiment", "seed", "status", "error", "stopped_because", "steps", "loss/reduction",
    "train/loss", "val/loss", "val/ppl", "val/bpb", "val/loss_as_trained", "floor/loss",
    "floor/ppl", "val/ppl_over_floor", "sample/legal_rate", "sample/pad_eos_share",
    "sample/repeat_share", "train/tokens", "train/tokens_per_second", "train/pad_share",
    "train/skipped", "preflight/faults", "preflight/audited",
    "seconds/total", "seconds/fit", "seconds/train", "seconds/preflight", "seconds/writing",
    "checkpoint/best", "checkpoint/stable", "checkpoint/steady", "checkpoint/last",
    *(f"writing/{field.name}" for field in fields(SampleStatistics)),
    "writing/repetition_spread", "writing/consistency_hidden", "writing/consistency_sentences",
)  # fmt: skip
"""Keys that ``summary.json`` always has, besides what was logged; null where one does not apply.
``checkpoint/steady`` is the old name of ``checkpoint/stable``."""


def run(cfg: DictConfig, directory: Path) -> dict[str, Any]:
    """Run a configuration and write the files of the run into ``directory``.

    Returns the summary, as written to ``summary.json``. A run that fails writes one too before it
    raises. Where ``ckpt_path=auto`` finds the run finished, only its summary is returned.

    Raises:
        RefusedError: ``ckpt_path`` cannot be continued by this run, or another run writes into
            ``directory``; no file is changed.
        ConfigError: ``directory`` has files, but is not that of a run.
    """
    with RunDir(directory) as run_dir:
        return _run_locked(cfg, run_dir)


def _run_locked(cfg: DictConfig, run_dir: RunDir) -> dict[str, Any]:
    started, directory = time.perf_counter(), run_dir.path
    summary: dict[str, Any] = dict.fromkeys(SUMMARY_KEYS)
    summary |= {"experiment": cfg.experiment, "seed": cfg.seed, "status": "failed",
                "preflight/faults": [], "loss/reduction": cfg.loss.reduction}  # fmt: skip
    cfg = cfg.copy()
    if cfg.ckpt_path == "auto":
        earlier = run_dir.finished_summary(cfg.trainer.max_steps)
        cfg.ckpt_path = run_dir.latest_checkpoint()
        if cfg.ckpt_path and earlier:
            log.info(f"{directory} is finished at step {earlier['steps']}: nothing to do")
            return earlier
        if not cfg.ckpt_path and is_rank_zero():
            log.info(f"ckpt_path=auto: no checkpoint in {directory}, so the run starts at step 0")
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
        print(f"\n{what if stop.signal else run_table(summary)}\nwritten to {directory}\n")
        if stop.signal == SIGUSR1:  # at the very end, as SLURM then ends this process
            requeue()
    return summary


def _run(cfg: DictConfig, run_dir: RunDir, summary: dict[str, Any], stop: StopAfterStep) -> None:
    """Fill ``summary`` as the run proceeds, so that a failed run keeps what is known."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    data, corpus, module = build.prepare(cfg)
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    # A checkpoint can then be read without the files that its model started from.
    config["model"] |= module.model.standalone_config()
    validation = [*fingerprint(corpus.val), cfg.data.max_length]
    metadata = checkpoint.CheckpointMetadata(config, corpus.tokenizer.state(), validation)
    continued, step = run_dir.contains(cfg.ckpt_path), 0
    if cfg.ckpt_path:
        is_finished = run_dir.finished_summary(cfg.trainer.max_steps) is not None
        step = metadata.check_continues(cfg.ckpt_path, continued and not is_finished)
        cfg.optimizer = config["optimizer"]
        module.make_optimizer = build.make_optimizer(cfg)
    if not continued:
        run_dir.set_aside_checkpoints()
    run_dir.prepare(cfg, step if continued else 0)
    metrics = MetricsCSV(run_dir.path, step if continued else 0, **cfg.get("metrics") or {})
    summary["steps"] = step

    preflight, statistics = make_preflight(cfg, corpus.tokenizer, run_dir.path), RunStatistics()
    options = {name: value for name, value in cfg.samples.items() if name != "self_check"}
    options["length"] = min(cfg.samples.length, cfg.data.max_length)
    monitor = SampleMonitor(corpus, seed=cfg.seed, directory=run_dir.path, **options)
    keep = partial(checkpoint.EvalCheckpoint, run_dir.checkpoints, continued=continued)
    best, last = keep("best", "val/loss"), keep("last", "val/loss", latest=True)
    stable = keep("stable", "writing/repetition_spread")
    options = OmegaConf.select(cfg, "callbacks.checkpoint") or {}
    stop.checkpoint = checkpoint.StepCheckpoint(run_dir.checkpoints / "last.ckpt", **options)
    callbacks = [metrics, preflight, statistics, stop, stop.checkpoint, metadata, monitor]
    callbacks += [best, stable, last]
    if cfg.trainer.enable_progress_bar:
        callbacks.append(StepBar())
    if cfg.gradients.report_every:
        callbacks.append(GradientReport(cfg.gradients.report_every))
    trainer = build.make_trainer(cfg, callbacks, [metrics])
    logged: dict[str, Any] = {}
    try:
        trainer.fit(module, data, ckpt_path=cfg.ckpt_path)
        logged |= metrics.earlier | trainer.callback_metrics
        if not stop.signal:
            with isolate_rng():  # the random state that is saved does not depend on this validation
                # Nothing is measured under trainer.limit_val_batches=0.
                (figures,) = trainer.validate(module, data, verbose=False) or [{}]
            logged |= figures
    except StoppedRun:
        if stop.at_once:  # before the first step there is nothing to save
            raise
        if not logged:  # an evaluation in the fit, after which Lightning calls no further hooks
            statistics.on_train_end()
            statistics.on_fit_end()
            logged |= metrics.earlier | trainer.callback_metrics
    except Exception as error:
        raise explain(error, cfg, trainer) from error
    finally:
        summary |= preflight.figures()
        summary |= {"steps": trainer.global_step, "train/skipped": module.guard.skipped}
    stopped_because = stop.reason(trainer) or monitor.stopper.stopped_because
    status = "stopped" if stopped_because else "finished"
    summary |= {"status": status, "stopped_because": stopped_because}
    for name, value in logged.items():
        summary[name] = float(value) if math.isfinite(value) else None
    summary |= statistics.figures(trainer) | monitor.figures()
    if stop.signal:  # the process may be killed soon: no further validation, no samples
        summary["checkpoint/last"] = f"step {trainer.global_step}: {stopped_because}"
        return
    if not math.isfinite(figures.get("val/loss", 0)):
        todo = "lower optimizer.lr, and continue from best.ckpt if there is one"
        raise FloatingPointError(f"val/loss is not finite after the last step: {todo}")
    if corpus.language is not None:
        nats, tokens = corpus.language.nll(corpus.val)
        summary |= {"floor/loss": nats / tokens, "floor/ppl": math.exp(nats / tokens)}
        if figures:
            summary["val/ppl_over_floor"] = figures["val/ppl"] / summary["floor/ppl"]
    lowest = math.inf if best.best_model_score is None else float(best.best_model_score)
    if figures and figures["val/loss"] < lowest:
        lowest = figures["val/loss"]
        best.best_model_score = torch.tensor(lowest)
        trainer.save_checkpoint(run_dir.checkpoints / "best.ckpt")
    trainer.save_checkpoint(run_dir.checkpoints / "last.ckpt")
    if trainer.is_global_zero:
        is_stable = stable.best_model_score is not None
        summary |= checkpoint.figures(run_dir.checkpoints, lowest, is_stable)
        stop.at_once = True  # the checkpoints are written
        options = dict(cfg.samples.self_check, seed=cfg.seed, batch_size=cfg.samples.batch_size)
        summary |= final_samples(module, corpus, run_dir.path, **options)
    ratio = summary["val/ppl_over_floor"]
    if ratio is not None and ratio < LEAKS_BELOW:
        below = f"the validation perplexity is {ratio:.3f}× that of the entropy floor"
        todo = "check masks.py, objective.py and the split of the data"
        raise ValueError(f"{below}: the evaluation leaks its targets; {todo}")

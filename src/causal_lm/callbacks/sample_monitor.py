"""Generates samples at each evaluation, logs their statistics, and keeps their text."""

import logging
import math
import statistics
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from causal_lm.data.documents import Corpus
from causal_lm.generation import sample_in_batches
from causal_lm.report import samples
from causal_lm.report.files import sample_files, write_text
from causal_lm.report.samples import SampleStatistics, format_samples, sample_statistics

log = logging.getLogger(__name__)

SPREAD_EVALUATIONS = 3  # over which ``writing/repetition_spread`` is taken
STANDARD_ERRORS = 3  # a rise of repetition by more than that counts as significant


def sample_unconditional(
    module: L.LightningModule, corpus: Corpus, count: int, **options: Any
) -> tuple[torch.Tensor, SampleStatistics]:
    """``count`` samples from BOS alone as token ids (count, length), and their statistics."""
    starts = torch.full((count, 1), corpus.tokenizer.bos_id)
    rows = sample_in_batches(module, starts, **options)
    return rows, sample_statistics(rows, corpus.tokenizer, corpus.language)


def final_samples(
    module: L.LightningModule, corpus: Corpus, directory: Path | None, *, shown: int, **options: Any
) -> dict[str, float | None]:
    """Write samples to ``samples.txt`` of ``directory``, unless that is None, and print the first
    ones; return ``sample/*`` figures. All ranks must call it, since sharded weights need it."""
    rows, figures = sample_unconditional(module.eval(), corpus, **options)
    if directory is not None:
        write_text(directory / "samples.txt", format_samples(rows, corpus.tokenizer, figures))
        print(format_samples(rows[:shown], corpus.tokenizer))
    names = ("legal_rate", "pad_eos_share", "repeat_share")
    return {f"sample/{name}": getattr(figures, name) for name in names}


class SampleMonitor(L.Callback):
    """Logs statistics of samples as ``writing/*`` at each evaluation; writes the samples to files.

    ``repetition_spread`` is the standard deviation of ``repetition_4`` over the last three
    evaluations of the fit, or 0 if that is below ``repetition_error``, the noise of sampling.

    Every evaluation uses the same seed, so that differences come from the model, and a generator of
    its own, so that training is not affected. All ranks sample, since sharded weights need it; the
    metrics of rank 0 are broadcast, so that all ranks decide alike.

    ``directory`` gets ``samples/step_….txt``; None: no files. ``options`` are ``temperature``,
    ``top_k`` and ``batch_size``; ``configs/samples/default.yaml`` explains the others.
    """

    def __init__(
        self, corpus: Corpus, *, count: int, length: int, seed: int, directory: Path | None = None,
        keep_last: int = 50, prompts: int = 8, per_prompt: int = 0, prompt_length: int = 8,
        embedder: str | Path | None = None, patience: int | None = None, **options: Any,
    ) -> None:  # fmt: skip
        self.corpus, self.count = corpus, count
        self.directory, self.keep_last = directory, keep_last
        prompt_length = min(prompt_length, length // 2)
        beginnings = samples.document_prompts(corpus.val, prompts, prompt_length)
        self.prompts = beginnings.repeat_interleave(per_prompt, dim=0)
        self.prompt_ids = torch.arange(len(beginnings)).repeat_interleave(per_prompt)
        self.embed: samples.Embedder = samples.hidden_state_embedder
        if embedder and count and per_prompt:
            self.embed = samples.SentenceEmbedder(embedder)
        self.consistency_name = f"consistency_{'sentences' if embedder else 'hidden'}"
        self.options = {"length": length, "seed": seed} | options
        self.last: dict[str, float] = {}  # what the last evaluation logged
        self.seconds = 0.0
        self.rates: list[float] = []
        self.stopper = DegenerationStopper(patience)
        self._step, self._fn = -1, ""  # of the last evaluation: "fit", or "validate" after it

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.count:
            return
        fn: Any = trainer.state.fn
        if trainer.global_step == self._step:  # the weights of the last evaluation
            if fn.value == self._fn:  # a repeated one: after a kill, or between micro-batches
                pl_module.log_dict(self.last)
            return
        started, step = time.perf_counter(), trainer.global_step
        try:
            figures, text = self.evaluate(pl_module)
        except FloatingPointError as error:  # the next training step reports and handles it
            figures, text = {}, ""
            log.warning(f"step {step}: no samples: {error}")
        self._step, self._fn = step, fn.value  # not before: a signal may have ended it
        figures = trainer.strategy.broadcast(figures)
        if trainer.state.fn == "fit" and figures:
            self._compare_with_earlier(trainer, figures)
        # NaN: Lightning would otherwise keep the figure of an earlier evaluation.
        figures.setdefault("repetition_spread", math.nan)
        self.last = {f"writing/{name}": value for name, value in figures.items()}
        pl_module.log_dict(self.last)
        if trainer.is_global_zero and self.directory is not None and text:
            folder = self.directory / "samples"
            folder.mkdir(exist_ok=True)
            write_text(folder / f"step_{self._step:08d}.txt", text)
            for _, path in sample_files(self.directory)[: -self.keep_last]:
                path.unlink()
        self.seconds += time.perf_counter() - started

    def _compare_with_earlier(self, trainer: L.Trainer, figures: dict[str, float]) -> None:
        rate, error = figures.get("repetition_4"), figures.get("repetition_error", 0.0)
        if rate is not None:
            self.rates = [*self.rates, rate][-SPREAD_EVALUATIONS:]
            if len(self.rates) == SPREAD_EVALUATIONS:
                spread = statistics.pstdev(self.rates)
                figures["repetition_spread"] = spread if spread > error else 0.0
        consistent = figures.get(self.consistency_name)
        if self.stopper.should_stop(self._step, rate, error, consistent):
            trainer.should_stop = True

    def evaluate(self, module: L.LightningModule) -> tuple[dict[str, float], str]:
        """Sample, and return the statistics that apply and the samples as text."""
        rows, figures = sample_unconditional(module, self.corpus, self.count, **self.options)
        named = vars(figures) | {self.consistency_name: self._consistency(module)}
        known = {name: value for name, value in named.items() if value is not None}
        return known, format_samples(rows, self.corpus.tokenizer, figures)

    def _consistency(self, module: Any) -> float | None:
        if not len(self.prompts):
            return None
        rows = sample_in_batches(module, self.prompts, **self.options)
        length, tokenizer = self.prompts.shape[1], self.corpus.tokenizer
        batches = rows.split(self.options["batch_size"])
        vectors = torch.cat([self.embed(module, batch, length, tokenizer) for batch in batches])
        return samples.consistency(vectors, self.prompt_ids)

    def figures(self) -> dict[str, float]:
        """For ``summary.json``: the last evaluation's figures, and the seconds of all of them."""
        return self.last | {"seconds/writing": self.seconds}

    def state_dict(self) -> dict[str, Any]:
        last = {"step": self._step, "fn": self._fn, "figures": self.last}
        return last | {"rates": self.rates, "history": self.stopper.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rates, self.stopper.history = state_dict["rates"], state_dict["history"]
        self._step, self._fn, self.last = (state_dict[key] for key in ("step", "fn", "figures"))


class DegenerationStopper:
    """Decides whether the samples were worse for ``patience`` evaluations in a row; None: never.

    An evaluation is worse if its repetition is higher, by :data:`STANDARD_ERRORS`, and its
    consistency is lower than at the reference: the last evaluation that was not worse (not the one
    just before, since both figures fluctuate). Early in training this is not always degeneration.
    """

    def __init__(self, patience: int | None) -> None:
        self.patience = patience
        self.stopped_because: str | None = None
        # Repetition, its error and consistency, of the reference and the worse ones after it.
        self.history: list[list[float]] = []
        self._warned = False

    def should_stop(
        self, step: int, repetition: float | None, error: float, consistency: float | None
    ) -> bool:
        """Take an evaluation into account; ``error`` is the standard error of ``repetition``."""
        if self.patience is None:
            return False
        if repetition is None or consistency is None:
            if not self._warned:
                missing = "repetition" if repetition is None else "consistency"
                log.warning(f"step {step}: samples.patience has no effect without {missing}")
            self._warned = True
            return False
        now = [repetition, error, consistency]
        reference, reference_error, reference_consistency = (self.history or [now])[0]
        noise = STANDARD_ERRORS * math.hypot(error, reference_error)
        is_worse = repetition - reference > noise and consistency < reference_consistency
        self.history = [*self.history, now] if is_worse else [now]
        if len(self.history) <= self.patience:
            return False
        columns = zip(*self.history, strict=True)
        repetitions, _, consistencies = (", ".join(f"{x:.4f}" for x in c) for c in columns)
        row = f"{len(self.history) - 1} evaluations in a row, up to step {step}"
        figures = f"repetition {repetitions}, consistency {consistencies}"
        self.stopped_because = f"the samples degenerated at {row}; from the reference on, {figures}"
        log.warning(f"stopped: {self.stopped_because}")
        return True

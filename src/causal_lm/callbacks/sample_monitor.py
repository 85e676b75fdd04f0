"""Lets the model write at each evaluation, looks at what it wrote, and keeps it."""

import logging
import math
import statistics
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from causal_lm import generation
from causal_lm.callbacks.stop import DegenerationStopper
from causal_lm.data.documents import Corpus
from causal_lm.report import samples
from causal_lm.report.consistency import Embedder, Sentences, consistency, hidden, prompts_of
from causal_lm.report.files import write_text

log = logging.getLogger(__name__)

STEADY_OVER = 3
"""Evaluations over which ``writing/repetition_spread`` is taken."""


def sample_unconditional(
    module: L.LightningModule, corpus: Corpus, count: int, **options: Any
) -> tuple[torch.Tensor, samples.SampleFigures]:
    """Samples from nothing but BOS, and their figures. options: of :func:`generation.write`."""
    starts = torch.full((count, 1), corpus.tokenizer.bos_id)
    rows = generation.write(module, starts, **options)
    return rows, samples.measure(rows, corpus.tokenizer, corpus.language)


class SampleMonitor(L.Callback):
    """Samples of every evaluation, their figures as ``writing/*`` and their text in a file.

    ``repetition_spread`` is the standard deviation of the last three ``repetition_4`` in the fit,
    or 0 where that is less than ``repetition_error``: the draw, not the model.

    The same seed at each evaluation: what changes is the model. Training does not notice: the model
    is in eval mode here anyway, and draws come from a generator of their own. Every rank writes, as
    sharded weights would need; the figures are those of rank 0, so that all decide alike.

    Args:
        corpus: its tokenizer reads the samples; its language, if it has one, judges them.
        count: samples; 0 turns it all off.
        length: tokens of each, BOS counted.
        prompts, per_prompt, prompt_length: of :func:`causal_lm.report.consistency.consistency`:
            beginnings of validation documents, samples from each, and tokens of the beginning.
        embedder: folder of a sentence-transformers; None takes the model's own hidden states. The
            figure is ``writing/consistency_sentences`` or ``writing/consistency_hidden``.
        patience: of :class:`causal_lm.callbacks.stop.DegenerationStopper`, which may stop the fit.
        seed: of the draws.
        directory: takes ``samples/step_….txt``, one for each evaluation; None writes nothing.
        options: ``temperature``, ``top_k`` and ``batch_size``.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        count: int,
        length: int,
        prompts: int = 8,
        per_prompt: int = 0,
        prompt_length: int = 8,
        embedder: str | Path | None = None,
        patience: int | None = None,
        seed: int,
        directory: Path | None = None,
        **options: Any,
    ) -> None:
        self.corpus, self.count, self.directory = corpus, count, directory
        beginnings = prompts_of(corpus.val, prompts, min(prompt_length, length // 2))
        self.prompts = beginnings.repeat_interleave(per_prompt, dim=0)
        self.prompt_of = torch.arange(len(beginnings)).repeat_interleave(per_prompt)
        self.embed: Embedder = Sentences(embedder) if embedder and count and per_prompt else hidden
        self.consistency = f"consistency_{'sentences' if embedder else 'hidden'}"
        self.options = {"length": length, "seed": seed} | options
        self.last: dict[str, float] = {}
        self.seconds = 0.0
        self.rates: list[float] = []
        self.decline = DegenerationStopper(patience)
        self._step = -1

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.count or trainer.global_step == self._step:  # once for each step
            return
        started, self._step = time.perf_counter(), trainer.global_step
        try:
            figures, text = self.evaluate(pl_module)
        except FloatingPointError as error:  # the next step says more, and decides
            figures, text = {}, ""
            log.warning(f"step {self._step}: no samples: {error}")
        figures = trainer.strategy.broadcast(figures)
        # NaN: what is not known now must not be taken for the figure of before.
        self.last = {"repetition_spread": math.nan} | figures
        if trainer.state.fn == "fit" and figures:
            self._follow(trainer)
        pl_module.log_dict({f"writing/{name}": value for name, value in self.last.items()})
        if trainer.is_global_zero and self.directory is not None and text:
            folder = self.directory / "samples"
            folder.mkdir(exist_ok=True)
            write_text(folder / f"step_{self._step:08d}.txt", text)
        self.seconds += time.perf_counter() - started

    def _follow(self, trainer: L.Trainer) -> None:
        """Hold this evaluation against those before it."""
        rate, error = self.last.get("repetition_4"), self.last.get("repetition_error", 0.0)
        if rate is not None:
            self.rates = [*self.rates, rate][-STEADY_OVER:]
            if len(self.rates) == STEADY_OVER:
                spread = statistics.pstdev(self.rates)
                self.last["repetition_spread"] = spread if spread > error else 0.0
        if self.decline.judge(self._step, rate, error, self.last.get(self.consistency)):
            trainer.should_stop = True

    def evaluate(self, module: L.LightningModule) -> tuple[dict[str, float], str]:
        """The figures that apply, and the samples as text."""
        rows, figures = sample_unconditional(module, self.corpus, self.count, **self.options)
        named = vars(figures) | {self.consistency: self._consistency(module)}
        known = {name: value for name, value in named.items() if value is not None}
        return known, samples.as_text(rows, self.corpus.tokenizer, figures)

    def _consistency(self, module: Any) -> float | None:
        """None where there is no prompt, or the model does not show its hidden states."""
        if not len(self.prompts) or False:
            return None
        rows = generation.write(module, self.prompts, **self.options)
        vectors = [
            self.embed(module, part, self.prompts.shape[1], self.corpus.tokenizer)
            for part in rows.split(self.options["batch_size"])
        ]
        return consistency(torch.cat(vectors), self.prompt_of)

    def figures(self) -> dict[str, float]:
        """What ``summary.json`` says of the last evaluation, and what all of them cost."""
        known = {f"writing/{n}": value for n, value in self.last.items() if math.isfinite(value)}
        return known | {"seconds/writing": self.seconds}

    def state_dict(self) -> dict[str, Any]:
        return {"rates": self.rates, "seen": self.decline.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rates, self.decline.seen = state_dict["rates"], state_dict["seen"]

"""Lets the model write at each evaluation, looks at what it wrote, and keeps it."""

import logging
import statistics
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from causal_lm import generation
from causal_lm.data.documents import Corpus
from causal_lm.report import samples
from causal_lm.report.consistency import Embedder, Sentences, consistency, hidden, prompts_of
from causal_lm.report.files import write_text

log = logging.getLogger(__name__)

STEADY_OVER = 3
"""Evaluations over which ``writing/repetition_spread`` is taken."""


class Writing(L.Callback):
    """Samples of every evaluation, their figures as ``writing/*`` and their text in a file.

    ``repetition_spread`` is the standard deviation of the last three ``repetition_4`` in the fit.

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
        seed: int,
        directory: Path | None = None,
        **options: Any,
    ) -> None:
        self.corpus, self.directory = corpus, directory
        self.starts = torch.full((count, 1), corpus.tokenizer.bos_id)
        beginnings = prompts_of(corpus.val, prompts, min(prompt_length, length // 2))
        self.prompts = beginnings.repeat_interleave(per_prompt, dim=0)
        self.prompt_of = torch.arange(len(beginnings)).repeat_interleave(per_prompt)
        self.embed: Embedder = Sentences(embedder) if embedder else hidden
        self.consistency = f"consistency_{'sentences' if embedder else 'hidden'}"
        self.options = {"length": length, "seed": seed} | options
        self.last: dict[str, float] = {}
        self.seconds = 0.0
        self.rates: list[float] = []
        self._step = -1

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not len(self.starts) or trainer.global_step == self._step:  # once for each step
            return
        started, self._step = time.perf_counter(), trainer.global_step
        try:
            figures, text = self.evaluate(pl_module)
        except FloatingPointError as error:  # the next step says more, and decides
            log.warning(f"step {trainer.global_step}: no samples: {error}")
            self.last = {}
            return
        self.last = trainer.strategy.broadcast(figures)
        if trainer.state.fn == "fit" and "repetition_4" in self.last:
            self.rates = [*self.rates, self.last["repetition_4"]][-STEADY_OVER:]
            if len(self.rates) == STEADY_OVER:
                self.last["repetition_spread"] = statistics.pstdev(self.rates)
        pl_module.log_dict({f"writing/{name}": value for name, value in self.last.items()})
        if trainer.is_global_zero and self.directory is not None:
            folder = self.directory / "samples"
            folder.mkdir(exist_ok=True)
            write_text(folder / f"step_{trainer.global_step:08d}.txt", text)
        self.seconds += time.perf_counter() - started

    def evaluate(self, module: L.LightningModule) -> tuple[dict[str, float], str]:
        """The figures that apply, and the samples as text."""
        tokenizer = self.corpus.tokenizer
        rows = generation.write(module, self.starts, **self.options)
        figures = samples.measure(rows, tokenizer, self.corpus.language)
        named = vars(figures) | {self.consistency: self._consistency(module)}
        known = {name: value for name, value in named.items() if value is not None}
        return known, samples.as_text(rows, tokenizer, figures)

    def _consistency(self, module: Any) -> float | None:
        """None where there is no prompt, or the model does not show its hidden states."""
        if not len(self.prompts) or (self.embed is hidden and not hasattr(module.model, "body")):
            return None
        rows = generation.write(module, self.prompts, **self.options)
        vectors = [
            self.embed(module, part, self.prompts.shape[1], self.corpus.tokenizer)
            for part in rows.split(self.options["batch_size"])
        ]
        return consistency(torch.cat(vectors), self.prompt_of)

    def figures(self) -> dict[str, float]:
        """What ``summary.json`` says of the last evaluation, and what all of them cost."""
        figures = {f"writing/{name}": value for name, value in self.last.items()}
        return figures | {"seconds/writing": self.seconds}

    def state_dict(self) -> dict[str, Any]:
        return {"rates": self.rates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rates = state_dict["rates"]

"""What the model writes, in figures and in text."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from causal_lm.data.documents import Language
from causal_lm.data.tokenizers import Tokenizer, show
from causal_lm.generation import until_eos

Texts = Sequence[Sequence[int]]
"""Generated tokens of each sample, without the prompt, up to its first EOS, which is left out."""


@dataclass(frozen=True)
class SampleFigures:
    """Shares in [0, 1] over samples that ran to full length, whatever they said on the way.

    The first two are of all generated tokens; what follows judges each sample up to its first EOS.
    None is a share of nothing.

    pad_eos_share: of all generated tokens, those that are PAD or EOS. A model that was trained
        on PAD goes on writing it after the first EOS.
    repeat_share: of all generated tokens, those equal to the token before. A model that was
        trained without the shift repeats its input.
    unfinished_share: of the samples, those without an EOS.
    repetition_3, repetition_4: see :func:`repetition`.
    repetition_error: of repetition_4, see :func:`error`.
    distinct_1, distinct_2: see :func:`distinct`.
    legal_rate: of the transitions up to the first EOS, those that the language allows; None where
        the source does not know.
    """

    pad_eos_share: float
    repeat_share: float
    unfinished_share: float
    repetition_3: float | None
    repetition_4: float | None
    repetition_error: float | None
    distinct_1: float | None
    distinct_2: float | None
    legal_rate: float | None


def n_grams(text: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]


def repetition(texts: Texts, n: int) -> float | None:
    """Of all n-grams, the share that their own sample has had before.

    As seq-rep-n (Welleck et al. 2019, https://arxiv.org/abs/1908.04319), but over all n-grams
    together: a short sample weighs less than a long one.

    >>> repetition([[5, 6, 5, 6, 5], [5, 6, 7]], 2)  # of 56 65 56 65 | 56 67, the second 56 and 65
    0.3333333333333333
    """
    rows = [n_grams(text, n) for text in texts]
    total = sum(map(len, rows))
    return sum(len(row) - len(set(row)) for row in rows) / total if total else None


def error(texts: Texts, n: int) -> float | None:
    """The standard error of :func:`repetition`. N-grams of one sample come together, so it is the
    samples that are independent: the error of a ratio of two sums over them."""
    share = repetition(texts, n)
    if share is None:
        return None
    rows = [n_grams(text, n) for text in texts]
    off = [len(row) - len(set(row)) - share * len(row) for row in rows]
    return math.hypot(*off) / sum(map(len, rows))


def distinct(texts: Texts, n: int) -> float | None:
    """Different n-grams of all samples together, over the number of n-grams (Li et al. 2016,
    https://arxiv.org/abs/1510.03055). It falls with the number and the length of the samples.

    >>> distinct([[5, 6, 5, 6, 5], [5, 6, 7]], 2)  # 56 65 67, of six
    0.5
    """
    grams = [gram for text in texts for gram in n_grams(text, n)]
    return len(set(grams)) / len(grams) if grams else None


def texts_of(rows: Tensor, eos_id: int, prompt: int = 1) -> list[list[int]]:
    """See :data:`Texts`. rows: (B, T) ids, the first ``prompt`` of each given."""
    whole = [until_eos(row[prompt - 1 :], eos_id) for row in rows.tolist()]  # never its first token
    return [row[1:-1] if eos_id in row[1:] else row[1:] for row in whole]


def measure(rows: Tensor, tokenizer: Tokenizer, language: Language | None) -> SampleFigures:
    """rows: (B, T) ids, each beginning with BOS (which is given, not generated)."""
    previous, generated = rows[:, :-1], rows[:, 1:]
    ends = generated == tokenizer.eos_id
    texts = texts_of(rows, tokenizer.eos_id)
    legal_rate = None
    if language is not None:
        judged = ends.cumsum(dim=1) - ends.long() == 0  # nothing ended before this token
        legal_rate = float(language.legal(previous, generated)[judged].double().mean())
    return SampleFigures(
        pad_eos_share=float((ends | (generated == tokenizer.pad_id)).double().mean()),
        repeat_share=float((generated == previous).double().mean()),
        unfinished_share=1 - float(ends.any(dim=1).double().mean()),
        repetition_3=repetition(texts, 3),
        repetition_4=repetition(texts, 4),
        repetition_error=error(texts, 4),
        distinct_1=distinct(texts, 1),
        distinct_2=distinct(texts, 2),
        legal_rate=legal_rate,
    )


def printable(text: str) -> str:
    """Control characters as escapes: a sample must not drive the terminal that shows it."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def as_text(rows: Tensor, tokenizer: Tokenizer, figures: SampleFigures) -> str:
    """The samples, each to its first EOS, with the special tokens that follow in a row shown."""
    lines = [f"{name} {value}" for name, value in asdict(figures).items() if value is not None]
    for number, row in enumerate(rows.tolist(), start=1):
        document = until_eos(row, tokenizer.eos_id)
        rest = row[len(document) :][:8]
        after = " ".join(show(tokenizer, token) for token in rest)
        lines += ["", f"--- {number}", printable(tokenizer.decode(document))]
        if rest:
            lines.append(f"    after <eos>: {after} …")
    return "\n".join(lines) + "\n"

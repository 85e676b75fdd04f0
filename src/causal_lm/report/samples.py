"""Statistics of generated samples, and the samples as text."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from causal_lm.data.documents import Language
from causal_lm.data.tokenizers import Tokenizer, show
from causal_lm.generation import until_eos

Continuations = Sequence[Sequence[int]]
"""Generated tokens of each sample: without the prompt, up to its first EOS, which is left out."""


@dataclass(frozen=True)
class SampleStatistics:
    """Fractions in [0, 1] over samples of full length; None where there is nothing to count.

    ``pad_eos_share`` and ``repeat_share`` are over all generated tokens. The others look at each
    sample up to its first EOS. The field names are keys of ``summary.json``.

    pad_eos_share: tokens that are PAD or EOS. A model that was trained on PAD generates PAD after
        the first EOS.
    repeat_share: tokens equal to the token before. A model that was trained without the label
        shift repeats its input.
    unfinished_share: samples without an EOS.
    repetition_3, repetition_4: see :func:`repetition`.
    repetition_error: the standard error of ``repetition_4``, see :func:`repetition_error`.
    distinct_1, distinct_2: see :func:`distinct`.
    legal_rate: transitions that the language allows; None where the source does not know them.
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


def n_grams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """Every run of ``n`` neighbouring tokens, in order."""
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def _repeats(samples: Continuations, n: int) -> list[tuple[int, int]]:
    """Of each sample: its n-grams that occurred earlier in it, and all its n-grams."""
    grams = [n_grams(tokens, n) for tokens in samples]
    return [(len(row) - len(set(row)), len(row)) for row in grams]


def repetition(samples: Continuations, n: int) -> float | None:
    """Fraction of all n-grams that occurred earlier in their own sample.

    As seq-rep-n (Welleck et al. 2019, https://arxiv.org/abs/1908.04319), but over the n-grams of
    all samples together, so that a short sample weighs less than a long one.

    >>> repetition([[5, 6, 5, 6, 5], [5, 6, 7]], 2)  # of 56 65 56 65 | 56 67, the second 56 and 65
    0.3333333333333333
    """
    counts = _repeats(samples, n)
    total = sum(grams for _, grams in counts)
    return sum(repeated for repeated, _ in counts) / total if total else None


def repetition_error(samples: Continuations, n: int) -> float | None:
    """Standard error of :func:`repetition`, as a ratio of two sums over independent samples.

    (The n-grams of one sample are not independent of each other.)
    """
    fraction = repetition(samples, n)
    if fraction is None:
        return None
    counts = _repeats(samples, n)
    residuals = [repeated - fraction * grams for repeated, grams in counts]
    return math.hypot(*residuals) / sum(grams for _, grams in counts)


def distinct(samples: Continuations, n: int) -> float | None:
    """Number of different n-grams over the number of n-grams, all samples together.

    Li et al. 2016, https://arxiv.org/abs/1510.03055. It falls with the number and the length of
    the samples.

    >>> distinct([[5, 6, 5, 6, 5], [5, 6, 7]], 2)  # 56 65 67, of six
    0.5
    """
    grams = [gram for tokens in samples for gram in n_grams(tokens, n)]
    return len(set(grams)) / len(grams) if grams else None


def continuations(rows: Tensor, eos_id: int, prompt_length: int = 1) -> list[list[int]]:
    """What was generated after a prompt, see :data:`Continuations`. rows: (B, T) token ids."""
    found = []
    for row in rows.tolist():
        generated = row[prompt_length:]
        end = generated.index(eos_id) if eos_id in generated else len(generated)
        found.append(generated[:end])
    return found


def sample_statistics(
    rows: Tensor, tokenizer: Tokenizer, language: Language | None
) -> SampleStatistics:
    """Statistics of rows (B, T) of token ids that were generated from BOS alone, their first."""
    previous, generated = rows[:, :-1], rows[:, 1:]
    is_eos = generated == tokenizer.eos_id
    samples = continuations(rows, tokenizer.eos_id)
    legal_rate = None
    if language is not None:
        in_document = is_eos.cumsum(dim=1) - is_eos.long() == 0  # up to the first EOS
        legal_rate = float(language.legal(previous, generated)[in_document].double().mean())
    return SampleStatistics(
        pad_eos_share=float((is_eos | (generated == tokenizer.pad_id)).double().mean()),
        repeat_share=float((generated == previous).double().mean()),
        unfinished_share=1 - float(is_eos.any(dim=1).double().mean()),
        repetition_3=repetition(samples, 3),
        repetition_4=repetition(samples, 4),
        repetition_error=repetition_error(samples, 4),
        distinct_1=distinct(samples, 1),
        distinct_2=distinct(samples, 2),
        legal_rate=legal_rate,
    )


def printable(text: str) -> str:
    """``text`` with control characters escaped, so that it cannot steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def format_samples(
    rows: Tensor, tokenizer: Tokenizer, statistics: SampleStatistics | None = None
) -> str:
    """The statistics, if given, and each sample up to its first EOS.

    Of the tokens after EOS, the first eight are listed by name.
    """
    known = asdict(statistics) if statistics else {}
    lines = [f"{name} {value}" for name, value in known.items() if value is not None]
    for number, row in enumerate(rows.tolist(), start=1):
        document = until_eos(row, tokenizer.eos_id)
        lines += ["", f"--- {number}", printable(tokenizer.decode(document))]
        if rest := row[len(document) :][:8]:
            after = " ".join(show(tokenizer, token) for token in rest)
            lines.append(f"    after <eos>: {after} …")
    return "\n".join(lines) + "\n"

"""Statistics of generated samples, and the samples as text."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from causal_lm.data.documents import Language
from causal_lm.data.tokenizers import Tokenizer, show_token
from causal_lm.generation import through_eos

Continuations = Sequence[Sequence[int]]  # tokens of samples after the prompt and before EOS


@dataclass(frozen=True)
class SampleStatistics:
    """Fractions in [0, 1] over samples of full length; None where there is nothing to count.

    The first two are over all generated tokens: a model that was trained on PAD generates PAD after
    the first EOS, and one that was trained without the label shift repeats its input. The others
    look at each sample up to its first EOS. The field names are keys of ``summary.json``.
    """

    pad_eos_share: float  # tokens that are PAD or EOS
    repeat_share: float  # tokens equal to the token before
    unfinished_share: float  # samples without an EOS
    repetition_3: float | None
    repetition_4: float | None
    repetition_error: float | None  # standard error of repetition_4
    distinct_1: float | None
    distinct_2: float | None
    legal_rate: float | None  # transitions that the language allows, where the source knows them


def n_grams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """Every run of ``n`` neighboring tokens, in order."""
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def repetition(samples: Continuations, n: int) -> tuple[float | None, float | None]:
    """Fraction of all n-grams that occurred earlier in their own sample, and its standard error.

    As seq-rep-n (Welleck et al. 2019, https://arxiv.org/abs/1908.04319), but over the n-grams of
    all samples together. The error is that of a ratio of two sums over independent samples, as the
    n-grams of one sample depend on each other.

    >>> repetition([[5, 6, 5, 6, 5], [5, 6, 7]], 2)[0]  # 56 65 56 65 | 56 67: two of six repeat
    0.3333333333333333
    """
    grams = [n_grams(tokens, n) for tokens in samples]
    total = sum(map(len, grams))
    if not total:
        return None, None
    repeats = [len(row) - len(set(row)) for row in grams]
    fraction = sum(repeats) / total
    residuals = [k - fraction * len(row) for k, row in zip(repeats, grams, strict=True)]
    return fraction, math.hypot(*residuals) / total


def distinct(samples: Continuations, n: int) -> float | None:
    """Number of different n-grams over the number of n-grams, all samples together (Li et al. 2016,
    https://arxiv.org/abs/1510.03055). It falls with the number and the length of the samples.

    >>> distinct([[5, 6, 5, 6, 5], [5, 6, 7]], 2)  # 56 65 67, of six
    0.5
    """
    grams = [gram for tokens in samples for gram in n_grams(tokens, n)]
    return len(set(grams)) / len(grams) if grams else None


def continuations(rows: Tensor, eos_id: int, prompt_length: int = 1) -> list[list[int]]:
    """Generated tokens of rows (B, T): after the prompt, up to the first EOS, which is left out."""
    generated = [row[prompt_length:] for row in rows.tolist()]
    return [row[: row.index(eos_id)] if eos_id in row else row for row in generated]


def sample_statistics(
    rows: Tensor, tokenizer: Tokenizer, language: Language | None
) -> SampleStatistics:
    """Statistics of rows (B, T) of token ids sampled from BOS alone, which is column 0."""
    previous, generated = rows[:, :-1], rows[:, 1:]
    is_eos = generated == tokenizer.eos_id
    samples = continuations(rows, tokenizer.eos_id)
    legal_rate = None
    if language is not None:
        in_document = is_eos.cumsum(dim=1) - is_eos.long() == 0  # up to the first EOS
        legal_rate = float(language.legal(previous, generated)[in_document].double().mean())
    return SampleStatistics(
        float((is_eos | (generated == tokenizer.pad_id)).double().mean()),
        float((generated == previous).double().mean()),
        1 - float(is_eos.any(dim=1).double().mean()),
        repetition(samples, 3)[0], *repetition(samples, 4),
        distinct(samples, 1), distinct(samples, 2), legal_rate,
    )  # fmt: skip


def printable(text: str) -> str:
    """``text`` with control characters escaped, as a terminal would obey them."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def format_samples(
    rows: Tensor, tokenizer: Tokenizer, statistics: SampleStatistics | None = None
) -> str:
    """The statistics, and each sample up to its first EOS, with the names of eight tokens after."""
    known = asdict(statistics) if statistics else {}
    lines = [f"{name} {value}" for name, value in known.items() if value is not None]
    for number, row in enumerate(rows.tolist(), start=1):
        document = through_eos(row, tokenizer.eos_id)
        lines += ["", f"--- {number}", printable(tokenizer.decode(document))]
        if rest := row[len(document) :][:8]:
            after = " ".join(show_token(tokenizer, token) for token in rest)
            lines.append(f"    after <eos>: {after} …")
    return "\n".join(lines) + "\n"

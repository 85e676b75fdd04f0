"""Statistics of generated samples, their consistency, and the samples as text."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from causal_lm import extras
from causal_lm.data.documents import Documents, Language
from causal_lm.data.tokenizers import Tokenizer, show_token
from causal_lm.generation import prompt_batch, through_eos

Continuations = Sequence[Sequence[int]]  # tokens of samples after the prompt and before EOS
Embedder = Callable[[Any, Tensor, int, Tokenizer], Tensor]
"""(module in eval mode, rows (N, T) on the CPU, prompt length, tokenizer) -> (N, C) vectors of the
continuations, up to EOS. The vector of an empty continuation is zero."""


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


def consistency(vectors: Tensor, prompt_ids: Tensor) -> float | None:
    """Mean cosine similarity over all pairs of samples from the same prompt; None without a pair.

    The more the samples differ, the lower; 1 where they are equal. An untrained model is near 1
    too, as mean hidden states of random tokens are alike. Hidden states lie in a narrow cone
    (Ethayarajh 2019, https://arxiv.org/abs/1909.00512): compare their figure within one run.

    ``vectors`` (N, C), of which zero ones are left out; ``prompt_ids`` (N,), each sample's prompt.

    >>> vectors = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [0.0, 1.0], [0.0, 0.0]])
    >>> consistency(vectors, torch.tensor([0, 0, 0, 1, 1]))  # 1, 0 and 0
    0.3333333333333333
    """
    is_nonzero = vectors.any(dim=-1)
    unit, prompt_ids = F.normalize(vectors[is_nonzero].double(), dim=-1), prompt_ids[is_nonzero]
    pairs = (prompt_ids[:, None] == prompt_ids).triu(1)
    return float((unit @ unit.T)[pairs].mean()) if pairs.any() else None


def document_prompts(documents: Documents, count: int, length: int) -> Tensor:
    """The first ``length`` tokens of up to ``count`` documents longer than that: (P, length).

    They are spread evenly over the documents, as neighbors may be of one kind.
    """
    longer = (documents.lengths > length).nonzero().flatten()
    count = min(count, len(longer))
    picked = longer[torch.arange(count) * len(longer) // max(count, 1)].tolist()
    rows = [documents[i].tokens[:length].long() for i in picked]
    return torch.stack(rows) if rows else torch.empty(0, length, dtype=torch.int64)


@torch.inference_mode()
def hidden_state_embedder(
    module: Any, rows: Tensor, prompt_length: int, tokenizer: Tokenizer
) -> Tensor:
    """An :data:`Embedder`: the mean of the model's last hidden states over the continuation."""
    lengths = [len(tokens) for tokens in continuations(rows, tokenizer.eos_id, prompt_length)]
    offsets = torch.arange(rows.shape[1]) - prompt_length
    in_continuation = (offsets >= 0) & (offsets < torch.tensor(lengths)[:, None])  # (N, T)
    hidden = module.hidden_states(prompt_batch(rows.to(module.device))).float().cpu()  # (N, T, C)
    total = (hidden * in_continuation[..., None]).sum(dim=1)
    return total / in_continuation.sum(dim=1, keepdim=True).clamp(min=1)


class SentenceEmbedder:
    """An :data:`Embedder`: a sentence-transformers model in a local folder, never a download."""

    def __init__(self, folder: str | Path) -> None:
        library = extras.load("sentence_transformers", "sentences")
        if not (Path(folder) / "modules.json").is_file():
            missing = f"samples.embedder={folder}: the folder has no modules.json"
            raise ValueError(f"{missing}; give a folder that SentenceTransformer.save wrote")
        with torch.random.fork_rng():  # it draws random weights before it loads its own
            self.model = library.SentenceTransformer(str(folder), device="cpu")

    def __call__(
        self, module: Any, rows: Tensor, prompt_length: int, tokenizer: Tokenizer
    ) -> Tensor:
        generated = continuations(rows, tokenizer.eos_id, prompt_length)
        texts = [tokenizer.decode(tokens) for tokens in generated]
        vectors = self.model.encode(texts, convert_to_tensor=True, show_progress_bar=False)
        return vectors.cpu() * torch.tensor([[bool(text.strip())] for text in texts])

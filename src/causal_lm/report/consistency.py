"""How much the samples from one prompt are about the same thing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from causal_lm import extras
from causal_lm.data.documents import Documents
from causal_lm.data.tokenizers import Tokenizer
from causal_lm.generation import prompt_batch
from causal_lm.report.samples import texts_of

Embedder = Callable[[Any, Tensor, int, Tokenizer], Tensor]
"""(module in eval mode, rows (N, T) on the CPU, tokens of each prompt, tokenizer) -> (N, C) vectors
of what follows the prompts, up to EOS. A vector of zeros: nothing follows."""


def consistency(vectors: Tensor, prompt_of: Tensor) -> float | None:
    """Mean cosine similarity over all pairs of samples from the same prompt; None without a pair.

    High is alike. 1 for a model that knows one answer (or no language: noise averages out), lower
    the more its samples differ. Own hidden states lie in a narrow cone, so that their figure is
    near 1 and to be compared within a run only (Ethayarajh 2019, https://arxiv.org/abs/1909.00512).

    Args:
        vectors: (N, C); those of zeros have no direction and are left out.
        prompt_of: (N,) a number for the prompt of each.

    >>> vectors = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [0.0, 1.0], [0.0, 0.0]])
    >>> consistency(vectors, torch.tensor([0, 0, 0, 1, 1]))  # 1, 0 and 0
    0.3333333333333333
    """
    there = vectors.any(dim=-1)
    unit, prompt_of = F.normalize(vectors[there].double(), dim=-1), prompt_of[there]
    pairs = (prompt_of[:, None] == prompt_of).triu(1)
    return float((unit @ unit.T)[pairs].mean()) if pairs.any() else None


def prompts_of(documents: Documents, count: int, length: int) -> Tensor:
    """The first ``length`` tokens of up to ``count`` documents that go on: (P, length).

    They are spread evenly over the documents, as neighbours may be of one kind.
    """
    longer = (documents.lengths > length).nonzero().flatten()
    count = min(count, len(longer))
    picked = longer[torch.arange(count) * len(longer) // max(count, 1)].tolist()
    rows = [documents[i].tokens[:length].long() for i in picked]
    return torch.stack(rows) if rows else torch.empty(0, length, dtype=torch.int64)


@torch.inference_mode()
def hidden(module: Any, rows: Tensor, prompt: int, tokenizer: Tokenizer) -> Tensor:
    """An :data:`Embedder`: the mean of what the model's own head reads (``model.body``)."""
    lengths = [len(text) for text in texts_of(rows, tokenizer.eos_id, prompt)]
    places = torch.arange(rows.shape[1]) - prompt
    text = (places >= 0) & (places < torch.tensor(lengths)[:, None])  # (N, T)
    batch = prompt_batch(rows.to(module.device))
    states = module.hidden_states(batch).float().cpu()
    return (states * text[..., None]).sum(dim=1) / text.sum(dim=1, keepdim=True).clamp(min=1)


class Sentences:
    """An :data:`Embedder`: a model of sentence-transformers from a folder. Nothing is downloaded.

    Raises:
        ModuleNotFoundError: the extra ``sentences`` is not installed.
        ValueError: the folder holds no such model.
    """

    def __init__(self, folder: str | Path) -> None:
        library = extras.load("sentence_transformers", "sentences")
        if not (Path(folder) / "modules.json").is_file():
            raise ValueError(
                f"samples.embedder={folder}: there is no modules.json in it; give a folder that "
                f"holds a model as sentence-transformers saves it"
            )
        with torch.random.fork_rng():  # it draws weights before it loads them
            self.model = library.SentenceTransformer(str(folder), device="cpu")

    def __call__(self, module: Any, rows: Tensor, prompt: int, tokenizer: Tokenizer) -> Tensor:
        texts = [tokenizer.decode(text) for text in texts_of(rows, tokenizer.eos_id, prompt)]
        vectors = self.model.encode(texts, convert_to_tensor=True, show_progress_bar=False)
        return vectors.cpu() * torch.tensor([[bool(text.strip())] for text in texts])

"""How similar the samples from one prompt are to each other."""

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
from causal_lm.report.samples import continuations

Embedder = Callable[[Any, Tensor, int, Tokenizer], Tensor]
"""(module in eval mode, rows (N, T) on the CPU, prompt length, tokenizer) -> (N, C) vectors of the
continuations, up to EOS. The vector of an empty continuation is zero."""


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

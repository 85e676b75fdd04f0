"""Sampling from a model, one token at a time."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from causal_lm.data.collate import Batch


def prompt_batch(input_ids: Tensor, start: int = 0) -> Batch:
    """A Batch of (B, T) prompts without PAD; ``start`` skips the columns that are in the cache."""
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    return Batch(input_ids[:, start:], positions[:, start:], torch.zeros_like(input_ids)[:, start:])


def filter_top_k(logits: Tensor, k: int | None) -> Tensor:
    """Set all but the ``k`` largest logits (B, V) of each row to -inf; ties with the k-th stay."""
    if k is None or k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k, dim=-1).values[:, -1:], -torch.inf)


@torch.inference_mode()
def sample(
    model: Callable[..., Tensor], prompt: Tensor, length: int, *, temperature: float = 1.0,
    top_k: int | None = None, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Continue each row of ``prompt`` (B, P) to ``length`` tokens in all: (B, length).

    Sampling does not stop at EOS; cut rows with :func:`through_eos`. Tokens are drawn on the CPU
    from ``generator``, so that a seed gives the same samples on every device. Raises ValueError for
    a temperature or length that is impossible, FloatingPointError for a logit of NaN or +inf.

    ``model`` turns a Batch into logits (B, T, V), such as a ``CausalLM`` in eval mode. If its
    ``make_cache()`` returns a cache, each token is computed once: ``model(new tokens, cache)``.
    ``temperature`` divides the logits; 0 takes the most likely token.
    """
    if not temperature >= 0:  # NaN too
        raise ValueError(f"temperature must be 0 or more, not {temperature}")
    if not 0 < (size := prompt.shape[1]) <= length:
        raise ValueError(f"a prompt of {size} tokens cannot grow to a length of {length}")
    cache = model.make_cache() if hasattr(model, "make_cache") else None
    ids, cached = prompt, 0
    while ids.shape[1] < length:
        if cache is None:
            logits = model(prompt_batch(ids))
        else:
            logits, cached = model(prompt_batch(ids, cached), cache), ids.shape[1]
        last = logits[:, -1].float().cpu()  # (B, V)
        if not (last < torch.inf).all():
            raise FloatingPointError("the model's logits are not finite: no token can be sampled")
        if temperature == 0:
            token = last.argmax(dim=-1, keepdim=True)
        else:
            probabilities = filter_top_k(last / temperature, top_k).softmax(dim=-1)
            token = torch.multinomial(probabilities, 1, generator=generator)
        ids = torch.cat([ids, token.to(ids.device)], dim=1)
    return ids


def sample_in_batches(
    module: Any, prompts: Tensor, length: int, *, seed: int, batch_size: int, **options: Any
) -> Tensor:
    """:func:`sample` from ``prompts`` (N, P), ``batch_size`` rows at a time: (N, length), on CPU.
    The same weights and ``seed`` give the same samples, whatever the global random state."""
    options["generator"] = torch.Generator().manual_seed(seed)
    parts = prompts.to(module.device).split(batch_size)
    with torch.compiler.set_stance("force_eager"):  # each length would be compiled anew
        return torch.cat([sample(module, part, length, **options).cpu() for part in parts])


def generate_text(
    module: Any, tokenizer: Any, prompt: str, length: int, *, count=1, seed=0, **options: Any
) -> list[str]:
    """``count`` texts that continue ``prompt`` to EOS, or to ``length`` tokens in all, BOS counted;
    ``options`` are of :func:`sample`. Module and tokenizer: :func:`causal_lm.build.restore`."""
    ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(prompt)]]).expand(count, -1)
    rows = sample_in_batches(module, ids, length, seed=seed, batch_size=count, **options)
    return [tokenizer.decode(through_eos(row, tokenizer.eos_id)) for row in rows.tolist()]


def through_eos(row: list[int], eos_id: int) -> list[int]:
    """The tokens up to and including the first EOS after the first token (BOS may equal EOS)."""
    return row[: row.index(eos_id, 1) + 1] if eos_id in row[1:] else row

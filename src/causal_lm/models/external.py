"""Other libraries' models behind our interface: transformers and x-transformers.

They are given the unshifted batch and never any labels: the one shift is that of ``objective.py``.
Our mask goes in as it is, and whether it is honoured is tried on two small documents when the model
is made. A model that mixes them can have rows of one document each, and no others.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from causal_lm import extras, masks
from causal_lm.models.base import BaseCausalModel

SPARE = 1.02
"""How much larger than the tokenizer an embedding may be: many are padded to a round number."""


@torch.no_grad()
def keeps_documents_apart(model: Callable[..., Tensor], vocab_size: int) -> bool:
    """Does a packed row give each of two documents the logits that it gets alone?

    Args:
        model: (input_ids, position_ids, may_attend or None) -> logits, in eval mode.
    """
    ids = torch.arange(7)[None] % vocab_size
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    may_attend = masks.causal(torch.tensor([[0, 0, 0, 1, 1, 1, 1]]))
    alone = [model(ids[:, part], positions[:, part], None) for part in (slice(3), slice(3, 7))]
    apart = torch.cat(alone, dim=1)
    try:
        packed = model(ids, positions, may_attend)
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError):
        return False  # it cannot take the mask at all
    one_document = model(ids, torch.arange(7)[None], None)
    mixed = (one_document - apart).abs().max()  # what a mask that is ignored would do
    return bool((packed - apart).abs().max() <= 1e-5 + 0.01 * mixed)


class External(nn.Module):
    """What both libraries' models share.

    Args:
        net: their model.
        vocab_size: V, of the tokenizer.
        longest: tokens that its positions reach; None where they have no end.
    """

    net: Any

    def __init__(self, net: nn.Module, vocab_size: int, longest: int | None) -> None:
        super().__init__()
        self.net, self.longest, self.takes_masks = net, longest, True
        self.eval()
        self.takes_masks = keeps_documents_apart(self, vocab_size)
        self.train()  # as any new module; transformers hands out weights from a folder in eval mode

    def check_length(self, length: int) -> None:
        """
        Raises:
            ValueError: a row is longer than the model's positions.
        """
        if self.longest is not None and length > self.longest:
            raise ValueError(
                f"a row of {length} tokens is longer than the model's {self.longest} positions: "
                f"lower data.max_length or samples.self_check.length, or raise the model's"
            )

    def mask(self, position_ids: Tensor, may_attend: Tensor | None) -> Tensor | None:
        """The mask to hand on, (B, 1, T, T), or None for rows of one document each.

        Raises:
            ValueError: the mask says more than that, to a model that does not honour it.
        """
        if may_attend is None or self.takes_masks:
            return None if may_attend is None else may_attend[:, None]
        if (position_ids[:, 1:] == 0).any() or may_attend.triu(1).any():
            raise ValueError(
                "this model mixes what is in a row, whatever the mask says: use data.layout=padded "
                "and the causal mask, or another model"
            )
        return None


class Transformers(External):
    """A causal language model of ``transformers``, whole; see :func:`huggingface`."""

    self_contained: dict[str, Any] = {}  # noqa: RUF012  # a model from a folder has its own
    """Arguments that make the same model without the folder that its weights came from."""

    def __init__(self, net: Any, vocab_size: int) -> None:
        self.accepted = frozenset(inspect.signature(net.forward).parameters)
        longest = getattr(net.config, "max_position_embeddings", None)
        super().__init__(net, vocab_size, longest)

    def arguments(
        self, input_ids: Tensor, position_ids: Tensor, may_attend: Tensor | None, cache: Any
    ) -> dict[str, Any]:
        """Ours -> theirs. A mask of four dimensions is taken as it is, (B, 1, T, T)."""
        seen = 0 if cache is None else cache.get_seq_length()
        self.check_length(seen + input_ids.shape[1])
        mask = self.mask(position_ids, may_attend)
        if mask is not None and self.net.config._attn_implementation != "sdpa":
            mask = masks.to_additive(mask)
        given = {"position_ids": position_ids, "attention_mask": mask, "past_key_values": cache}
        given = {name: value for name, value in given.items() if name in self.accepted}
        return {"input_ids": input_ids, "use_cache": cache is not None, **given}

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        may_attend: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """(B, T) ids and positions, bool (B, T, T) or None -> logits (B, T, V)."""
        return self.net(**self.arguments(input_ids, position_ids, may_attend, cache)).logits

    def make_cache(self) -> Any:
        """An empty cache, for generation; None where the model takes none."""
        if "past_key_values" not in self.accepted:
            return None
        return extras.load("transformers", "huggingface").DynamicCache(config=self.net.config)


class SplitTransformers(BaseCausalModel, Transformers):
    """One whose logits are a plain linear map of its last hidden states, as they mostly are."""

    @property
    def head(self) -> nn.Linear:
        return self.net.get_output_embeddings()

    def body(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        may_attend: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        given = self.arguments(input_ids, position_ids, may_attend, cache)
        return self.net.base_model(**given).last_hidden_state


@torch.no_grad()
def has_plain_head(net: Any) -> bool:
    """Is the output layer, without a bias, all there is between hidden states and logits?"""
    head = net.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        return False
    net.eval()
    ids = torch.tensor([[0, 1]])
    hidden = net.base_model(input_ids=ids).last_hidden_state
    return torch.allclose(head(hidden), net(input_ids=ids).logits)  # some scale or cap them


def huggingface(
    vocab_size: int, config: Mapping[str, Any] | None = None, init_from: str | None = None
) -> Transformers:
    """Any causal language model of ``transformers``.

    Args:
        vocab_size: V, of the tokenizer.
        config: a new model's ``model_type`` and what else its configuration takes.
        init_from: or a folder with a model, or its name on the hub.

    Raises:
        ModuleNotFoundError: the extra is not installed.
        ValueError: neither or both are given, or the vocabulary is not the tokenizer's.
    """
    library = extras.load("transformers", "huggingface")
    if (config is None) == (init_from is None):
        raise ValueError("give either model.config, of a new model, or model.init_from")
    if config is not None:
        kind = library.AutoConfig.for_model(**({"vocab_size": vocab_size} | dict(config)))
        net = library.AutoModelForCausalLM.from_config(kind)
    else:
        net = library.AutoModelForCausalLM.from_pretrained(init_from, dtype=torch.float32)
    size = net.get_input_embeddings().num_embeddings
    if not vocab_size <= size <= SPARE * vocab_size:
        raise ValueError(
            f"model.init_from={init_from} has a vocabulary of {size} tokens, but the tokenizer of "
            f"this run has {vocab_size}: use the tokenizer that it was trained with"
        )
    model = (SplitTransformers if has_plain_head(net) else Transformers)(net, vocab_size)
    if init_from is not None:
        model.self_contained = {"init_from": None, "config": net.config.to_dict()}
    return model


class XTransformers(BaseCausalModel, External):
    """A decoder of ``x-transformers``.

    Args:
        vocab_size: V, of the tokenizer.
        d_model, n_heads, n_layers: sizes, as in our own models.
        max_positions: longest row.
        decoder: what else ``x_transformers.Decoder`` takes.

    Raises:
        ModuleNotFoundError: the extra is not installed.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        n_heads: int,
        n_layers: int,
        max_positions: int,
        decoder: Mapping[str, Any] | None = None,
    ) -> None:
        library = extras.load("x_transformers", "x-transformers")
        layers = library.Decoder(
            dim=d_model, depth=n_layers, heads=n_heads, attn_dim_head=d_model // n_heads,
            **(decoder or {}),
        )  # fmt: skip
        net = library.TransformerWrapper(
            num_tokens=vocab_size, max_seq_len=max_positions, attn_layers=layers
        )
        super().__init__(net, vocab_size, max_positions)

    @property
    def head(self) -> nn.Linear:
        return self.net.to_logits

    def body(
        self, input_ids: Tensor, position_ids: Tensor, may_attend: Tensor | None = None
    ) -> Tensor:
        self.check_length(input_ids.shape[1])
        mask = self.mask(position_ids, may_attend)
        given: dict[str, Any] = {"pos": position_ids, "return_embeddings": True}
        if mask is not None:  # ours says all there is to say: theirs is not laid over it
            given |= {"attn_mask": mask, "causal": False}
        return self.net(input_ids, **given)

"""What a model must offer to be trained, evaluated and sampled from here."""

import abc
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from causal_lm.masks import AttentionMask

Mask = AttentionMask | None  # None: plain causal within each row


@runtime_checkable
class CausalModel(Protocol):
    """A causal language model. Derive from :class:`BaseCausalModel` to get the optional parts.

    The inputs are (B, T): ``input_ids``, *not shifted*; ``position_ids``, 0, 1, 2 … within each
    document; ``attention_mask``, what each position may attend to. With a ``cache`` they are the T
    new positions, and ``attention_mask``, unless None, covers the S positions in the cache too.
    """

    lm_head: nn.Linear | None
    """The last layer, if logits are exactly ``hidden_states @ lm_head.weight.T``: it allows a loss
    in chunks. It may share its weight with an embedding. None otherwise."""

    def __call__(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Mask = None, cache=None
    ) -> Tensor:
        """Logits (B, T, V)."""

    @abc.abstractmethod
    def hidden_states(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Mask = None, cache=None
    ) -> Tensor:
        """Hidden states (B, T, C), as the head reads them. A cache is extended in place."""

    def make_cache(self) -> Any:
        """An empty cache for generation; None if there is none (each token recomputes the row)."""
        return None

    def embeddings(self) -> list[nn.Embedding]:
        """The embedding tables. They get no weight decay and are not updated by Muon."""
        return [module for module in self.modules() if isinstance(module, nn.Embedding)]

    def standalone_config(self) -> dict[str, Any]:
        """Constructor arguments to change so that a checkpoint needs no other file."""
        return {}

    # Methods of nn.Module that are used here:

    def modules(self) -> Iterator[nn.Module]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def state_dict(self) -> dict[str, Any]: ...


def blocks_of(model: Any) -> list[nn.Module]:
    """The modules of its ModuleLists, such as blocks: what is compiled, and sharded, one by one."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [block for blocks in lists for block in blocks]


def check_length(length: int, max_positions: int | None) -> None:
    """Raise ValueError where a row of ``length`` tokens does not fit the model's positions."""
    if max_positions is not None and length > max_positions:
        problem = f"a row of {length} tokens is longer than the model's {max_positions} positions"
        keys = "data.max_length or samples.self_check.length, or raise model.max_positions"
        raise ValueError(f"{problem}: lower {keys}")


class BaseCausalModel(nn.Module, CausalModel):
    """A :class:`CausalModel` from :meth:`hidden_states` and ``lm_head``, a linear layer without a
    bias. If the logits are not exactly its output, set it to None and override ``forward``."""

    def forward(self, input_ids, position_ids, attention_mask=None, cache=None) -> Tensor:
        assert self.lm_head is not None, "set lm_head, or override forward"
        return self.lm_head(self.hidden_states(input_ids, position_ids, attention_mask, cache))

"""What the models share."""

from typing import Any

from torch import Tensor, nn


class BaseCausalModel(nn.Module):
    """A model in two parts, so that the loss can be computed without the full logits (see
    :func:`causal_lm.objective.chunked_nll`).

    body: (input_ids (B, T), position_ids (B, T), may_attend, and a cache where there are any) ->
        hidden (B, T, C). may_attend is bool (B, T, T), True = may attend; None is plain causal
        within each row.
    head: the linear map from there to logits (B, T, V).
    """

    def forward(self: Any, *inputs: Any) -> Tensor:
        """What ``body`` takes -> logits (B, T, V)."""
        return self.head(self.body(*inputs))

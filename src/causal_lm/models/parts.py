"""What the models share."""

from typing import Any

from torch import Tensor, nn


class BodyAndHead(nn.Module):
    """A model in two parts: ``body``, and the linear map ``head`` from hidden states to logits.

    So the loss can be computed without the full logits (:func:`causal_lm.objective.chunked_nll`).
    """

    def forward(self: Any, *inputs: Any) -> Tensor:
        """What ``body`` takes -> logits (B, T, V)."""
        return self.head(self.body(*inputs))

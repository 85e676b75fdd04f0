"""Fully sharded training (``trainer=fsdp``): each rank keeps a part of every weight, of its gradient
and of its optimizer state, and gathers the weights of a block while it computes with them.

Zhao et al. 2023, https://arxiv.org/abs/2304.11277; here with PyTorch's ``fully_shard``.
"""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only


def shard(model: Any) -> None:
    """Shard a ``CausalModel`` over all ranks: each module of its ModuleLists, such as a block, is a
    unit, and the rest is another. Does nothing where it is sharded already."""
    if isinstance(model, FSDPModule):
        return
    blocks = [b for m in model.modules() if isinstance(m, nn.ModuleList) for b in m]
    for part in (*blocks, model):  # the model last: it takes what the blocks have left
        fully_shard(part)
    register_fsdp_forward_method(model, "hidden_states")


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or the whole one of which a rank has a part; all ranks must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def load_weights(module: nn.Module, weights: dict[str, Any]) -> None:
    """Load whole weights into a module, which may be sharded."""
    set_model_state_dict(module, weights, options=StateDictOptions(full_state_dict=True))


class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for ``fully_shard``, with the checkpoints of every other strategy: one
    file with whole tensors, and an optimizer state in the order of the parameter groups.

    (Lightning's own assumes the order of the model, and cannot read a state that is empty.)
    """

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The state with whole tensors on the CPU of rank zero; all ranks must call it."""

        def gather(part: DTensor) -> Tensor:
            full = part.full_tensor()
            return full.cpu() if self.is_global_zero else full.new_empty(0)

        return tree_map_only(DTensor, gather, optimizer.state_dict())

    def load_checkpoint(self, checkpoint_path: Any, weights_only: Any = None) -> dict[str, Any]:
        """Read a checkpoint of any strategy; load its weights and, in a fit, its optimizer."""
        checkpoint = torch.load(checkpoint_path, "cpu", weights_only=True, mmap=True)
        assert self.model is not None
        load_weights(self.model, checkpoint["state_dict"])
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            optimizer.load_state_dict(shard_state(state, optimizer.param_groups))
        return checkpoint


def shard_state(state: Mapping[str, Any], param_groups: Any) -> dict[str, Any]:
    """A whole optimizer state, sharded like the parameters of these groups."""
    parameters = [p for group in param_groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    sharded = {
        number: {
            name: distribute_tensor(value, p.device_mesh, p.placements)
            if isinstance(value, Tensor) and value.shape == p.shape
            else value
            for name, value in state["state"][number].items()
        }
        for number, p in zip(numbers, parameters, strict=True)
        if number in state["state"]
    }
    return {**state, "state": sharded}

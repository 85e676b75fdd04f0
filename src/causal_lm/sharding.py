"""Fully sharded training (``trainer=fsdp``) by PyTorch's ``fully_shard``: each rank keeps a part of
every weight, of its gradient and of its optimizer state (https://arxiv.org/abs/2304.11277)."""

from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from causal_lm.models.base import blocks_of


def shard(model: Any, device: str) -> None:
    """Shard a ``CausalModel`` over all ranks, unless it is: each module of its ModuleLists, such as
    a block, whose weights are gathered only while they are used; then what these leave."""
    if not isinstance(model, FSDPModule):
        mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
        for part in (*blocks_of(model), model):
            fully_shard(part, mesh=mesh)
        register_fsdp_forward_method(model, "hidden_states")


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or the whole one of which a rank has a part; all ranks must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(own: Any, value: Any) -> Any:
    """This rank's part of a whole ``value``, if ``own`` is a part of a tensor of that shape."""
    is_part = isinstance(own, DTensor) and getattr(value, "shape", None) == own.shape
    return distribute_tensor(value, own.device_mesh, own.placements) if is_part else value


def load_weights(module: nn.Module, weights: dict[str, Any]) -> None:
    """Load whole weights into a module that may be sharded."""
    own = module.state_dict()
    module.load_state_dict({name: part_like(own.get(name), w) for name, w in weights.items()})


class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for sharded modules, with checkpoints that other strategies can read and
    write: whole tensors in one file. (Lightning takes the optimizer state to be in the order of the
    model, not of the parameter groups, and cannot read an empty one.)"""

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        most = None if self.is_global_zero else 0  # all ranks gather, and the first one saves
        return tree_map_only(DTensor, lambda t: whole(t)[:most].cpu(), optimizer.state_dict())

    def load_checkpoint(self, checkpoint_path: Any, weights_only: Any = None) -> dict[str, Any]:
        checkpoint = torch.load(checkpoint_path, "cpu", weights_only=True, mmap=True)
        assert self.model is not None
        load_weights(self.model, checkpoint["state_dict"])
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for number, p in zip(numbers, parameters, strict=True):
                values = saved["state"].get(number, {})
                values |= {name: part_like(p, value) for name, value in values.items()}
            optimizer.load_state_dict(saved)
        return checkpoint

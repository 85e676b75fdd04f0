"""What stands in for the process group while one rank audits alone and the others wait for it."""

from typing import Any

from torch import Tensor
from torch._C._distributed_c10d import FakeWork, ProcessGroup, ReduceOp, Work, _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode

_POWERS = {"sum": 1, "avg": 0, "min": 0, "max": 0, "band": 0, "bor": 0}


class LocalCollectives(TorchDispatchMode):
    """Collectives act as if every rank had the tensors of this one; nothing is sent.

    `used`: whether a tensor was reduced or gathered.

    Raises:
        ValueError: a collective without such a meaning, as between two ranks, is called.
    """

    supports_higher_order_operators = True
    used = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "namespace", "") not in ("c10d", "_c10d_functional"):
            return func(*args, **(kwargs or {}))
        name, done = func._schema.name.split("::")[1], Work.boxed(FakeWork())
        self.used |= "reduce" in name or "gather" in name
        match name:
            case "wait_tensor" | "_wrap_tensor_autograd":
                return args[0]
            case "barrier":
                return done
            case "broadcast_" if ProcessGroup.unbox(args[1]).rank() == args[2]:
                return args[0], done
            case "all_reduce":
                return _reduced(args[0], args[1], _resolve_process_group(args[2]).size())
            case "all_gather_into_tensor":
                return args[0].repeat(args[1], *[1] * (args[0].ndim - 1))
            case "allreduce_":
                operation = ReduceOp.RedOpType(args[2].op()).name
                for t in args[0]:
                    t.copy_(_reduced(t, operation, ProcessGroup.unbox(args[1]).size()))
                return args[0], done
            case "allgather_":
                for outputs, t in zip(args[0], args[1], strict=True):
                    [output.copy_(t) for output in outputs]
                return args[0], done
            case "_allgather_base_":
                args[0].view(-1, args[1].numel()).copy_(args[1].reshape(1, -1))
                return args[0], done
        raise ValueError(f"the loss calls the collective {name}, which one rank cannot do alone")


def _reduced(t: Tensor, operation: str, ranks: int) -> Tensor:
    """The reduction of one tensor that all ranks have."""
    if (power := _POWERS.get(operation.lower())) is None:
        raise ValueError(f"the loss reduces by {operation}, which one rank cannot do alone")
    return t * ranks**power

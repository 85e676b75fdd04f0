"""What stands in for the process group while one rank audits alone and the others wait for it."""

from typing import Any

from torch._C._distributed_c10d import FakeWork, ProcessGroup, ReduceOp, Work
from torch.utils._python_dispatch import TorchDispatchMode


class LocalCollectives(TorchDispatchMode):
    """Collectives act as if every rank had the tensors of this one; nothing is sent.

    `used`: whether a tensor was reduced or gathered. ValueError where there is no such meaning, as
    between two ranks.
    """

    used = False
    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "namespace", "") not in ("c10d", "_c10d_functional"):
            return func(*args, **(kwargs or {}))
        name, done = func._schema.name.split("::")[1], Work.boxed(FakeWork())
        if name == "barrier":
            return done
        if name == "broadcast_" and ProcessGroup.unbox(args[1]).rank() == args[2]:
            return args[0], done
        operation = ReduceOp.RedOpType(args[2].op()).name if name == "allreduce_" else ""
        if operation == "SUM":
            [t.mul_(ProcessGroup.unbox(args[1]).size()) for t in args[0]]
        elif name == "allgather_":
            [out.copy_(t) for outputs, t in zip(*args[:2], strict=True) for out in outputs]
        elif name == "_allgather_base_":
            args[0].view(-1, args[1].numel()).copy_(args[1].reshape(1, -1))
        elif operation not in ("AVG", "MIN", "MAX"):
            what = f"the loss calls the collective {name} {operation}".rstrip()
            raise ValueError(f"{what}, which one rank cannot do alone")
        self.used = True
        return args[0], done

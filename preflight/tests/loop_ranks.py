"""Two ranks on the CPU: prints what `LoopProbe` finds in each loop. Run by test_loop_probe.py."""

import json
import os
import warnings

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from causal_preflight.lightning import PreflightError
from causal_preflight.loop_probe import LoopProbe
from loop_cases import base, gradients, settings


class SeededByRank(base.Right):
    """Weights are drawn anew after the strategy has made them equal."""

    def on_train_start(self):
        torch.manual_seed(self.global_rank)
        nn.init.normal_(self.net.norm.bias)


class OwnGradients(base.Right):
    """Each rank steps on its own gradients: equal weights at the start, not after a step."""

    def on_before_optimizer_step(self, optimizer):
        for p in self.parameters():
            p.grad += 0.01 * self.global_rank


class BufferPerRank(base.Right):
    """Right: statistics of each rank's own rows."""

    def make(self):
        net = base.Net()
        net.norm = nn.Sequential(net.norm, gradients.Rows(nn.BatchNorm1d(base.C)))
        return net


# Faults that one rank shows as well, and their right twins.
WRONG = gradients.SomeParameters, gradients.NotZeroed, settings.Copied, settings.IntegerDivision
TWINS = gradients.Frozen, settings.Untied, settings.Scheduled


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for case in (base.Right, BufferPerRank, SeededByRank, OwnGradients, *WRONG, *TWINS):
        for manual in (False, True):
            probe, stopped = LoopProbe(), False
            try:
                strategy = DDPStrategy(process_group_backend="gloo", broadcast_buffers=False)
                base.fit(case(manual), probe, strategy=strategy, devices=2)
            except PreflightError:
                stopped = True
            found = [(f.probe, "before" in f.seen) for f in probe.report.findings]
            record = (case.__name__, manual, found, stopped, "ranks" in probe.report.passed)
            with open(f"{os.environ['RECORDS']}/{os.environ.get('LOCAL_RANK', 0)}", "a") as file:
                print(json.dumps(record), file=file)


if __name__ == "__main__":
    main()

"""What Lightning's Trainer costs beside a bare loop over the same batches; see benchmark.py."""

import itertools
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, cast

from causal_lm import config

MODEL = ["model=llama", "model.d_model=256", "model.n_heads=4", "model.n_kv_heads=4",
         "model.n_layers=4", "model.d_ff=688"]  # fmt: skip
DATA = ["data=docstrings", "data.layout=packed", "data.max_length=256", "data.batch_size=32"]


def measure(rounds: int, steps: int, overrides: list[str]) -> dict[str, list[float]]:
    """Seconds of ``steps`` optimizer steps in each round, of the Trainer and of the bare loop.

    The Trainer has this project's progress bar, metrics.csv and statistics. Each loop starts from
    the same weights and takes one more step, untimed, before.

    Raises:
        AssertionError: the loops end in different weights, so they did not do the same.
    """
    import torch

    from causal_lm.build import prepare

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    cfg = config.load([*MODEL, *DATA, "trainer=cpu", *overrides, f"trainer.max_steps={steps + 1}"])
    data, _, module = prepare(cfg)
    batches = list(itertools.islice(data.train_dataloader(), steps + 1))
    loader = torch.utils.data.DataLoader(cast(Any, batches), batch_size=None)
    initial = {name: value.clone() for name, value in module.state_dict().items()}
    loops = {"Trainer": _trainer_loop, "bare loop": _bare_loop}
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        ended = []
        for name, loop in loops.items():
            module.load_state_dict(initial)
            module.zero_grad()
            seconds[name].append(loop(cfg, module, loader))
            ended.append({key: value.clone() for key, value in module.state_dict().items()})
        torch.testing.assert_close(*ended, atol=1e-3, rtol=0)
    return seconds


def _trainer_loop(cfg: Any, module: Any, batches: Any) -> float:
    import lightning as L

    from causal_lm.build import make_trainer
    from causal_lm.callbacks.progress import StepBar
    from causal_lm.callbacks.run_statistics import RunStatistics
    from causal_lm.metrics_csv import MetricsCSV

    ends = []

    class Clock(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        metrics = MetricsCSV(Path(folder), 0)
        callbacks = [metrics, RunStatistics(), StepBar(), Clock()]
        trainer = make_trainer(cfg, callbacks, [metrics], enable_checkpointing=False)
        trainer.fit(module, batches)
    return ends[-1] - ends[0]


def _bare_loop(cfg: Any, module: Any, batches: Any) -> float:
    import torch
    from torch.optim.lr_scheduler import LambdaLR

    from causal_lm.optim.parameter_groups import parameter_groups

    optimizer = module.make_optimizer(parameter_groups(module.model))
    schedule = LambdaLR(optimizer, module.make_scheduler(len(batches)))
    ends = []
    module.train()
    for batch in batches:
        loss = module.accumulated_loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), cfg.trainer.gradient_clip_val)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        loss.item()
        ends.append(time.perf_counter())
    return ends[-1] - ends[0]


def table_of(seconds: dict[str, list[float]], steps: int) -> str:
    """Milliseconds a step, and the speed of the Trainer in that of the bare loop."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    lines = [f"{name}: {1000 * value / steps:.1f} ms a step" for name, value in medians.items()]
    return "\n".join([*lines, f"{medians['bare loop'] / medians['Trainer']:.3f} of its speed"])

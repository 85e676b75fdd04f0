"""Ratios, measured side by side in one run; medians over interleaved rounds.

python scripts/benchmark.py layouts    real tokens per second of each layout, on docstrings
python scripts/benchmark.py loss       time and peak memory of head and loss, whole and in chunks
python scripts/benchmark.py text data.path=FILE.txt    experiment=text_cpu beside nanoGPT's recipe
"""

import argparse
import itertools
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable

from causal_lm import cli, config
from causal_lm.report.table import table


def layouts(args: argparse.Namespace) -> None:
    """Optimizer steps through the very objects that a run is made of, without a trainer."""
    from causal_lm.build import make_optimizer, prepare

    steps = {}
    for layout in ("padded", "bucketed", "packed"):
        overrides = ["data=docstrings", "data.max_length=512", "data.batch_size=32"]
        cfg = config.load([*overrides, f"data.layout={layout}", *args.overrides])
        data, _, module = prepare(cfg)
        module.to(args.device)
        optimizer = make_optimizer(cfg)(module.named_parameters())
        steps[layout] = _epoch(module, optimizer, itertools.cycle(data.train_dataloader()), args)
    for step in steps.values():
        step()  # warm up
    rates: dict[str, list[float]] = {name: [] for name in steps}
    shares: dict[str, float] = {}
    for _ in range(args.rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            real, slots = step()
            rates[name].append(real / (time.perf_counter() - started))
            shares[name] = real / slots
    base = statistics.median(rates["padded"])
    rows = [["layout", "real tokens/s", "× padded", "slots that are real"]]
    for name, values in rates.items():
        rate = statistics.median(values)
        rows.append([name, f"{rate:,.0f}", f"{rate / base:.2f}", f"{100 * shares[name]:.0f} %"])
    print(f"{table(rows)}\n\n{args.rounds} rounds of {args.steps} steps, {_machine(args.device)}")


def _epoch(module, optimizer, batches, args) -> Callable[[], tuple[int, int]]:
    """A function that takes some steps and returns the real targets and the slots in them."""
    from causal_lm import objective

    def go() -> tuple[int, int]:
        real = slots = 0
        for batch in itertools.islice(batches, args.steps):
            real += int(objective.has_target(batch.document_ids).sum())
            slots += batch.input_ids.numel()
            moved = type(batch)(*(part if part is None else part.to(args.device) for part in batch))
            module.accumulated_loss(moved).backward()
            optimizer.step()
            optimizer.zero_grad()
        return real, slots

    return go


LOSSES = ("whole", "chunks of 256", "chunks of 256, half PAD", "torch's own", "checkpointed chunks")


def loss(args: argparse.Namespace) -> None:
    """Each in a process of its own, so that one's memory is not another's."""
    context = multiprocessing.get_context("spawn")
    took: dict[str, list[float]] = {name: [] for name in LOSSES}
    peaks: dict[str, float] = dict.fromkeys(LOSSES, 0.0)
    for _ in range(args.rounds):
        for name in LOSSES:
            with context.Pool(1) as pool:
                seconds, peak, off = pool.apply(_loss, (name, args.device))
            took[name].append(seconds)
            peaks[name] = max(peaks[name], peak)
            assert off < 1e-5, f"{name} is off by {off}"
    base, most = statistics.median(took["whole"]), peaks["whole"]
    rows = [["8,192 tokens, width 256, 50,257 ids", "seconds", "× whole", "peak MiB", "whole ×"]]
    for name, values in took.items():
        seconds = statistics.median(values)
        rows.append([name, f"{seconds:.2f}", f"{seconds / base:.2f}", f"{peaks[name]:,.0f}",
                     f"1/{most / peaks[name]:.0f}"])  # fmt: skip
    print(f"{table(rows)}\n\nforward and backward, {args.rounds} rounds, {_machine(args.device)}")


def _loss(name: str, device: str) -> tuple[float, float, float]:
    """Seconds, peak MiB above the inputs, and how far the loss is from plain cross-entropy."""
    import torch
    import torch.nn.functional as F
    from torch.utils.checkpoint import checkpoint

    from causal_lm import objective

    torch.manual_seed(0)
    hidden = torch.randn(1, 8192, 256, device=device, requires_grad=True)
    head = (torch.randn(50257, 256, device=device) / 16).requires_grad_()
    labels = torch.randint(0, 50257, (1, 8192), device=device)
    if "half PAD" in name:
        labels[:, ::2] = objective.IGNORE
    weights = torch.ones_like(labels, dtype=torch.float32)

    def value() -> torch.Tensor:
        if name == "whole":
            return objective.weighted_nll(F.linear(hidden, head), labels, weights)
        if name == "torch's own":
            options = torch.nn.LinearCrossEntropyOptions()
            return F.linear_cross_entropy(
                hidden[0], head, labels[0], reduction="sum", options=options
            )
        if name == "checkpointed chunks":
            parts = zip(hidden[0].split(256), labels[0].split(256), strict=True)

            def part(x, y):
                return F.cross_entropy(F.linear(x, head), y, reduction="sum")

            return sum(checkpoint(part, x, y, use_reentrant=False) for x, y in parts)
        return objective.chunked_nll(hidden, head, labels, weights, 256)

    F.linear(hidden[:, :256], head[:256]).sum().backward()  # libraries load, pools fill
    hidden.grad = head.grad = None
    with _Peak(device) as peak:
        started = time.perf_counter()
        got = value()
        got.backward()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    with torch.no_grad():
        whole = sum(
            F.cross_entropy(F.linear(x, head), y, reduction="sum").double()
            for x, y in zip(hidden[0].split(512), labels[0].split(512), strict=True)
        )
    return seconds, peak.mib, abs(float(got.detach()) / float(whole) - 1)


class _Peak:
    """Most memory in use meanwhile, above what was in use before: MiB."""

    def __init__(self, device: str) -> None:
        self.device, self.mib = device, 0.0

    def __enter__(self) -> "_Peak":
        if self.device != "cpu":
            import torch

            torch.cuda.reset_peak_memory_stats()
        self._before, self._done = self._now(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _now(self) -> float:
        if self.device != "cpu":
            import torch

            return torch.cuda.max_memory_allocated() / 2**20
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * 4096 / 2**20

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.mib = max(self.mib, self._now() - self._before)

    def __exit__(self, *_: object) -> None:
        self.mib = max(self.mib, self._now() - self._before)
        self._done.set()
        self._thread.join()


def text(args: argparse.Namespace) -> None:
    """Both train to the end, taking turns; each has its own clock, which stops meanwhile."""
    import lightning as L
    from yardstick import Yardstick

    from causal_lm.build import make_trainer, prepare
    from causal_lm.callbacks.run_statistics import RunStatistics

    cfg = config.load(
        ["experiment=text_cpu", "data=text", "trainer.enable_progress_bar=false", *args.overrides]
    )
    data, corpus, module = prepare(cfg)
    yardstick = Yardstick(corpus.train.tokens, corpus.val.tokens, args.yardstick_steps)

    class Turns(L.Callback):
        def on_train_batch_end(self, trainer, *_) -> None:
            turn, rest = divmod(trainer.global_step * args.rounds, trainer.max_steps)
            if rest < args.rounds:
                yardstick.advance(args.yardstick_steps * turn // args.rounds)

    meter = RunStatistics()
    trainer = make_trainer(cfg, callbacks=[meter, Turns()], enable_checkpointing=False)
    trainer.fit(module, data)
    (figures,) = trainer.validate(module, data, verbose=False)
    ours, theirs = meter.seconds_train - yardstick.seconds, yardstick.seconds
    rows = [["", "parameters", "steps", "ms a step", "seconds", "nats a token"]]
    for name, model, steps, seconds, nats in (
        ("nanoGPT's recipe", yardstick.model, args.yardstick_steps, theirs, yardstick.loss()),
        ("text_cpu", module.model, trainer.global_step, ours, figures["val/loss"]),
    ):
        size = sum(p.numel() for p in model.parameters())
        rows.append([name, f"{size:,}", f"{steps:,}", f"{1000 * seconds / steps:.1f}",
                     f"{seconds:.1f}", f"{nats:.3f}"])  # fmt: skip
    print(f"{table(rows)}\n\n1/{theirs / ours:.1f} of the time, {_machine('cpu')}")


def _machine(device: str) -> str:
    import torch

    if device == "cpu":
        return f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}"
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["layouts", "loss", "text"])
    parser.add_argument("overrides", nargs="*", help="of train.py, for layouts and text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps a round")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--yardstick-steps", type=int, default=2000, help="for text")
    args = parser.parse_intermixed_args()
    {"layouts": layouts, "loss": loss, "text": text}[args.what](args)


if __name__ == "__main__":
    with cli.one_line_errors():
        main()

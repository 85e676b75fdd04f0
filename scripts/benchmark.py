"""Measure ratios of speed and memory: medians over alternating rounds.

python scripts/benchmark.py layouts    real tokens per second of each layout, on docstrings
python scripts/benchmark.py loss       seconds and peak memory of head and loss, whole and in chunks
python scripts/benchmark.py peers --nanogpt FOLDER     beside other people's models (peers.py)
python scripts/benchmark.py gpu --device cuda --nanogpt FOLDER     model=llama_124m beside GPT-2
python scripts/benchmark.py trainer    Lightning's Trainer beside a bare loop, same batches
python scripts/benchmark.py start      from a command to its first optimizer step
python scripts/benchmark.py tokenize data.path=FILE.txt    lines beside datasets.map
python scripts/benchmark.py text data.path=FILE.txt    experiment=text_cpu beside nanoGPT's recipe
"""

import argparse
import itertools
import multiprocessing
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from causal_lm import cli, config
from causal_lm.report.files import write_json
from causal_lm.report.table import table


def layouts(args: argparse.Namespace) -> None:
    """Real tokens per second of each layout: the objects of a run, without a trainer."""
    from causal_lm.build import make_optimizer, prepare
    from causal_lm.optim.parameter_groups import parameter_groups

    take_steps = {}
    for layout in ("padded", "bucketed", "packed"):
        overrides = ["data=docstrings", "data.max_length=512", "data.batch_size=32"]
        cfg = config.load([*overrides, f"data.layout={layout}", *args.overrides])
        data, _, module = prepare(cfg)
        module.to(args.device)
        optimizer = make_optimizer(cfg)(parameter_groups(module.model))
        batches = itertools.cycle(data.train_dataloader())
        take_steps[layout] = _step_taker(module, optimizer, batches, args)
    for take in take_steps.values():
        take()  # warm up
    rates: dict[str, list[float]] = {name: [] for name in take_steps}
    real_fractions: dict[str, float] = {}
    for _ in range(args.rounds):
        for name, take in take_steps.items():
            started = time.perf_counter()
            real, slots = take()
            rates[name].append(real / (time.perf_counter() - started))
            real_fractions[name] = real / slots
    base = statistics.median(rates["padded"])
    rows = [["layout", "real tokens/s", "× padded", "slots that are real"]]
    for name, values in rates.items():
        rate = statistics.median(values)
        rows.append(
            [
                name,
                f"{rate:,.0f}",
                f"{rate / base:.2f}",
                f"{100 * real_fractions[name]:.0f} %",
            ]
        )
    print(f"{table(rows)}\n\n{args.rounds} rounds of {args.steps} steps, {_machine(args.device)}")


def _step_taker(
    module: Any, optimizer: Any, batches: Iterator, args: argparse.Namespace
) -> Callable[[], tuple[int, int]]:
    """A function that takes ``args.steps`` steps and returns the targets and slots in them."""
    from lightning.fabric.utilities import move_data_to_device

    from causal_lm import objective

    def take() -> tuple[int, int]:
        real = slots = 0
        for batch in itertools.islice(batches, args.steps):
            real += int(objective.has_target(batch.document_ids).sum())
            slots += batch.input_ids.numel()
            module.accumulated_loss(move_data_to_device(batch, args.device)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return real, slots

    return take


LOSSES = ("whole", "chunks of 256", "chunks of 256, half PAD", "torch's own", "checkpointed chunks")


def loss(args: argparse.Namespace) -> None:
    """Seconds and peak memory of head and loss, each way in a process of its own."""
    context = multiprocessing.get_context("spawn")
    import torch

    has_own = hasattr(torch.nn, "LinearCrossEntropyOptions")  # a recent API
    names = [name for name in LOSSES if has_own or name != "torch's own"]
    took: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, float] = dict.fromkeys(names, 0.0)
    for _ in range(args.rounds):
        for name in names:
            with context.Pool(1) as pool:
                seconds, peak, error = pool.apply(_measure_loss, (name, args.device))
            took[name].append(seconds)
            peaks[name] = max(peaks[name], peak)
            assert error < 1e-5, f"{name} is off by {error}"
    base, most = statistics.median(took["whole"]), peaks["whole"]
    rows = [["8,192 tokens, width 256, 50,257 ids", "seconds", "× whole", "peak MiB", "whole ×"]]
    for name, values in took.items():
        seconds = statistics.median(values)
        rows.append([name, f"{seconds:.2f}", f"{seconds / base:.2f}", f"{peaks[name]:,.0f}",
                     f"1/{most / peaks[name]:.0f}"])  # fmt: skip
    print(f"{table(rows)}\n\nforward and backward, {args.rounds} rounds, {_machine(args.device)}")


def _measure_loss(name: str, device: str) -> tuple[float, float, float]:
    """Seconds, peak MiB above the inputs, and relative error against plain cross-entropy."""
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

    F.linear(hidden[:, :256], head[:256]).sum().backward()  # load libraries, fill memory pools
    hidden.grad = head.grad = None
    with _PeakMemory(device) as peak:
        started = time.perf_counter()
        computed = value()
        computed.backward()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    with torch.no_grad():
        expected = sum(
            F.cross_entropy(F.linear(x, head), y, reduction="sum").double()
            for x, y in zip(hidden[0].split(512), labels[0].split(512), strict=True)
        )
    return seconds, peak.mib, abs(float(computed.detach()) / float(expected) - 1)


class _PeakMemory:
    """Context that records the peak of memory in use inside it, above what was in use before.

    ``mib`` is in MiB. On a CPU a thread reads the resident size every 2 ms.
    """

    def __init__(self, device: str) -> None:
        self.device, self.mib = device, 0.0

    def __enter__(self) -> "_PeakMemory":
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
    """Seconds and loss of ``experiment=text_cpu`` beside nanoGPT's recipe."""
    from nanogpt_baseline import compare

    compare(args, _machine("cpu"))


def peers(args: argparse.Namespace) -> None:
    """Targets per second beside other people's models; ``--json`` keeps the figures."""
    try:
        from peers import measure, table_of
    except ImportError as error:
        raise FileNotFoundError("scripts/peers.py is not part of this project") from error

    _show(measure(args.rounds, args.steps, args.nanogpt, _machine("cpu")), table_of, args.json)


def gpu(args: argparse.Namespace) -> None:
    """Tokens per second and utilization beside nanoGPT's GPT-2; ``--json`` keeps the figures."""
    from gpu_throughput import measure, table_of

    _show(measure(args, _machine(args.device), _PeakMemory), table_of, args.json)


def trainer(args: argparse.Namespace) -> None:
    """Milliseconds a step of Lightning's Trainer, and of a bare loop over the same batches."""
    from trainer_overhead import measure, table_of

    print(table_of(measure(args.rounds, args.steps, args.overrides), args.steps))
    print(f"{args.rounds} rounds of {args.steps} steps, {_machine('cpu')}")


def start(args: argparse.Namespace) -> None:
    """Seconds from the start of a command to its first optimizer step."""
    from start_time import measure

    print(f"{measure(args.rounds)}\n\n{args.rounds} rounds, {_machine('cpu')}")


def tokenize(args: argparse.Namespace) -> None:
    """MB/s of tokenizing and packing the lines of ``data.path``, beside ``datasets.map``."""
    from tokenize_speed import measure

    files = [Path(o.removeprefix("data.path=")) for o in args.overrides if "data.path=" in o]
    if not files or not files[0].is_file():
        raise FileNotFoundError("name a text file: data.path=FILE.txt")
    kinds = [o.partition("=")[2] for o in args.overrides if o.startswith("data.tokenizer=")]
    if (kind := [*kinds, "bytes"][0]) not in ("bytes", "bpe"):
        raise ValueError(f"data.tokenizer must be bytes or bpe here, not {kind}")
    made = f"{args.rounds} rounds, tokens are {kind}, {_machine('cpu')}"
    print(f"{measure(args.rounds, files[0], kind)}\n\n{made}")


def _show(result: dict[str, Any], table_of: Callable, path: Path | None) -> None:
    if path is not None:
        write_json(path, result)
    print(table_of(result))


def _processor() -> str:
    """The name of the CPU."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _machine(device: str) -> str:
    """Processor or GPU, and the version of torch."""
    import torch

    if device == "cpu":
        threads = f"{torch.get_num_threads()} CPU threads"
        return f"{_processor()}, {threads}, torch {torch.__version__}"
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", choices=["layouts", "loss", "peers", "gpu", "trainer", "start", "tokenize", "text"]
    )
    parser.add_argument("overrides", nargs="*", help="of train.py, not for loss and peers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps a round")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--baseline-steps", type=int, default=2000, help="for text")
    parser.add_argument("--target", type=float, help="for text: the time to so many nats a token")
    parser.add_argument("--nanogpt", type=Path, help="folder of nanoGPT's model.py, for peers, gpu")
    parser.add_argument("--json", type=Path, help="where to write the figures, for peers, gpu")
    sizes = parser.add_argument_group("for gpu")
    sizes.add_argument("--row", type=int, default=1024, help="slots of a row")
    sizes.add_argument("--batch", type=int, default=32, help="rows of a batch")
    sizes.add_argument("--vocab", type=int, default=50304, help="ids")
    sizes.add_argument("--warmup", type=int, default=5, help="steps before the clock starts")
    sizes.add_argument("--compile", action="store_true", help="compile both models")
    sizes.add_argument("--peak", type=float, help="TFLOP/s of the device, for its utilization")
    args = parser.parse_intermixed_args()
    globals()[args.what](args)


if __name__ == "__main__":
    with cli.one_line_errors():
        main()

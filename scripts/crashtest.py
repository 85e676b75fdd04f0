"""Kill training runs with SIGKILL at random moments, continue them, and compare them bit for bit.

python scripts/crashtest.py --kills 50 --seed 0
"""

import argparse
import contextlib
import csv
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # no thread pool before a fork, nor after it

import torch

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "trainer=cpu", "trainer.max_steps=40", "trainer.val_check_interval=10",
    "trainer.enable_progress_bar=false", "preflight.on_fault=off",
    "data.source.train_documents=60", "data.max_length=20",
    "data.source.val_documents=20", "data.batch_size=4", "model.d_model=16", "model.d_ff=16",
    "samples.count=4", "samples.prompts=2", "samples.per_prompt=2", "samples.self_check.count=3",
    "ckpt_path=auto", "callbacks.checkpoint.every_n_steps=7",
]  # fmt: skip
"""60 documents are 15 micro-batches, so that runs of 40 steps end inside an epoch."""
ACCUMULATE = ["trainer.accumulate_grad_batches=4", "trainer.max_steps=20"]
TWO_RANKS = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=2"]
CASES = {
    "padded": [],
    "bucketed": ["data.layout=bucketed", *ACCUMULATE],
    "packed": ["data.layout=packed", *ACCUMULATE],
    "workers": ["data.num_workers=2", *ACCUMULATE],
    "packed_workers": ["data.num_workers=2", "data.layout=packed"],
    "muon": ["optimizer=muon", "data.layout=bucketed"],
    "muon_accumulate": ["optimizer=muon", *ACCUMULATE],
    "dropout": ["model.dropout=0.1"],
    "dropout_packed": ["model.dropout=0.1", "data.layout=packed", *ACCUMULATE],
    "dropout_workers": ["model.dropout=0.1", "data.num_workers=2", *ACCUMULATE],
    "ranks": [*TWO_RANKS, "data.layout=bucketed"],
}
IGNORED = re.compile(
    r"second|time|ckpt_path|\.ckpt/epoch$"
    r"|/loops/.*(epoch_progress|zero_grad|val_loop|_batches_that_stepped)"
)
"""Places of values that may differ: the clock's, the checkpoint to continue from, and counters of
Lightning's that count what is repeated or cut short, and that nothing here reads."""
TIMEOUT = 180  # seconds, for a run that should end by itself
DELAY = 0.01  # seconds at most between the change of a file and the kill


class Moment(NamedTuple):
    """When to kill: some seconds after the start, or at the n-th change of a file."""

    seconds: float = math.inf
    change: float = math.inf
    delay: float = 0.0

    def __str__(self) -> str:
        return f"change {self.change}" if self.change < math.inf else f"{self.seconds:.2f} s"


class Run(NamedTuple):
    """How a command ended: its exit code (-9: killed), and what it did to the directory."""

    code: int
    seconds: float
    first_change: float  # seconds
    changes: int


class Bench:
    """One directory in which all runs take place, so that the paths that they store are equal."""

    def __init__(self, folder: Path, fork: bool) -> None:
        self.folder, self.fork, self.directory = folder, fork, folder / "run"
        self.references: dict[str, Run] = {}
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")

    def start(self, case: str, log: Path) -> int:
        """Start the command of a case in a process group of its own; return its process id.

        A fork of this process, which has imported torch and lightning, runs ``train.py`` without
        loading them anew. With two ranks, which a command starts by itself, it is a new process.
        """
        arguments = [*SMALL, *CASES[case], f"hydra.run.dir={self.directory}"]
        if not self.fork or "trainer.devices=2" in arguments:
            with log.open("ab") as file:
                return subprocess.Popen(
                    [sys.executable, str(ROOT / "train.py"), *arguments],
                    cwd=ROOT, stdout=file, stderr=file, start_new_session=True,
                ).pid  # fmt: skip
        import causal_lm.fit  # noqa: F401

        sys.stdout.flush()
        if pid := os.fork():
            return pid
        os.setsid()
        os.chdir(ROOT)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.argv[:] = [str(ROOT / "train.py"), *arguments]
        code: Any = 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as error:
            code = error.code
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))

    def run(self, case: str, log: Path, moment: Moment = Moment()) -> Run:  # noqa: B008
        """Run the command of a case, and kill its process group at ``moment``."""
        pid, started = self.start(case, log), time.perf_counter()
        seen, first, changes, kill_at = files(self.directory), math.inf, 0, moment.seconds
        try:
            while True:
                seconds = time.perf_counter() - started
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    return Run(os.waitstatus_to_exitcode(status), seconds, first, changes)
                now = files(self.directory)
                changes += len(now - seen)
                if now != seen:
                    first, seen = min(first, seconds), now
                if changes >= moment.change and kill_at == math.inf:
                    kill_at = seconds + moment.delay
                if seconds >= min(kill_at, TIMEOUT):
                    os.killpg(pid, signal.SIGKILL)
                time.sleep(0.001)
        finally:  # workers and ranks that a failed command leaves, and all at Ctrl-C
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

    def reference(self, case: str) -> Run:
        """The uninterrupted run of a case; its directory is kept beside, under the case's name."""
        if case not in self.references:
            log = self.folder / f"{case}.log"
            shutil.rmtree(self.directory, ignore_errors=True)
            run = self.run(case, log)
            if run.code:
                sys.exit(f"{case} fails without a kill:\n{log.read_text()}")
            self.directory.rename(self.folder / case)
            self.references[case] = run
        return self.references[case]

    def kill(self, number: int, case: str, draw: random.Random) -> bool:
        """Kill a run once or twice, continue it to the end, print whether it equals the other."""
        whole = self.reference(case)
        log, written = self.folder / f"{number}.log", self.directory / "checkpoints"
        while True:
            shutil.rmtree(self.directory, ignore_errors=True)
            moments = [draw_moment(draw, whole, whole.first_change)]
            if self.run(case, log, moments[0]).code == -signal.SIGKILL:
                break  # otherwise it has ended before
        in_write = any(written.glob(".*"))
        if draw.random() < 0.5:  # the continued run, too
            moments.append(draw_moment(draw, whole, 0.0))
            self.run(case, log, moments[-1])
            in_write |= any(written.glob(".*"))
        last = self.run(case, log)
        if last.code:
            found = [f"exit code {last.code}: {log.read_text().strip().splitlines()[-1]}"]
        else:
            found = list(compare(self.folder / case, self.directory))
        steps = re.findall(r"from step (\d+)", log.read_text()) or ["0"]
        where = " and ".join(map(str, moments)) + (", in a checkpoint's write" if in_write else "")
        print(f"{number:3} {case}: killed at {where}; continued from step {steps[-1]}: ", end="")
        print("identical" if not found else "; ".join(found[:5]), flush=True)
        if found:
            self.directory.rename(self.folder / f"{number}")
        return not found


def draw_moment(draw: random.Random, whole: Run, earliest: float) -> Moment:
    """Half of the moments are spread over the run's duration, half over its changes of files.

    Files change at evaluations and in writes of checkpoints.
    """
    if draw.random() < 0.5:
        return Moment(seconds=draw.uniform(earliest, whole.seconds))
    return Moment(change=draw.randint(1, whole.changes), delay=draw.uniform(0, DELAY))


def files(directory: Path) -> set[tuple[str, int, int]]:
    """(path, time of its last change, size) of every file below ``directory``."""
    found = set()
    for folder in (directory, directory / "checkpoints", directory / "samples"):
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(folder):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    found.add((entry.path, status.st_mtime_ns, status.st_size))
    return found


def compare(expected: Path, found: Path) -> Iterator[str]:
    """What differs between the files of two runs; nothing that depends on the clock."""
    return differences(contents_of(expected), contents_of(found))


def contents_of(directory: Path) -> dict[str, Any]:
    """What the files of a run hold, by their names: checkpoints, rows, figures, texts."""
    contents: dict[str, Any] = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_dir() or path.suffix == ".log" or name.startswith(".hydra"):
            continue
        if path.name.startswith("."):  # there must be no other one, as a temporary file is
            contents[name] = None
        elif path.suffix == ".ckpt":
            contents[name] = torch.load(path, weights_only=True)
        elif path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8") as file:
                contents[name] = list(csv.DictReader(file))
        elif path.suffix == ".json":
            contents[name] = json.loads(path.read_text(encoding="utf-8"))
        else:
            lines = path.read_text(encoding="utf-8").splitlines()
            contents[name] = [line for line in lines if not line.startswith("ckpt_path:")]
    return contents


def differences(expected: Any, found: Any, where: str = "") -> Iterator[str]:
    """The places at which two nested structures are not equal to the bit."""
    if type(expected) is not type(found):
        yield f"{where} is {type(found).__name__}, not {type(expected).__name__}"
    elif isinstance(expected, Mapping):
        for key in sorted({*expected} ^ {*found}, key=str):
            yield f"{where}/{key} is {'missing' if key in expected else 'too much'}"
        for key in expected:
            place = f"{where}/{key}"
            if key in found and (".csv/" in place or not IGNORED.search(place)):
                yield from differences(expected[key], found[key], place)
    elif isinstance(expected, list | tuple):
        if len(expected) != len(found):
            yield f"{where} has {len(found)} items, not {len(expected)}"
        for number, (one, other) in enumerate(zip(expected, found, strict=False)):
            yield from differences(one, other, f"{where}/{number}")
    elif isinstance(expected, torch.Tensor):
        same = expected.dtype == found.dtype and expected.shape == found.shape
        bits = [tensor.reshape(-1).view(torch.uint8) for tensor in (expected, found)]
        if not (same and torch.equal(*bits)):
            yield f"{where} has other numbers"
    elif repr(expected) != repr(found):  # NaN equals NaN
        yield f"{where} is {found!r:.80}, not {expected!r:.80}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="runs to kill")
    parser.add_argument("--seed", type=int, default=0, help="of cases and moments")
    parser.add_argument(
        "--case", choices=CASES, action="append", help="may be repeated; none: all cases, in turn"
    )
    parser.add_argument(
        "--no-fork", action="store_true", help="start a new process for each run: slower"
    )
    args = parser.parse_args()
    folder, draw = Path(tempfile.mkdtemp(prefix="crashtest_")), random.Random(args.seed)
    bench, identical = Bench(folder, fork=not args.no_fork), 0
    cases: list[str] = args.case or [*CASES]
    order: list[str] = []
    for number in range(args.kills):
        if not order:
            order = draw.sample(cases, len(cases))
        identical += bench.kill(number, order.pop(), draw)
    print(f"{identical} of {args.kills} bit-identical")
    if identical < args.kills:
        sys.exit(f"the runs that differ are kept in {folder}, each under its number")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()

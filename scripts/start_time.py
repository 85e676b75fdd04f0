"""Seconds from the start of train.py to its first optimizer step, beside importing Lightning."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L

from causal_lm.report.table import table

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
RUNS = {
    "python train.py experiment=fix": ["experiment=fix"],
    "python train.py data=docstrings": ["data=docstrings"],
    "python train.py experiment=text_cpu data=docstrings": [
        "experiment=text_cpu", "data=docstrings",
    ],
}  # fmt: skip
TIME_FILE = "CAUSAL_LM_FIRST_STEP"


class FirstStep(L.Callback):
    """Writes the time at the end of the first optimizer step, and ends the process."""

    def on_train_batch_end(self, *_: Any) -> None:
        Path(os.environ[TIME_FILE]).write_text(str(time.time()), encoding="utf-8")
        os._exit(0)


def measure(rounds: int) -> str:
    """The table of medians, in turns; the first turn, which fills caches, does not count."""
    names = ["import lightning", *RUNS]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names:
            took = _import_lightning() if name not in RUNS else _first_step(RUNS[name])
            if turn:
                seconds[name].append(took)
    medians = {name: statistics.median(took) for name, took in seconds.items()}
    base = medians["import lightning"]
    rows = [["", "seconds", "× import lightning"]]
    rows += [[name, f"{took:.1f}", f"{took / base:.2f}"] for name, took in medians.items()]
    return table(rows)


def _import_lightning() -> float:
    started = time.time()
    subprocess.run([sys.executable, "-c", "import lightning"], check=True)
    return time.time() - started


def _first_step(overrides: Sequence[str]) -> float:
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "time")
        command = [sys.executable, str(TRAIN), *overrides, f"hydra.run.dir={folder}/run",
                   "+callbacks.first._target_=start_time.FirstStep"]  # fmt: skip
        started = time.time()
        done = subprocess.run(
            command, env=os.environ | {TIME_FILE: str(file), "PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if not file.exists():
            raise ChildProcessError(done.stderr.strip() or "train.py ended before its first step")
        return float(file.read_text(encoding="utf-8")) - started

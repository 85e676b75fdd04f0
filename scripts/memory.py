"""Measure whether a run's memory grows with its corpus: train on a small and on a large text file.

python scripts/memory.py --large 1000
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", type=int, default=10, help="MB of the small file")
    parser.add_argument("--large", type=int, default=300, help="MB of the large file")
    parser.add_argument("--steps", type=int, default=300, help="training steps of each run")
    parser.add_argument("overrides", nargs="*", help="of train.py, such as data.unit=file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        peaks = [peak(Path(folder), size, args) for size in (args.small, args.large)]
    print(f"{args.large} MB of text take {peaks[1] - peaks[0]:.0f} MB more than {args.small} MB")


def peak(folder: Path, size: int, args: argparse.Namespace) -> float:
    """Peak resident memory in MB of two runs on ``size`` MB of text, tokenizing it and cached."""
    path = folder / f"{size}.txt"
    write_lines(path, size * 10**6)
    peaks = []
    for start in ("tokenizing", "cached"):
        command = [
            sys.executable, ROOT / "train.py", "data=text", f"data.path={path}", "data.unit=line",
            f"data.cache_dir={folder}", f"hydra.run.dir={folder}/run", "trainer=cpu",
            f"trainer.max_steps={args.steps}", f"trainer.val_check_interval={args.steps}",
            "data.val_share=0.0001", "trainer.enable_progress_bar=false",
            # These have peaks that do not depend on the corpus.
            "samples.count=0", "samples.self_check.count=1", "preflight.on_fault=off",
            *args.overrides,
        ]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"the run failed with exit status {os.waitstatus_to_exitcode(status)}")
        peaks.append(usage.ru_maxrss * 1024 / 10**6)
        print(f"{size} MB, {start}: {peaks[-1]:.0f} MB resident at most", flush=True)
    return max(peaks)


def write_lines(path: Path, size: int) -> None:
    """Write ``size`` bytes of lines of 3 to 30 words from a vocabulary of 20,000."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 9))) for _ in range(20_000)]
    with path.open("w", encoding="ascii") as file:
        while file.tell() < size:
            lines = (" ".join(draw.choices(words, k=draw.randint(3, 30))) for _ in range(5000))
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

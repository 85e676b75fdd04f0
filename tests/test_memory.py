"""Memory does not grow with the corpus, nor with the length of a run."""

import os
import re
import sys

import pytest

from support import ROOT, command


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "wait4"), reason="measures with wait4")
def test_twenty_times_the_text_takes_little_more_memory():
    done = command("scripts/memory.py", "--large", "200", "--steps", "60", timeout=1200)
    assert done.returncode == 0, done.stderr
    peaks = [int(n) for n in re.findall(r"(\d+) MB resident at most", done.stdout)]
    assert len(peaks) == 4 and min(peaks) > 100
    assert max(peaks[2:]) - max(peaks[:2]) < 100


LONG = """
import os, sys
from pathlib import Path
from causal_lm.callbacks.run_statistics import RunStatistics
from support.runs import short_run
after = RunStatistics.on_train_batch_end
def measured(self, trainer, *rest):
    after(self, trainer, *rest)
    if trainer.global_step in (2_000, 20_000):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        print(pages, len(os.listdir("/proc/self/fd")), flush=True)
RunStatistics.on_train_batch_end = measured
short_run(Path(sys.argv[1]), *sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="measures with /proc")
def test_twenty_thousand_steps_take_no_more_memory_files_or_rows_than_two_thousand(tmp_path):
    words = ["trainer.max_steps=20000", "trainer.val_check_interval=400", "samples.keep_last=5",
             "metrics.keep_steps=1000", "samples.count=2", "samples.length=8",
             "samples.per_prompt=0"]  # fmt: skip
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), *sys.path])
    done = command("-c", LONG, str(tmp_path), *words, PYTHONPATH=path, timeout=1800)
    assert done.returncode == 0, done.stderr
    (early, files), (late, more_files) = (
        map(int, line.split()) for line in re.findall(r"^\d+ \d+$", done.stdout, re.MULTILINE)
    )
    assert late < 1.02 * early, f"{early} pages resident after 2,000 steps, {late} after 20,000"
    assert more_files == files
    assert len(list((tmp_path / "samples").iterdir())) == 5
    assert 1000 <= (tmp_path / "metrics.csv").read_bytes().count(b"\n") <= 1120

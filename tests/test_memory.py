"""Memory does not grow with the corpus."""

import os
import re

import pytest

from support import command


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "wait4"), reason="measures with wait4")
def test_twenty_times_the_text_takes_little_more_memory():
    done = command("scripts/memory.py", "--large", "200", "--steps", "60", timeout=1200)
    assert done.returncode == 0, done.stderr
    peaks = [int(n) for n in re.findall(r"(\d+) MB resident at most", done.stdout)]
    assert len(peaks) == 4 and min(peaks) > 100
    assert max(peaks[2:]) - max(peaks[:2]) < 100

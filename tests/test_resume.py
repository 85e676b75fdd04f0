"""A fit that is broken off anywhere and continued reads on where it was, and ends with the very
weights of one that was not broken off."""

import os

import pytest
import torch

from support import ROOT, command
from support.resume import BUCKETED, PACKED, PADDED, WORKERS, evaluated, fit


@pytest.mark.parametrize("options", [PADDED, BUCKETED, PACKED, WORKERS], ids=str)
def test_a_broken_run_ends_as_an_unbroken_one(tmp_path, options):
    whole, batches = fit(tmp_path, keep=[evaluated(tmp_path / "kept")], **options)
    breaks = sorted((tmp_path / "kept").iterdir())
    assert len(breaks) >= 4
    for steps in (2, 6, 8):  # inside an epoch, and at the end of one where a step is a batch
        _, before = fit(tmp_path / f"{steps}", steps, **options)
        assert before == batches[: len(before)]
        breaks.append(tmp_path / f"{steps}" / "last.ckpt")
    for path in breaks:
        weights, after = fit(tmp_path, ckpt_path=path, **options)
        assert after == batches[len(batches) - len(after) :], path
        assert torch.equal(weights, whole), path


def test_epochs_differ_and_are_whole(tmp_path):
    """The guard of the test above."""
    _, batches = fit(tmp_path)
    first, second = ([t for batch in batches[i : i + 6] for t in batch] for i in (0, 6))
    assert first != second and sorted(first) == sorted(second)


TWO_RANKS = """
import sys
from pathlib import Path
import torch
from support.resume import PADDED, evaluated, fit

here, options = Path(sys.argv[1]), PADDED | {"dropout": 0.0, "ranks": 2}
whole, batches = fit(here, keep=[evaluated(here / "kept")], **options)
fit(here / "broken", 7, **options)
same = []
for path in [*sorted((here / "kept").iterdir()), here / "broken" / "last.ckpt"]:
    weights, after = fit(here, ckpt_path=path, **options)
    same += [bool(torch.equal(weights, whole)) and after == batches[len(batches) - len(after):]]
with open(here / f"rank{torch.distributed.get_rank()}.txt", "w") as file:
    print(*same, file=file)
"""


@pytest.mark.slow
def test_two_ranks_do_too(tmp_path):
    (tmp_path / "two.py").write_text(TWO_RANKS)
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    done = command("two.py", str(tmp_path), cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        same = (tmp_path / f"rank{rank}.txt").read_text().split()
        assert len(same) >= 5 and set(same) == {"True"}


@pytest.mark.parametrize("missing", ["causal_lm_training", "position", "unfinished"])
def test_a_checkpoint_without_a_position_is_refused_in_words(tmp_path, missing):
    fit(tmp_path, 1)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    (saved if missing in saved else saved["causal_lm_training"]).pop(missing)
    torch.save(saved, tmp_path / "old.ckpt")
    with pytest.raises(ValueError, match="ckpt_path"):
        fit(tmp_path, 2, tmp_path / "old.ckpt")

"""Checkpoints are written whole or not at all; damaged files of a run are named."""

import errno
import json

import pytest
import torch

from causal_lm.build import restore
from causal_lm.checkpoint_file import CONFIG, TOKENIZER, AtomicCheckpointIO, read_checkpoint
from causal_lm.report.files import MARKER
from support import command
from support.runs import short_run

KILLED = """
import os, sys
import torch
from causal_lm.checkpoint_file import AtomicCheckpointIO
save = torch.save
def half(checkpoint, file):
    save(checkpoint, file)
    file.truncate(file.tell() // 2)
    file.flush()
    os._exit(9)
torch.save = half
AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(1000)}, sys.argv[1])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    short_run(directory)
    return directory


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_a_kill_while_it_is_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    assert command("-c", KILLED, str(path)).returncode == 9
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert names(tmp_path) == {"last.ckpt", ".last.ckpt.part"}
    AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 2}
    assert names(tmp_path) == {"last.ckpt"}


def test_a_full_disk_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)

    def full(checkpoint, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert names(tmp_path) == {"last.ckpt"}


def test_a_run_writes_its_checkpoints_so(tmp_path, monkeypatch):
    saved = []
    save = AtomicCheckpointIO.save_checkpoint

    def spy(self, checkpoint, path, storage_options=None):
        saved.append(str(path).rpartition("/")[2])
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", spy)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / MARKER).touch()
    (tmp_path / "checkpoints" / ".last.ckpt.part").write_bytes(b"of a killed run")
    short_run(tmp_path)
    assert saved.count("last.ckpt") >= 3
    assert set(saved) == names(tmp_path / "checkpoints") == {"best.ckpt", "last.ckpt"}


@pytest.mark.parametrize(
    ("named", "damage"),
    [
        ("state_dict", lambda c: c.pop("state_dict")),
        ("global_step", lambda c: c.update(global_step="six")),
        (CONFIG, lambda c: c.update({CONFIG: [1]})),
        (f"{CONFIG}.model", lambda c: c[CONFIG].pop("model")),
        (f"{CONFIG}.data.max_length", lambda c: c[CONFIG]["data"].pop("max_length")),
        (TOKENIZER, lambda c: c.pop(TOKENIZER)),
        ("tokenizer", lambda c: c.update({TOKENIZER: {"kind": "nothing"}})),
        ("weights", lambda c: c["state_dict"].popitem()),
        ("weights", lambda c: c.update(state_dict={"a": 1})),
        ("model.d_model", lambda c: c[CONFIG]["model"].update(d_model="wide")),
    ],
)
def test_a_damaged_checkpoint_is_named(named, damage, folder, tmp_path):
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    damage(saved)
    torch.save(saved, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=named) as error:
        restore(tmp_path / "bad.ckpt")
    assert "bad.ckpt" in str(error.value)


def test_auto_falls_back_to_the_newest_that_can_be_read(tmp_path, caplog):
    short_run(tmp_path)
    last, best = (tmp_path / "checkpoints" / f"{name}.ckpt" for name in ("last", "best"))
    last.write_bytes(last.read_bytes()[:1000])
    caplog.set_level("INFO")
    more = short_run(tmp_path, "ckpt_path=auto", "trainer.max_steps=8")
    assert more["steps"] == 8
    assert [m for m in caplog.messages if str(last) in m and "read" in m]
    assert [m for m in caplog.messages if str(best) in m and "step 6" in m]
    assert read_checkpoint(last)["global_step"] == 8
    for path in (last, best):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=str(tmp_path)):
        short_run(tmp_path, "ckpt_path=auto", "trainer.max_steps=9")
    assert last.read_bytes() == b""


@pytest.mark.parametrize("damage", ["", "\x00\xff", '{"status": "finished"', "[]", '"text"'])
def test_a_damaged_summary_is_no_finished_run(damage, tmp_path):
    short_run(tmp_path, "trainer.max_steps=3")
    (tmp_path / "summary.json").write_text(damage)
    assert short_run(tmp_path, "trainer.max_steps=3", "ckpt_path=auto")["status"] == "finished"
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 3


@pytest.mark.parametrize(
    "keep", [0.3, *(pytest.param(keep, marks=pytest.mark.slow) for keep in (0.0, 0.97))]
)
def test_a_torn_log_is_cut_at_its_last_good_row(keep, tmp_path):
    short_run(tmp_path, "trainer.max_steps=3")
    path = tmp_path / "metrics.csv"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    short_run(tmp_path, "trainer.max_steps=5", "ckpt_path=auto")
    header, *rows = path.read_text().splitlines()
    assert len(rows) >= 2
    assert {row.count(",") for row in rows} == {header.count(",")}

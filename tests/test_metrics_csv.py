"""``metrics.csv`` after kills, cuts and bit flips; its columns, its size and its loggers."""

import csv
import os
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.loggers import Logger

from causal_lm.callbacks.sample_monitor import SampleMonitor
from causal_lm.metrics_csv import LAST_ROW, MetricsCSV
from support import command
from support.runs import short_run

FAST = ["preflight.on_fault=off", "samples.length=8", "samples.count=2", "samples.per_prompt=0",
        "gradients.report_every=2", "data.source.train_documents=20"]  # fmt: skip


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(metrics, first, last):
    """Rows as Lightning logs them: one for each step, and evaluations, which have other columns."""
    for step in range(first, last):
        metrics.log_metrics({"epoch": step // 4, "train/loss": 1 / (step + 3)}, step)
        if step % 3 == 2:
            metrics.log_metrics({"epoch": step // 4, "val/loss": 2 / (step + 3)}, step)


def written(directory, steps, **options):
    directory.mkdir(exist_ok=True)
    metrics = MetricsCSV(directory, 0, **options)
    write_rows(metrics, 0, steps)
    return metrics


def save(metrics, step):
    checkpoint = {}
    metrics.on_save_checkpoint(SimpleNamespace(global_step=step), None, checkpoint)
    return checkpoint


def test_rows_are_on_the_disk_at_once_and_a_new_column_keeps_the_old_ones(tmp_path):
    metrics = written(tmp_path, 3)
    metrics.log_metrics({"train/loss": float("nan"), "a,b": 0.5}, 3)
    assert metrics.path.read_bytes().decode().split("\n") == [
        '"a,b",epoch,step,train/loss,val/loss',
        ",0,0,0.3333333333333333,", ",0,1,0.25,", ",0,2,0.2,", ",0,2,,0.4", "0.5,,3,nan,", "",
    ]  # fmt: skip
    assert os.listdir(tmp_path) == ["metrics.csv"]


def test_a_full_disk_at_a_new_column_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    metrics = written(tmp_path, 2)
    before = metrics.path.read_bytes()
    monkeypatch.setattr(csv.DictWriter, "writerow", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        metrics.log_metrics({"new": 1}, 2)
    assert metrics.path.read_bytes() == before
    assert os.listdir(tmp_path) == ["metrics.csv"]


def test_a_file_cut_at_any_byte_goes_on_with_its_good_rows(tmp_path, caplog):
    """Each whole row before the checkpoint is kept, no other, and what is missing is said."""
    checkpoint = save(written(tmp_path, 4), 4)
    write_rows(MetricsCSV(tmp_path, 4), 4, 6)
    path = tmp_path / "metrics.csv"
    whole, all_rows = path.read_bytes(), rows_of(path)
    assert checkpoint[LAST_ROW] == [[3, 1]] and len(all_rows) == 8
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        complete = max(whole[:size].count(b"\n") - 1, 0)
        expected = [row for row in all_rows[:complete] if int(row["step"]) < 4]
        caplog.clear()
        metrics = MetricsCSV(tmp_path, 4)
        assert (rows_of(path) if path.exists() else []) == expected, size
        metrics.on_load_checkpoint(None, None, checkpoint)
        is_torn = size > 0 and whole[size - 1 : size] != b"\n"
        is_short = len(expected) < 5
        assert len([r for r in caplog.records if r.levelname == "WARNING"]) == is_torn + is_short
        write_rows(metrics, 4, 6)
        assert rows_of(path) == expected + all_rows[5:], size


@given(st.binary(max_size=30), st.integers(0, 200), st.integers(0, 30))
def test_damage_drops_the_damaged_rows_and_never_raises(tmp_path_factory, noise, at, length):
    directory = tmp_path_factory.mktemp("damaged")
    path = written(directory, 6).path
    before, whole = rows_of(path), path.read_bytes()
    path.write_bytes(whole[:at] + noise + whole[at + length :])
    metrics = MetricsCSV(directory, 6)
    is_header_whole = metrics.columns == ["epoch", "step", "train/loss", "val/loss"]
    untouched = sum(whole[:at].count(b"\n") > i for i in range(1, 9)) if is_header_whole else 0
    write_rows(metrics, 6, 7)
    after = rows_of(path)
    assert after[:untouched] == before[:untouched]
    assert all(None not in row and None not in row.values() for row in after)
    assert after[-1]["step"] == "6"


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_the_file_is_bounded_also_over_a_kill(tmp_path, cut):
    whole = written(tmp_path / "whole", 60, keep_steps=20).path
    steps = [int(row["step"]) for row in rows_of(whole)]
    assert set(steps) >= set(range(40, 60)) and min(steps) >= 60 - 22
    killed = written(tmp_path / "killed", cut, keep_steps=20)
    write_rows(killed, cut, min(cut + 9, 60))  # rows after the checkpoint
    write_rows(MetricsCSV(tmp_path / "killed", cut, keep_steps=20), cut, 60)
    assert killed.path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(("every", "interval"), [(1, 3), (4, 6)])
def test_a_broken_run_has_the_rows_of_an_unbroken_one(tmp_path, monkeypatch, every, interval):
    """Broken in an evaluation after step 3, which may be between two micro-batches of a step."""
    words = [*FAST, f"trainer.val_check_interval={interval}",
             f"trainer.accumulate_grad_batches={every}"]  # fmt: skip
    short_run(tmp_path / "whole", *words)
    with monkeypatch.context() as patch:
        evaluate = SampleMonitor.evaluate

        def broken(self, module):
            if module.trainer.global_step > 3:
                raise SystemExit
            return evaluate(self, module)

        patch.setattr(SampleMonitor, "evaluate", broken)
        with pytest.raises(SystemExit):
            short_run(tmp_path / "broken", *words)
    short_run(tmp_path / "broken", *words, "ckpt_path=auto")
    whole, broken = (tmp_path / name / "metrics.csv" for name in ("whole", "broken"))
    assert broken.read_bytes() == whole.read_bytes()
    rows = rows_of(whole)
    assert [int(row["step"]) for row in rows if row["train/loss"]] == list(range(6))
    assert [int(row["step"]) for row in rows if row["update/model.lm_head"]] == [0, 2, 4]


KILLS = """
import os, random, shutil, signal, sys, time
from pathlib import Path
from support.runs import short_run

here, words, draw = Path(sys.argv[1]), sys.argv[2:], random.Random(0)
def start(name):
    pid = os.fork()
    if not pid:
        os.dup2(os.open(here / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        short_run(here / name, *words, "ckpt_path=auto")
        os._exit(0)
    return pid
began = time.monotonic()
assert os.waitpid(start("whole"), 0)[1] == 0
duration, killed = time.monotonic() - began, 0
for kill in range(8):
    pid = start(f"killed{kill}")
    time.sleep(draw.uniform(0.2, 1) * duration)
    os.kill(pid, signal.SIGKILL)
    killed += os.waitpid(pid, 0)[1] != 0
    assert os.waitpid(start(f"killed{kill}"), 0)[1] == 0
assert killed >= 4, killed
"""


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 4])
def test_no_row_is_lost_or_twice_after_a_kill_at_any_moment(tmp_path, every):
    words = [*FAST, "trainer.max_steps=60", "trainer.val_check_interval=5",
             f"trainer.accumulate_grad_batches={every}"]  # fmt: skip
    path = os.pathsep.join(os.environ.get("PYTHONPATH", "").split(os.pathsep))
    path = os.pathsep.join([str(Path(__file__).parent), path])
    done = command("-c", KILLS, str(tmp_path), *words, PYTHONPATH=path, timeout=600)
    assert done.returncode == 0, done.stderr
    whole = (tmp_path / "whole" / "metrics.csv").read_bytes()
    assert whole.count(b"\n") > 60
    for kill in range(8):
        assert (tmp_path / f"killed{kill}" / "metrics.csv").read_bytes() == whole, kill


class Records(Logger):
    """A logger of a user's own."""

    name = version = ""
    rows: ClassVar[list] = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))

    def log_hyperparams(self, *_, **__):
        pass


def test_a_logger_of_ones_own_is_added_to_ours(tmp_path):
    Records.rows.clear()
    node = f"{{_target_: {__name__}.Records}}"
    short_run(tmp_path, *FAST, f"+logger.records={node}", "trainer.max_steps=3")
    ours = rows_of(tmp_path / "metrics.csv")
    assert [(step, m["train/loss"]) for step, m in Records.rows if "train/loss" in m] == [
        (int(row["step"]), float(row["train/loss"])) for row in ours if row["train/loss"]
    ]
    assert len(ours) >= 4

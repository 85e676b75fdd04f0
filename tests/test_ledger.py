"""The ledger of a sweep: what is one run, where it is, and how far it has come."""

import json
import os
import sqlite3
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from causal_lm import cli, ledger
from causal_lm.config import ConfigError
from causal_lm.fit import SUMMARY_KEYS
from causal_lm.ledger import Ledger, key_of, outcome, settings_of
from causal_lm.report.table import sweep_table
from causal_lm.run_dir import RunDir
from support import command, load_script

compare_runs = sys.modules["compare_runs"] = load_script("compare_runs")
FIX = {"experiment": "fix", "ckpt_path": None, "seed": 0}


def job(folder, number=0, *overrides, sweep="sweep"):
    """The node ``hydra`` of a job."""
    return SimpleNamespace(
        runtime=SimpleNamespace(cwd=str(folder), output_dir=str(folder / sweep / f"{number}_fix")),
        sweep=SimpleNamespace(dir=sweep), job=SimpleNamespace(num=number),
        overrides=OmegaConf.create({"task": list(overrides)}),
    )  # fmt: skip


def end(directory, **summary):
    """Write the summary of a run."""
    text = json.dumps({"status": "finished", "stopped_because": None} | summary)
    (directory / "summary.json").write_text(text)


def claim(hydra, settings=FIX, path=None):
    return Ledger(path, hydra).claim(settings, hydra)


# ---- what is one run ----


def test_paths_loggers_and_auto_are_no_settings(tmp_path):
    a, b = (
        settings_of(
            FIX | {"paths": {"log_dir": name}, "logger": {"csv": {"name": name}}, "ledger": name,
                   "callbacks": {"mine": [f"{tmp_path / name}/file"]}, "ckpt_path": ckpt},
            tmp_path / name,
        )
        for name, ckpt in (("a", None), ("b", "auto"))
    )  # fmt: skip
    assert a["callbacks"] == {"mine": ["./file"]} and "paths" not in a
    assert key_of(a) == key_of(b)
    keys = {key_of(FIX | more) for more in ({}, {"seed": 1}, {"ckpt_path": "a.ckpt"}, {"x": None})}
    assert len(keys) == 4


def test_the_code_of_the_package_and_of_a_class_of_ones_own_counts(tmp_path, monkeypatch):
    (tmp_path / "package").mkdir()
    own = {"model": {"_target_": "mine_x.model.Model"}}
    monkeypatch.syspath_prepend(tmp_path)
    keys = [key_of(own)]
    for text in ("a = 1", "a = 2"):
        (tmp_path / "mine_x").mkdir(exist_ok=True)
        (tmp_path / "mine_x" / "layers.py").write_text(text)
        keys.append(key_of(own))
        (tmp_path / "package" / "module.py").write_text(text)
        monkeypatch.setattr(ledger, "__file__", str(tmp_path / "package" / "ledger.py"))
        keys.append(key_of(own))
    assert len(set(keys)) == 5


# ---- where it is ----


def test_a_job_gets_the_directory_of_its_run_and_never_that_of_another(tmp_path):
    first = claim(job(tmp_path, 0))
    assert first == tmp_path / "sweep/0_fix"
    assert claim(job(tmp_path, 1)) == first  # as the jobs have other numbers
    assert claim(job(tmp_path, 0), FIX | {"seed": 1}) == tmp_path / "sweep/0_fix_1"
    (tmp_path / "sweep/2_fix/.hydra").mkdir(parents=True)  # Hydra's own
    assert claim(job(tmp_path, 2), FIX | {"seed": 2}) == tmp_path / "sweep/2_fix"
    (tmp_path / "sweep/3_fix").mkdir()
    (tmp_path / "sweep/3_fix/thesis.txt").touch()
    assert claim(job(tmp_path, 3), FIX | {"seed": 3}) == tmp_path / "sweep/3_fix_1"


def test_a_named_ledger_serves_sweeps_in_other_folders_and_can_be_moved(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b", target_is_directory=True)
    (tmp_path / "a" / "b").mkdir(parents=True)
    linked = claim(job(tmp_path / "link"))
    assert claim(job(tmp_path / "a" / "b", 1)) == linked == tmp_path / "a/b/sweep/0_fix"
    first = claim(job(tmp_path, sweep="monday"), path="night.sqlite")
    assert claim(job(tmp_path, sweep="tuesday"), path="night.sqlite") == first
    end(first)
    moved = tmp_path.rename(tmp_path.with_name(f"{tmp_path.name}_moved"))
    (run,) = Ledger(moved / "night.sqlite").summaries()
    assert (run["status"], run["directory"]) == ("finished", moved / "monday/0_fix")


def test_sweeps_that_claim_at_once_share_each_run(tmp_path):
    def sweep(name):
        hydras = [job(tmp_path, n, sweep=name) for n in range(6)]
        return [claim(h, FIX | {"seed": n}, "shared.sqlite") for n, h in enumerate(hydras)]

    with ThreadPoolExecutor(4) as pool:
        a, *others = pool.map(sweep, "abcd")
    assert len(set(a)) == 6 and others == [a, a, a]
    found = Ledger("shared.sqlite", job(tmp_path, sweep="c")).summaries(since=0.0)
    assert [run["directory"] for run in found] == a


def test_two_sweeps_at_once_run_each_job_once(tmp_path, monkeypatch):
    """Each in a thread, with runs that hold the lock of their directory as a real one does."""
    here, trained = threading.local(), []

    def run(cfg, directory, command):
        assert cfg.ckpt_path == "auto"
        with RunDir(directory):
            if not (directory / "summary.json").exists():
                trained.append((cfg.seed, cfg.own))
                time.sleep(0.01)
                end(directory, **{"val/loss": float(cfg.seed)})
        return outcome(directory)

    monkeypatch.setattr(cli.HydraConfig, "get", lambda: here.hydra)
    monkeypatch.setattr(cli, "_run", run)
    plain = {"trainer": {"devices": 1}, "ckpt_path": None}

    def sweep(name):
        found = []
        for n in range(10):
            here.hydra = job(tmp_path, n, sweep=name)
            own = here.hydra.runtime.output_dir
            config = plain | {"seed": n, "ledger": "shared.sqlite", "own": f"{own}/x"}
            found.append(cli._run_in_sweep(OmegaConf.create(config), Path(own)))
        return found

    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(sweep, "ab"))
    assert [seed for seed, _ in sorted(trained)] == list(range(10))
    for found in both:
        assert {s["status"] for s in found} <= {"finished", "running"}
        assert all(s["val/loss"] in (n, None) for n, s in enumerate(found))
    for run in Ledger(tmp_path / "shared.sqlite").summaries():
        assert run["status"] == "finished" and run["settings"]["own"] == "./x"
        assert (run["val/loss"], f"{run['directory']}/x") in trained


@pytest.mark.parametrize("content", [b"no database at all, but a text", b"SQLite format 3\0rest"])
def test_a_file_that_is_no_ledger_is_named(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=str(path)):
        Ledger(path)
    assert path.read_bytes() == content


# ---- how far it has come ----


@pytest.mark.parametrize(
    ("summary", "status"),
    [
        ({}, "finished"),
        ({"status": "stopped", "stopped_because": "EarlyStopping with …"}, "stopped"),
        ({"status": "stopped", "stopped_because": "signal SIGTERM"}, "interrupted"),
        ({"status": "failed"}, "failed"),
        (None, "interrupted"),
    ],
)
def test_the_outcome_of_a_run(tmp_path, summary, status):
    assert outcome(tmp_path)["status"] == "interrupted"
    with RunDir(tmp_path):
        if summary is not None:
            end(tmp_path, **summary)
        while_locked = outcome(tmp_path)["status"]
        assert while_locked == ("running" if status in ("interrupted", "failed") else status)
    assert outcome(tmp_path)["status"] == status


def test_the_table_has_the_jobs_of_this_sweep_and_fails_with_them(tmp_path, capsys):
    config = OmegaConf.create({"hydra": {"sweep": {"dir": "sweep"}, "runtime": {"cwd": "."}}})
    config.hydra.runtime.cwd = str(tmp_path)
    old = claim(job(tmp_path, 7, "seed=7"), FIX | {"seed": 7})  # of an earlier sweep, interrupted
    table = cli.SweepTable()
    table.on_multirun_start(config)
    directory = claim(job(tmp_path, 0, "seed=0", "model=gru"))
    other = claim(job(tmp_path, 1, "seed=1", "model=gru"), FIX | {"seed": 1})
    end(directory, **{"val/loss": None, "status": "stopped"})
    with RunDir(other):
        table.on_multirun_end(config)  # another sweep is at the second: no failure
    out = capsys.readouterr().out
    assert "running" in out and old.name not in out
    head, _, *rows = out.strip().splitlines()[:4]
    assert head.split()[:3] == ["run", "seed", "train/loss"]
    assert [row.split()[:2] for row in rows] == [["0_fix", "0"], ["1_fix", "1"]]
    for status in ("interrupted", "failed"):
        with pytest.raises(SystemExit) as stop:
            table.on_multirun_end(config)
        assert stop.value.code == 1 and status in capsys.readouterr().out
        end(other, status="failed")
    (other / "summary.json").write_text("{")
    with pytest.raises(cli._BypassHydraError) as damaged:
        table.on_multirun_end(config)
    assert str(other / "summary.json") in str(damaged.value.__cause__)


def test_the_swept_values_are_those_in_which_jobs_differ():
    given = (["+a.b=1", "c=x"], ["+a.b=2", "c=x"], ["c=x", "d=[1,2]"])
    rows = [{"name": "r", "status": "failed", "overrides": words} for words in given]
    head, _, *lines = sweep_table(rows).splitlines()
    assert head.split()[:3] == ["run", "a.b", "d"]
    assert [line.split()[1:3] for line in lines] == [["1", "–"], ["2", "–"], ["–", "[1,2]"]]


def test_four_hundred_runs_are_a_table_in_two_seconds(tmp_path):
    """Half of two hundred seeds have one rate and half another."""
    hydra, figures = job(tmp_path, 0, "seed=0"), dict.fromkeys(SUMMARY_KEYS)
    figures |= {
        "status": "finished",
        "experiment": "fix",
        "train/loss": 1.0,
        "seconds/total": 1,
        "preflight/faults": [],
    }
    claim(hydra, FIX | {f"key_{n}": n for n in range(150)})
    with sqlite3.connect(tmp_path / "sweep/ledger.sqlite") as database:
        ((_, _, overrides, config),) = database.execute("SELECT * FROM runs").fetchall()
        for n in range(400):
            (folder := tmp_path / f"sweep/{n}").mkdir(exist_ok=True)
            end(folder, **figures | {"val/loss": 1 + n % 2 + n / 1000, "seed": n})
            settings = json.dumps(json.loads(config) | {"seed": n, "lr": n % 2})
            row = (f"{n}", f"{n}", overrides.replace("seed=0", f"seed={n}"), settings)
            database.execute("INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?)", row)
        database.execute("DELETE FROM runs WHERE directory = '0_fix'")
    started = sum(os.times()[:4])  # of this process and its children
    done = command("scripts/compare.py", str(tmp_path / "sweep/ledger.sqlite"))
    runs = compare_runs.read_runs([tmp_path / "sweep/ledger.sqlite"])
    assert sum(os.times()[:4]) - started < 2
    assert done.returncode == 0, done.stderr
    table, seeds = done.stdout.split("\n\n")
    assert len(table.splitlines()) == 402 and " 399 " in table
    assert [line.split()[2] for line in seeds.splitlines()[2:]] == ["200", "200"]
    assert len(runs) == 400 and runs[0]["settings"]["key_149"] == 149

"""The ledger of a sweep: the directory of each configuration's run, in a SQLite file.

A run is known by its resolved configuration and the code, so that the same sweep, started again,
skips what is complete and continues what is not.
"""

import hashlib
import json
import os
import sqlite3
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from itertools import chain, count
from pathlib import Path
from re import fullmatch
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from causal_lm.config import ConfigError, leaves
from causal_lm.report import files

NOT_SETTINGS = ("paths", "logger", "extras", "ledger")  # they change no figure of a run
TABLES = (  # directories are relative to the ledger's
    "runs (key TEXT PRIMARY KEY, directory TEXT UNIQUE, overrides TEXT, config TEXT)",
    "jobs (sweep TEXT, number INTEGER, asked REAL, key TEXT, PRIMARY KEY (sweep, number))",
)


def settings_of(config: Mapping[str, Any], directory: str | Path) -> dict[str, Any]:
    """What of a resolved configuration decides the figures of a run: not its paths and loggers.
    In every value, the run's own ``directory`` is written as ``.``."""
    kept = {key: value for key, value in config.items() if key not in NOT_SETTINGS}
    return replace_text(kept, str(directory), ".")


def replace_text(value: Any, old: str, new: str) -> Any:
    """A copy of plain data, with ``new`` in the place of ``old`` in every string."""
    if isinstance(value, Mapping):
        return {key: replace_text(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [replace_text(item, old, new) for item in value]
    return value.replace(old, new) if isinstance(value, str) else value


def key_of(settings: Mapping[str, Any]) -> str:
    """A hash of the settings and of the code: this package, and those not installed that a
    ``_target_`` names."""
    if settings.get("ckpt_path") == "auto":  # a new run begins as with null
        settings = {**settings, "ckpt_path": None}
    targets = [str(value) for key, value in leaves(settings) if key.endswith("_target_")]
    packages = {name.partition(".")[0] for name in targets} - {__name__.partition(".")[0]}
    sources = set(Path(__file__).parent.rglob("*.py"))
    for folder in (Path(entry) for entry in sys.path if "-packages" not in entry):
        for name in packages:
            sources |= {*folder.glob(f"{name}.py"), *folder.glob(f"{name}/**/*.py")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for path in sorted(sources):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def outcome(directory: Path) -> dict[str, Any]:
    """The summary of a run. The status of one that a signal or a kill has ended is ``interrupted``,
    and ``running`` while a process writes into the directory."""
    path, marker = directory / "summary.json", directory / files.MARKER
    summary = files.read_summary(path) if path.exists() else defaultdict(lambda: None)
    by_signal = str(summary["stopped_because"]).startswith("signal ")
    if summary["status"] in ("finished", "stopped") and not by_signal:
        return summary
    summary["status"] = "failed" if summary["status"] == "failed" else "interrupted"
    if marker.exists() and files.is_rank_zero():  # for another rank, it is the same run
        try:
            with FileLock(marker, timeout=0):
                pass
        except Timeout:
            summary["status"] = "running"
    return summary


class Ledger:
    """Gives each job of a sweep its run. Processes can share the file.

    ``path``: what the key ``ledger`` names; None: ``ledger.sqlite`` in the sweep's directory, which
    ``hydra``, the node of a configuration, has. Raises ConfigError where the file is no ledger.
    """

    def __init__(self, path: str | Path | None, hydra: Any = None) -> None:
        self.sweep = str(Path(hydra.runtime.cwd, hydra.sweep.dir)) if hydra else ""
        self.path = Path(hydra.runtime.cwd if hydra else "", path or f"{self.sweep}/ledger.sqlite")
        self.folder = self.path.resolve().parent
        if self.path.exists():
            with self._open():
                pass

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection, which waits a minute for others; a block that raises changes nothing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with closing(sqlite3.connect(self.path, timeout=60)) as database, database:
                for table in TABLES:
                    database.execute(f"CREATE TABLE IF NOT EXISTS {table}")
                yield database
        except sqlite3.Error as error:
            todo = "name another file with ledger=PATH"
            raise ConfigError(f"{self.path} cannot be used as a ledger: {error}; {todo}") from error

    def claim(self, settings: Mapping[str, Any], hydra: Any) -> Path:
        """The directory of the run that a job asks for: that of an earlier job with this key, or
        the job's own, or where that is taken, a new one beside it."""
        key, own = key_of(settings), Path(hydra.runtime.output_dir).resolve()
        beside = (own.with_name(f"{own.name}_{n}") for n in count(1))
        with self._open() as database:
            database.execute("BEGIN IMMEDIATE")  # no other process claims until the block ends
            job = [self.sweep, hydra.job.num, time.time(), key]
            database.execute("REPLACE INTO jobs VALUES (?, ?, ?, ?)", job)
            row = database.execute("SELECT directory FROM runs WHERE key = ?", [key]).fetchone()
            free = (
                path
                for path in chain([own], beside)
                if not path.exists()
                or all(fullmatch(files.HYDRA_FILES, name) for name in os.listdir(path))
            )
            directory = (self.folder / row[0]).resolve() if row else next(free)
            files.claim_directory(directory, ignored=files.HYDRA_FILES)
            overrides = OmegaConf.to_container(hydra.overrides.task)  # interpolations as typed
            texts = (json.dumps(each, default=str) for each in (overrides, settings))
            run = [key, os.path.relpath(directory, self.folder), *texts]
            database.execute("REPLACE INTO runs VALUES (?, ?, ?, ?)", run)
        return directory

    def summaries(self, since: float | None = None) -> Iterator[dict[str, Any]]:
        """The :func:`outcome` of each run; or of each job that this sweep has asked for ``since``.

        Each has the ``name``, ``directory``, ``overrides`` and ``settings`` of its run besides.
        """
        query, given = "SELECT directory, overrides, config FROM runs", list[Any]()
        if since is not None:
            query += " JOIN jobs USING (key) WHERE sweep = ? AND asked >= ? ORDER BY number"
            given = [self.sweep, since]
        with self._open() as database:
            rows = database.execute(query, given).fetchall()
        for place, overrides, config in rows:
            run = outcome(directory := (self.folder / place).resolve())
            run |= {"name": directory.name, "directory": directory}
            yield run | {"overrides": json.loads(overrides), "settings": json.loads(config)}

"""The table at the end of a sweep, whatever launched its jobs."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from causal_lm.report.table import sweep_table


class SweepTable(Callback):
    """Reads every job's ``summary.json`` and prints one row each."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Exits with code 1 where a job failed, now that the others have run."""
        folder = Path(config.hydra.sweep.dir)
        summaries = read_summaries(folder.glob("*/summary.json"))
        if summaries:
            print(f"\n{sweep_table(summaries)}\n\nwritten below {folder}")
        if any(s["status"] == "failed" for s in summaries):
            sys.exit(1)


def read_summaries(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Of jobs as they were launched, each with its folder's name."""
    return [
        {"name": path.parent.name} | json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(paths, key=job_number)
    ]


def job_number(path: Path) -> tuple[int, str]:
    """Sorts the files of jobs as they were launched."""
    number = path.parent.name.partition("_")[0]
    return (int(number) if number.isdigit() else sys.maxsize, path.parent.name)

"""The table at the end of a sweep, for any launcher."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from causal_lm.report.files import read_summary
from causal_lm.report.table import sweep_table


class SweepTable(Callback):
    """Hydra callback: prints one row per job, read from its ``summary.json``."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table; exit with code 1 where a job failed, after all of them have run."""
        folder = Path(config.hydra.sweep.dir)
        try:
            summaries = read_summaries(folder.glob("*/summary.json"))
        except ValueError as error:  # Hydra would print it as a warning, and go on
            sys.exit(f"error: {error}")
        if summaries:
            print(f"\n{sweep_table(summaries)}\n\nwritten below {folder}")
        unwritten = [job for job in folder.glob("[0-9]*/") if not (job / "summary.json").exists()]
        if unwritten or any(s["status"] == "failed" for s in summaries):
            sys.exit(1)


def job_order(paths: Iterable[Path]) -> list[Path]:
    """Files in folders of jobs, such as ``3_fix/summary.json``, in the order of the jobs."""

    def job_number(path: Path) -> tuple[int, str]:
        number = path.parent.name.partition("_")[0]
        return (int(number) if number.isdigit() else sys.maxsize, path.parent.name)

    return sorted(paths, key=job_number)


def read_summaries(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The summaries in the order of their jobs, each with its folder's name as ``name``.

    Raises:
        ValueError: one is damaged.
    """
    return [{"name": path.parent.name} | read_summary(path) for path in job_order(paths)]

"""The table at the end of a sweep, for any launcher."""

import sys
import time
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from causal_lm.ledger import Ledger
from causal_lm.report.table import sweep_table


class SweepTable(Callback):
    """Hydra callback: prints one row per job, as the sweep's ledger has it."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        self._started = time.time()

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Print the table; exit with code 1 where a job failed, after all of them have run."""
        ledger = Ledger(config.get("ledger"), config.hydra)
        try:
            summaries = ledger.summaries(since=self._started)
        except ValueError as error:  # Hydra would print it as a warning, and go on
            sys.exit(f"error: {error}")
        print(
            f"\n{sweep_table(summaries)}\n\nwritten below {config.hydra.sweep.dir}; {ledger.path}"
        )
        if any(s["status"] in ("failed", "interrupted") for s in summaries):
            sys.exit(1)

"""Whole runs, short ones."""

from causal_lm import config
from causal_lm.fit import run

SHORT = [
    "trainer=cpu", "trainer.max_steps=6", "trainer.val_check_interval=3",
    "trainer.enable_progress_bar=false", "data.source.train_documents=40",
    "data.source.val_documents=13", "data.batch_size=4", "data.max_length=20",
    "model.d_model=16", "model.d_ff=16", "samples.count=4",
    "samples.self_check.count=3", "samples.self_check.shown=1",
]  # fmt: skip
FILES = {
    "config.yaml",
    "summary.json",
    "metrics.csv",
    "preflight.json",
    "preflight.html",
    "samples.txt",
}


def short_run(directory, *overrides):
    return run(config.load([*SHORT, *overrides]), directory)

"""Errors of torch that name no key or document, in words that do."""

from typing import Any

from omegaconf import DictConfig

from causal_lm.nonfinite import dataset_indices

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def explain(error: Exception, cfg: DictConfig, trainer: Any) -> Exception:
    """The error to raise in place of ``error``: another one where memory is exhausted, or where a
    data-loader worker died or raised."""
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, MemoryError) or any(text in str(error) for text in OUT_OF_MEMORY):
        data = cfg.data
        sizes = f"data.batch_size={data.get('batch_size')}, data.max_length={data.max_length}"
        lower = "lower one of them, samples.batch_size or the sizes of the model"
        more = "trainer.accumulate_grad_batches keeps the batch of a step"
        return MemoryError(f"out of memory with {sizes}: {lower} ({more}): {lines[0]:.200}")
    if "DataLoader worker" not in str(error):
        return error
    # A worker that raised sends its traceback, whose last line is the error.
    cause = lines[-1] if lines[0].startswith("Caught ") else lines[0]
    where = "of the validation"
    if trainer.lightning_module.training:  # the trainer has already left its stage
        windows = ", ".join(map(str, dataset_indices(trainer, trainer.fit_loop.batch_idx + 1)))
        named = f", training windows {windows}," if windows else ""
        where = f"of the next batch{named} or one soon after it"
    return ValueError(f"a data-loader worker failed at a document {where}: {cause:.500}")

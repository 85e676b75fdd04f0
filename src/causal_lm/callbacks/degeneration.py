"""Early stopping on degenerate samples."""

import logging
import math

log = logging.getLogger(__name__)

STANDARD_ERRORS = 3  # a rise of repetition by more than that counts as significant


class DegenerationStopper:
    """Decides whether the samples were worse for ``patience`` evaluations in a row; None: never.

    An evaluation is worse if its repetition is higher, by :data:`STANDARD_ERRORS`, and its
    consistency is lower than at the reference: the last evaluation that was not worse (not the one
    just before, since both figures fluctuate). Early in training this is not always degeneration.
    """

    def __init__(self, patience: int | None) -> None:
        self.patience = patience
        self.stopped_because: str | None = None
        # Repetition, its error and consistency, of the reference and the worse ones after it.
        self.history: list[list[float]] = []
        self._warned = False

    def should_stop(
        self, step: int, repetition: float | None, error: float, consistency: float | None
    ) -> bool:
        """Take an evaluation into account; ``error`` is the standard error of ``repetition``."""
        if self.patience is None:
            return False
        if repetition is None or consistency is None:
            if not self._warned:
                missing = "repetition" if repetition is None else "consistency"
                log.warning(f"step {step}: samples.patience has no effect without {missing}")
            self._warned = True
            return False
        now = [repetition, error, consistency]
        reference, reference_error, reference_consistency = (self.history or [now])[0]
        noise = STANDARD_ERRORS * math.hypot(error, reference_error)
        is_worse = repetition - reference > noise and consistency < reference_consistency
        self.history = [*self.history, now] if is_worse else [now]
        if len(self.history) <= self.patience:
            return False
        columns = zip(*self.history, strict=True)
        repetitions, _, consistencies = (", ".join(f"{x:.4f}" for x in c) for c in columns)
        row = f"{len(self.history) - 1} evaluations in a row, up to step {step}"
        figures = f"repetition {repetitions}, consistency {consistencies}"
        self.stopped_because = f"the samples degenerated at {row}; from the reference on, {figures}"
        log.warning(f"stopped: {self.stopped_because}")
        return True

"""The signals that end a run: at once, in worker processes, and before SLURM's time limit."""

import contextlib
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C, the end of a job, and SLURM's warning before it (``sbatch --signal=USR1@120``)."""
SECONDS_BEHIND = 2.0  # that other ranks wait before they end


class StoppedRun(SystemExit):  # no error
    """A signal ends the run. The exit code is 128 + its number, as in a shell."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


def say(text: str) -> None:
    """Write a line to stderr on the first rank; safe in a signal handler, where print is not."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.write(2, f"\n{text}\n".encode())


def stop_at_once(number: int, frame: FrameType | None) -> None:
    """Signal handler: raise :class:`StoppedRun` here and now; after the first rank on the others,
    as Lightning kills it where another one ends first."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(SECONDS_BEHIND)
    say(f"{signal.Signals(number).name}: the run ends at once, as no training step is in hand")
    raise StoppedRun(number)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Hold :data:`STOP_SIGNALS` back here, and in the processes that are started meanwhile: a
    worker would otherwise end at one that comes before :func:`leave_to_parent`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_parent(*_: Any) -> None:
    """Ignore :data:`STOP_SIGNALS` in a worker process, which its parent ends.

    A whole process group gets them, and the parent still needs its workers. A SIGTERM that the
    parent sends (``Process.terminate``) ends the worker.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux; a handler would not know who sent the signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_await_parent, daemon=True).start()


def _await_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def requeue() -> None:
    """Put this SLURM job, or this task of an array, back into the queue; nothing without SLURM."""
    job, array = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_ARRAY_JOB_ID")
    if array:
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if not job:
        return
    try:
        subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=True)
        log.info(f"job {job} is in the queue again; it continues here with ckpt_path=auto")
    except (OSError, subprocess.CalledProcessError) as error:
        why = getattr(error, "stderr", None) or error
        log.warning(f"scontrol requeue {job} failed, so start the job again: {str(why).strip()}")

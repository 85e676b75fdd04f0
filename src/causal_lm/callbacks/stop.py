"""Ends the fit at a signal, between two optimizer steps, with its checkpoint."""

import contextlib
import os
import signal
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, Timer

from causal_lm.callbacks.checkpoint import StepCheckpoint
from causal_lm.signals import STOP_SIGNALS, StoppedRun, say, stop_at_once


class StopAfterStep(L.Callback):
    """Stop at one of :data:`STOP_SIGNALS`: between two optimizer steps, or inside an evaluation.

    Use it as a context around the whole run. Before the first step, and where ``at_once`` is set,
    a signal raises :class:`StoppedRun`. In the fit, ``checkpoint`` is written after the step in
    hand. An evaluation raises before its next forward pass; a resumed run repeats it whole. A
    second SIGINT raises KeyboardInterrupt.

    All ranks must take the same steps: once per step they exchange whether a signal came and a
    checkpoint is due.
    """

    checkpoint: StepCheckpoint  # to be set before the fit

    def __init__(self) -> None:
        self.signal = 0  # that ends the fit, the same on all ranks; 0: none
        self.at_once = True
        self._handlers: dict[int, Any] = {}
        self._received, self._pid = 0, os.getpid()
        self._step = -1

    def __enter__(self) -> "StopAfterStep":
        with contextlib.suppress(ValueError):  # outside the main thread, which cannot set handlers
            self._handlers = {n: signal.signal(n, self._request) for n in STOP_SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a worker that was forked a moment ago
            return
        if self._received:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return  # SLURM's SIGUSR1 stays the reason where SIGTERM follows
        self._received = number
        if self.at_once:
            stop_at_once(number, frame)
        in_hand = "the optimizer step in hand, or the forward pass of an evaluation"
        say(f"{signal.Signals(number).name}: the run stops after {in_hand}")

    def setup(self, trainer: Any, pl_module: L.LightningModule, stage: str) -> None:
        """Keep Lightning from setting handlers of its own, which raise, and requeue under SLURM."""
        trainer._signal_connector.register_signal_handlers = lambda: None

    def reason(self, trainer: Any) -> str | None:
        """What stopped the fit before its last step: a signal or a callback; None: nothing."""
        if self.signal:
            return f"signal {signal.Signals(self.signal).name}"
        if not trainer.should_stop or trainer.global_step >= trainer.lightning_module.total_steps:
            return None
        for c in trainer.callbacks:
            if because := getattr(c, "stopped_because", None):
                return str(because)
            if isinstance(c, Timer) and (left := c.time_remaining()) is not None and left <= 0:
                return "trainer.max_time"
            if isinstance(c, EarlyStopping) and (message := c.stopping_reason_message):
                reason = message.removesuffix(" Signaling Trainer to stop.")
                return f"EarlyStopping with monitor={c.monitor}, patience={c.patience}: {reason}"
        return "a callback set trainer.should_stop"

    def _exchange(self, trainer: L.Trainer, save: bool = False) -> bool:
        """Take over a signal of any rank; return whether the first rank wants to ``save``."""
        self.signal = self._received
        if trainer.world_size > 1:
            flags = torch.tensor([self.signal, int(save and trainer.is_global_zero)])
            flags = flags.to(trainer.strategy.root_device)
            self.signal, save = trainer.strategy.reduce(flags, reduce_op="max").tolist()
        return bool(save)

    def _save_where_due(self, trainer: L.Trainer) -> None:
        save = self._exchange(trainer, self.checkpoint.is_due(trainer.global_step))
        if save or (self.signal and self.checkpoint.step != trainer.global_step):
            self.checkpoint.save(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Save and stop here, where the step before is complete and its metrics are logged."""
        if trainer.global_step == self._step:  # between micro-batches
            return
        self.at_once, self._step = False, trainer.global_step
        self._save_where_due(trainer)
        if self.signal:
            trainer.should_stop = True
            raise StopIteration  # Lightning then ends the epoch without this batch

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._save_where_due(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._hook = pl_module.register_forward_pre_hook(lambda *_: self._poll(trainer))

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._poll(trainer)  # the hook does not see every way to compute the loss

    def on_validation_end(self, *_: Any) -> None:
        self._hook.remove()

    def _poll(self, trainer: L.Trainer) -> None:
        self._exchange(trainer)
        if self.signal:
            raise StoppedRun(self.signal)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Save an evaluation that was cut short as one that is still to come."""
        if self.at_once or not isinstance(exception, StoppedRun):
            return
        if trainer.state.fn == "fit":
            evaluated = trainer.fit_loop.epoch_loop.val_loop.batch_progress
            evaluated.reset()
            evaluated.increment_ready()
            evaluated.increment_started()
        self.checkpoint.save(trainer)

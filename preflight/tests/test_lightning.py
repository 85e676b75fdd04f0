"""The Lightning callback in somebody else's project."""

import dataclasses
import json
import logging
import random
from collections import namedtuple
from functools import cached_property

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from audit_cases.parts import Tiny, ce, padded

L = pytest.importorskip("lightning")

from lightning.pytorch.loggers import Logger  # noqa: E402

from causal_preflight.lightning import Preflight, PreflightError, audit_batch  # noqa: E402

torch.set_num_threads(1)
V = 12


class Theirs(L.LightningModule):
    """Somebody's module: dict batches, its own loss, its own logging."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Embedding(V, 16), nn.Linear(16, V))
        self.shift = shift

    def training_step(self, batch, batch_idx):
        ids = batch["input_ids"]
        logits = self.net(ids)[:, : ids.shape[1] - self.shift]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, self.shift :].flatten(), ignore_index=0)
        self.log("loss", loss)
        return {"loss": loss}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module, callback, tmp_path, batch=None, **options):
    ids = torch.tensor([[1, 3, 4, 5, 6, 2], [1, 7, 8, 2, 0, 0], [1, 9, 5, 4, 2, 0]])
    data = [batch or {"input_ids": ids, "attention_mask": (ids != 0).long()}] * 3
    trainer = L.Trainer(
        max_steps=2, max_epochs=1, accelerator="cpu", enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, **({"callbacks": [callback], "logger": False} | options),
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=None))
    return trainer


def test_a_right_module_of_somebody_else_trains(tmp_path):
    callback = Preflight(pad_id=0, eos_id=2, directory=tmp_path)
    trainer = fit(Theirs(shift=1), callback, tmp_path)
    assert trainer.global_step == 2
    assert callback.report.faults == set()
    assert "loss" in trainer.callback_metrics  # logging works again afterwards
    assert "<html" in (tmp_path / "preflight.html").read_text()
    assert json.loads((tmp_path / "preflight.json").read_text())["faults"] == []


def test_a_faulty_one_is_stopped_warned_of_or_let_be(tmp_path):
    with pytest.raises(PreflightError, match="shift"):
        fit(Theirs(shift=2), Preflight(pad_id=0, eos_id=2), tmp_path)
    warned = Preflight("warn", pad_id=0, eos_id=2)
    assert fit(Theirs(shift=2), warned, tmp_path).global_step == 2
    assert "shift" in warned.report.faults
    off = Preflight("off")
    assert fit(Theirs(shift=2), off, tmp_path).global_step == 2
    assert off.report is None


def test_a_mean_under_accumulation_is_a_mean_of_means(tmp_path):
    """A right loss by itself; with Lightning's average over micro-batches it is not."""
    callback = Preflight(pad_id=0, eos_id=2)
    with pytest.raises(PreflightError, match="reduction: "):
        fit(Theirs(shift=1), callback, tmp_path, accumulate_grad_batches=2)
    assert callback.report.faults == {"reduction"}


def test_the_audit_does_not_change_the_training(tmp_path):
    """Same weights after two steps, to the bit, with and without the audit (dropout included)."""
    states = []
    for on_fault in ("error", "off"):
        module = Theirs(shift=1)
        module.net.insert(1, nn.Dropout(0.3))
        torch.manual_seed(7)
        fit(module, Preflight(on_fault, pad_id=0, eos_id=2), tmp_path)
        states.append(module.state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


Named = namedtuple("Named", "input_ids attention_mask loss_mask")


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Labels are a cached property: an edited batch must not carry those of the original."""

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor | None = None

    @cached_property
    def targets(self) -> Tensor:
        ids = F.pad(self.input_ids[:, 1:], (0, 1), value=-100)
        return ids.masked_fill(F.pad(self.attention_mask[:, 1:], (0, 1)) == 0, -100)


@pytest.mark.parametrize("kind", [Named, Frozen])
@pytest.mark.parametrize("parted", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
def test_named_tuples_and_dataclasses(kind, parted, shifted):
    torch.manual_seed(0)
    model = Tiny()
    raw = padded(0)
    batch = kind(raw["input_ids"], raw["attention_mask"], None)
    if kind is Frozen:
        assert batch.targets is not None  # cached before the audit

    def loss(*parts):
        """Sum over all parts, divided once."""
        total, count = 0, 0
        for part in parts:
            targets = Frozen(part.input_ids, part.attention_mask).targets
            if kind is Frozen:
                targets = part.targets
            if shifted:
                targets = targets.roll(-1, 1).masked_fill(part.attention_mask == 0, -100)
            total = total + ce(model(part.input_ids, part.attention_mask), targets, reduction="sum")
            count += int((targets != -100).sum())
        assert len(parts) == 1 + parted
        return total / count

    report = audit_batch(model, batch, loss, parted=parted, pad_id=0, eos_id=2)
    assert ("shift" in report.faults) == shifted, str(report)
    if not shifted:
        assert not report.faults, str(report)
        assert {"alignment", "future", "reduction"} <= set(report.passed)


class Manual(Theirs):
    """Manual optimization: steps, zeroes, clips, schedules and logs inside `training_step`."""

    def __init__(self, shift: int, way: str = "manual_backward") -> None:
        super().__init__(shift)
        self.automatic_optimization, self.way = False, way

    def training_step(self, batch, batch_idx):
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        random.random()
        loss = super().training_step(batch, batch_idx)["loss"]
        if self.logger is not None:
            self.logger.experiment.append(loss.item())
        optimizer.param_groups[0]["lr"] *= 0.5
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, 1.0, "norm")
        if self.way == "trainer":
            self.trainer.optimizers[0].step()
        else:
            optimizer.step()
        scheduler.step()
        return loss if self.way == "returned" else None

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


class Memory(Logger):
    """A logger whose experiment is a list."""

    name, version = "memory", 0

    def __init__(self) -> None:
        super().__init__()
        self.experiment: list[float] = []

    def log_metrics(self, *args, **kwargs): ...
    def log_hyperparams(self, *args, **kwargs): ...


class State(L.Callback):
    """What the optimizer, scheduler, trainer and random states are before the first step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            (optimizer,) = trainer.optimizers
            self.seen = [
                dict(optimizer.state), optimizer.param_groups[0]["lr"], "step" in vars(optimizer),
                trainer.lr_scheduler_configs[0].scheduler.state_dict(), trainer.global_step,
                list(trainer.logger.experiment), random.getstate(), torch.get_rng_state().tolist(),
                [p.grad for p in pl_module.parameters()],
            ]  # fmt: skip


@pytest.mark.parametrize("way", ["manual_backward", "returned", "trainer"])
def test_manual_optimization_is_audited_and_left_as_it_was(tmp_path, way):
    states = []
    for on_fault in ("error", "off"):
        callback, state, module = Preflight(on_fault, pad_id=0, eos_id=2), State(), Manual(1, way)
        random.seed(1)
        torch.manual_seed(7)
        trainer = fit(module, callback, tmp_path, callbacks=[callback, state], logger=Memory())
        assert trainer.global_step == (2 if way != "trainer" else 0)
        states.append([state.seen, [p.tolist() for p in module.parameters()]])
        if on_fault == "error":
            assert callback.report.clean, str(callback.report)
            assert {"alignment", "reduction", "future"} <= set(callback.report.passed)
    assert states[0] == states[1]
    with pytest.raises(PreflightError, match="shift"):
        fit(Manual(2, way), Preflight(pad_id=0, eos_id=2), tmp_path, logger=Memory())


class TwoOptimizers(Manual):
    """A list of optimizers and schedulers, each with losses and parameters of its own."""

    def __init__(self, shift: int, adversary: bool) -> None:
        super().__init__(shift)
        self.critic, self.adversary = nn.Linear(16, 1), adversary

    def training_step(self, batch, batch_idx):
        if not self.adversary:
            loss = Theirs.training_step(self, batch, batch_idx)["loss"]
            self.manual_backward(loss)
        for i, (optimizer, scheduler) in enumerate(
            zip(self.optimizers(), self.lr_schedulers(), strict=True)
        ):
            self.toggle_optimizer(optimizer)
            if self.adversary:
                judged = self.critic(self.net[0](batch["input_ids"]))[
                    batch["input_ids"] != 0
                ].mean()
                loss = judged if i else Theirs.training_step(self, batch, batch_idx)["loss"]
                optimizer.zero_grad()
                self.manual_backward(loss)
            optimizer.step()
            scheduler.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        own, rest = (self.net, self.critic) if self.adversary else (self.net[0], self.net[1])
        pair = [torch.optim.AdamW(own.parameters()), torch.optim.SGD(rest.parameters(), 0.1, 0.9)]
        return pair, [torch.optim.lr_scheduler.StepLR(o, 1, 0.9) for o in pair]


@pytest.mark.parametrize("adversary", [pytest.param(False, marks=pytest.mark.slow), True])
def test_two_optimizers_are_left_as_they_were(tmp_path, adversary):
    states = []
    for on_fault in ("error", "off"):
        callback, module = Preflight(on_fault, pad_id=0, eos_id=2), TwoOptimizers(1, adversary)
        trainer = fit(module, callback, tmp_path)
        optimizers = [o.state_dict() for o in trainer.optimizers]
        schedulers = [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs]
        grads = [p.requires_grad for p in module.parameters()]
        states.append(str([optimizers, schedulers, grads, list(module.state_dict().items())]))
        assert callback.report is None or callback.report.clean, str(callback.report)
    assert states[0] == states[1]
    with pytest.raises(PreflightError, match="shift"):
        fit(TwoOptimizers(2, adversary), Preflight(pad_id=0, eos_id=2), tmp_path)


@pytest.mark.parametrize("labeled", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_batch_without_a_target_is_passed_over(tmp_path, labeled, capsys, caplog):
    class Masked(Theirs):
        def training_step(self, batch, batch_idx):
            ids, keep = batch["input_ids"], batch["loss_mask"]
            labels = batch.get("labels", ids).masked_fill(keep == 0, -100)[:, self.shift :]
            logits = self.net(ids)[:, : -self.shift].mT
            total = F.cross_entropy(logits, labels, reduction="sum")
            return total / (labels != -100).sum().clamp_min(1)

    def batches():
        ids = torch.tensor([[1, 3, 4, 5, 6, 2], [1, 7, 8, 9, 2, 0], [1, 9, 5, 4, 2, 0]])
        for keep in (0, 0, 1, 1):
            mask = keep * (ids != 0).long()
            labels = {"labels": ids.masked_fill(mask == 0, -100)} if labeled else {}
            yield {"input_ids": ids, "loss_mask": mask, **labels}

    for shift in (1, 2):
        callback, module = Preflight("warn", pad_id=0, eos_id=2), Masked(shift)
        trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=False, callbacks=[callback],
                            enable_checkpointing=False, default_root_dir=tmp_path)  # fmt: skip
        trainer.fit(module, DataLoader(list(batches()), batch_size=None))
        assert trainer.global_step == 4
        assert callback.report.faults == ({"shift"} if shift == 2 else set()), str(callback.report)
        assert callback.report.audited
        heard = capsys.readouterr().err + caplog.text
        assert heard.count("has no target") == 2
        caplog.clear()


def test_keys_of_the_batch_are_passed_on(tmp_path):
    class Renamed(Theirs):
        def training_step(self, batch, batch_idx):
            return super().training_step({"input_ids": batch["tokens"]}, batch_idx)

    ids = torch.tensor([[1, 3, 4, 5, 6, 2], [1, 7, 8, 2, 0, 0], [1, 9, 5, 4, 2, 0]])
    for key, audited in (("tokens", True), ("input_ids", False)):
        callback = Preflight(pad_id=0, eos_id=2, input_key=key)
        fit(Renamed(1), callback, tmp_path, batch={"tokens": ids})
        assert callback.report.clean == audited, str(callback.report)


def test_a_step_without_a_loss_is_not_audited(tmp_path, capsys):
    class Silent(Manual):
        def training_step(self, batch, batch_idx):
            self.optimizers().step()

    callback = Preflight(pad_id=0, eos_id=2)
    assert fit(Silent(1), callback, tmp_path, logger=Memory()).global_step == 2
    assert not callback.report.audited and not callback.report.clean
    assert "manual_backward" in callback.report.skipped["preflight"]


@pytest.mark.parametrize("handled", [False, True])
def test_it_is_heard_once_whatever_the_logging(tmp_path, handled, monkeypatch, capsys):
    lines = []

    class Lines(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [Lines()] if handled else [logging.NullHandler()])
    level = root.level
    root.setLevel(logging.INFO if handled else logging.WARNING)
    try:
        fit(Theirs(1), Preflight(pad_id=0, eos_id=2), tmp_path)
    finally:
        root.setLevel(level)
    heard = "\n".join(lines if handled else [capsys.readouterr().err])
    assert heard.count("no fault found") == 1
    assert ("no fault found" in capsys.readouterr().err) is False


def test_another_type_of_batch_is_named():
    with pytest.raises(ValueError, match="list"):
        audit_batch(nn.Linear(2, 2), [1, 2], lambda b: b)


def test_remedies_of_the_project_are_named():
    callback = Preflight(remedies={"shift": "data.shift"}, override="audit=off")
    model, raw = Tiny(), padded(0)
    report = audit_batch(
        model, raw, lambda b: ce(model(b["input_ids"]), b["input_ids"]), pad_id=0, eos_id=2
    )
    assert "shift" in report.faults
    message = callback.message(report)
    assert "data.shift" in message and "audit=off" in message and "\n" not in message

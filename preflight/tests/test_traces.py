"""The audit of a Lightning module leaves no trace in what the module holds, however it holds it."""

from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from audit_cases.parts import EOS, PAD, Tiny, padded, token_mean
from causal_preflight import preflight
from causal_preflight.sandbox import Sandbox

L = pytest.importorskip("lightning")
torchmetrics = pytest.importorskip("torchmetrics")

from causal_preflight.lightning import Preflight  # noqa: E402

V = 12


class Meter:
    """A plain class with a number, a list and a way back to itself."""

    def __init__(self) -> None:
        self.n, self.values, self.me = 0, [], self

    def update(self, value: Any) -> None:
        self.n += 1
        self.values.append(value)


class Rows(Dataset):
    """A data set, which the audit must not put back."""

    position = 0


class Holder(L.LightningModule):
    """Right, and counts its training steps in everything that can hold a number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Embedding(V, 16), nn.Linear(16, V))
        self.hidden = [nn.Linear(1, 1)]  # not registered: gets gradients, too
        self.metrics = {"acc": torchmetrics.MeanMetric()}
        self.recent, self.counts, self.nested = deque(maxlen=99), Counter(), {"a": [], "b": ([],)}
        self.meter, self.space = Meter(), SimpleNamespace(inner=[Meter()])
        self.user, self.lists = UserDict(n=0), defaultdict(list)
        self.order = OrderedDict(first=0, second=0)
        self.tensors, self.numbers = [torch.zeros(1)], {3}
        self.generators, self.rows = [torch.Generator().manual_seed(0)], Rows()

    def count(self, loss: Tensor) -> None:
        self.metrics["acc"].update(loss.detach())
        self.recent.append(float(loss))
        self.counts["steps"] += 1
        self.nested["a"].append(1)
        self.nested["b"][0].append(1)
        self.meter.update(loss)
        self.space.inner[0].update(loss)
        self.user["n"] += 1
        self.lists["steps"].append(1)
        self.order.move_to_end("first")
        self.tensors[0] += 1
        self.numbers.add(len(self.numbers))
        self.rows.position += 1
        torch.rand(1, generator=self.generators[0])

    def seen(self) -> list[int]:
        """One number for each of them: the steps that it has counted."""
        return [
            self.metrics["acc"]._update_count, len(self.recent), self.counts["steps"],
            len(self.nested["a"]), len(self.nested["b"][0]), self.meter.n, len(self.meter.values),
            self.space.inner[0].n, self.user["n"], len(self.lists["steps"]),
            int(self.tensors[0]), len(self.numbers) - 1,
        ]  # fmt: skip

    def training_step(self, batch):
        ids = batch["input_ids"]
        logits = self.net(ids)[:, :-1].mT + 0 * self.hidden[0](torch.ones(1))
        loss = F.cross_entropy(logits, ids[:, 1:], ignore_index=PAD)
        self.count(loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


def fit(module: L.LightningModule, steps: int = 1, on_fault: str = "error") -> Any:
    """The report of a fit of a few steps."""
    ids = torch.tensor([[1, 3, 4, 5, 6, 2], [1, 7, 8, 2, 0, 0], [1, 9, 5, 4, 2, 0]])
    callback = Preflight(on_fault, pad_id=PAD, eos_id=EOS)
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[callback],
    )  # fmt: skip
    trainer.fit(module, DataLoader([{"input_ids": ids}] * steps, batch_size=None))
    return callback.report


def test_what_a_step_counts_is_counted_once():
    """`training_step` takes the batch alone, which Lightning accepts."""
    module, other = Holder(), Holder()
    report = fit(module)
    assert report.clean and report.forwards > 40, str(report)
    assert set(module.seen()) == {1}
    assert module.rows.position > 40  # another's: a data set is left alone
    fit(other, on_fault="off")
    drawn = [torch.rand(1, generator=x.generators[0]) for x in (module, other)]
    assert drawn[0] == drawn[1]
    assert [*module.order] == [*other.order]
    grads = [x.hidden[0].weight.grad for x in (module, other)]
    assert torch.equal(*grads)


def test_what_cannot_or_need_not_be_put_back_does_no_harm():
    """Tensors of inference mode, expanded and sparse ones, long lists, references in a circle."""
    model = Tiny()
    with torch.inference_mode():
        model.outputs = [torch.ones(2)]
    model.views = [torch.ones(1).expand(3), torch.eye(2).to_sparse(), torch.ones(0)]
    model.documents, model.circle = [[1]] * 20_000, {}
    model.circle["model"] = [model, model.circle]
    assert len(Sandbox(model).undo) < 200
    assert preflight(model, padded(0), token_mean, pad_id=PAD, eos_id=EOS).clean
    assert len(model.documents) == 20_000 and model.circle["model"][0] is model


def test_an_optimizer_inside_backward_takes_no_step():
    """As those that free each gradient as soon as it is there."""
    model = Tiny()
    before = [p.detach().clone() for p in model.parameters()]
    steps = []
    for p in model.parameters():
        own = torch.optim.SGD([p], lr=0.1)
        p.register_post_accumulate_grad_hook(lambda _, own=own: steps.append(own.step()))
    assert preflight(model, padded(0), token_mean, pad_id=PAD, eos_id=EOS).clean
    assert steps == [] and all(map(torch.equal, before, model.parameters()))
    token_mean(model, padded(0)).backward()
    assert len(steps) == len(before) and not all(map(torch.equal, before, model.parameters()))


class Redrawn(Tiny):
    """Its `reset` draws new weights, and clears nothing between batches."""

    def reset(self) -> None:
        for p in self.parameters():
            nn.init.normal_(p)


def test_a_reset_that_draws_weights_changes_none():
    model = Redrawn()
    before = [p.detach().clone() for p in model.parameters()]
    report = preflight(model, padded(0), token_mean, pad_id=PAD, eos_id=EOS)
    assert report.clean, str(report)
    assert all(map(torch.equal, before, model.parameters()))


class OwnScaler(Holder):
    """Manual optimization in half precision's way, with a scaler of one's own."""

    def __init__(self, scale: float = 2.0**10, shift: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
        self.shift = shift

    def training_step(self, batch, batch_idx):
        ids, optimizer = batch["input_ids"], self.optimizers()
        logits = self.net(ids)[:, : ids.shape[1] - self.shift].mT
        loss = F.cross_entropy(logits, ids[:, self.shift :], ignore_index=PAD)
        optimizer.zero_grad()
        self.manual_backward(self.scaler.scale(loss))
        self.scaler.unscale_(optimizer)
        self.scaler.step(optimizer)
        self.scaler.update()


def test_a_scaler_of_ones_own_is_audited_and_unchanged():
    states = []
    for on_fault in ("warn", "off"):
        module = OwnScaler()
        report = fit(module, 3, on_fault)
        weights = [p.tolist() for p in module.parameters()]
        states.append((module.scaler.state_dict(), weights))
        assert report is None or report.clean, str(report)
    assert states[0] == states[1] and states[0][0]["scale"] == 2.0**11
    assert fit(OwnScaler(shift=2), on_fault="warn").faults == {"shift"}

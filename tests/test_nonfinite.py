"""Losses and gradients that are not finite: named, stopped at, or left out."""

import logging
import os
from dataclasses import replace
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader

from causal_lm import nonfinite
from causal_lm.accumulation import MicroBatch
from causal_lm.callbacks.run_statistics import RunStatistics
from causal_lm.data.sampler import DocumentSampler
from causal_lm.module import CausalLM
from causal_lm.nonfinite import NonFiniteGuard
from support import ROOT, command, make_batch, make_model, make_module
from support.breaking import BAD, GOOD, module_that_breaks, state


def fit(module, batches, accumulate=1, plugin=None, ckpt_path=None):
    trainer = L.Trainer(
        max_steps=len(batches) // accumulate, max_epochs=-1,
        accumulate_grad_batches=accumulate, accelerator="cpu",
        logger=False, enable_checkpointing=False, enable_progress_bar=False, plugins=plugin,
        enable_model_summary=False, gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(module, DataLoader(batches, batch_size=None), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize(
    ("at", "accumulate", "words"),
    [
        ("forward", 1, r"the loss \(first in model\.blocks\.layers\.0\.linear2\) of batch 2 is not "
                       r"finite at step 2: lower optimizer\.lr"),
        ("forward", 2, r"the loss \(first in model\.blocks\.layers\.0\.linear2\) of batch 2 is not "
                       r"finite at step 1"),
        # And on down to the two embeddings.
        ("backward", 1, r"the gradient of batch 2 \(first in model\.blocks\.layers\.0; layers "
                        r"affected: 3\) is not finite at step 2"),
        ("backward", 2, r"the gradient of batch 2, 3 \(first in .*\.0; .*: 3\) .* at step 1"),
    ],
)  # fmt: skip
def test_a_run_stops_and_says_where(at, accumulate, words):
    module = module_that_breaks(at)
    with pytest.raises(FloatingPointError, match=words):
        fit(module, [GOOD, GOOD, BAD, GOOD], accumulate)
    before = module_that_breaks(at)
    fit(before, [GOOD, GOOD], accumulate)
    for one, other in zip(state(module), state(before), strict=True):
        assert torch.equal(one, other)  # the weights are those before the step


def test_a_step_without_a_target_is_counted_as_skipped():
    nothing = replace(GOOD, loss_mask=torch.zeros_like(GOOD.input_ids, dtype=torch.bool))
    module = make_module()
    before = state(module)
    trainer = fit(module, [nothing, nothing])
    assert RunStatistics().figures(trainer)["train/skipped"] == module.guard.skipped == 2
    assert all(torch.equal(a, b) for a, b in zip(state(module), before, strict=True))


@pytest.mark.parametrize("at", ["forward", "backward"])
def test_a_skipped_step_is_no_step(at, caplog):
    """Weights, momenta and what the optimizers count are as if the batch had not come."""
    skipping = module_that_breaks(at, nonfinite=NonFiniteGuard("skip"))
    with caplog.at_level(logging.WARNING, logger="causal_lm.nonfinite"):
        trainer = fit(skipping, [GOOD, BAD, GOOD])
    assert trainer.global_step == 3
    assert float(trainer.callback_metrics["train/skipped"]) == skipping.guard.skipped == 1
    assert RunStatistics().figures(trainer)["train/skipped"] == 1
    assert "step 1 is skipped" in caplog.text
    assert f"the {'loss' if at == 'forward' else 'gradient'}" in caplog.text
    without = module_that_breaks(at)
    other = fit(without, [GOOD, GOOD])
    for a, b in zip(state(skipping), state(without), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(trainer.optimizers[0].state.values(), other.optimizers[0].state.values(),
                    strict=True):  # fmt: skip
        assert all(torch.equal(a[key], b[key]) for key in a) and a.keys() == b.keys()
    loss = trainer.callback_metrics["train/loss"]
    assert torch.equal(loss, other.callback_metrics["train/loss"])


def test_so_many_in_a_row_and_no_more():
    three = [BAD, BAD, GOOD, BAD, BAD, BAD]
    with pytest.raises(FloatingPointError, match=r"step 5, after gradients\.max_skipped=2 skipped"):
        fit(module_that_breaks("forward", nonfinite=NonFiniteGuard("skip", 2)), three)
    module = module_that_breaks("forward", nonfinite=NonFiniteGuard("skip", 3))
    fit(module, three)
    assert module.guard.skipped == 5


def test_a_run_that_goes_on_goes_on_counting(tmp_path):
    fit(module_that_breaks("forward", NonFiniteGuard("skip", 3)), [GOOD, BAD, BAD]).save_checkpoint(
        tmp_path / "last.ckpt"
    )
    module = module_that_breaks("forward", NonFiniteGuard("skip", 3))
    with pytest.raises(FloatingPointError, match=r"step 4, after gradients\.max_skipped=3 skipped"):
        fit(module, [BAD] * 9, ckpt_path=tmp_path / "last.ckpt")
    assert module.guard.skipped == 3


def test_float16_leaves_gradients_to_its_scaler_but_no_loss():
    def plugin():
        return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))

    half = plugin()
    module = module_that_breaks("backward")
    before = fit(module, [GOOD, BAD], plugin=half)
    assert before.precision == "16-mixed"
    assert half.scaler.get_scale() == 2.0**15  # it met the NaN, skipped the step and backed off
    assert module.guard.skipped == 1 and all(torch.isfinite(p).all() for p in module.parameters())
    with pytest.raises(FloatingPointError, match=r"the loss \(first in .*linear2\) of batch 1"):
        fit(module_that_breaks("forward"), [GOOD, BAD], plugin=plugin())
    with pytest.raises(FloatingPointError, match=r"the gradient .* step 4, after .*max_skipped=3"):
        fit(
            module_that_breaks("backward", NonFiniteGuard("stop", 3)),
            [GOOD, *[BAD] * 5],
            plugin=plugin(),
        )


def test_muon_under_the_loss_scaler_is_clipped_as_without():
    scaler, norms = torch.amp.GradScaler("cpu"), []
    for plugin in (None, MixedPrecision("16-mixed", "cpu", scaler=scaler)):
        trainer = fit(module_that_breaks(""), [GOOD], plugin=plugin)
        norms.append(float(trainer.callback_metrics["train/grad_norm"]))
    assert scaler.get_scale() == 2.0**16
    assert norms[0] > 0.1
    assert norms[1] == pytest.approx(norms[0], rel=0.02)


TWO_RANKS = """
import lightning as L
from torch.utils.data import DataLoader
from causal_lm.nonfinite import NonFiniteGuard
from support.breaking import BAD, GOOD, module_that_breaks, state

class Data(L.LightningDataModule):
    def train_dataloader(self):  # the second batch of rank 1 alone is bad
        return DataLoader([GOOD, (GOOD, BAD)[self.trainer.global_rank], GOOD], batch_size=None)

for on_nonfinite, at in (("skip", "forward"), ("stop", "forward"), ("skip", "")):
    module = module_that_breaks(at, nonfinite=NonFiniteGuard(on_nonfinite))
    if not at:  # a gradient that is NaN on rank 1 alone, as where parameters are sharded
        def clip(*args, of=module, clip=module.configure_gradient_clipping, **kwargs):
            if of.trainer.global_rank == of.trainer.global_step == 1:
                next(of.parameters()).grad.fill_(float("nan"))
            clip(*args, **kwargs)
        module.configure_gradient_clipping = clip
    trainer = L.Trainer(
        max_steps=3, accelerator="cpu", devices=2, strategy="ddp", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )
    try:
        trainer.fit(module, Data())
        weights = sum(float(p.double().sum()) for p in state(module))
        said = f"{module.guard.skipped} skipped, weights {weights!r}"
    except FloatingPointError as error:
        said = str(error)
    with open(f"rank{trainer.global_rank}.txt", "a") as file:
        print(said, file=file)
"""


@pytest.mark.slow
def test_all_ranks_decide_alike(tmp_path):
    (tmp_path / "two.py").write_text(TWO_RANKS)
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    done = command("two.py", cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    one, two = ((tmp_path / f"rank{rank}.txt").read_text() for rank in (0, 1))
    assert one == two
    skipped, stopped, on_one = one.splitlines()
    for said in (skipped, on_one):
        assert said.startswith("1 skipped, weights ") and "nan" not in said
    assert stopped.startswith(
        "the loss (first in model.blocks.layers.0.linear2) of batch 1 of rank 1 is not finite"
    )


def test_weights_that_are_gone_are_named():
    model = make_model()
    batch = make_batch()
    module = CausalLM(model)
    assert nonfinite.first_nonfinite_layer(module, lambda: module(batch)) is None
    with torch.no_grad():
        model.blocks.layers[1].self_attn.in_proj_weight[0, 0] = float("inf")
    found = nonfinite.first_nonfinite_layer(module, lambda: module(batch))
    assert found == "model.blocks.layers.1.self_attn"
    assert not any(m._forward_hooks for m in module.modules())


def test_sharded_parameters_are_not_asked_for_by_one_rank(monkeypatch):
    """The loss is computed again only where every rank can do so alone."""
    module = module_that_breaks("")
    module.loss_terms = None  # not to be called
    module.trainer = SimpleNamespace(
        world_size=2, strategy=object(), train_dataloader=None, fit_loop=None
    )
    lost = MicroBatch(5, BAD, torch.tensor([float("nan"), 1.0]))
    fine = MicroBatch(5, GOOD, torch.tensor([1.0, 1.0]))

    def gather(every, own):  # rank 1 has nothing to say of the loss, but of layers
        every[:] = [own, (None, ["head", "blocks.1"])]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert nonfinite.describe_nonfinite(module, [fine, lost]) == "the loss of batch 5 of rank 0"
    found = nonfinite.describe_nonfinite(module, [fine])
    assert found == "the gradient of batch 5 (first in blocks.1; layers affected: 2)"


def test_rows_of_a_batch():
    sampler = DocumentSampler(10, shuffle=True, rank=1, world_size=2, batch_size=2)
    loader = DataLoader(range(10), batch_size=2, sampler=sampler)

    loop = SimpleNamespace(total_batch_idx=4, batch_idx=1)  # the second batch of the second epoch
    trainer = SimpleNamespace(train_dataloader=loader, fit_loop=loop)
    sampler.batches_done = lambda: 3
    batches = [batch.tolist() for batch in loader]
    assert len(batches) == 3 and sum(map(len, batches)) == 5
    assert [nonfinite.dataset_indices(trainer, n) for n in range(3)] == batches
    trainer.train_dataloader = DataLoader([GOOD], batch_size=None)
    assert nonfinite.dataset_indices(trainer, 0) == []

"""The same documents give the same step, however they are batched."""

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from causal_lm.data.collate import PaddedCollate
from conftest import PAD, V, make_batch, make_module

LENGTHS = (12, 2, 11, 3)


def weights_after(batch_sizes, accumulate, steps=2):
    """Two SGD steps over the same four documents, in micro-batches of these sizes."""
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(3, V, (n,), generator=generator) for n in LENGTHS]
    batches, start = [], 0
    for size in batch_sizes:
        batches.append(PaddedCollate(PAD, V)(documents[start : start + size]))
        start += size
    module = make_module()
    trainer = L.Trainer(
        max_steps=steps, max_epochs=-1, accumulate_grad_batches=accumulate, accelerator="cpu",
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(batches, batch_size=None))
    loss = float(trainer.callback_metrics["train/loss"])
    return torch.cat([p.detach().flatten() for p in module.parameters()]), loss


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 2), (3, 1)])
def test_accumulation_is_exact(sizes):
    whole, loss = weights_after([4], 1)
    parts, loss_of_parts = weights_after(sizes, len(sizes))
    start = torch.cat([p.detach().flatten() for p in make_module().parameters()])
    assert float((whole - start).norm()) > 0.01  # it moved
    assert float((parts - whole).norm() / (whole - start).norm()) < 1e-5
    assert loss_of_parts == pytest.approx(loss, rel=1e-6)


def test_a_last_window_that_is_shorter_is_not_scaled_down():
    """Four micro-batches in windows of three: the second window holds one."""
    shorter, _ = weights_after((1, 1, 1, 1), 3)
    module = make_module()
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(3, V, (n,), generator=generator) for n in LENGTHS]
    for window in (documents[:3], documents[3:]):
        module.zero_grad()
        module.training_loss(PaddedCollate(PAD, V)(window)).backward()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter -= 0.1 * parameter.grad
    expected = torch.cat([p.detach().flatten() for p in module.parameters()])
    assert float((shorter - expected).norm() / expected.norm()) < 1e-6


def test_a_mean_of_means_would_differ():
    """The guard of the tests above: what they exclude is not what they would see anyway."""
    module = make_module()
    of_all = module.training_loss(make_batch(LENGTHS))
    means = [module.training_loss(make_batch(LENGTHS[i : i + 1], seed=i)) for i in range(4)]
    assert abs(float((sum(means) / 4).detach()) - float(of_all.detach())) > 1e-3

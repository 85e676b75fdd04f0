"""Groups of parameters, the rule for the rate, and Muon beside AdamW as one optimizer."""

import io
import logging

import pytest
import torch
from torch import nn

from causal_lm import config
from causal_lm.build import make_optimizer
from causal_lm.models.decoder import Llama
from causal_lm.models.gru import GRU
from causal_lm.optim import optimizers
from support import V, make_batch, make_model, make_module

OPTIONS = {"muon_lr": 0.02, "muon_momentum": 0.95, "lr": 0.01, "weight_decay": 0.1}


def llama(**changes):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "n_heads": 2, "n_kv_heads": 1, "n_layers": 2, "d_ff": 24}
    return Llama(V, **(sizes | changes))


MODELS = {
    "tiny": make_model,
    "llama": llama,
    "tied": lambda: llama(tied=True),
    "gru": lambda: GRU(V, 16, 1, 0.0),
}


def names(optimizer, **wanted):
    return {
        name
        for group in optimizer.param_groups
        for name in group["param_names"]
        if all(group.get(key) == value for key, value in wanted.items())
    }


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd", "muon"])
def test_nothing_twice_and_nothing_left_out(make, kind):
    model = make()
    options = OPTIONS if kind == "muon" else {"lr": 0.01, "weight_decay": 0.1}
    optimizer = getattr(optimizers, kind)(model.named_parameters(), **options)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_matrices_decay_and_norms_biases_and_embeddings_do_not(make):
    """Told by what they belong to, which the groups are not told."""
    model = make()
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    expected = {n for n, p in model.named_parameters() if p.dim() > 1 and id(p) not in tables}
    assert expected and tables
    optimizer = optimizers.adamw(model.named_parameters(), lr=0.01, weight_decay=0.1)
    assert names(optimizer, weight_decay=0.1) == expected


def test_muon_has_the_matrices_between_embedding_and_head():
    both = [f"blocks.{i}.{n}.weight" for i in (0, 1)
            for n in ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")]  # fmt: skip
    for tied in (False, True):
        optimizer = optimizers.muon(llama(tied=tied).named_parameters(), **OPTIONS)
        assert names(optimizer, momentum=0.95) == set(both)
        assert names(optimizer, lr=0.02) == set(both)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("net.model.embed_tokens.weight", "embedding"),
        ("net.transformer.wpe.weight", "embedding"),
        ("net.token_emb.emb.weight", "embedding"),
        ("net.gpt_neox.embed_out.weight", "embedding"),
        ("net.lm_head.weight", "head"),
        ("net.to_logits.weight", "head"),
        ("layer.0.output.dense.weight", "hidden"),
        ("blocks.0.sa.heads.1.key.weight", "hidden"),
        ("members.0.weight", "hidden"),
    ],
)
def test_names_in_other_libraries(name, role):
    named = name, nn.Parameter(torch.zeros(2, 2))
    assert optimizers.is_hidden_matrix(named) == (role == "hidden")
    assert optimizers.decays(named) == (role != "embedding")


def test_frozen_parameters_are_left_alone():
    model = make_model()
    model.tokens.weight.requires_grad_(False)
    for optimizer in (optimizers.adamw(model.named_parameters(), lr=0.01, weight_decay=0.1),
                      optimizers.muon(model.named_parameters(), **OPTIONS)):  # fmt: skip
        assert "positions.weight" in names(optimizer)
        assert "tokens.weight" not in names(optimizer)


def test_peak_rate(caplog):
    with caplog.at_level(logging.INFO, logger="causal_lm.optim"):
        wide = [("tokens.weight", nn.Parameter(torch.zeros(3, 768)))]
        assert optimizers.peak_rate("auto", wide) == pytest.approx(2.165e-4, rel=1e-3)
    assert "6e-3 / sqrt(768) = 0.00022" in caplog.text
    assert optimizers.peak_rate("auto", make_module().named_parameters()) == pytest.approx(1.5e-3)
    assert optimizers.peak_rate(0.3, wide) == 0.3
    with pytest.raises(ValueError, match=r"optimizer\.lr=auto follows .* set optimizer\.lr"):
        optimizers.peak_rate("auto", nn.Linear(2, 2).named_parameters())


# ---- Muon and AdamW as one ----


def train(module, optimizer, steps, start=0):
    """Steps on batches that are a function of the step."""
    for step in range(start, start + steps):
        optimizer.zero_grad()
        module.accumulated_loss(make_batch(seed=step)).backward()
        optimizer.step()


def test_joint_is_both_of_torch():
    joint, apart = make_module(), make_module()
    train(joint, optimizers.muon(joint.named_parameters(), **OPTIONS, betas=(0.9, 0.95)), 5)

    named = list(apart.named_parameters())
    hidden = [p for n, p in named if "blocks" in n and p.dim() == 2]
    head = [p for n, p in named if "head" in n]
    rest = [p for n, p in named if p.dim() == 1 or "tokens" in n or "positions" in n]
    both = (
        torch.optim.Muon(hidden, lr=0.02, weight_decay=0.1),
        torch.optim.AdamW(head, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1),
        torch.optim.AdamW(rest, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0),
    )
    for step in range(5):
        for optimizer in both:
            optimizer.zero_grad()
        apart.accumulated_loss(make_batch(seed=step)).backward()
        for optimizer in both:
            optimizer.step()
    for one, other in zip(joint.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_joint_resumes_as_if_never_stopped(fused):
    """Through a file that holds plain data alone, with a schedule over both peaks."""

    def make(module):
        optimizer = optimizers.muon(module.named_parameters(), **OPTIONS, fused=fused)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def steps(module, optimizer, schedule, few):
        for step in few:
            train(module, optimizer, 1, start=step)
            schedule.step()

    whole, stopped = make_module(), make_module()
    steps(whole, *make(whole), range(6))
    optimizer, schedule = make(stopped)
    steps(stopped, optimizer, schedule, range(3))
    assert {g["lr"] for g in optimizer.param_groups} == {0.02 / 4, 0.01 / 4}
    file = io.BytesIO()
    torch.save([o.state_dict() for o in (stopped, optimizer, schedule)], file)
    file.seek(0)

    resumed = make_module(seed=1)
    optimizer, schedule = make(resumed)
    saved = torch.load(file, weights_only=True)
    for part, state in zip((resumed, optimizer, schedule), saved, strict=True):
        part.load_state_dict(state)
    assert len(optimizer.state) == len(list(resumed.parameters()))
    steps(resumed, optimizer, schedule, range(3, 6))
    for one, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_closure_runs_once_and_gradients_go():
    module, calls = make_module(), []
    optimizer = optimizers.muon(module.named_parameters(), **OPTIONS)

    def closure():
        calls.append(1)
        loss = module.accumulated_loss(make_batch())
        loss.backward()
        return loss

    with torch.no_grad():
        assert float(optimizer.step(closure)) > 0
    assert calls == [1]
    optimizer.zero_grad()
    assert all(p.grad is None for p in module.parameters())


def test_muon_needs_a_matrix():
    model = nn.ModuleDict({"tokens": nn.Embedding(3, 2)})
    with pytest.raises(ValueError, match=r"no hidden matrix .* optimizer=adamw"):
        optimizers.muon(model.named_parameters(), **OPTIONS)


# ---- from the configuration ----


@pytest.mark.parametrize(
    ("precision", "fused"), [("32-true", True), ("bf16-mixed", True), ("16-mixed", False)]
)
@pytest.mark.parametrize("kind", ["adamw", "adam", "muon"])
def test_fused_where_clipping_sees_unscaled_gradients(kind, precision, fused):
    cfg = config.load([f"optimizer={kind}", f"trainer.precision={precision}"])
    optimizer = make_optimizer(cfg)(make_model().named_parameters())
    assert optimizer.param_groups[-1]["fused"] is fused
    with pytest.raises(config.ConfigError, match=r"optimizer\.fused=true cannot clip"):
        config.load([f"optimizer={kind}", "optimizer.fused=true", "trainer.precision=16-mixed"])

"""Other libraries' models: what is refused, and what is said without the library."""

import copy
import json

import pytest
import torch

from causal_lm import config, extras, generation, masks
from causal_lm.build import instantiate, prepare
from causal_lm.models.external import XTransformers, huggingface
from causal_lm.module import CausalLM
from support import V, command, make_batch
from support.models import GPT2, LLAMA, by_document, logits_of, packed, padded

GEMMA2 = LLAMA | {"model_type": "gemma2", "head_dim": 4, "final_logit_softcapping": 0.01}
MAMBA = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1}
BLOOM = {"model_type": "bloom", "hidden_size": 16, "n_layer": 1, "n_head": 2}
EXTRAS = {"transformers": "huggingface", "x_transformers": "x-transformers"}


@pytest.mark.parametrize(
    ("preset", "module"),
    [("huggingface", "transformers"), ("x_transformers", "x_transformers")],
)
def test_without_the_extra_it_is_named(preset, module, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, module, None)  # as if it were not installed
    cfg = config.load([f"model={preset}"])
    with pytest.raises(ModuleNotFoundError, match=rf"pip install -e '\.\[{EXTRAS[module]}\]'"):
        instantiate(cfg.model, vocab_size=V)


def test_a_library_that_is_broken_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import a_part_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_part_that_is_not_there"):
        extras.load("half_installed", "huggingface")


@pytest.mark.extras
@pytest.mark.parametrize(
    ("changes", "plain"),
    [
        (GPT2, True),
        (LLAMA, True),
        (GEMMA2, False),
        (LLAMA | {"model_type": "granite", "logits_scaling": 8.0}, False),
    ],
)
def test_the_head_is_split_off_only_where_it_is_all_there_is(changes, plain):
    torch.manual_seed(0)
    model = huggingface(V, changes)
    assert (model.lm_head is not None) == plain
    assert model.training
    assert logits_of(model, packed()).shape == (2, 14, V)


@pytest.mark.extras
@pytest.mark.parametrize(
    "make",
    [
        lambda: huggingface(V, MAMBA),
        lambda: huggingface(V, BLOOM),
        lambda: XTransformers(V, 16, 2, 2, 24, {"shift_tokens": 1}),
    ],
)
def test_a_model_that_mixes_documents_gets_one_a_row_or_is_refused(make):
    model, batch = make().eval(), padded()
    plain = by_document(logits_of(model, batch, dense=False), batch)
    inputs = batch.input_ids, batch.position_ids
    close = torch.testing.assert_close
    close(by_document(model(*inputs, batch.attention_mask), batch), plain)
    with pytest.raises(ValueError, match=r"data\.layout=padded"):
        logits_of(model, packed())
    everything = masks.same_document(batch.document_ids)
    with pytest.raises(ValueError, match=r"data\.layout=padded"):
        model(*inputs, batch.attention_mask.with_dense(everything))


@pytest.mark.extras
@pytest.mark.parametrize(
    "make", [lambda: huggingface(V, GPT2), lambda: XTransformers(V, 16, 2, 2, 24)]
)
def test_rows_and_requests_that_do_not_fit(make):
    with pytest.raises(ValueError, match=r"row of 25 tokens .* model's 24 positions"):
        logits_of(make(), make_batch((25,)))


@pytest.mark.extras
def test_a_sample_that_outgrows_the_positions():
    module = CausalLM(huggingface(V, GPT2).eval())
    assert generation.sample(module, torch.ones(1, 1, dtype=torch.long), 25).shape == (1, 25)
    with pytest.raises(ValueError, match=r"row of 25 tokens .* lower .* samples\.self_check"):
        generation.sample(module, torch.ones(1, 1, dtype=torch.long), 26)


@pytest.mark.extras
def test_a_mask_that_is_not_causal_is_honoured_too():
    """The pitfall of no causal mask shows on every model, as nothing is laid over our mask."""
    batch = padded()
    open_mask = batch.attention_mask.with_dense(masks.same_document(batch.document_ids))
    for model in (huggingface(V, GPT2), XTransformers(V, 16, 2, 2, 24)):
        model.eval()
        seen = model(batch.input_ids, batch.position_ids, open_mask)
        assert (seen - logits_of(model, batch))[:, 0].abs().max() > 1e-4


@pytest.mark.extras
def test_from_a_folder(tmp_path):
    torch.manual_seed(0)
    first = huggingface(V, GPT2).eval()
    first.net.save_pretrained(tmp_path)
    second = huggingface(V, init_from=str(tmp_path))
    assert all(part.training for part in second.modules())  # its dropout is on in training
    copy.deepcopy(second.eval())
    assert torch.equal(logits_of(first, packed()), logits_of(second, packed()))
    rebuilt = huggingface(V, **second.standalone_config())  # what a checkpoint is read with
    rebuilt.load_state_dict(second.state_dict())
    assert torch.equal(logits_of(first, packed()), logits_of(rebuilt.eval(), packed()))
    assert huggingface(V, GPT2).standalone_config() == {}  # its configuration says it all
    padded_up = huggingface(100, GPT2 | {"vocab_size": 102})
    padded_up.net.save_pretrained(tmp_path / "more")
    third = huggingface(100, init_from=str(tmp_path / "more"))
    huggingface(100, **third.standalone_config()).load_state_dict(padded_up.state_dict())
    with pytest.raises(ValueError, match=r"vocabulary of 11 tokens, but the tokenizer .* has 259"):
        huggingface(259, init_from=str(tmp_path))
    with pytest.raises(ValueError, match=r"either model\.config.* or model\.init_from"):
        huggingface(V)


@pytest.mark.extras
def test_code_of_a_repository_is_never_run(tmp_path, monkeypatch):
    """Without being told so, transformers asks at the terminal, and runs it after a "y"."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    auto = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto}))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'it_ran')!r}, 'w')")
    with pytest.raises(ValueError, match=r"model\.init_from=.* never run"):
        huggingface(V, init_from=str(tmp_path))
    assert not (tmp_path / "it_ran").exists()


@pytest.mark.slow
@pytest.mark.extras
@pytest.mark.parametrize("preset", ["huggingface", "huggingface_llama", "x_transformers"])
def test_a_run_and_its_checkpoint(preset, tmp_path):
    done = command(
        "train.py", f"model={preset}", "trainer=cpu", "trainer.max_steps=2",
        "samples.self_check.count=2",
        "data.source.train_documents=64", "data.source.val_documents=16",
        f"hydra.run.dir={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "no fault found" in done.stdout + done.stderr
    done = command("scripts/generate.py", str(tmp_path / "checkpoints/last.ckpt"))
    assert done.returncode == 0, done.stderr


@pytest.mark.extras
def test_rows_longer_than_the_positions_are_refused_before_the_first_step():
    cfg = config.load(["model=huggingface", "model.config.n_positions=16", "data.max_length=20"])
    with pytest.raises(config.ConfigError, match=r"rows of up to 20 tokens, and the model has 16"):
        prepare(cfg)

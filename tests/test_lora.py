"""LoRA adapters on a pretrained model: what is trained, saved, continued and exported."""

import json

import pytest
import torch

from causal_lm import config
from causal_lm.build import restore
from causal_lm.fit import run
from causal_lm.models.external import huggingface
from causal_lm.optim.parameter_groups import parameter_groups
from support import V, load_script
from support.models import GPT2, LLAMA, logits_of, packed

pytest.importorskip("peft")
pytestmark = pytest.mark.extras

LORA = {"r": 2, "alpha": 8, "dropout": 0.1}
RUN = [
    "trainer=cpu", "trainer.enable_progress_bar=false", "trainer.val_check_interval=2",
    "data.source.train_documents=40", "data.source.val_documents=8", "data.batch_size=4",
    "data.max_length=20", "data.source.symbols=8", "model=pretrained", "samples.count=2",
    "samples.self_check.count=2", "scheduler=constant", "scheduler.warmup_steps=0",
    *(f"model.lora.{key}={value}" for key, value in LORA.items()),
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a small Llama for the synthetic language of eight symbols."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    huggingface(V, LLAMA).net.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """The directory and the summary of a run of four steps."""
    folder = tmp_path_factory.mktemp("run")
    return folder, train(base, folder, 4)


def train(base, folder, steps, *more):
    overrides = [*RUN, f"model.init_from={base}", f"trainer.max_steps={steps}", *more]
    return run(config.load(overrides), folder)


def checkpoint(folder):
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)


def test_adapters_alone_are_trained(base, trained):
    folder, summary = trained
    assert summary["preflight/faults"] == [] and summary["preflight/audited"]
    saved, before = checkpoint(folder), huggingface(V, init_from=str(base)).state_dict()
    after = {name.replace(".base_layer", ""): w for name, w in saved["state_dict"].items()}
    assert all(torch.equal(after[f"model.{name}"], weight) for name, weight in before.items())
    adapters = {name: w for name, w in saved["state_dict"].items() if ".lora_" in name}
    assert len(after) == len(before) + len(adapters)
    assert all(w.abs().max() > 0 for w in adapters.values())  # B began at zero
    assert len(saved["optimizer_states"][0]["state"]) == len(adapters) == 8


@pytest.mark.parametrize("sizes", [GPT2, LLAMA])
def test_the_optimizer_gets_no_other_weight_and_the_start_is_the_base_model(sizes):
    def make(lora):
        torch.manual_seed(0)
        return huggingface(V, sizes, lora=lora).eval()

    plain, off, adapted = make(None), make({"r": None, "alpha": 8}), make(LORA)
    groups = parameter_groups(adapted)
    assert [group["role"] for group in groups] == ["hidden_matrix"]
    assert all(".lora_" in name for name, _ in groups[0]["params"])
    assert plain.state_dict().keys() == off.state_dict().keys()
    assert torch.equal(logits_of(adapted, packed()), logits_of(plain, packed()))
    everywhere = make(LORA | {"target_modules": "all-linear"})
    assert len(parameter_groups(everywhere)[0]["params"]) > len(groups[0]["params"])


def test_a_run_that_is_continued_has_the_weights_of_one_that_was_not_stopped(
    base, trained, tmp_path
):
    train(base, tmp_path, 2, "preflight.on_fault=off")
    again = [f"ckpt_path={tmp_path}/checkpoints/last.ckpt", "preflight.on_fault=off"]
    train(base, tmp_path, 4, *again)
    whole, parts = checkpoint(trained[0]), checkpoint(tmp_path)
    for name, weight in whole["state_dict"].items():
        assert torch.equal(parts["state_dict"][name], weight), name
    moments = [saved["optimizer_states"][0]["state"] for saved in (whole, parts)]
    for index, state in moments[0].items():
        assert all(torch.equal(moments[1][index][name], value) for name, value in state.items())
    with pytest.raises(config.ConfigError, match=r"model\.lora\.r"):
        train(base, tmp_path / "other", 6, again[0], "model.lora.r=3")


def test_adapters_and_the_merged_model_are_exported(base, trained, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    module, tokenizer, _ = restore(trained[0] / "checkpoints/last.ckpt")
    batch = packed()
    expected = logits_of(module.model, batch)
    load_script("export").export(module.model, tokenizer, 20, tmp_path / "adapters")
    load_script("export").export(module.model, tokenizer, 20, tmp_path / "merged", merge=True)
    assert torch.equal(logits_of(module.model, batch), expected)  # which itself is not merged

    def logits(net):
        mask = batch.attention_mask.to_dense()[:, None]
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
        with torch.no_grad():
            return net.eval()(**inputs, attention_mask=mask).logits

    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    assert (logits(plain) - expected).abs().max() > 1e-3
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "adapters")
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-5, atol=1e-5)
    settings = json.loads((tmp_path / "adapters/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base) and settings["task_type"] == "CAUSAL_LM"
    assert not (tmp_path / "adapters/model.safetensors").exists()
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(merged).__name__ == "LlamaForCausalLM"
    assert not any("lora" in name for name in merged.state_dict())
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)


def test_without_peft_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '\.\[peft\]'"):
        huggingface(V, LLAMA, lora=LORA)


@pytest.mark.parametrize("wrong", ["r=0", "alpha=0", "dropout=1", "rank=8"])
def test_wrong_settings_are_named(wrong):
    with pytest.raises(config.ConfigError, match=rf"model\.lora\.{wrong.partition('=')[0]}"):
        config.load(["model=pretrained", f"model.lora.{wrong}"])


def test_modules_that_the_model_lacks_are_named():
    with pytest.raises(ValueError, match="nowhere"):
        huggingface(V, LLAMA, lora=LORA | {"target_modules": ["nowhere"]})

"""Weights and tokenizers to transformers and back, compared with transformers itself."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from causal_lm import masks
from causal_lm.data.subwords import SubwordTokenizer
from causal_lm.data.tokenizers import ByteTokenizer, SymbolTokenizer
from causal_lm.models import hf_conversion
from causal_lm.models.decoder import Decoder
from causal_lm.models.external import huggingface
from support import V, command, load_script
from support.models import GPT2, LLAMA, SIZES, make, packed

script = load_script("export")
export, write_model, write_tokenizer = script.export, script.write_model, script.write_tokenizer

pytestmark = pytest.mark.extras
safetensors_torch = pytest.importorskip("safetensors.torch")


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def write(model, folder):
    write_model(model, SymbolTokenizer(V - 3), 32, folder)


def same_logits(ours, theirs):
    batch = packed()
    mask = masks.causal_within_documents(batch.document_ids)
    found = theirs(
        input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=mask[:, None]
    ).logits
    expected = ours(batch.input_ids, batch.position_ids, batch.attention_mask)
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_ours_to_theirs_and_back(transformers, tmp_path, tied):
    ours = make("llama_tied" if tied else "llama")
    ours.final_norm.weight.data.fill_(1.0)
    write(ours, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__ == "LlamaForCausalLM"
    same_logits(ours, theirs)
    back = Decoder(V, **SIZES, tied=tied, init_from=str(tmp_path))
    assert torch.equal(back.lm_head.weight, ours.lm_head.weight)
    same_logits(back, theirs)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["1GB", "8KB"])
def test_theirs_to_ours(transformers, tmp_path, tied, shard):
    kind = transformers.LlamaConfig(
        **LLAMA, vocab_size=V, tie_word_embeddings=tied, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(kind).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "8KB")
    sizes = SIZES | {"tied": tied, "rope_theta": 500.0, "norm_eps": 1e-6}
    same_logits(Decoder(V, **sizes, init_from=str(tmp_path)), theirs)


def change(folder, **entries):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_other_sizes_are_named(tmp_path):
    ours = make("llama")
    write(ours, tmp_path)
    sizes = SIZES | {"n_layers": 3, "tied": True}
    with pytest.raises(ValueError, match=r"model\.n_layers=2 model\.tied=false.* 3, true"):
        Decoder(V, **sizes, init_from=str(tmp_path))
    with pytest.raises(ValueError, match=r"model\.vocab_size=11.* 12"):
        Decoder(V + 1, **SIZES, init_from=str(tmp_path))


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ({"attention_bias": True}, "attention_bias=true"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}},
         "rope_type=linear"),
        ({"model_type": "mistral"}, "model_type=mistral"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"head_dim": 8}, "head_dim=8"),
    ],
)  # fmt: skip
def test_another_kind_of_model_is_named(tmp_path, entries, named):
    write(make("llama"), tmp_path)
    change(tmp_path, **entries)
    with pytest.raises(ValueError, match=named):
        Decoder(V, **SIZES, init_from=str(tmp_path))


def test_missing_files_and_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.init_from=.*nowhere.*config\.json"):
        Decoder(V, **SIZES, init_from=str(tmp_path / "nowhere"))
    ours = make("llama")
    write(ours, tmp_path)
    weights = tmp_path / "model.safetensors"
    some = safetensors_torch.load_file(weights)
    del some["model.norm.weight"]
    safetensors_torch.save_file(some, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.init_from=.*model\.norm\.weight"):
        Decoder(V, **SIZES, init_from=str(tmp_path))
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.init_from=.*model\.safetensors") as error:
        Decoder(V, **SIZES, init_from=str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_conversion_draws_nothing_from_the_global_generator(tmp_path):
    ours = make("llama")
    before = torch.get_rng_state()
    write(ours, tmp_path)
    hf_conversion.read_weights(tmp_path, ours.sizes)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture(scope="module")
def theirs_of(transformers, tmp_path_factory):
    """Our tokenizers as transformers loads them."""

    def load(tokenizer):
        folder = tmp_path_factory.mktemp("tokenizer")
        write_tokenizer(tokenizer, 64, folder)
        return transformers.AutoTokenizer.from_pretrained(folder)

    return {"bytes": load(ByteTokenizer()), "symbols": load(SymbolTokenizer(5))}


@given(st.text())
def test_bytes_have_the_same_ids(theirs_of, text):
    ours, theirs = ByteTokenizer(), theirs_of["bytes"]
    ids = ours.encode(text)
    assert theirs.encode(text, add_special_tokens=False) == ids
    assert theirs.encode(text) == [ours.bos_id, *ids]
    assert theirs.decode(ids) == text


@pytest.mark.parametrize("text", ["<eos>", "a<pad>b <bos>", "<0x41>", " \r\n\t", "e\u0301", "\0"])
def test_bytes_of_texts_that_look_special(theirs_of, text):
    ids = ByteTokenizer().encode(text)
    theirs = theirs_of["bytes"]
    assert theirs.encode(text, add_special_tokens=False) == ids
    assert theirs.decode([1, *ids, 2, 0], skip_special_tokens=True) == text


@pytest.fixture(scope="module")
def bpe(transformers, tmp_path_factory):
    texts = ["the cat sat on the mat, the hat and the cat", "naïve cats, <eos> and all"]
    ours = SubwordTokenizer.train([texts], 300)
    folder = tmp_path_factory.mktemp("bpe")
    write_tokenizer(ours, 64, folder)
    return ours, transformers.AutoTokenizer.from_pretrained(folder)


@given(text=st.text())
def test_a_bpe_has_the_same_ids(bpe, text):
    ours, theirs = bpe
    ids = ours.encode(text)
    assert theirs.encode(text, add_special_tokens=False) == ids
    assert theirs.encode(text) == [ours.bos_id, *ids]
    assert theirs.decode(ids) == text == ours.decode(ids)


def test_a_bpe_merges_and_knows_its_special_tokens(bpe):
    ours, theirs = bpe
    assert len(ours.encode("the cat")) < 5
    ids = ours.encode("a <eos> b")
    assert ours.eos_id not in ids and theirs.encode("a <eos> b", add_special_tokens=False) == ids
    assert (theirs.pad_token_id, theirs.bos_token_id) == (ours.pad_id, ours.bos_id)
    assert theirs.decode([ours.bos_id, *ids, ours.eos_id], skip_special_tokens=True) == "a <eos> b"


def test_special_ids(theirs_of):
    for theirs in theirs_of.values():
        ids = theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id
        assert ids == (0, 1, 2)
    assert len(theirs_of["bytes"]) == ByteTokenizer().vocab_size
    assert theirs_of["symbols"].encode("abea", add_special_tokens=False) == SymbolTokenizer(
        5
    ).encode("abea")
    assert theirs_of["symbols"].decode([3, 7]) == "ae"


def test_a_model_of_transformers_is_exported_as_it_is(transformers, tmp_path):
    ours = huggingface(V, GPT2).eval()
    write_model(ours, ByteTokenizer(), 24, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (theirs.config.pad_token_id, theirs.config.bos_token_id) == (0, 1)
    for name, weight in ours.net.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], weight)


@pytest.mark.slow
def test_from_a_run_to_transformers_and_into_another_run(transformers, tmp_path):
    """Train, export, generate there; go on from the folder; the checkpoint needs no folder."""
    tiny = ["model=llama", "model.n_layers=1", "trainer=cpu", "trainer.max_steps=2",
            "data.source.train_documents=64", "data.source.val_documents=16",
            "samples.self_check.count=2"]  # fmt: skip
    done = command("train.py", *tiny, f"hydra.run.dir={tmp_path}/one")
    assert done.returncode == 0, done.stderr
    checkpoint, folder = tmp_path / "one/checkpoints/last.ckpt", tmp_path / "exported"
    done = command("scripts/export.py", str(checkpoint), str(folder))
    assert (done.returncode, done.stdout) == (0, f"written to {folder}\n"), done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"one", "exported"}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    out = model.generate(**tokenizer("ab", return_tensors="pt", return_token_type_ids=False),
                         max_new_tokens=5, do_sample=False)  # fmt: skip
    assert out[0, :3].tolist() == [1, 3, 4]
    again = command("scripts/export.py", str(checkpoint), str(folder))
    assert again.returncode == 1 and str(folder) in again.stderr

    init = [f"model.init_from={folder}", "optimizer.lr=1e-12"]
    done = command("train.py", *tiny, *init, f"hydra.run.dir={tmp_path}/two")
    assert done.returncode == 0, done.stderr
    losses = [
        json.loads((tmp_path / run / "summary.json").read_text())["val/loss"]
        for run in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    folder.rename(tmp_path / "gone")
    done = command("scripts/generate.py", str(tmp_path / "two/checkpoints/last.ckpt"))
    assert done.returncode == 0, done.stderr


def test_a_model_may_say_how_it_is_exported(transformers, tmp_path):
    class Mine(torch.nn.Module):
        def to_transformers(self):
            return huggingface(V, GPT2).net

    write(Mine(), tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).model_type == "gpt2"


def test_what_cannot_be_exported_is_named_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"GRU.*to_transformers"):
        export(make("gru"), ByteTokenizer(), 24, tmp_path / "out")
    with pytest.raises(ValueError, match=r"model\.mlp=relu2"):
        export(make("llama_fast"), ByteTokenizer(), 24, tmp_path / "out")
    with pytest.raises(ValueError, match=r"model\.qk_norm=true"):
        Decoder(V, **SIZES, qk_norm=True, init_from=str(tmp_path))
    assert not list(tmp_path.iterdir())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(FileExistsError, match="full"):
        export(make("llama"), SymbolTokenizer(V - 3), 24, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]

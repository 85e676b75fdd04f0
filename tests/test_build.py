"""Sizes that cannot be built, and values that must not be resolved, are refused beforehand."""

import json
import time

import pytest
import torch

from causal_lm import build, config
from causal_lm.build import check_size, restore
from causal_lm.checkpoint_file import CONFIG, TOKENIZER
from causal_lm.data.sources.text_files import TextFiles
from causal_lm.data.tokenizers import ByteTokenizer, from_state
from causal_lm.evaluate import evaluate
from support.models import MAKE, NAMES
from support.runs import SHORT, short_run

DATA = ["data=synthetic", *[word for word in SHORT if word.startswith("data.source")]]
HUGGINGFACE = "causal_lm.models.external.huggingface"
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
SECRET = "${oc.env:CAUSAL_LM_TEST_SECRET}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    short_run(folder)
    return folder / "checkpoints" / "last.ckpt"


@pytest.fixture
def altered(trained, tmp_path):
    """A copy of the checkpoint with changed parts of its configuration, by group."""

    def alter(tokenizer=None, **groups):
        saved = torch.load(trained, weights_only=True)
        for group, changes in groups.items():
            before = {} if "_target_" in changes else saved[CONFIG][group]
            saved[CONFIG][group] = before | changes
        saved[TOKENIZER] = tokenizer or saved[TOKENIZER]
        torch.save(saved, tmp_path / "altered.ckpt")
        return str(tmp_path / "altered.ckpt")

    return alter


def numbers_in(message):
    return [
        int(word.replace(",", "")) for word in message.split() if word.replace(",", "").isdigit()
    ]


# ---- sizes ----


@pytest.mark.parametrize("name", NAMES)
def test_counting_allocates_nothing_and_draws_nothing(name):
    torch.manual_seed(0)
    expected = [p.clone() for p in MAKE[name]().parameters()]
    torch.manual_seed(0)
    check_size(MAKE[name], "model", most=10**6)
    assert all(map(torch.equal, MAKE[name]().parameters(), expected))
    with pytest.raises(ValueError, match="model has at least"):
        check_size(MAKE[name], "model", most=100)


@pytest.mark.parametrize(
    ("words", "parameters"),
    [
        (["model.d_model=10000000"], 8 * 10**14),
        (["model=llama", "model.d_model=10000000"], 9 * 10**14),
        (["model=gru", "model.d_model=10000000"], 6 * 10**14),
        (["data.max_length=10000000", "model.d_model=2048"], 10**7 * 2048),
        (["model.d_ff=100000000", "model.d_model=4000"], 16 * 10**11),
    ],
)
def test_a_model_that_cannot_be_allocated_is_refused_with_its_parameters(words, parameters):
    started = time.process_time()
    with pytest.raises(ValueError, match="model has at least") as error:
        build.make_module(config.load(words), ByteTokenizer())
    assert parameters <= numbers_in(str(error.value))[0] < 1.1 * parameters
    assert time.process_time() - started < 20


def test_memory_is_known_here():
    assert 2**28 < build.memory_bytes() < 2**50


@pytest.mark.parametrize(
    "model",
    [
        {"d_model": 10**7},
        {"d_ff": 10**8},
        {"n_layers": 1000},  # ten million parameters are allowed
        {"n_layers": 10**9},
        {"d_model": 10**30},
        {"max_positions": 10**8},
    ],
    ids=str,
)
def test_a_stored_model_larger_than_its_weights_is_refused(model, altered):
    path = altered(model=model | ({"d_model": 256} if "n_layers" in model else {}))
    started = time.process_time()
    with pytest.raises(ValueError, match=r"at least|model\.(n_layers|d_model) must be") as error:
        restore(path)
    assert path in str(error.value)
    assert time.process_time() - started < 20


@pytest.mark.extras
@pytest.mark.parametrize("size", [{"n_embd": 10**7}, {"n_layer": 10**9}, {"n_positions": 10**12}])
def test_so_is_one_of_transformers(size, altered):
    config_ = GPT2 | size
    with pytest.raises(ValueError, match=r"at least|must be"):
        restore(altered(model={"_target_": HUGGINGFACE, "config": config_}))


@pytest.mark.parametrize("symbols", [2**31, 10**30, 0, -3, 63, "many", 2.5, None])
def test_a_stored_number_of_symbols_is_checked(symbols, altered):
    with pytest.raises(ValueError, match="tokenizer"):
        restore(altered(tokenizer={"name": "symbols", "symbols": symbols}))


@pytest.mark.extras
@pytest.mark.parametrize("largest", [2**22, 2**31, 2**32 - 1])
def test_a_tokenizer_with_a_huge_id_is_refused(largest, altered, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    text = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, "a")).to_str()
    settings, path = json.loads(text), tmp_path / "tokenizer.json"
    settings["model"]["vocab"]["b"] = largest  # the library itself takes minutes to write it
    path.write_text(json.dumps(settings))
    (tmp_path / "a.txt").write_text("a b\nb a\n")
    named = f"{largest:,}"
    with pytest.raises(ValueError, match=named):
        TextFiles(path=str(tmp_path / "a.txt"), tokenizer=str(path)).load()
    state = {"name": "subwords", "json": path.read_text(), "pad": 0, "bos": 0, "eos": 0}
    with pytest.raises(ValueError, match=f"tokenizer.*{named}"):
        restore(altered(tokenizer=state))


@pytest.mark.extras
@pytest.mark.parametrize("role", ["pad", "bos", "eos"])
@pytest.mark.parametrize("number", [-1, 2, 2**31])
def test_special_tokens_are_in_the_vocabulary(role, number):
    tokenizers = pytest.importorskip("tokenizers")
    text = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, "a")).to_str()
    state = {"name": "subwords", "json": text, "pad": 0, "bos": 0, "eos": 0}
    assert from_state(state).vocab_size == 2
    with pytest.raises(ValueError, match="vocabulary"):
        from_state(state | {role: number})


# ---- interpolations ----


@pytest.mark.parametrize(
    "groups",
    [
        {"model": {"d_model": SECRET}},
        {"model": {"max_positions": SECRET}},
        {"data": {"max_length": SECRET}},
        {"model": {"_target_": SECRET, "d_model": 16}},
        pytest.param(
            {"model": {"_target_": HUGGINGFACE, "config": GPT2 | {"n_embd": SECRET}}},
            marks=pytest.mark.extras,
        ),
    ],
    ids=str,
)
def test_a_stored_interpolation_is_not_resolved(groups, altered, monkeypatch):
    monkeypatch.setenv("CAUSAL_LM_TEST_SECRET", "16")  # resolved, it would be a valid size
    path = altered(**groups)
    for use in (restore, lambda path: evaluate(path, DATA)):
        with pytest.raises(ValueError, match=r"CAUSAL_LM_TEST_SECRET|not int"):
            use(path)


def test_a_run_that_continues_does_not_resolve_one(altered, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("CAUSAL_LM_TEST_SECRET", "hunter2")
    path = altered(data={"own": SECRET}, samples={"count": SECRET})
    caplog.set_level("INFO")
    short_run(tmp_path / "more", f"ckpt_path={path}", "trainer.max_steps=7")
    assert "CAUSAL_LM_TEST_SECRET" in caplog.text
    written = [p.read_text() for p in (tmp_path / "more").glob("*.*") if p.is_file()]
    assert written and not [text for text in [caplog.text, *written] if "hunter2" in text]


def test_the_guard_of_these_tests(monkeypatch):
    """A configuration of the caller's own does resolve it."""
    monkeypatch.setenv("CAUSAL_LM_TEST_SECRET", "hunter2")
    node = config.load([f"+own.key='{SECRET}'"]).own
    assert node.key == "hunter2"
    assert json.dumps(dict(node)) == '{"key": "hunter2"}'

"""Chats: the assistant's turns alone are learned, each with its EOS."""

import json
import logging
from functools import partial

import pytest
import torch

from causal_lm import config, generation
from causal_lm.build import restore
from causal_lm.data.collate import Collate
from causal_lm.data.datamodule import DataModule
from causal_lm.data.sources.huggingface import HuggingFaceDataset
from causal_lm.data.subwords import SubwordTokenizer
from causal_lm.evaluate import evaluate
from causal_lm.fit import run
from causal_lm.models.external import huggingface
from causal_lm.models.tiny import Tiny
from causal_lm.module import CausalLM
from causal_lm.objective import IGNORE
from causal_preflight.lightning import audit_batch
from support.chats import CHATS, documents, learned, load_chats, says
from support.models import LLAMA


@pytest.fixture
def load(tmp_path):
    return partial(load_chats, tmp_path)


# ---- the plain template ----


def test_the_assistant_is_learned_with_its_eos_and_nothing_else(load):
    corpus = load(CHATS)
    tokenizer, texts = corpus.tokenizer, []
    for document in documents(corpus):
        first, last = document.tokens[[0, -1]].tolist()
        assert (first, last) == (tokenizer.bos_id, tokenizer.eos_id)
        turns = learned(document, tokenizer)
        assert [ends for _, ends in turns] == [True, True] and turns[1][0] == "So."
        assert int((document.tokens == tokenizer.eos_id).sum()) == 2
        texts.append(tokenizer.decode(document.tokens.tolist()))
    assert sorted(texts) == sorted(
        f"system:\nAdd.\nuser:\n{i}+1?\nassistant:\nIt is {i + 1}.user:\nWhy é?\nassistant:\nSo."
        for i in range(40)
    )


def test_labels_by_hand(load):
    chat = [says("user", "a"), says("assistant", "bc"), says("user", "d"), says("assistant", "")]
    corpus = load([chat, *CHATS])
    tokenizer = corpus.tokenizer
    (document,) = [d for d in documents(corpus) if len(d.tokens) < 60]
    batch = Collate(tokenizer.pad_id, tokenizer.vocab_size)([document])
    prompts = "user:\na\nassistant:\n", "user:\nd\nassistant:\n"
    expected = [IGNORE] * len(prompts[0]) + [*tokenizer.encode("bc"), tokenizer.eos_id]
    expected += [IGNORE] * len(prompts[1]) + [tokenizer.eos_id, IGNORE]
    assert batch.labels[0].tolist() == expected


def test_turns_after_the_last_of_the_assistant_are_left_out(load):
    corpus = load([[*chat, says("user", "And then?")] for chat in CHATS])
    assert all(len(learned(d, corpus.tokenizer)) == 2 for d in documents(corpus))
    assert all(int(d.tokens[-1]) == corpus.tokenizer.eos_id for d in documents(corpus))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([says("user", "a")], ["assistant"]),
        ([], ["assistant"]),
        ([says("assistant", None)], ["role", "content", "None"]),
        ([{"content": "a"}], ["role", "'a'"]),
        ([says("user", "\ud800"), says("assistant", "")], ["role", "content"]),
        (["a"], ["role", "'a'"]),
        ("a text", ["mixed", "'messages'"]),
    ],
)
def test_a_chat_that_cannot_be_learned_is_named_or_skipped(value, words, load, caplog):
    with pytest.raises(ValueError, match=r"chats\.jsonl, line 41: ") as error:
        load([*CHATS, value])
    assert all(word in str(error.value) for word in words)
    with caplog.at_level(logging.INFO):
        assert len(documents(load([*CHATS, value], on_error="skip"))) == len(CHATS)
    assert " 1 records without a text;" in caplog.text


def test_windows_and_batches_keep_the_mask(load, caplog):
    corpus = load(CHATS)
    source = type("Source", (), {"load": lambda self: corpus})()
    data = DataModule(source, batch_size=4, max_length=32, layout="packed")
    data.setup()
    targets = sum(int((batch.labels != IGNORE).sum()) for batch in data.train_dataloader())
    train = [corpus.train[i].loss_mask for i in range(len(corpus.train))]
    assert targets == sum(int(mask[1:].sum()) for mask in train)


class LearnsEveryTurn(CausalLM):
    def training_labels(self, batch):
        return type(batch)(batch.input_ids, batch.position_ids, batch.document_ids).labels


def test_the_preflight_tells_learned_user_turns(load):
    short = [[says("user", f"{i}?"), says("assistant", f"{i}.")] for i in range(9)]
    corpus = load(short)
    t = corpus.tokenizer
    batch = Collate(t.pad_id, t.vocab_size)([corpus.train[i] for i in range(2)])
    torch.manual_seed(0)
    model = Tiny(t.vocab_size, d_model=8, n_heads=2, n_layers=1, d_ff=8, max_positions=80)
    for kind, faults in ((CausalLM, []), (LearnsEveryTurn, ["pad"])):
        module = kind(model)
        loss = module.accumulated_loss
        report = audit_batch(module, batch, loss, pad_id=t.pad_id, eos_id=t.eos_id)
        assert report.audited and sorted(report.faults) == faults


# ---- fine-tuning, with libraries ----


@pytest.mark.extras
def test_chats_by_the_datasets_library(load, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"messages": chat} for chat in CHATS]).save_to_disk(tmp_path / "d")
    options = {"field": "messages", "cache_dir": str(tmp_path / "other"), "num_proc": 1}
    corpus = HuggingFaceDataset(path=str(tmp_path / "d"), val_share=0.3, **options).load()
    both = [sorted(d.tokens.tolist() for d in documents(c)) for c in (corpus, load(CHATS))]
    assert both[0] == both[1]


@pytest.mark.extras
def test_adapters_learn_chats_end_to_end(tmp_path):
    """A pretrained model, its tokenizer, LoRA and chats: the preflight is clean, and the checkpoint
    can be evaluated and sampled from."""
    pytest.importorskip("peft")
    pytest.importorskip("tokenizers")
    tokenizer, data = tmp_path / "tokenizer.json", tmp_path / "chats.jsonl"
    trained = SubwordTokenizer.train([[m["content"] for c in CHATS for m in c]], vocab_size=280)
    tokenizer.write_text(trained.json)
    data.write_text("\n".join(json.dumps({"messages": chat}) for chat in CHATS))
    torch.manual_seed(0)
    sizes = LLAMA | {"max_position_embeddings": 96}
    huggingface(trained.vocab_size, sizes).net.save_pretrained(tmp_path / "base")
    data_keys = ["data=text", f"data.path={data}", "data.field=messages", "data.max_length=96"]
    cfg = config.load([
        *data_keys, f"data.tokenizer={tokenizer}", "experiment=finetune",
        f"model.init_from={tmp_path / 'base'}",
        "trainer=cpu", "trainer.max_steps=2", "trainer.val_check_interval=2", "data.batch_size=2",
        "samples.count=0", "samples.self_check.count=1", "trainer.enable_progress_bar=false",
    ])  # fmt: skip
    summary = run(cfg, tmp_path / "run")
    assert summary["preflight/faults"] == [] and summary["preflight/audited"]
    last = tmp_path / "run/checkpoints/last.ckpt"
    figures = evaluate(str(last), data_keys)
    assert figures["loss"] == pytest.approx(summary["val/loss"], rel=1e-5)
    module, restored, saved = restore(last)
    assert saved["model"]["lora"]["r"] == 8 and saved["optimizer"]["lr"] == 2e-4
    prompt = torch.tensor([[restored.bos_id, *restored.encode("user:\n1+1?\nassistant:\n")]])
    assert generation.sample(module, prompt, 60).shape == (1, 60)

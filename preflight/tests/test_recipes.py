"""The blocks of docs/recipes.md, run as they stand on right set-ups and on wrong ones."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit_cases.parts import EOS, PAD, Batch, Tiny, V, full, nll, padded, targets
from trainer_parts import RECIPES, documents, llama, run_recipe, tokenizer

extras = pytest.mark.extras


def test_every_recipe_is_at_most_twelve_lines() -> None:
    assert list(RECIPES) == [
        "A Hugging Face model", "transformers' Trainer", "TRL", "nanoGPT",
        "litgpt: pretraining", "litgpt: fine-tuning",
        "a loop of your own, with accumulation".capitalize(),
    ]  # fmt: skip
    lines = [[x for x in block.splitlines() if x.strip()] for block in RECIPES.values()]
    assert max(map(len, lines)) <= 12


class NanoGPT(nn.Module):
    """The convention of nanoGPT: `model(x, y)` gives logits and the loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.transformer = Tiny()

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Any]:
        logits = self.transformer(idx)
        if targets is None:
            return logits[:, [-1]], None
        loss = F.cross_entropy(logits.view(-1, V), targets.view(-1), ignore_index=-1)
        return logits, loss


@pytest.mark.parametrize(("ahead", "fault"), [(1, set()), (0, {"shift"}), (2, {"shift"})])
def test_nanogpt(ahead: int, fault: set[str]) -> None:
    data = full(0, rows=1, width=400)["input_ids"][0]

    def get_batch(split: str) -> tuple[Tensor, Tensor]:
        starts = torch.arange(8) * 37
        x, y = (torch.stack([data[i + k : i + k + 24] for i in starts]) for k in (0, ahead))
        return x, y

    report = run_recipe("nanoGPT", model=NanoGPT(), get_batch=get_batch)
    assert report.faults == fault, str(report)
    assert report.audited


def test_a_loop_of_ones_own() -> None:
    def summed(model: nn.Module, batch: Batch) -> Tensor:
        return nll(model(batch["input_ids"]), targets(batch)).sum()

    def mean(model: nn.Module, batch: Batch) -> Tensor:
        return summed(model, batch) / (batch["labels"] != -100).sum() * 20

    recipe = "A loop of your own, with accumulation"
    names = {"model": Tiny(), "batch": padded(0)}
    assert run_recipe(recipe, summed_loss=summed, **names).clean
    assert run_recipe(recipe, summed_loss=mean, **names).faults == {"reduction"}


@extras
@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (lambda labels, ids: labels, set()),
        (lambda labels, ids: labels.roll(-1, 1), {"shift"}),
        (lambda labels, ids: ids.clone(), {"pad"}),
        (lambda labels, ids: labels.masked_fill(ids == EOS, -100), {"eos"}),
    ],
)
def test_a_hugging_face_model(edit: Any, fault: set[str]) -> None:
    """Batches of the collator for language modeling, whose type is BatchEncoding."""
    transformers = pytest.importorskip("transformers")
    collate = transformers.DataCollatorForLanguageModeling(tokenizer(), mlm=False)
    batch = collate([{"input_ids": ids} for ids in documents(4)])
    batch["labels"] = edit(batch["labels"], batch["input_ids"])
    names = {"model": llama(), "tokenizer": tokenizer(), "train_dataloader": [batch]}
    report = run_recipe("A Hugging Face model", **names)
    assert report.faults == fault and report.audited, str(report)


@pytest.fixture
def litgpt() -> Any:
    module = pytest.importorskip("litgpt")
    torch.manual_seed(0)
    return module.GPT(
        module.Config(
            block_size=64, vocab_size=V, padded_vocab_size=V, n_layer=2, n_head=2, n_embd=16,
            rotary_percentage=1.0, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP",
            intermediate_size=32, bias=False,
        )
    )  # fmt: skip


@extras
def test_litgpt_pretraining(litgpt: Any) -> None:
    names = {"model": litgpt, "train_dataloader": [full(0)["input_ids"]]}
    report = run_recipe("litgpt: pretraining", **names)
    assert report.clean and {"alignment", "future"} <= set(report.passed), str(report)
    litgpt.lm_head.register_forward_hook(lambda module, args, out: out + out.roll(-1, 1))
    assert run_recipe("litgpt: pretraining", **names).faults == {"causal"}


@extras
@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (lambda labels, ids: labels, set()),
        (lambda labels, ids: labels.roll(-1, 1), {"shift"}),
        (lambda labels, ids: ids.clone(), {"pad"}),
        (lambda labels, ids: labels.masked_fill(ids == EOS, -100), {"eos"}),
    ],
)
def test_litgpt_finetuning(edit: Any, fault: set[str], litgpt: Any) -> None:
    """Batches of litgpt's own collate function, with prompts that do not count."""
    from litgpt.data.base import get_sft_collate_fn

    rows, counts = [], {"raw": 1, "raw_plus_prompt_template": 1}
    for ids, mask in zip(padded(0)["input_ids"], padded(0)["attention_mask"], strict=True):
        ids = ids[mask.bool()]
        labels = torch.cat([torch.full((3,), -100), ids[3:]])
        rows.append({"input_ids": ids, "labels": labels, "token_counts": counts})
    batch = get_sft_collate_fn(pad_id=PAD)(rows)
    batch["labels"] = edit(batch["labels"], batch["input_ids"])
    report = run_recipe("litgpt: fine-tuning", model=litgpt, train_dataloader=[batch], eos_id=EOS)
    assert report.faults == fault, str(report)
    assert report.audited

"""The callback on TRL's SFTTrainer, whose loss never makes logits: packing, chats, completions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer_parts import documents, llama, run_recipe, tokenizer

pytest.importorskip("accelerate")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from causal_preflight.report import PreflightError  # noqa: E402
from causal_preflight.transformers import PreflightCallback, _loss_of  # noqa: E402

pytestmark = pytest.mark.extras
TURN_ENDS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} "
    "<eos> {% endgeneration %}{% else %}<bos> {{ m['content'] }} {% endif %}{% endfor %}"
)
# Wrong: the end of the turn is outside of what counts, so the model never learns to stop.
NEVER_ENDS = TURN_ENDS.replace("<eos> {% endgeneration %}", "{% endgeneration %}<eos> ")


def words(ids: list[int]) -> str:
    return " ".join(tokenizer().convert_ids_to_tokens(ids))


TEXTS = [{"text": words(ids)} for ids in documents(24)]
COMPLETIONS = [
    {"prompt": words(ids[:3]), "completion": " " + words(ids[3:])} for ids in documents(24)
]
CHATS = [
    {"messages": [{"role": "user", "content": words(ids[1:3])},
                  {"role": "assistant", "content": words(ids[3:-1])}]}
    for ids in documents(24)
]  # fmt: skip


def sft(
    tmp_path: Path, rows: list[Any], template: str = TURN_ENDS, kind: Any = trl.SFTTrainer,
    model: Any = None, **settings: Any,
) -> Any:  # fmt: skip
    tokens = tokenizer()
    tokens.chat_template = template
    settings = {"per_device_train_batch_size": 4, "max_length": 40} | settings
    args = trl.SFTConfig(
        str(tmp_path), max_steps=2, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True,
        save_strategy="no", logging_steps=1, learning_rate=1e-2, **settings,
    )  # fmt: skip
    return kind(
        model=model or llama(), args=args, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokens,
    )  # fmt: skip


def audited(tmp_path: Path, rows: list[Any], audit: bool = True, **settings: Any) -> Any:
    run = sft(tmp_path, rows, **settings)
    callback = PreflightCallback(run, "warn")
    if audit:
        run.add_callback(callback)
    run.train()
    return callback


def test_the_recipe_on_a_right_trainer_and_on_a_wrong_one(tmp_path: Path, capsys: Any) -> None:
    run = sft(tmp_path, TEXTS)
    run_recipe("TRL", trainer=run)
    assert run.state.global_step == 2
    assert capsys.readouterr().err.count("preflight: no fault found") == 1
    wrong = sft(tmp_path, TEXTS, kind=Shifted)
    with pytest.raises(PreflightError, match="shift"):
        run_recipe("TRL", trainer=wrong)
    assert wrong.state.global_step == 0


@pytest.mark.parametrize(
    ("rows", "settings", "examined"),
    [
        (TEXTS, {}, {"extension"}),
        (TEXTS, {"packing": True, "max_length": 48}, {"documents"}),
        (TEXTS, {"padding_free": True, "max_length": None}, {"documents"}),
        (TEXTS, {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1}, set()),
        (CHATS, {"assistant_only_loss": True}, {"emptied", "ending"}),
        (COMPLETIONS, {"completion_only_loss": True}, {"emptied", "ending"}),
        (COMPLETIONS, {"gradient_accumulation_steps": 2}, {"emptied", "ending"}),
    ],
)
def test_right_runs_are_clean(
    rows: list[Any], settings: dict[str, Any], examined: set[str], tmp_path: Path
) -> None:
    report = audited(tmp_path, rows, **settings).report
    assert report.clean, str(report)
    assert {"alignment", "reduction", "future", *examined} <= set(report.passed), str(report)


class Unnormalized(trl.SFTTrainer):
    """Wrong under accumulation: each micro-batch is divided by its own count."""

    def compute_loss(self, *args: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


class Shifted(trl.SFTTrainer):
    """Wrong: labels are shifted, and the model shifts them again."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        labels = inputs["labels"].roll(-1, 1)
        return super().compute_loss(model, {**inputs, "labels": labels}, *args, **kwargs)


def leaking() -> Any:
    """A Llama in which packed documents see each other."""
    model = llama()
    plain = model.model.forward

    def forward(*args: Any, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        return plain(*args, **kwargs)

    model.model.forward = forward
    return model


@pytest.mark.parametrize(
    ("rows", "settings", "label"),
    [
        (TEXTS, {"kind": Unnormalized, "gradient_accumulation_steps": 2}, "reduction"),
        (TEXTS, {"kind": Shifted}, "shift"),
        (TEXTS, {"packing": True, "max_length": 48, "model": leaking}, "causal"),
        (CHATS, {"assistant_only_loss": True, "template": NEVER_ENDS}, "eos"),
    ],
)
def test_faults_are_named(
    rows: list[Any], settings: dict[str, Any], label: str, tmp_path: Path
) -> None:
    settings = settings | {k: v() for k, v in settings.items() if k == "model"}
    report = audited(tmp_path, rows, **settings).report
    assert report.faults == {label}, str(report)


def test_training_and_its_metrics_are_the_same_with_and_without(tmp_path: Path) -> None:
    runs = [audited(tmp_path, TEXTS, audit=audit).trainer for audit in (True, False)]
    state, logged = [], []
    for run in runs:
        state.append([*run.model.parameters(), torch.get_rng_state()])
        logged.append([e for e in run.state.log_history if "mean_token_accuracy" in e])
    keys = ("loss", "entropy", "num_tokens", "mean_token_accuracy")
    assert all(map(torch.equal, *state))
    assert len(logged[0]) == 2
    assert all(a[k] == b[k] for a, b in zip(*logged, strict=True) for k in keys)
    assert runs[0]._total_train_tokens == runs[1]._total_train_tokens > 0


def test_the_audited_loss_is_that_of_the_fused_head(tmp_path: Path) -> None:
    run = audited(tmp_path, COMPLETIONS, audit=False).trainer
    batch, notes = next(iter(run.get_train_dataloader())), set[str]()
    run.model.eval()
    count = (batch["labels"][:, 1:] != -100).sum()
    own = run.compute_loss(run.model, dict(batch), num_items_in_batch=count)
    torch.testing.assert_close(_loss_of(run, notes)(batch), own)
    assert len(notes) == 1

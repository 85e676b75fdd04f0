"""The callback of transformers' Trainer, on real Trainers that are right and wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer_parts import documents, llama, run_recipe, tokenizer

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from causal_preflight.report import PreflightError  # noqa: E402
from causal_preflight.transformers import PreflightCallback  # noqa: E402

pytestmark = pytest.mark.extras


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return transformers.DataCollatorForLanguageModeling(tokenizer(), mlm=False)(rows)


def shifted(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Wrong: the model shifts the labels again."""
    batch = collate(rows)
    return {**batch, "labels": F.pad(batch["labels"][:, 1:], (0, 1), value=-100)}


def pad_counts(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    batch = collate(rows)
    return {**batch, "labels": batch["input_ids"].clone()}


def pad_is_eos(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Wrong: EOS is used as PAD, and all of it is ignored by its id."""
    tokens = tokenizer()
    tokens.pad_token = tokens.eos_token
    return transformers.DataCollatorForLanguageModeling(tokens, mlm=False)(rows)


def nll(logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], **kwargs)


def divided_by_all(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return nll(outputs.logits, labels, reduction="sum") / num_items_in_batch


def divided_by_own(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Wrong under accumulation: each micro-batch is divided by its own count, and all are added."""
    return nll(outputs.logits, labels)


def divided_by_slots(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return nll(outputs.logits, labels, reduction="sum") / labels.numel()


class DropsTheCount(transformers.Trainer):
    """Wrong under accumulation: the model gets no `num_items_in_batch`."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        self.log({"own": 1.0})
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def trainer(
    tmp_path: Path, kind: Any = transformers.Trainer, collator: Any = collate, accumulate: int = 1,
    rows: int = 4, data: Any = None, model: Any = None, **kwargs: Any,
) -> Any:  # fmt: skip
    settings = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=rows, gradient_accumulation_steps=accumulate,
        max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
        logging_steps=1, label_smoothing_factor=kwargs.pop("smoothing", 0.0), learning_rate=1e-2,
        lr_scheduler_type="constant",
    )  # fmt: skip
    data = data or [{"input_ids": ids} for ids in documents(16)]
    return kind(
        model=model or llama(attention_dropout=0.1), args=settings, data_collator=collator,
        train_dataset=data, processing_class=tokenizer(), **kwargs,
    )  # fmt: skip


def audited(run: Any, on_fault: str = "warn", **options: Any) -> PreflightCallback:
    callback = PreflightCallback(run, on_fault, **options)
    run.add_callback(callback)
    run.train()
    return callback


RIGHT = {
    "plain": {},
    "accumulated": {"accumulate": 4},
    "one row a batch": {"accumulate": 4, "rows": 1},
    "own loss": {"accumulate": 2, "compute_loss_func": divided_by_all},
    "one micro-batch": {"compute_loss_func": divided_by_own},
    "count dropped, but needed nowhere": {"kind": DropsTheCount},
    "smoothed": {"accumulate": 2, "smoothing": 0.1},
}
FAULTY = {
    "shifted twice": ({"collator": shifted}, "shift"),
    "pad counts": ({"collator": pad_counts, "accumulate": 2}, "pad"),
    "eos is ignored": ({"collator": pad_is_eos}, "eos"),
    "mean of means": ({"accumulate": 2, "compute_loss_func": divided_by_own}, "reduction"),
    "mean of single rows": (
        {"accumulate": 4, "rows": 1, "compute_loss_func": divided_by_own}, "reduction",
    ),
    "divided by slots": ({"compute_loss_func": divided_by_slots}, "reduction"),
    "count dropped": ({"accumulate": 2, "kind": DropsTheCount}, "reduction"),
}  # fmt: skip


@pytest.mark.parametrize("case", RIGHT)
def test_right_trainers_are_clean(case: str, tmp_path: Path) -> None:
    report = audited(trainer(tmp_path, **RIGHT[case])).report
    assert report is not None and report.clean, str(report)
    assert {"alignment", "reduction", "future"} <= set(report.passed), str(report)


@pytest.mark.parametrize("case", FAULTY)
def test_faults_are_named(case: str, tmp_path: Path) -> None:
    settings, label = FAULTY[case]
    report = audited(trainer(tmp_path, **settings)).report
    assert report is not None and report.faults == {label}, str(report)


def test_an_error_stops_before_the_first_step(tmp_path: Path, capsys: Any) -> None:
    right = trainer(tmp_path)
    run_recipe("transformers' Trainer", trainer=right)
    (callback,) = [c for c in right.callback_handler.callbacks if type(c) is PreflightCallback]
    assert callback.report.clean and right.state.global_step > 0
    assert capsys.readouterr().err.count("preflight: no fault found") == 1
    run = trainer(tmp_path, collator=shifted)
    before = [p.detach().clone() for p in run.model.parameters()]
    with pytest.raises(PreflightError, match="shift"):
        run_recipe("transformers' Trainer", trainer=run)
    assert run.state.global_step == 0
    assert all(map(torch.equal, before, run.model.parameters()))
    assert capsys.readouterr().err.count("preflight: FAULTS shift") == 1


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2, "kind": DropsTheCount}])
def test_training_is_the_same_with_and_without(settings: dict[str, Any], tmp_path: Path) -> None:
    """Weights, optimizer, what was logged, and the random state, with dropout and shuffled data."""

    def outcome(audit: bool) -> tuple[list[Tensor], list[Any]]:
        run = trainer(tmp_path, **settings)
        if audit:
            audited(run)
        else:
            run.train()
        state = run.optimizer.state_dict()["state"].values()
        moments = [t for s in state for t in s.values()]
        logged = [{k: v for k, v in e.items() if "per_second" not in k and "runtime" not in k}
                  for e in run.state.log_history]  # fmt: skip
        return [*run.model.parameters(), *moments, torch.get_rng_state()], logged

    (tensors, logged), (expected, expected_logged) = outcome(True), outcome(False)
    assert len(tensors) > 20 and all(map(torch.equal, tensors, expected))
    assert logged == expected_logged and len(logged) > 2


def test_a_first_step_without_targets_waits_for_the_next(tmp_path: Path, capsys: Any) -> None:
    calls: list[int] = []

    def no_target_at_first(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = collate(rows)
        calls.append(len(rows))
        return {**batch, "labels": batch["labels"].fill_(-100)} if len(calls) == 1 else batch

    report = audited(trainer(tmp_path, collator=no_target_at_first), "error").report
    assert report is not None and report.clean, str(report)
    assert len(calls) >= 2
    assert capsys.readouterr().err.count("no label counts; waits for another") == 1


def test_the_trainer_has_its_own_methods_again(tmp_path: Path, capsys: Any) -> None:
    run = trainer(tmp_path)
    callback = audited(run)
    assert "get_batch_samples" not in vars(run)
    run.train()  # a second time: it is not audited again
    assert capsys.readouterr().err.count("preflight: ") == 1 and callback.report.clean
    with pytest.raises(PreflightError):
        audited(wrong := trainer(tmp_path, collator=shifted), "error")
    assert "get_batch_samples" not in vars(wrong)


def test_rows_are_put_together_only_where_all_have_one_shape(tmp_path: Path) -> None:
    """A number beside each row is no column of tokens, and a key may be in some batches alone."""
    model, seen = llama(), list[tuple[int, ...]]()
    run, ids, plain_forward = trainer(tmp_path, model=model), documents(1)[0], model.forward

    def forward(task: Any = None, **batch: Any) -> Any:
        seen.append(tuple(batch["input_ids"].shape))
        return plain_forward(**batch)

    model.forward = forward
    run.create_optimizer()
    plain = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([ids])}
    for first, second in (
        (plain | {"task": torch.tensor([[3]])}, plain | {"task": torch.tensor([[4]])}),
        (plain, plain | {"attention_mask": torch.ones(1, len(ids))}),
    ):
        seen.clear()
        PreflightCallback(run, "warn").audit([first, second])
        assert len(seen) > 5 and seen[0] == (1, len(ids)) != (1, 1)


def test_other_names_and_ids_are_passed_on(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="on_fault"):
        PreflightCallback(trainer(tmp_path), "stop")
    assert PreflightCallback(trainer(tmp_path)).options == {"pad_id": 0, "eos_id": 2}
    assert PreflightCallback(trainer(tmp_path), eos_id=7).options["eos_id"] == 7


@pytest.mark.parametrize("kind", ["right", "wrong", "collective"])
def test_two_ranks(kind: str, tmp_path: Path) -> None:
    """Rank zero audits, both know the result and stop or go on; the weights are as without."""

    def results(audit: str) -> list[dict[str, Any]]:
        script = Path(__file__).with_name("trainer_ranks.py")
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        paths = os.pathsep.join([str(script.parent), str(script.parents[1] / "src")])
        done = subprocess.run(
            [*launch, "2", str(script), str(tmp_path), audit, kind], capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": paths}, timeout=300, check=False,
        )  # fmt: skip
        lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT")]
        assert len(lines) == 2, done.stderr[-2000:]
        assert done.stderr.count("preflight: ") == (audit == "audit")
        return [json.loads(line.removeprefix("RESULT")) for line in lines]

    found = results("audit")
    assert {x["rank"] for x in found} == {0, 1} and all(x["ranks"] == 2 for x in found)
    assert all(x["clean"] == (kind != "wrong") for x in found)
    assert all(x["stopped"] == (kind == "wrong") for x in found)
    if kind == "right":
        plain = results("none")
        assert len({x["weights"] for x in [*found, *plain]}) == 1
    elif kind == "wrong":
        assert all(x["faults"] == ["shift"] for x in found)

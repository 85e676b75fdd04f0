"""One rank of a Trainer's training, for test_transformers.py: prints its report and its weights."""

import json
import sys
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from causal_preflight.report import PreflightError
from causal_preflight.transformers import PreflightCallback
from trainer_parts import documents, llama, tokenizer


def divided_by_collective(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor
) -> torch.Tensor:
    """Right: every rank has the count of all, so its mean over ranks is that count."""
    count = num_items_in_batch.clone()
    torch.distributed.all_reduce(count)
    logits, ranks = outputs.logits[:, :-1].mT, torch.distributed.get_world_size()
    return F.cross_entropy(logits, labels[:, 1:], reduction="sum") / count * ranks


def main(folder: str, audit: bool, kind: str) -> None:
    args = transformers.TrainingArguments(
        folder, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=2,
        use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", learning_rate=1e-2,
    )  # fmt: skip
    collator = transformers.DataCollatorForLanguageModeling(tokenizer(), mlm=False)

    def shifted(rows: list) -> dict:
        batch = collator(rows)
        return {**batch, "labels": batch["labels"].roll(-1, 1)}

    trainer = transformers.Trainer(
        llama(), args, train_dataset=[{"input_ids": ids} for ids in documents(32)],
        data_collator=shifted if kind == "wrong" else collator, processing_class=tokenizer(),
        compute_loss_func=divided_by_collective if kind == "collective" else None,
    )  # fmt: skip
    callback = PreflightCallback(trainer)
    stopped = False
    if audit:
        trainer.add_callback(callback)
    try:
        trainer.train()
    except PreflightError:
        stopped = True
    total = sum(p.detach().double().abs().sum().item() for p in trainer.model.parameters())
    faults = sorted(callback.report.faults) if callback.report else []
    result = {"rank": args.process_index, "ranks": args.world_size, "stopped": stopped}
    result |= {"faults": faults, "clean": bool(callback.report and callback.report.clean)}
    print("RESULT" + json.dumps({**result, "weights": total}), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "audit", sys.argv[3])

"""Tokenizing and packing lines: this project beside ``datasets.map`` with the same tokenizer."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

from causal_lm.data.datamodule import DataModule
from causal_lm.data.sources.text_files import TextFiles
from causal_lm.report.table import table

ROW, WINDOWS = 256, 32  # slots of a row; windows in a batch
IDS = 4096  # of the tokenizer that is trained on the text


def measure(rounds: int, path: Path, kind: str) -> str:
    """The table of medians, in turns, each with caches of its own; ``kind`` is bytes, or bpe for
    one that is trained on the text before."""
    works = {"this project": _ours, "datasets.map": _theirs}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as place:
        tokenizer = None if kind == "bytes" else _train(path, Path(place, "tokenizer.json"))
        for turn in range(rounds):
            for name, work in works.items():
                started = time.perf_counter()
                count_rows = work(path, tokenizer, Path(place, f"{turn} {name}"))
                tokenized = time.perf_counter()
                counts[name] = count_rows()
                seconds[name].append((tokenized - started, time.perf_counter() - tokenized))
    medians = {name: [statistics.median(x) for x in zip(*took, strict=True)]
               for name, took in seconds.items()}  # fmt: skip
    rows = [["", "tokenizing, s", "MB/s", "× datasets.map", "packing and reading, s", "tokens"]]
    for name, (tokenizing, reading) in medians.items():
        rate = path.stat().st_size / 1e6 / tokenizing
        ratio = medians["datasets.map"][0] / tokenizing
        rows.append([name, f"{tokenizing:.2f}", f"{rate:.1f}", f"{ratio:.1f}", f"{reading:.2f}",
                     f"{counts[name]:,}"])  # fmt: skip
    return table(rows)


def _train(path: Path, file: Path) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=IDS, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(path)], trainer)
    tokenizer.save(str(file))
    return file


def _ours(path: Path, tokenizer: Path | None, folder: Path) -> Callable[[], int]:
    """Tokenize each line into the cache; the rest collates an epoch of packed batches."""
    data = DataModule(
        TextFiles, path=str(path), unit="line", tokenizer=str(tokenizer or "bytes"),
        cache_dir=str(folder), layout="packed", max_length=ROW, batch_size=WINDOWS, val_share=0.01,
    )  # fmt: skip
    data.setup("fit")
    return lambda: sum(int((batch.document_ids >= 0).sum()) for batch in data.train_dataloader())


def _theirs(path: Path, tokenizer: Path | None, folder: Path) -> Callable[[], int]:
    """Map the lines to tokens; the rest maps them to rows of one stream, as transformers' examples
    do, without positions or documents, and reads these once."""
    from datasets import disable_progress_bars, load_dataset
    from transformers import PreTrainedTokenizerFast

    disable_progress_bars()
    own: Any = tokenizer and PreTrainedTokenizerFast(tokenizer_file=str(tokenizer))

    def tokenize(rows: dict[str, Any]) -> dict[str, Any]:
        texts = rows["text"]
        ids = own(texts, add_special_tokens=False)["input_ids"] if own else map(str.encode, texts)
        return {"input_ids": [[1, *each, 2] for each in ids]}  # BOS and EOS

    def to_rows(rows: dict[str, Any]) -> dict[str, Any]:
        stream = list(chain.from_iterable(rows["input_ids"]))
        return {"input_ids": [stream[i : i + ROW] for i in range(0, len(stream), ROW)]}

    lines = load_dataset("text", data_files=str(path), cache_dir=str(folder))["train"]
    lines = lines.filter(lambda row: row["text"].strip() != "", num_proc=os.cpu_count())
    options: Any = {"batched": True, "num_proc": os.cpu_count()}
    tokens = lines.map(tokenize, remove_columns=["text"], **options)

    def count_rows() -> int:
        rows: Any = tokens.map(to_rows, **options)
        return sum(len(row) for batch in rows.iter(WINDOWS) for row in batch["input_ids"])

    return count_rows

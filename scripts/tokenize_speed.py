"""Tokenizing and packing a text file: this project beside ``datasets.map``, same tokenizer."""

import os
import statistics
import tempfile
import time
from itertools import chain
from pathlib import Path
from typing import Any

from causal_lm.data.datamodule import DataModule
from causal_lm.data.sources.text_files import TextFiles
from causal_lm.report.table import table

ROW, WINDOWS = 256, 32  # slots of a row; windows in a batch
IDS = 4096  # of the tokenizer that is trained on the text


def measure(rounds: int, path: Path) -> str:
    """The table of medians, in turns, each with caches of its own."""
    seconds: dict[str, list[float]] = {"this project": [], "datasets.map": []}
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as place:
        tokenizer = Path(place, "tokenizer.json")
        _train(path, tokenizer)
        for turn in range(rounds):
            for name, work in (("this project", _ours), ("datasets.map", _theirs)):
                folder = Path(place, f"{turn} {name}")
                started = time.perf_counter()
                counts[name] = work(path, tokenizer, folder)
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(took) for name, took in seconds.items()}
    rows = [["", "seconds", "MB/s", "tokens", "× datasets.map"]]
    for name, took in medians.items():
        ratio = medians["datasets.map"] / took
        rate = path.stat().st_size / 1e6 / took
        rows.append([name, f"{took:.1f}", f"{rate:.1f}", f"{counts[name]:,}", f"{ratio:.1f}"])
    return table(rows)


def _train(path: Path, file: Path) -> None:
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


def _ours(path: Path, tokenizer: Path, folder: Path) -> int:
    """Tokenize each line into the cache, then collate packed rows; the number of real tokens."""
    data = DataModule(
        TextFiles, path=str(path), unit="line", tokenizer=str(tokenizer), cache_dir=str(folder),
        layout="packed", max_length=ROW, batch_size=WINDOWS, val_share=0.01,
    )  # fmt: skip
    data.setup("fit")
    return sum(int((batch.document_ids >= 0).sum()) for batch in data.train_dataloader())


def _theirs(path: Path, tokenizer: Path, folder: Path) -> int:
    """Map the lines to tokens, then to rows of one stream, as transformers' examples do."""
    from datasets import disable_progress_bars, load_dataset
    from transformers import PreTrainedTokenizerFast

    disable_progress_bars()
    own: Any = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer))
    bos, eos = own.convert_tokens_to_ids(["<s>", "</s>"])

    def tokenize(rows: dict[str, Any]) -> dict[str, Any]:
        ids: Any = own(rows["text"], add_special_tokens=False)["input_ids"]
        return {"input_ids": [[bos, *each, eos] for each in ids]}

    def to_rows(rows: dict[str, Any]) -> dict[str, Any]:
        stream = list(chain.from_iterable(rows["input_ids"]))
        return {"input_ids": [stream[i : i + ROW] for i in range(0, len(stream), ROW)]}

    lines = load_dataset("text", data_files=str(path), cache_dir=str(folder))["train"]
    lines = lines.filter(lambda row: row["text"].strip() != "", num_proc=os.cpu_count())
    options: Any = {"batched": True, "num_proc": os.cpu_count()}
    tokens = lines.map(tokenize, remove_columns=["text"], **options)
    rows: Any = tokens.map(to_rows, **options)
    batches: Any = rows.iter(WINDOWS)
    return sum(len(row) for batch in batches for row in batch["input_ids"])

"""Targets per second of this project's layouts beside other people's models, in turns.

python scripts/benchmark.py peers --nanogpt FOLDER --json FILE   measures, FOLDER has model.py
python scripts/peers.py FILE                                       prints the table of a measurement

Every model has four layers of width 256 with four heads; all train on the same documents, in
float32 with AdamW. A *target* is a token whose loss counts, a *slot* a position that is computed:
PAD takes a slot and has no target. The contiguous stream mixes documents: tokens see those of the
document before, which none of the layouts allows.
"""

import importlib.metadata
import importlib.util
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from causal_lm import config

SIZES = {"layers": 4, "width": 256, "heads": 4}
ROW, WINDOWS = 256, 32  # slots of a row; windows of documents in a batch
DATA = ["data=docstrings", f"data.max_length={ROW}", f"data.batch_size={WINDOWS}"]
OURS = {
    "llama": ["model=llama", "model.d_model=256", "model.n_heads=4", "model.n_kv_heads=4",
              "model.n_layers=4", "model.d_ff=688"],
    "seed model": ["model=tiny", "model.d_model=256", "model.n_heads=4", "model.n_layers=4",
                   "model.d_ff=1024"],
}  # fmt: skip
BASE, PACKED = "nanoGPT, contiguous stream", "llama, packed"
Take = Callable[[], tuple[int, int]]  # trains on a few batches; the targets and slots in them


def measure(rounds: int, steps: int, nanogpt: Path | None, machine: str) -> dict[str, Any]:
    """Time every contestant in each of ``rounds`` rounds; plain data."""
    take = dict(_contestants(nanogpt, steps))
    for first in take.values():
        first()
    targets: dict[str, list[float]] = {name: [] for name in take}
    slots: dict[str, list[float]] = {name: [] for name in take}
    for _ in range(rounds):
        for name, next_steps in take.items():
            started = time.perf_counter()
            counted, computed = next_steps()
            seconds = time.perf_counter() - started
            targets[name].append(counted / seconds)
            slots[name].append(computed / seconds)
    packages = ("torch", "x-transformers", "transformers", "litgpt")
    versions = {name: importlib.metadata.version(name) for name in packages if _installed(name)}
    return {"machine": machine, "rounds": rounds, "steps": steps, "versions": versions,
            "targets_per_second": targets, "slots_per_second": slots}  # fmt: skip


def table_of(result: dict[str, Any]) -> str:
    """The table of a measurement in Markdown, with how it was made."""
    found, ours = result["targets_per_second"], result["targets_per_second"][PACKED]
    rows = [["", "targets/s", "spread", "slots/s", "slots with a target", "packed ÷ this"]]
    if BASE in found:
        rows[0].append("this ÷ the stream")
    for name, values in found.items():
        rate = statistics.median(values)
        slots = statistics.median(result["slots_per_second"][name])
        spread = (max(values) - min(values)) / rate
        row = [name, f"{rate:,.0f}", f"{spread:.0%}", f"{slots:,.0f}", f"{rate / slots:.2f}",
               _ratio(ours, values)]  # fmt: skip
        rows.append([*row, _ratio(values, found[BASE])] if BASE in found else row)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    how = f"{result['rounds']} rounds of {result['steps']} steps in turns"
    made = f"Medians of {how}, also of ratios; spread = (largest - smallest) / median."
    return "\n".join([*lines, "", f"{made} {result['machine']}; {versions}."])


def _ratio(a: list[float], b: list[float]) -> str:
    """The median over the rounds: the rates of one round had the same neighbors."""
    return f"{statistics.median(x / y for x, y in zip(a, b, strict=True)):.2f}"


def _contestants(nanogpt: Path | None, steps: int) -> Iterator[tuple[str, Take]]:
    """Each model and layout: its name, and a function that trains on ``steps`` batches."""
    import torch

    from causal_lm.build import make_optimizer, prepare
    from causal_lm.optim.parameter_groups import parameter_groups

    for name, model in OURS.items():
        for layout in ("packed", "bucketed", "padded") if name == "llama" else ("padded",):
            cfg = config.load([*DATA, *model, f"data.layout={layout}"])
            data, corpus, module = prepare(cfg)
            optimizer = make_optimizer(cfg)(parameter_groups(module.model))
            batches = itertools.cycle(data.train_dataloader())
            yield f"{name}, {layout}", _stepper(module.accumulated_loss, optimizer, batches, steps)
    vocab_size, padded = corpus.tokenizer.vocab_size, itertools.cycle(data.train_dataloader())
    for name, make in {"x-transformers": _x_transformers, "transformers": _gpt2,
                       "litgpt": _litgpt}.items():  # fmt: skip
        if _installed(name):
            yield f"{name}, padded", _peer(*make(vocab_size), padded, steps)
    if nanogpt is not None:
        model, loss = _nanogpt(nanogpt, vocab_size)
        yield "nanoGPT, padded", _peer(model, loss, padded, steps)
        stream = torch.as_tensor(corpus.train.tokens[:]).long()
        yield BASE, _peer(model, loss, _stream(stream), steps)


def _stepper(loss_of: Callable, optimizer: Any, batches: Iterator, steps: int) -> Take:
    def take() -> tuple[int, int]:
        targets = slots = 0
        for batch in itertools.islice(batches, steps):
            loss_of(batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            targets += int((batch.labels >= 0).sum())
            slots += batch.input_ids.numel()
        return targets, slots

    return take


def _peer(model: Any, loss: Callable, batches: Iterator, steps: int) -> Take:
    """A model of others, whose ``loss(ids, labels)`` gets labels shifted, -100 = ignore."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    return _stepper(lambda b: loss(b.input_ids, b.labels), optimizer, batches, steps)


def _stream(tokens: Any) -> Iterator[Any]:
    """Batches of 16 random rows of the tokens of all documents, one after another."""
    import torch

    from causal_lm.data.collate import Batch

    while True:
        first = torch.randint(len(tokens) - ROW, (WINDOWS // 2, 1))
        ids = tokens[first + torch.arange(ROW + 1)]
        batch = Batch(ids[:, :-1].contiguous(), ids, ids)
        batch.__dict__["labels"] = ids[:, 1:].contiguous()
        yield batch


def _nanogpt(folder: Path, vocab_size: int) -> tuple[Any, Callable]:
    from nanogpt_baseline import load_nanogpt

    nanogpt = load_nanogpt(folder)
    model = nanogpt.GPT(nanogpt.GPTConfig(
        block_size=ROW, vocab_size=vocab_size, n_layer=SIZES["layers"], n_head=SIZES["heads"],
        n_embd=SIZES["width"], dropout=0.0, bias=False,
    ))  # fmt: skip
    return model, lambda ids, labels: model(ids, labels.clamp(min=-1))[1]


def _cross_entropy(logits: Any, labels: Any) -> Any:
    import torch.nn.functional as F

    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def _x_transformers(vocab_size: int) -> tuple[Any, Callable]:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=SIZES["width"], depth=SIZES["layers"], heads=SIZES["heads"],
                     attn_flash=True)  # fmt: skip
    model = TransformerWrapper(num_tokens=vocab_size, max_seq_len=ROW, attn_layers=layers)
    return model, lambda ids, labels: _cross_entropy(model(ids), labels)


def _gpt2(vocab_size: int) -> tuple[Any, Callable]:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=vocab_size, n_positions=ROW, n_embd=SIZES["width"], n_layer=SIZES["layers"],
        n_head=SIZES["heads"], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=None, eos_token_id=None,
    ))  # fmt: skip
    return model, lambda ids, labels: _cross_entropy(model(ids).logits, labels)


def _litgpt(vocab_size: int) -> tuple[Any, Callable]:
    from litgpt import GPT, Config

    model = GPT(Config(
        block_size=ROW, vocab_size=vocab_size, padded_vocab_size=vocab_size,
        n_layer=SIZES["layers"], n_head=SIZES["heads"], n_embd=SIZES["width"],
    ))  # fmt: skip
    return model, lambda ids, labels: _cross_entropy(model(ids), labels)


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package.replace("-", "_")) is not None


if __name__ == "__main__":
    print(table_of(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))

"""Tokens per second, model FLOPs utilization and peak memory beside nanoGPT's GPT-2, in turns.

python scripts/benchmark.py gpu --device cuda --nanogpt FOLDER --json FILE   FOLDER has model.py
python scripts/gpu_throughput.py FILE                         prints the table of a measurement

Both train on the same random tokens of a vocabulary of GPT-2's size, of documents whose lengths are
exponentially distributed: ours in packed rows that keep documents apart, nanoGPT in one stream that
mixes them. Both use the same optimizer, in bfloat16 by autocast where the device is a GPU.
"""

import itertools
import json
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from causal_lm import config
from causal_lm.build import CHUNK_TOKENS, instantiate
from causal_lm.data.collate import Batch, Collate
from causal_lm.data.documents import Document
from causal_lm.models.base import blocks_of
from causal_lm.module import CausalLM
from causal_lm.objective import LossConfig

MEAN_DOCUMENT = 400  # tokens, before they are cut to a row
BATCHES = 8  # different ones, made before the clock starts
PEAK_TFLOPS = {  # dense bfloat16, by a part of the device's name; the first that matches
    "H100 PCIe": 756, "H200": 989, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165,
}  # fmt: skip


class Contestant(NamedTuple):
    """A model that can be trained, and what a step of it computes."""

    step: Callable[[], tuple[int, float]]  # takes one step: real tokens, FLOPs
    parameters: int
    peak_mib: float  # highest memory in use in its first steps, above what others held


def model_flops(parameters: int, layers: int, width: int, lengths: list[int]) -> float:
    """FLOPs of the forward and backward pass over documents of these lengths.

    Six for each token and each of the ``parameters``, which leave out tables that are only looked
    up: a multiplication and an addition, in the forward pass and twice in the backward pass. And
    6 · layers · width · n² for the attention of a document of n tokens: as many for each pair of a
    query and a key, for scores and for values, of which the causal mask leaves half. PAD and what
    is computed anew do not count.
    """
    return 6.0 * parameters * sum(lengths) + 6.0 * layers * width * sum(n * n for n in lengths)


def used_parameters(model: nn.Module, only_looked_up: tuple[nn.Embedding, ...]) -> int:
    """All parameters but those of these tables, unless the head shares them."""
    total = sum(p.numel() for p in model.parameters())
    return total - sum(table.weight.numel() for table in only_looked_up)


def measure(args: Namespace, machine: str, peak_memory: Callable[[str], Any]) -> dict[str, Any]:
    """Time each model in each of ``args.rounds`` rounds; plain data. ``peak_memory(device)`` is a
    context that measures MiB."""
    cfg = config.load(["model=llama_124m", *args.overrides])
    torch.manual_seed(0)
    documents = _documents(args.vocab, args.row, args.row * args.batch * BATCHES)
    contestants = {"ours, packed": _ours(cfg, documents, args, peak_memory)}
    if args.nanogpt is not None:
        contestants["nanoGPT, stream"] = _nanogpt(cfg, documents, args, peak_memory)
    peak = args.peak or next((t for part, t in PEAK_TFLOPS.items() if part in machine), None)
    found: dict[str, Any] = {
        name: {"parameters": c.parameters, "peak_mib": c.peak_mib, "tokens_per_second": [],
               "tflops": []} for name, c in contestants.items()
    }  # fmt: skip
    for _ in range(args.rounds):
        for name, contestant in contestants.items():
            started = time.perf_counter()
            steps = [contestant.step() for _ in range(args.steps)]
            _synchronize(args.device)
            seconds = time.perf_counter() - started
            tokens, flops = map(sum, zip(*steps, strict=True))
            found[name]["tokens_per_second"].append(tokens / seconds)
            found[name]["tflops"].append(flops / seconds / 1e12)
    return {"machine": machine, "rounds": args.rounds, "steps": args.steps, "row": args.row,
            "batch": args.batch, "compiled": args.compile, "peak_tflops": peak,
            "models": found}  # fmt: skip


def table_of(result: dict[str, Any]) -> str:
    """The table of a measurement in Markdown, with how it was made."""
    lines = ["| | parameters | tokens/s | TFLOP/s | utilization | peak MiB |", "|---" * 6 + "|"]
    for name, found in result["models"].items():
        rate, tflops = (statistics.median(found[key]) for key in ("tokens_per_second", "tflops"))
        peak = result["peak_tflops"]
        share = f"{tflops / peak:.1%}" if peak else "–"
        lines.append(f"| {name} | {found['parameters']:,} | {rate:,.0f} | {tflops:,.3g} | {share} "
                     f"| {found['peak_mib']:,.0f} |")  # fmt: skip
    rows = f"{result['batch']} rows of {result['row']}"
    how = "compiled" if result["compiled"] else "not compiled"
    made = f"Medians of {result['rounds']} rounds of {result['steps']} steps in turns"
    return "\n".join([*lines, "", f"{made}, {rows}, {how}. {result['machine']}."])


def _documents(vocab: int, longest: int, tokens: int) -> list[Document]:
    """Random documents of two tokens or more, of so many tokens in all."""
    lengths = torch.empty(2 * tokens // MEAN_DOCUMENT + 8).exponential_(1 / MEAN_DOCUMENT).long()
    lengths = lengths.clamp(2, longest)
    kept = int((lengths.cumsum(0) <= tokens).sum())
    ids = torch.randint(1, vocab, (int(lengths[:kept].sum()),))
    return [Document(part, None) for part in ids.split(lengths[:kept].tolist())]


def _ours(cfg: Any, documents: list[Document], args: Namespace, peak_memory: Any) -> Contestant:
    collate, groups = Collate(0, args.vocab, row_length=args.row), [list[Document]()]
    for document in documents:  # greedily, as many documents as surely fit the rows
        if sum(len(d.tokens) for d in [*groups[-1], document]) > args.row * args.batch:
            groups.append([])
        groups[-1].append(document)
    batches = [collate(group) for group in groups]
    with peak_memory(args.device) as memory:
        model = instantiate(cfg.model, vocab_size=args.vocab).to(args.device)
        chunk = cfg.loss.chunk_tokens
        loss = LossConfig(chunk_tokens=CHUNK_TOKENS if chunk == "auto" else chunk)
        module = CausalLM(model, loss=loss)
        tied = model.lm_head.weight is model.token_embedding.weight
        size = used_parameters(model, () if tied else (model.token_embedding,))
        if args.compile:
            for block in blocks_of(model):
                block.compile()

        def work(batch: Batch) -> list[int]:
            module.accumulated_loss(batch.to(args.device, non_blocking=True)).backward()
            return list(batch.attention_mask.document_lengths)

        step = _stepper(model, work, itertools.cycle(batches), cfg.model, size, args)
    return Contestant(step, size, memory.mib)


def _nanogpt(cfg: Any, documents: list[Document], args: Namespace, peak_memory: Any) -> Contestant:
    from nanogpt_baseline import load_nanogpt

    stream = torch.cat([document.tokens for document in documents])
    slots = args.row * args.batch
    inputs = stream[: (len(stream) - 1) // slots * slots].view(-1, args.batch, args.row)
    labels = stream[1 : inputs.numel() + 1].view_as(inputs)
    sizes = cfg.model
    with peak_memory(args.device) as memory:
        nanogpt = load_nanogpt(args.nanogpt)
        model = nanogpt.GPT(nanogpt.GPTConfig(
            block_size=args.row, vocab_size=args.vocab, n_layer=sizes.n_layers, dropout=0.0,
            n_head=sizes.n_heads, n_embd=sizes.d_model, bias=False,
        )).to(args.device)  # fmt: skip
        size = used_parameters(model, (model.transformer.wpe,))
        loss_of = torch.compile(model) if args.compile else model

        def work(rows: tuple[Tensor, Tensor]) -> list[int]:
            ids, targets = (part.to(args.device, non_blocking=True) for part in rows)
            loss_of(ids, targets)[1].backward()
            return [args.row] * args.batch

        rows = itertools.cycle(zip(inputs, labels, strict=True))
        step = _stepper(model, work, rows, sizes, size, args)
    return Contestant(step, size, memory.mib)


def _stepper(
    model: nn.Module, work: Callable, batches: Iterator, sizes: Any, size: int, args: Namespace
) -> Callable[[], tuple[int, float]]:
    """One optimizer step after another, the first ones taken here: they compile and fill memory
    pools. ``work`` runs forward and backward pass, and returns the lengths of the documents."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> tuple[int, float]:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device != "cpu"):
            lengths = work(next(batches))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return sum(lengths), model_flops(size, sizes.n_layers, sizes.d_model, lengths)

    for _ in range(args.warmup):
        step()
    _synchronize(args.device)
    return step


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


if __name__ == "__main__":
    print(table_of(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))

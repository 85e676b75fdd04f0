"""Which values make sense, key by key, and how to say so. Imports nothing that is slow to load."""

from collections.abc import Callable
from fnmatch import fnmatch
from math import inf, isfinite
from pathlib import Path
from re import fullmatch
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """A test of a value, and in words what passes it."""

    holds: Callable[[Any], bool]
    words: str


def _is_number(value: Any) -> bool:
    return _is_whole(value) or isinstance(value, float)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def integer(low: int, high: float = inf) -> Rule:
    words = f"of at least {low}" if high == inf else f"from {low} to {high}"
    return Rule(lambda v: _is_whole(v) and low <= v <= high, f"a whole number {words}")


def real(above: float = -inf, low: float = -inf, below: float = inf) -> Rule:
    bounds = [("above", above), ("at least", low), ("below", below)]
    words = " and ".join(f"{name} {value:g}" for name, value in bounds if isfinite(value))
    return Rule(lambda v: _is_number(v) and above < v < below and v >= low, f"a number {words}")


def one_of(*options: Any) -> Rule:
    return Rule(lambda v: v in options, "one of " + ", ".join(str(o) for o in options))


def optional(rule: Rule) -> Rule:
    return Rule(lambda v: v is None or rule.holds(v), f"{rule.words}, or null")


def or_auto(rule: Rule) -> Rule:
    return Rule(lambda v: v == "auto" or rule.holds(v), f"{rule.words}, or auto")


anything = Rule(lambda v: True, "whatever the library takes")
flag = Rule(lambda v: isinstance(v, bool), "true or false")
text = Rule(lambda v: isinstance(v, str) and v != "", "a text")

RULES: dict[str, Rule] = {
    "experiment": text,
    "seed": integer(0, 2**32 - 1),
    "ckpt_path": Rule(
        lambda v: v is None or (isinstance(v, str) and (v == "auto" or Path(v).is_file())),
        "a file that exists, auto, or null",
    ),
    "data.batch_size": integer(1),
    "data.max_length": integer(3),
    "data.layout": one_of("padded", "bucketed", "packed"),
    "data.padding_side": one_of("right", "left"),
    "data.pad_is_eos": flag,
    "data.shuffle": flag,
    "data.num_workers": integer(0),
    "data.seed": integer(0),
    "data.source.symbols": integer(2, 62),
    "data.source.successors": integer(1),
    "data.source.copies": integer(1),
    "data.source.copies_after": integer(0),
    "data.source.mean": real(low=1),
    "data.source.train_documents": integer(1),
    "data.source.val_documents": integer(1),
    "data.source.max_length": integer(3),
    "data.source.seed": integer(0),
    "data.tokenizer": Rule(
        lambda v: v in ("bytes", "bpe") or (isinstance(v, str) and Path(v).is_file()),
        "bytes, bpe, or the path of a tokenizer.json that exists",
    ),
    "data.vocab_size": integer(260),
    "data.special_tokens.*": optional(text),
    "data.val_share": real(above=0, below=1),
    "data.cache_dir": optional(text),
    "data.num_proc": optional(integer(1)),
    "data.root": optional(text),
    "data.path": Rule(text.holds, "a file, a folder or a glob, as in data.path=texts/*.txt"),
    "data.val_path": optional(text),
    "data.name": optional(text),
    "data.split": text,
    "data.val_split": optional(text),
    "data.unit": one_of("file", "line", "paragraph", "record", None),
    "data.field": text,
    "data.prompt_field": optional(text),
    "data.on_error": one_of("raise", "skip"),
    "model.d_model": integer(1),
    "model.n_heads": integer(1),
    "model.n_layers": integer(1),
    "model.n_kv_heads": integer(1),
    "model.rope_theta": real(above=0),
    "model.norm_eps": real(above=0),
    "model.tied": flag,
    "model.mlp": one_of("swiglu", "relu2"),
    "model.qk_norm": flag,
    "model.zero_init_residual": flag,
    "model.token_smear": integer(0),
    "model.checkpoint_activations": flag,
    "model.init_from": optional(text),
    "model.config.*": anything,
    "model.decoder.*": anything,
    "model.d_ff": integer(1),
    "model.max_positions": integer(2),
    "model.dropout": real(low=0, below=1),
    "loss.reduction": one_of("token", "sequence", "padded"),
    "loss.length": integer(1),
    "loss.chunk_tokens": optional(or_auto(integer(1))),
    "optimizer.lr": or_auto(real(above=0)),
    "optimizer.muon_lr": real(above=0),
    "optimizer.muon_momentum": real(low=0, below=1),
    "optimizer.fused": or_auto(flag),
    "optimizer.weight_decay": real(low=0),
    "optimizer.momentum": real(low=0, below=1),
    "optimizer.betas": Rule(
        lambda v: (
            isinstance(v, list) and len(v) == 2 and all(_is_number(b) and 0 <= b < 1 for b in v)
        ),
        "two numbers from 0 to 1, such as [0.9,0.95]",
    ),
    "scheduler.warmup_steps": or_auto(integer(0)),
    "scheduler.warmup_cap": real(low=0, below=1),
    "scheduler.final_share": real(low=0),
    "scheduler.period": integer(2),
    "scheduler.peak_decay": real(above=0),
    "scheduler.every": integer(1),
    "scheduler.drop": real(above=0),
    "scheduler.decay_share": real(low=0, below=1),
    "gradients.on_nonfinite": one_of("stop", "skip"),
    "gradients.max_skipped": integer(0),
    "gradients.report_every": optional(integer(1)),
    "trainer.accelerator": one_of("auto", "cpu", "gpu", "cuda", "mps"),
    "trainer.devices": Rule(
        lambda v: v == "auto" or (_is_whole(v) and (v >= 1 or v == -1)),
        "a whole number of at least 1, -1 for all, or auto",
    ),
    "trainer.num_nodes": integer(1),
    "trainer.strategy": text,
    "trainer.precision": one_of(
        "32-true", "16-mixed", "bf16-mixed", "bf16-true", "16-true", "64-true", 32, 16, 64, "bf16"
    ),
    "trainer.max_steps": integer(1),
    "trainer.max_epochs": integer(-1),
    "trainer.max_time": Rule(
        lambda v: v is None or (isinstance(v, str) and bool(fullmatch(r"\d+(:\d\d){3}", v))),
        "days:hours:minutes:seconds, as in '00:01:30:00', or null",
    ),
    "trainer.accumulate_grad_batches": integer(1),
    "trainer.gradient_clip_val": optional(real(above=0)),
    "trainer.gradient_clip_algorithm": one_of("norm"),
    "trainer.val_check_interval": integer(1),
    "trainer.check_val_every_n_epoch": one_of(None),
    "trainer.log_every_n_steps": integer(1),
    "trainer.deterministic": flag,
    "trainer.benchmark": flag,
    "trainer.detect_anomaly": flag,
    "trainer.enable_progress_bar": flag,
    "trainer.enable_model_summary": flag,
    "trainer.use_distributed_sampler": flag,
    "trainer.num_sanity_val_steps": integer(-1),
    "samples.count": integer(0),
    "samples.batch_size": integer(1),
    "samples.prompts": integer(1),
    "samples.per_prompt": Rule(
        lambda v: v == 0 or integer(2).holds(v), "a whole number of at least 2, or 0"
    ),
    "samples.prompt_length": integer(1),
    "samples.patience": optional(integer(1)),
    "samples.embedder": Rule(
        lambda v: v is None or (isinstance(v, str) and Path(v).is_dir()),
        "a folder that exists, or null",
    ),
    "samples.self_check.count": integer(1),
    "samples.self_check.shown": integer(0),
    "samples*.length": integer(2),
    "samples*.temperature": real(low=0),
    "samples*.top_k": optional(integer(1)),
    "pitfalls.*": flag,
    "preflight.on_fault": one_of("error", "warn", "off"),
}


def is_float16(precision: str | int) -> bool:
    """Whether ``trainer.precision`` is float16 with a loss scaler."""
    return precision in ("16-mixed", 16)


def rule_of(key: str) -> Rule | None:
    return next((rule for name, rule in RULES.items() if fnmatch(key, name)), None)

"""The valid values of each configuration key. Imports nothing that is slow to load."""

from collections.abc import Callable
from fnmatch import fnmatch
from math import inf, isfinite
from pathlib import Path
from re import fullmatch
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """A test of a value, and a description of the values that pass it."""

    accepts: Callable[[Any], bool]
    description: str


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def integer(low: int, high: float = inf) -> Rule:
    """Integers from ``low`` to ``high``, both included."""
    bounds = f"of at least {low}" if high == inf else f"from {low} to {high}"
    return Rule(lambda v: _is_integer(v) and low <= v <= high, f"an integer {bounds}")


def real(above: float = -inf, low: float = -inf, below: float = inf) -> Rule:
    """Finite numbers within these bounds; ``low`` itself included."""
    limits = [("above", above), ("at least", low), ("below", below)]
    bounds = " and ".join(f"{name} {value:g}" for name, value in limits if isfinite(value))

    def accepts(v: Any) -> bool:
        return (_is_integer(v) or isinstance(v, float)) and above < v < below and v >= low

    return Rule(accepts, f"a number {bounds}")


def one_of(*options: Any) -> Rule:
    """These options; None is written as null, as in YAML."""
    names = ["null" if option is None else str(option) for option in options]
    return Rule(lambda v: v in options, ("one of " if names[1:] else "") + ", ".join(names))


def optional(rule: Rule) -> Rule:
    """What the rule accepts, or None."""
    return Rule(lambda v: v is None or rule.accepts(v), f"{rule.description}, or null")


def or_auto(rule: Rule) -> Rule:
    """What the rule accepts, or ``auto``."""
    return Rule(lambda v: v == "auto" or rule.accepts(v), f"{rule.description}, or auto")


ANY = Rule(lambda v: True, "anything")
BOOLEAN = Rule(lambda v: isinstance(v, bool), "true or false")
STRING = Rule(lambda v: isinstance(v, str) and v != "", "a non-empty string")
FRACTION = real(low=0, below=1)
FILE = Rule(lambda v: isinstance(v, str) and Path(v).is_file(), "a file that exists")
FOLDER = Rule(lambda v: isinstance(v, str) and Path(v).is_dir(), "a folder that exists")

_KEYS_BY_RULE: list[tuple[Rule, str]] = [
    (STRING, "experiment data.split data.field trainer.strategy"),
    (optional(STRING), """data.special_tokens.* data.cache_dir data.root data.val_path data.name
        data.val_split data.prompt_field model.init_from"""),
    (BOOLEAN, """data.pad_is_eos data.shuffle model.tied model.qk_norm model.zero_init_residual
        model.checkpoint_activations trainer.deterministic trainer.benchmark trainer.detect_anomaly
        trainer.enable_progress_bar trainer.enable_model_summary trainer.use_distributed_sampler
        pitfalls.*"""),
    (or_auto(BOOLEAN), "optimizer.fused"),
    (integer(-1), "trainer.max_epochs trainer.num_sanity_val_steps"),
    (integer(0), """data.num_workers data.seed data.source.copies_after data.source.seed
        model.token_smear gradients.max_skipped samples.count samples.self_check.shown"""),
    (or_auto(integer(0)), "scheduler.warmup_steps"),
    (integer(1), """
        data.batch_size data.source.successors data.source.copies data.source.train_documents
        data.source.val_documents model.d_model model.n_heads model.n_layers model.n_kv_heads
        model.d_ff loss.length scheduler.every trainer.num_nodes trainer.max_steps
        trainer.accumulate_grad_batches trainer.val_check_interval trainer.log_every_n_steps
        samples.batch_size samples.prompts samples.prompt_length samples.self_check.count
        samples.keep_last metrics.keep_steps"""),
    (optional(integer(1)), "data.num_proc gradients.report_every samples.patience samples*.top_k"),
    (optional(or_auto(integer(1))), "loss.chunk_tokens"),
    (integer(2), "model.max_positions scheduler.period samples*.length"),
    (integer(2, 62), "data.source.symbols"),
    (integer(3), "data.max_length data.source.max_length"),
    (integer(260), "data.vocab_size"),
    (integer(0, 2**32 - 1), "seed"),
    (real(low=0), """
        data.max_overlap optimizer.weight_decay scheduler.final_share samples*.temperature"""),
    (real(low=1), "data.source.mean"),
    (real(above=0), """
        model.rope_theta model.norm_eps optimizer.muon_lr scheduler.peak_decay scheduler.drop"""),
    (real(above=0, below=1), "data.val_share"),
    (optional(real(above=0)), "trainer.gradient_clip_val"),
    (or_auto(real(above=0)), "optimizer.lr"),
    (FRACTION, """model.dropout optimizer.muon_momentum optimizer.momentum scheduler.warmup_cap
        scheduler.decay_share"""),
    (optional(or_auto(FILE)), "ckpt_path"),
    (optional(FOLDER), "samples.embedder"),
    (one_of("padded", "bucketed", "packed"), "data.layout"),
    (one_of("right", "left"), "data.padding_side"),
    (one_of(None, "txt", "jsonl", "json", "csv", "parquet"), "data.format"),
    (one_of("file", "line", "paragraph", "record", None), "data.unit"),
    (one_of("raise", "skip"), "data.on_error"),
    (one_of("swiglu", "relu2"), "model.mlp"),
    (one_of("token", "sequence", "padded"), "loss.reduction"),
    (one_of("stop", "skip"), "gradients.on_nonfinite"),
    (one_of("error", "warn", "off"), "preflight.on_fault"),
    (one_of("auto", "cpu", "gpu", "cuda", "mps"), "trainer.accelerator"),
    (one_of("32-true", "16-mixed", "bf16-mixed", "bf16-true", "16-true", "64-true", 32, 16, 64,
            "bf16"), "trainer.precision"),
    (one_of("norm"), "trainer.gradient_clip_algorithm"),
    (one_of(None), "trainer.check_val_every_n_epoch"),
    (ANY, "model.config.* model.decoder.*"),
    (Rule(STRING.accepts, "a file, a folder or a glob, as in data.path=texts/*.txt"), "data.path"),
    (Rule(lambda v: v in ("bytes", "bpe") or FILE.accepts(v),
          "bytes, bpe, or the path of a tokenizer.json that exists"), "data.tokenizer"),
    (Rule(lambda v: isinstance(v, list) and len(v) == 2 and all(map(FRACTION.accepts, v)),
          "two numbers in [0, 1), such as [0.9,0.95]"), "optimizer.betas"),
    (Rule(lambda v: v == 0 or integer(2).accepts(v),
          "0, or an integer of at least 2"), "samples.per_prompt"),
    (Rule(lambda v: v == "auto" or v == -1 or integer(1).accepts(v),
          "an integer of at least 1, -1 for all, or auto"), "trainer.devices"),
    (Rule(lambda v: v is None or (isinstance(v, str) and bool(fullmatch(r"\d+(:\d\d){3}", v))),
          "days:hours:minutes:seconds, as in '00:01:30:00', or null"), "trainer.max_time"),
]  # fmt: skip
RULES: dict[str, Rule] = {key: rule for rule, keys in _KEYS_BY_RULE for key in keys.split()}
"""Dotted key, as a pattern of ``fnmatch`` -> its rule."""


def rule_of(key: str) -> Rule | None:
    """The rule of a dotted key; None for an unknown key."""
    return next((rule for name, rule in RULES.items() if fnmatch(key, name)), None)


def is_float16(precision: str | int) -> bool:
    """Whether ``trainer.precision`` is float16 with a loss scaler."""
    return precision in ("16-mixed", 16)

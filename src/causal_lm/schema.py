"""The valid values of each configuration key, and of several together.

Imports nothing that is slow to load.
"""

from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatch
from math import inf, isfinite
from os.path import isdir, isfile
from re import fullmatch
from typing import Any, NamedTuple

HYDRA_KEYS = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")
MAX_INTEGER = 2**31 - 1
MAX_VOCABULARY = 2**22  # ids of a tokenizer: sixteen times the largest in use


class ConfigError(ValueError):
    """The configuration is not valid; the message is one line and says what to change."""


class Rule(NamedTuple):
    """A test of a value, and a description of the values that pass it."""

    accepts: Callable[[Any], bool]
    description: str


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def integer(low: int, high: int = MAX_INTEGER) -> Rule:
    """Integers from ``low`` to ``high``, both included."""
    bounds = f"of at least {low}" if high == MAX_INTEGER else f"from {low} to {high}"
    return Rule(lambda v: _is_integer(v) and low <= v <= high, f"an integer {bounds}")


def real(above: float = -inf, low: float = -inf, below: float = inf, high: float = inf) -> Rule:
    """Finite numbers within these bounds; ``low`` and ``high`` included."""
    limits = [("above", above), ("at least", low), ("below", below), ("at most", high)]
    bounds = " and ".join(f"{name} {value:g}" for name, value in limits if isfinite(value))

    def accepts(v: Any) -> bool:
        return (_is_integer(v) or isinstance(v, float)) and above < v < below and low <= v <= high

    return Rule(accepts, f"a number {bounds}")


def matching(pattern: str, description: str) -> Rule:
    """Strings that match a regular expression."""
    return Rule(lambda v: isinstance(v, str) and bool(fullmatch(pattern, v)), description)


def one_of(*options: Any) -> Rule:
    """These options; None is written as null, as in YAML."""
    names = ["null" if option is None else str(option) for option in options]
    return Rule(lambda v: v in options, ("one of " if names[1:] else "") + ", ".join(names))


def either(*rules: Rule) -> Rule:
    """What one of the rules accepts."""
    descriptions = ", or ".join(rule.description for rule in rules)
    return Rule(lambda v: any(rule.accepts(v) for rule in rules), descriptions)


def optional(rule: Rule) -> Rule:
    """What the rule accepts, or None."""
    return either(rule, one_of(None))


def or_auto(rule: Rule) -> Rule:
    """What the rule accepts, or ``auto``."""
    return either(rule, one_of("auto"))


ANY = Rule(lambda v: True, "anything")
BOOLEAN = Rule(lambda v: isinstance(v, bool), "true or false")
STRING = Rule(lambda v: isinstance(v, str) and v != "", "a non-empty string")
FRACTION, FRACTION_OR_ONE = real(low=0, below=1), real(low=0, high=1)
FILE = Rule(lambda v: isinstance(v, str) and isfile(v), "a file that exists")
FOLDER = Rule(lambda v: isinstance(v, str) and isdir(v), "a folder that exists")
STRATEGY = matching(
    r"auto|ddp(_spawn|_fork|_notebook)?(_find_unused_parameters_(true|false))?|fsdp(_cpu_offload)?"
    r"|deepspeed(_stage_(1|[23](_offload)?|3_offload_nvme))?|single_(device|tpu|xla)|xla(_debug)?",
    "a strategy of Lightning, such as auto, ddp or fsdp",
)
BATCHES = optional(either(integer(1), real(above=0, high=1)))
PRECISION = one_of("32-true", "16-mixed", "bf16-mixed", "bf16-true", "16-true", "64-true", "32",
                   "16", "64", "bf16", "auto")  # fmt: skip
DEVICES = r"-1|'(-1|auto|[1-9][0-9]{0,3}|[0-9]+,|[0-9]+(,[0-9]+)+)'|\[[0-9]+(, [0-9]+)*\]"

_KEYS_BY_RULE: list[tuple[Rule, str]] = [
    (STRING, "experiment data.split data.field paths.log_dir paths.output_dir"),
    (optional(STRING), """data.special_tokens.* data.cache_dir data.root data.val_path data.name
        data.val_split data.test_path data.test_split data.prompt_field model.init_from
        ledger"""),
    (BOOLEAN, """test compile data.pad_is_eos data.shuffle data.streaming model.tied model.qk_norm
        model.zero_init_residual model.checkpoint_activations extras.print_config pitfalls.*
        trainer.detect_anomaly trainer.enable_progress_bar trainer.enable_model_summary
        trainer.use_distributed_sampler trainer.inference_mode trainer.sync_batchnorm"""),
    (or_auto(BOOLEAN), "optimizer.fused"),
    (optional(BOOLEAN), "trainer.benchmark"),
    (either(BOOLEAN, one_of("warn", None)), "trainer.deterministic"),
    (optional(integer(-1)), "trainer.num_sanity_val_steps"),
    (either(integer(1), one_of(-1)), "trainer.max_steps"),
    (either(integer(1), one_of(-1, None)), "trainer.max_epochs"),
    (integer(0, 1024), "data.num_workers"),
    (integer(0), """data.source.copies_after data.source.test_documents
        model.token_smear gradients.max_skipped samples.count samples.self_check.shown"""),
    (or_auto(integer(0)), "scheduler.warmup_steps"),
    (integer(1), """
        data.batch_size data.shuffle_buffer data.max_held_out data.source.successors
        data.source.copies model.n_heads model.n_kv_heads loss.length scheduler.every
        trainer.num_nodes trainer.accumulate_grad_batches
        samples.batch_size samples.prompts samples.prompt_length samples.self_check.count
        samples.keep_last metrics.keep_steps"""),
    (integer(1, 1000), """model.n_layers model.config.n_layer
        model.config.num_hidden_layers"""),  # more take minutes to build
    (integer(1, 10**8), "model.d_model model.d_ff"),  # for sizes in bytes that fit 64 bits
    (integer(1, 10**7), "data.source.train_documents data.source.val_documents"),  # in memory
    (optional(integer(1, 1024)), "data.num_proc"),
    (optional(integer(1)), """gradients.report_every samples.patience samples*.top_k
        model.lora.r callbacks.checkpoint.every_n_steps trainer.check_val_every_n_epoch
        trainer.log_every_n_steps"""),
    (optional(or_auto(integer(1))), "loss.chunk_tokens"),
    (integer(2), "model.max_positions scheduler.period samples*.length"),
    (integer(2, 62), "data.source.symbols"),
    (integer(3, 2**24), "data.max_length data.source.max_length"),
    (integer(260, MAX_VOCABULARY), "data.vocab_size"),
    (integer(0, 2**32 - 1), "seed data.seed data.source.seed"),
    (FRACTION_OR_ONE, "data.max_overlap scheduler.final_share"),
    (real(low=0, high=100), "optimizer.weight_decay samples*.temperature"),
    (real(low=1, high=1e9), "data.source.mean model.rope_theta"),
    (real(above=0, high=1), "model.norm_eps scheduler.peak_decay scheduler.drop"),
    (real(above=0, high=1000), "optimizer.muon_lr model.lora.alpha"),
    (real(above=0, below=1), "data.val_share"),
    (optional(real(above=0)), "trainer.gradient_clip_val callbacks.checkpoint.every_minutes"),
    (either(integer(0), FRACTION_OR_ONE), "trainer.overfit_batches"),
    (optional(either(integer(0), FRACTION_OR_ONE)),
     "trainer.limit_val_batches trainer.limit_test_batches"),
    (BATCHES, "trainer.limit_train_batches"),
    (Rule(BATCHES.accepts, f"{BATCHES.description} (no duration: runs would differ)"),
     "trainer.val_check_interval"),
    (Rule(lambda v: v is None, "null: a run does not predict"), "trainer.limit_predict_batches"),
    (one_of("simple", "advanced", "pytorch", "xla", None), "trainer.profiler"),
    (Rule(lambda v: v is True, "true: a run needs its checkpoints"),
     "trainer.enable_checkpointing"),
    (Rule(lambda v: v is False, "false: a run needs its logs"), "trainer.barebones"),
    (either(BOOLEAN, integer(0)), "trainer.fast_dev_run"),
    (or_auto(real(above=0, high=1000)), "optimizer.lr"),
    (FRACTION, """data.test_share model.dropout model.lora.dropout optimizer.muon_momentum
        optimizer.momentum scheduler.warmup_cap scheduler.decay_share"""),
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
    (Rule(lambda v: PRECISION.accepts(str(v)), PRECISION.description), "trainer.precision"),
    (Rule(one_of("norm", None).accepts, "norm, which is logged and must be finite, or null"),
     "trainer.gradient_clip_algorithm"),
    (ANY, "model.config.* model.decoder.* model.lora.target_modules paths.*"),
    (matching(r"\w+(\.\w+)+", "the dotted name of a class or function"), "*._target_"),
    (BOOLEAN, "*._partial_"),
    (STRATEGY, "trainer.strategy"),
    (Rule(STRING.accepts, "a file, a folder or a glob, as in data.path=texts/*.txt"), "data.path"),
    (either(one_of("bytes", "bpe"), FILE), "data.tokenizer"),
    (Rule(lambda v: isinstance(v, list) and len(v) == 2 and all(map(FRACTION.accepts, v)),
          "two numbers in [0, 1), such as [0.9,0.95]"), "optimizer.betas"),
    (either(integer(2), one_of(0)), "samples.per_prompt"),
    (Rule(lambda v: isinstance(v, list) and all(map(STRING.accepts, v)),
          "a list of words, such as [baseline,small]"), "extras.tags"),
    (either(integer(1, 1024), Rule(lambda v: bool(fullmatch(DEVICES, repr(v))),
            "-1, auto, or numbers of GPUs, as in [0,1]")), "trainer.devices"),
    (optional(matching("[0-9]{1,4}(:[0-9]{2}){3}",
        "days:hours:minutes:seconds, as in '00:01:30:00', {hours: 1}")), "trainer.max_time"),
    (real(low=0, high=10**6), """trainer.max_time.weeks trainer.max_time.days
        trainer.max_time.hours trainer.max_time.minutes trainer.max_time.seconds"""),
]  # fmt: skip
RULES: dict[str, Rule] = {key: rule for rule, keys in _KEYS_BY_RULE for key in keys.split()}
"""Dotted key, as a pattern of ``fnmatch`` -> its rule."""
STREAM_RULES = {  # besides those above, where ``data.streaming`` is true
    "trainer.max_steps": integer(1), "trainer.val_check_interval": integer(1),
    "trainer.limit_train_batches": either(integer(1), one_of(1.0)),
    "trainer.overfit_batches": one_of(0), "data.tokenizer": either(one_of("bytes"), FILE),
}  # fmt: skip
"""The length of a stream is not known, and there are no stored documents to train a bpe on."""


def rule_of(key: str) -> Rule | None:
    """The rule of a dotted key; None for an unknown key."""
    return RULES.get(key) or next(
        (rule for name, rule in RULES.items() if fnmatch(key, name)), None
    )


def is_float16(precision: str | int) -> bool:
    """Whether ``trainer.precision`` is float16 with a loss scaler."""
    return precision in ("16-mixed", 16, "16")


def check_values(values: Mapping[str, Any]) -> None:
    """Raise :class:`ConfigError` for the first value, by dotted key, that breaks its rule."""
    for key, value in values.items():
        parent, _, name = key.rpartition(".")
        if parent in RULES and name not in HYDRA_KEYS and not rule_of(key):
            raise ConfigError(f"{parent} must be {RULES[parent].description}, not a group of keys")
        if (rule := rule_of(key)) and not rule.accepts(value):
            given = "null" if value is None else f"{value!r:.200}"
            raise ConfigError(f"{key} must be {rule.description}, not {given}")


def check_combinations(v: Mapping[str, Any]) -> None:
    """Raise :class:`ConfigError` for the first values that do not go together."""
    rotary = bool(v.get("model.n_kv_heads"))
    width = "rotary heads cannot have an odd width" if rotary else "all heads have the same width"
    for whole, part, times, why in (
        ("model.d_model", "model.n_heads", 2 if rotary else 1, width),
        ("model.n_heads", "model.n_kv_heads", 1, "query heads share them evenly"),
    ):
        if v.get(whole) and v.get(part) and v[whole] % (times * v[part]):
            factor = f"{f'{times} times ' if times > 1 else ''}{part}={v[part]}"
            raise ConfigError(f"{whole}={v[whole]} must be a multiple of {factor}: {why}")
    for low, high, room, why in (
        ("data.max_length", "model.max_positions", 0, "positions of a row"),
        ("samples.self_check.length", "model.max_positions", 0, "positions of a row"),
        ("data.source.successors", "data.source.symbols", 1, "a symbol does not follow itself"),
        ("data.source.copies", "data.source.max_length", 2, "BOS and EOS"),
    ):
        if v.get(high) and v.get(low, 0) + room > v[high]:
            most = f"{high}={v[high]}{f' - {room}' if room else ''}"
            raise ConfigError(f"{low}={v[low]} must be at most {most} ({why})")
    if v["trainer.max_steps"] == -1 and v.get("trainer.max_epochs") in (None, -1):
        endless = "trainer.max_steps=-1 without trainer.max_epochs gives the schedule no end"
        raise ConfigError(f"{endless}: set one of them above 0")
    for key, rule in STREAM_RULES.items() if v.get("data.streaming") else ():
        if key in v and not rule.accepts(v[key]):
            problem = f"{key} must be {rule.description}, not {v[key]}"
            raise ConfigError(f"data.streaming=true: {problem}")
    strategy = ["FSDPStrategy"] * str(v.get("trainer.strategy")).startswith("fsdp")
    targets = [str(v[key]).rpartition(".")[2] for key in v if key.endswith("._target_")]
    check_classes(strategy + targets)
    if v.get("data.val_share", 0) + v.get("data.test_share", 0) >= 1:
        raise ConfigError("data.val_share and data.test_share leave no document for training")
    if v.get("optimizer.fused") is True and is_float16(v["trainer.precision"]):
        clip = "optimizer.fused=true cannot clip gradients under trainer.precision=16-mixed"
        raise ConfigError(f"{clip}: set optimizer.fused=auto")
    if v.get("samples.patience") and not (v["samples.count"] and v.get("samples.per_prompt")):
        raise ConfigError("samples.patience needs samples.count and samples.per_prompt above 0")


def check_classes(names: Collection[str]) -> None:
    """Raise :class:`ConfigError` where a class of these names would make a run wrong: a strategy or
    a callback, or one that they are derived from."""
    if "StochasticWeightAveraging" in names:
        reason = "replaces the schedule, and its runs do not continue as they were"
        raise ConfigError(f"StochasticWeightAveraging {reason}: use EMAWeightAveraging")
    if "FSDPStrategy" in names:
        reason = "clips each rank's part of the gradient by itself"
        raise ConfigError(f"trainer.strategy=fsdp {reason}: type trainer=fsdp")
    if "FullyShardedStrategy" in names and any(x.endswith("WeightAveraging") for x in names):
        raise ConfigError("trainer=fsdp cannot average weights: remove callbacks=ema")

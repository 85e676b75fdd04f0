"""What a valid configuration is.

Imports neither torch nor lightning, so that a slip of the keyboard is answered in a fraction of a
second. The YAML files below ``configs/`` say which keys there are and what they are by default;
the rules here say which values make sense. Every complaint names the key and the nearest valid one.
"""

import difflib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"
MOST_JOBS_CHECKED = 64
"""Jobs of a sweep whose combination is checked before the first one starts."""


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one line and says what to do."""


# ---- rules ----


class Rule(NamedTuple):
    """A test of a value, and in words what passes it."""

    holds: Callable[[Any], bool]
    words: str


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def integer(low: int, also: tuple[int, ...] = ()) -> Rule:
    words = f"a whole number of at least {low}" + "".join(f", or {value}" for value in also)
    return Rule(
        lambda v: isinstance(v, int) and not isinstance(v, bool) and (v >= low or v in also), words
    )


def real(above: float | None = None, low: float | None = None, below: float | None = None) -> Rule:
    bounds = [("above", above), ("at least", low), ("below", below)]
    words = " and ".join(f"{name} {value:g}" for name, value in bounds if value is not None)
    return Rule(
        lambda v: (
            _is_number(v)
            and float("-inf") < v < float("inf")
            and (above is None or v > above)
            and (low is None or v >= low)
            and (below is None or v < below)
        ),
        f"a number {words}",
    )


def one_of(*options: Any) -> Rule:
    return Rule(lambda v: v in options, "one of " + ", ".join(str(o) for o in options))


def optional(rule: Rule) -> Rule:
    return Rule(lambda v: v is None or rule.holds(v), f"{rule.words}, or null")


flag = Rule(lambda v: isinstance(v, bool), "true or false")
text = Rule(lambda v: isinstance(v, str) and v != "", "a text")

RULES: dict[str, Rule] = {
    "experiment": text,
    "seed": Rule(
        lambda v: isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**32,
        "a whole number from 0 to 4294967295",
    ),
    "ckpt_path": optional(text),
    "data.batch_size": integer(1),
    "data.max_length": integer(3),
    "data.layout": one_of("padded"),
    "data.shuffle": flag,
    "data.num_workers": integer(0),
    "data.seed": integer(0),
    "data.source.symbols": Rule(
        lambda v: isinstance(v, int) and not isinstance(v, bool) and 2 <= v <= 62,
        "a whole number from 2 to 62",
    ),
    "data.source.successors": integer(1),
    "data.source.mean": real(low=1),
    "data.source.train_documents": integer(1),
    "data.source.val_documents": integer(1),
    "data.source.val_share": real(above=0, below=1),
    "model.d_model": integer(1),
    "model.n_heads": integer(1),
    "model.n_layers": integer(1),
    "model.d_ff": integer(1),
    "model.max_positions": integer(2),
    "model.dropout": real(low=0, below=1),
    "loss.reduction": one_of("token"),
    "optimizer.lr": real(above=0),
    "optimizer.weight_decay": real(low=0),
    "scheduler.warmup_steps": integer(0),
    "scheduler.final_share": real(low=0),
    "trainer.accelerator": one_of("auto", "cpu", "gpu", "cuda", "mps", "tpu"),
    "trainer.max_steps": integer(1),
    "trainer.num_nodes": integer(1),
    "trainer.accumulate_grad_batches": integer(1),
    "trainer.gradient_clip_val": optional(real(above=0)),
    "trainer.gradient_clip_algorithm": one_of("norm"),
    "trainer.log_every_n_steps": integer(1),
    "samples.count": integer(1),
    "samples.shown": integer(0),
    "samples.length": integer(2),
    "samples.temperature": real(low=0),
    "samples.top_k": optional(integer(1)),
    "pitfalls.*": flag,
    "preflight.on_fault": one_of("error", "warn", "off"),
}


def validate(cfg: DictConfig) -> None:
    """Hold every value against its rule, and the keys against each other.

    Raises:
        ConfigError: naming the first key at fault.
    """
    try:
        values = dict(_leaves(OmegaConf.to_container(cfg, resolve=True)))
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error)) from error
    for key, value in values.items():
        rule = _rule(key)
        if rule and not rule.holds(value):
            raise ConfigError(f"{key} must be {rule.words}, not {value!r}")
    _validate_together(values)


def _validate_together(v: Mapping[str, Any]) -> None:
    d_model, n_heads = v.get("model.d_model"), v.get("model.n_heads")
    if d_model and n_heads and d_model % n_heads:
        raise ConfigError(
            f"model.d_model={d_model} must be a multiple of model.n_heads={n_heads}, "
            f"as each head gets an equal share"
        )
    longest = v.get("model.max_positions")
    for key in ("data.max_length", "samples.length"):
        if longest and v.get(key, 0) > longest:
            raise ConfigError(
                f"{key}={v[key]} is longer than model.max_positions={longest}: lower the first or "
                f"raise the second"
            )
    successors, symbols = v.get("data.source.successors"), v.get("data.source.symbols")
    if successors and symbols and successors >= symbols:
        raise ConfigError(
            f"data.source.successors={successors} must be below data.source.symbols={symbols}"
        )


def _rule(key: str) -> Rule | None:
    return next((rule for name, rule in RULES.items() if fnmatch(key, name)), None)


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


# ---- composition ----


def load(overrides: Sequence[str] = (), config_dir: Path = CONFIG_DIR) -> DictConfig:
    """Compose and validate one run's configuration, as the command line would.

    Raises:
        ConfigError: a key, a preset or a value that is not valid.
    """
    try:
        with initialize_config_dir(str(config_dir), version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            parsed = _parse(overrides, loader)
            for override in parsed:
                if override.is_sweep_override():
                    raise ConfigError(
                        f"{override.input_line}: several values make a sweep; add -m to run it"
                    )
            _check_keys(parsed, loader)
            cfg = compose("train", overrides=list(overrides))
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_first_line(error)) from error
    validate(cfg)
    return cfg


def load_sweep(overrides: Sequence[str], config_dir: Path = CONFIG_DIR) -> None:
    """Validate every job of a sweep before the first one starts (the first 64, if there are more).

    Raises:
        ConfigError: as :func:`load`, of the first job at fault.
    """
    parsed = _parse(overrides)
    axes = [
        list(o.sweep_string_iterator()) if o.is_discrete_sweep() else [o.get_value_element_as_str()]
        for o in parsed
        if not (o.is_sweep_override() and not o.is_discrete_sweep())
    ]
    keys = [o.get_key_element() for o in parsed]
    for values in itertools.islice(itertools.product(*axes), MOST_JOBS_CHECKED):
        load([f"{k}={v}" for k, v in zip(keys, values, strict=True)], config_dir)


def _parse(overrides: Sequence[str], loader: ConfigLoader | None = None) -> list[Override]:
    for word in overrides:
        if "=" not in word and not word.startswith("~"):
            raise ConfigError(f"{word!r} is no override: write key=value, as in experiment=fix")
    try:
        return OverridesParser.create(loader).parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError(_first_line(error)) from error


def _check_keys(overrides: Sequence[Override], loader: ConfigLoader) -> None:
    """Every override names a group's option or a key that the chosen groups have."""
    in_groups = [o for o in overrides if loader.get_group_options(o.key_or_group)]
    for override in in_groups:
        _check_option(override, loader.get_group_options(override.key_or_group))
    cfg = loader.load_configuration(
        "train", [o.input_line or "" for o in in_groups], run_mode=RunMode.RUN
    )
    known = {key for key, _ in _leaves(OmegaConf.to_container(cfg, resolve=False))}
    known |= {key.rpartition(".")[0] for key in known}  # whole nodes may be replaced too
    names = [key for key in known if not key.startswith("hydra")]
    for override in overrides:
        key = override.key_or_group
        if override in in_groups or key in known or key.startswith("hydra"):
            continue
        near = _nearest(key, names + [g for g in loader.list_groups("") if g != "hydra"])
        group = key.partition(".")[0]
        raise ConfigError(
            f"unknown key {key!r}{near} (a key of your own goes into a file of configs/{group}/)"
        )


def _check_option(override: Override, options: list[str]) -> None:
    value = override.value()
    chosen = value if isinstance(value, list) else [value]
    for option in chosen:
        if isinstance(option, str) and option not in options:
            group = override.key_or_group
            raise ConfigError(
                f"{group}={option}: there is no such {group}{_nearest(option, options)} "
                f"(there are: {', '.join(options)})"
            )


def _nearest(word: str, options: Sequence[str]) -> str:
    """'; did you mean …?', comparing last parts of dotted keys when the whole is too far off."""
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if not close:
        last = {option.rpartition(".")[2]: option for option in options}
        close = [
            last[match] for match in difflib.get_close_matches(word.rpartition(".")[2], last, n=1)
        ]
    close = close or difflib.get_close_matches(word, options, n=1, cutoff=0.0)
    return f"; did you mean {close[0]!r}?" if close else ""

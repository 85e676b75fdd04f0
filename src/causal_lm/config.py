"""What a valid configuration is.

Imports neither torch nor lightning, so that a slip of the keyboard is answered in a fraction of a
second. The YAML files below ``configs/`` say which keys there are and what they are by default;
``rules.py`` says which values make sense. Every complaint names the key and the nearest valid one.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from causal_lm.schema import RULES, is_float16, rule_of

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"
MOST_VALUES_CHECKED = 16
"""Values of one axis of a sweep that are checked before its first job starts."""


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one line and says what to do."""


GROUPS = ("data", "data.source", "gradients", "loss", "model", "optimizer", "preflight", "samples",
          "scheduler", "trainer")  # fmt: skip
"""Parts that no run can do without. (The pitfalls can be left out.)"""


def validate(cfg: DictConfig) -> None:
    """Hold every value against its rule, and the keys against each other.

    Raises:
        ConfigError: naming the first key at fault.
    """
    try:
        values = dict(leaves(OmegaConf.to_container(cfg, resolve=True)))
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error)) from error
    for key, value in values.items():
        parent = key.rpartition(".")[0]
        if parent in RULES:
            raise ConfigError(f"{parent} must be {RULES[parent].words}, not a group of keys")
        rule = rule_of(key)
        if rule and not rule.holds(value):
            raise ConfigError(f"{key} must be {rule.words}, not {value!r}")
    for group in GROUPS:
        if not any(key.startswith(f"{group}.") for key in values):
            raise ConfigError(f"{group} is missing or empty: a run needs one")
    _validate_together(values)


def _validate_together(v: Mapping[str, Any]) -> None:
    for whole, part, why in (
        ("model.d_model", "model.n_heads", "each head gets an equal share"),
        ("model.n_heads", "model.n_kv_heads", "each key and value head serves as many query heads"),
    ):
        if v.get(whole) and v.get(part) and v[whole] % v[part]:
            raise ConfigError(
                f"{whole}={v[whole]} must be a multiple of {part}={v[part]}, as {why}"
            )
    d_model, n_heads = v.get("model.d_model"), v.get("model.n_heads")
    if v.get("model.n_kv_heads") and d_model and n_heads and d_model // n_heads % 2:
        raise ConfigError(
            f"model.d_model={d_model} gives each of model.n_heads={n_heads} an odd width, but "
            f"rotary positions turn pairs"
        )
    longest = v.get("model.max_positions")
    for key in ("data.max_length", "samples.self_check.length"):
        if longest and v.get(key, 0) > longest:
            raise ConfigError(
                f"{key}={v[key]} is longer than model.max_positions={longest}: lower the first or "
                f"raise the second"
            )
    if v.get("optimizer.fused") is True and is_float16(v.get("trainer.precision", "")):
        raise ConfigError(
            "optimizer.fused=true cannot clip gradients under trainer.precision=16-mixed: set "
            "optimizer.fused=auto"
        )
    if v.get("samples.patience") and not (v["samples.count"] and v["samples.per_prompt"]):
        raise ConfigError(
            "samples.patience compares repetition and consistency: set samples.count and "
            "samples.per_prompt above 0"
        )
    successors, symbols = v.get("data.source.successors"), v.get("data.source.symbols")
    if successors and symbols and successors >= symbols:
        raise ConfigError(
            f"data.source.successors={successors} must be below data.source.symbols={symbols}"
        )
    copies, longest_document = v.get("data.source.copies"), v.get("data.source.max_length")
    if copies and longest_document and copies > longest_document - 2:
        raise ConfigError(
            f"data.source.copies={copies} of one symbol and BOS and EOS do not fit a document of "
            f"data.source.max_length={longest_document} tokens: lower the first or raise the second"
        )


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
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
    except (HydraException, OmegaConfBaseException, ValueError, AssertionError) as error:
        raise ConfigError(f"{_first_line(error)} (in: {' '.join(overrides)})") from error
    validate(cfg)
    return cfg


def load_sweep(overrides: Sequence[str], config_dir: Path = CONFIG_DIR) -> None:
    """Validate every value of a sweep before its first job starts, each beside the first others.

    Raises:
        ConfigError: as :func:`load`, of the first value at fault.
    """
    with initialize_config_dir(str(config_dir), version_base="1.3"):
        parsed = _parse(overrides, GlobalHydra.instance().config_loader())
    axes = [_values(override) for override in parsed]
    first = [values[0] for values in axes]
    load(first, config_dir)
    for i, values in enumerate(axes):
        for value in values[1:MOST_VALUES_CHECKED]:
            load([*first[:i], value, *first[i + 1 :]], config_dir)


def _values(override: Override) -> list[str]:
    """What a sweep will put in this override's place, each as an override of its own."""
    key = override.get_key_element()
    if override.is_sweep_override() and override.is_discrete_sweep():
        return [f"{key}={value}" for value in override.sweep_string_iterator()]
    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        return [f"{key}={sweep.start}", f"{key}={sweep.end}"]
    return [override.input_line or ""]


def _parse(overrides: Sequence[str], loader: ConfigLoader) -> list[Override]:
    parser = OverridesParser.create(loader)
    parsed = []
    for word in overrides:
        if "=" not in word and not word.startswith("~"):
            raise ConfigError(f"{word!r} is no override: write key=value, as in experiment=fix")
        try:
            parsed += parser.parse_overrides([word])
        except HydraException as error:
            raise ConfigError(
                f"{word!r} cannot be read: quote a value that holds =, spaces or brackets, as in "
                f"'ckpt_path=\"a=b/last.ckpt\"'"
            ) from error
    return parsed


def _check_keys(overrides: Sequence[Override], loader: ConfigLoader) -> None:
    """Every override names a group's option or a key that the chosen groups have."""
    for override in overrides:
        if override.is_delete():
            raise ConfigError(
                f"{override.input_line}: nothing can be taken away; set another value"
            )
    in_groups = [o for o in overrides if loader.get_group_options(o.key_or_group)]
    for override in in_groups:
        _check_option(override, loader.get_group_options(override.key_or_group))
    cfg = loader.load_configuration(
        "train", [o.input_line or "" for o in in_groups], run_mode=RunMode.RUN
    )
    known = {key for key, _ in leaves(OmegaConf.to_container(cfg, resolve=False))}
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
    group, options = override.key_or_group, [o for o in options if not o.startswith("_")]
    if override.is_sweep_override():
        return
    if not isinstance(value, str):
        raise ConfigError(f"{group}={value}: choose one among {', '.join(options)}")
    if value not in options:
        raise ConfigError(
            f"{group}={value}: there is no such {group}{_nearest(value, options)} "
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

"""Compose and validate the configuration of a run; every error is one line that names the key.

``configs/`` (in a wheel: inside the package) has the keys and defaults, ``schema.py`` the valid
values. Imports neither torch nor lightning, so that a misspelled key is reported at once.
"""

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.utils import to_absolute_path
from omegaconf import DictConfig, OmegaConf, errors

from causal_lm import schema
from causal_lm.schema import HYDRA_KEYS, RULES, ConfigError, check_values, rule_of

CONFIG_DIR = next(d for p in Path(__file__).resolve().parents if (d := p / "configs").is_dir())
MAX_VALUES_CHECKED = 16  # of one axis of a sweep, before the first job starts
SIMILAR = 0.75  # of difflib: from here on, a key is suggested in place of an unknown one

REQUIRED = (  # the code reads them
    "experiment", "seed", "ckpt_path", "data._target_", "data.source._target_", "data.max_length",
    "model._target_", "loss.reduction", "loss.length", "loss.chunk_tokens", "optimizer._target_",
    "scheduler._target_", "gradients.on_nonfinite", "gradients.max_skipped",
    "gradients.report_every", "preflight.on_fault", "trainer._target_", "trainer.max_steps",
    "trainer.devices", "trainer.precision", "trainer.accelerator",
    "trainer.accumulate_grad_batches", "trainer.enable_progress_bar", "samples.count",
    "samples.length", "samples.batch_size", "samples.self_check.shown",
    "samples.self_check.count", "samples.self_check.length",
)  # fmt: skip
UNRESOLVED = object()  # a value that depends on the node ``hydra``, before the job starts
GROUPS = sorted(path.name for path in CONFIG_DIR.glob("*/") if path.name != "hydra")
ADDED_GROUPS = ("callbacks", "logger", "debug", "hparams_search")  # their default is no option
_parts = [key.replace("*", "").split(".") for key in RULES]
_keys = {".".join(parts[:end]) for parts in _parts for end in range(2, len(parts) + 1)}
_files = [path for group in ADDED_GROUPS[:2] for path in CONFIG_DIR.glob(f"{group}/*.yaml")]
PLACES = [f"{path.parent.name}={path.stem}" for path in _files]
PLACES += sorted(_keys, key=lambda key: (key.count("."), key))  # of what is below the top level
LOGGER_PACKAGES = {  # class of a logger -> the package that it needs, in an extra of that name
    "TensorBoardLogger": "tensorboard", "WandbLogger": "wandb", "MLFlowLogger": "mlflow",
    "TrackioLogger": "trackio", "CometLogger": "comet_ml",
}  # fmt: skip
PATH_KEYS = (  # besides data.path, val_path and test_path, which the sources resolve
    "ckpt_path", "data.tokenizer", "data.cache_dir", "data.root", "model.init_from",
    "samples.embedder")  # fmt: skip
LAUNCHER_EXTRAS = ("joblib", "submitit", "ray")
NODE_KEYS = ("callbacks", "logger", "trainer.callbacks", "trainer.logger", "trainer.plugins")


def load(overrides: Sequence[str] = (), config_dir: Path = CONFIG_DIR) -> DictConfig:
    """Compose and validate the configuration of one run, as the command line does."""
    with initialize_config_dir(str(config_dir), version_base="1.3"):
        return _load(overrides)


def validate_sweep(overrides: Sequence[str], config_name: str | None = "train") -> None:
    """Validate every value of every axis, with the other axes at their first value.

    Hydra must be initialized. An interval is validated at both ends.
    """
    with as_config_error(overrides):
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        axes = [_sweep_values(override) for override in parser.parse_overrides(list(overrides))]
    first = [values[0] for values in axes]
    _load(first, config_name)
    for i, values in enumerate(axes):
        for value in values[1:MAX_VALUES_CHECKED]:
            _load([*first[:i], value, *first[i + 1 :]], config_name)


def _load(overrides: Sequence[str], config_name: str | None = "train") -> DictConfig:
    overrides = group_overrides(overrides)
    with as_config_error(overrides):
        cfg = compose(config_name, overrides=overrides)
    validate(cfg)
    return cfg


def _sweep_values(override: Override) -> list[str]:
    """The overrides that a sweep puts in the place of this one."""
    key = override.get_key_element()
    if override.is_sweep_override() and override.is_discrete_sweep():
        if values := [f"{key}={value}" for value in override.sweep_string_iterator()]:
            return values
        raise ConfigError(f"{override.input_line} has no value")
    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        return [f"{key}={sweep.start}", f"{key}={sweep.end}"]
    return [override.input_line or ""]


def group_overrides(overrides: Iterable[str]) -> list[str]:
    """The same overrides, but ``+callbacks=…`` without its plus, which Hydra refuses. Raises
    :class:`ConfigError` where one of :data:`ADDED_GROUPS` is repeated, as Hydra would silently use
    the last one."""
    plus = rf"^\+(?=({'|'.join(ADDED_GROUPS)})=)"
    words = [re.sub(plus, "", word) for word in overrides]
    for group in ADDED_GROUPS:
        options = [word.partition("=")[2] for word in words if word.startswith(f"{group}=")]
        if len(options) > 1:
            raise ConfigError(f"{group} is given twice: write '{group}=[{','.join(options)}]'")
    return words


@contextmanager
def as_config_error(overrides: Sequence[str] = ()) -> Iterator[None]:
    """Turn what Hydra and OmegaConf raise inside into a :class:`ConfigError` of one line."""
    try:
        yield
    except ConfigError:
        raise
    except (HydraException, errors.OmegaConfBaseException) as error:
        raise ConfigError(_explain(error)) from error
    except (ValueError, AssertionError) as error:  # Hydra's own, which does not name the override
        message = " ".join(str(error).split())
        raise ConfigError(f"{message} (in: {' '.join(overrides)})") from error


def _explain(error: Exception) -> str:
    """The message of an error of Hydra or OmegaConf, with the valid keys or options."""
    cause = error.__cause__
    if isinstance(error, OverrideParseException):
        wrong = f"{error.override!r} cannot be read: write key=value, as in experiment=fix"
        quote = "quote a value that holds =, brackets, or characters beyond ASCII"
        return f"{wrong}; {quote}, as in 'ckpt_path=\"a=b/last.ckpt\"'"
    if isinstance(error, MissingConfigException) and "/" in (error.missing_cfg_file or ""):
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        options = [name for name in error.options or () if not name.startswith("_")]
        if group == "hydra/launcher" and (extra := option.partition("_")[0]) in LAUNCHER_EXTRAS:
            return f"{group}={option} is not installed: pip install -e '.[{extra}]'"
        if not options:
            return f"there is no group {group!r}; valid groups: {', '.join(GROUPS)}"
        guess = _did_you_mean(option, options)
        return f"there is no {group}={option}{guess}; valid options: {', '.join(options)}"
    if isinstance(cause, errors.ConfigKeyError | errors.ConfigAttributeError):
        parent = cause.parent_node
        siblings = list(parent) if isinstance(parent, DictConfig) else []
        root: Any = OmegaConf.to_container(parent._get_root(), resolve=False) if siblings else {}
        return unknown_key(str(cause.full_key), siblings, [key for key, _ in leaves(root)])
    if isinstance(cause, errors.OmegaConfBaseException):
        error = cause
    if isinstance(error, errors.OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {str(error).splitlines()[0]}"
    return " ".join(str(error).split())


def unknown_key(key: str, siblings: Sequence[Any], others: Sequence[str] = ()) -> str:
    """The message for an unknown key: the likely one, and the valid keys in its place."""
    parent, _, last = key.rpartition(".")
    groups = [] if parent else GROUPS
    guess = _did_you_mean(last, [*siblings, *groups], f"{parent}." if parent else "")
    same = [other for other in others if _ends_in(last, other)]  # in another group
    if same and not guess:
        guess = f" (did you mean {same[0]!r}?)"
    names = ", ".join(name for name in siblings if name not in (*HYDRA_KEYS, "hydra", *groups))
    message = f"unknown key {key!r}{guess}; valid keys{f' of {parent}' if parent else ''}: {names}"
    more = f"; other arguments of lightning.Trainer are added: +{key}=…" * (parent == "trainer")
    return f"{message}; valid groups: {', '.join(groups)}" if groups else message + more


def _ends_in(name: str, key: str) -> bool:
    return key.endswith((f".{name}", f"={name}"))


def _did_you_mean(word: str, options: Sequence[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(word, options, n=1, cutoff=SIMILAR)
    return f" (did you mean {prefix + close[0]!r}?)" if close else ""


def validate(cfg: DictConfig) -> None:
    """Raise :class:`ConfigError` for the first key at fault.

    Keys below a ``_target_`` outside causal_lm are checked when the object is built
    (:func:`causal_lm.build.instantiate`).
    """
    with as_config_error():
        values = dict(leaves(cfg))
        for key, path in [(k, v) for k in PATH_KEYS if isinstance(v := values.get(k), str)]:
            there = to_absolute_path(path)  # of where the command was typed
            is_moved = there != os.path.abspath(path)  # under hydra.job.chdir
            if is_moved and (os.path.exists(there) or key == "data.cache_dir"):
                OmegaConf.update(cfg, key, there)
                values[key] = there
    for key in REQUIRED:
        if key not in values:
            raise ConfigError(f"{key} must be a single value: it is missing, or a group of keys")
    for key in NODE_KEYS:
        target_nodes(cfg, key)
    ours = _values_to_check(values)
    check_values(ours)
    schema.check_combinations(ours)


def leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of each value, without the node ``hydra``, or :data:`UNRESOLVED`."""
    for name in node:
        key = f"{prefix}{name}"
        if key == "hydra":
            continue
        try:
            value = node[name]
        except errors.InterpolationResolutionError as error:
            if "HydraConfig was not set" not in str(error):
                raise
            value = UNRESOLVED
        if isinstance(value, Mapping) and len(value):
            yield from leaves(value, f"{key}.")
        else:
            is_list = OmegaConf.is_config(value)
            yield key, OmegaConf.to_container(value, resolve=True) if is_list else value


def _values_to_check(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values to check, without those below a ``_target_`` outside causal_lm.

    Raises for an unknown key of one of our groups, and for a misspelled group.
    """
    targets = {k.removesuffix("._target_"): v for k, v in values.items() if k.endswith("._target_")}
    foreign = {k for k, v in targets.items() if not str(v).startswith("causal_lm.")} - {"trainer"}
    groups = sorted({"logger", *(key.partition(".")[0].rstrip("*") for key in RULES)} - {""})
    ours = {}
    for key, value in values.items():
        group, parent, name = key.partition(".")[0], *key.rpartition(".")[::2]
        owner = max((t for t in targets if key.startswith(f"{t}.")), key=len, default="")
        has_rule = owner not in foreign and (rule_of(key) or parent in RULES)
        is_built = group in ("trainer", *NODE_KEYS) and parent != "callbacks.checkpoint"
        package = LOGGER_PACKAGES.get(str(value).rpartition(".")[2])
        if package and not getattr(find_spec(package), "origin", None):  # no package, or a folder
            install = f"pip install -e '.[{package.removesuffix('_ml')}]'"
            raise ConfigError(f"{key}={value} needs {package}, which is not installed: {install}")
        if value is not UNRESOLVED and (has_rule or name in HYDRA_KEYS):
            ours[key] = value
        elif value is UNRESOLVED or owner in foreign or is_built:
            continue  # those of the Trainer are checked before the data are loaded
        elif value == {} and any(k.startswith(f"{key}.") for k in RULES):
            continue
        elif group not in groups:  # the user's own, unless it is one of ours, not in its place
            if _did_you_mean(group, groups) or any(_ends_in(group, place) for place in PLACES):
                raise ConfigError(unknown_key(group, groups, PLACES))
            if group in GROUPS:
                raise ConfigError(f"nothing reads {key} (is '# @package _global_' missing?)")
        elif not (parent == "data" and "data.source" in foreign):
            siblings = [k.rpartition(".")[2] for k in values if k.rpartition(".")[0] == parent]
            raise ConfigError(unknown_key(key, [s for s in siblings if rule_of(f"{parent}.{s}")]))
    return ours


def target_nodes(cfg: DictConfig, key: str) -> list[Any]:
    """The nodes at a key of :data:`NODE_KEYS`: one, or those of a list or a mapping.

    Raises :class:`ConfigError` for an entry that is neither null nor keys with a ``_target_``.
    """
    node, group = OmegaConf.select(cfg, key), key.rpartition(".")[2]
    if key == "trainer.logger" and node is False:
        return []
    is_group = isinstance(node, Mapping) and not node.get("_target_")
    names: Any = node if is_group else range(len(node)) if OmegaConf.is_list(node) else None
    entries = {key: node} if names is None else {node._get_full_key(n): node[n] for n in names}
    nodes = {k: v for k, v in entries.items() if v is not None and k != "callbacks.checkpoint"}
    for name, entry in nodes.items():
        if not isinstance(entry, Mapping) or not entry.get("_target_"):
            word = entry if isinstance(entry, str) else name.rpartition(".")[2]
            is_option = (CONFIG_DIR / group / f"{word}.yaml").is_file()
            todo = f": choose {group}={word}" if is_option else ""
            raise ConfigError(f"{name} must be null or keys with a _target_, not {entry}{todo}")
    return list(nodes.values())

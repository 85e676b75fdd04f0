"""Configuration -> objects: data, module, trainer, preflight; and a model from a checkpoint."""

import importlib
import inspect
import logging
import math
import os
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from hydra.errors import InstantiationException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig

from causal_lm import config, extras, precision
from causal_lm.checkpoint_file import CONFIG, TOKENIZER, AtomicCheckpointIO, read_checkpoint
from causal_lm.config import HYDRA_KEYS, ConfigError, check_values, leaves, unknown_key
from causal_lm.data.datamodule import DataModule
from causal_lm.data.documents import Corpus
from causal_lm.data.tokenizers import Tokenizer, from_state
from causal_lm.module import CausalLM
from causal_lm.nonfinite import NonFiniteGuard
from causal_lm.objective import LossConfig
from causal_lm.schema import check_classes, is_float16

OWN_MODELS = (  # every ``_target_`` that a checkpoint may name without being trusted
    "causal_lm.models.tiny.Tiny", "causal_lm.models.decoder.Decoder", "causal_lm.models.gru.GRU",
    "causal_lm.models.external.XTransformers", "causal_lm.models.external.huggingface",
)  # fmt: skip
CODE_KEYS = (*HYDRA_KEYS, "auto_map", "trust_remote_code")  # Hydra or transformers load code
SMALL_MODEL = 10**7  # parameters that a checkpoint's model may have, whatever weights it holds
LARGE_VOCABULARY, CHUNK_TOKENS = 8192, 256
"""``loss.chunk_tokens=auto``: from this vocabulary size on, chunks of this many tokens."""


def import_object(name: str, key: str) -> Any:
    """The class or function of a dotted name; ConfigError, with the ``key`` that names it, where
    there is none. (Hydra's own function logs a traceback.)"""
    try:
        try:
            return pkgutil.resolve_name(name)
        except AttributeError:  # an import inside the module may have failed: raise that error
            importlib.import_module(name.rpartition(".")[0])
            raise
    except Exception as error:
        raise ConfigError(f"{key}: {name} cannot be imported: {error}") from error


def find_target(node: DictConfig) -> Any:
    """The class or function that ``node._target_`` names. Raises ConfigError where there is none,
    or where it does not take a key of the node."""
    target = import_object(node._target_, node._get_full_key("_target_"))
    try:
        parameters = dict(inspect.signature(target).parameters)
    except ValueError:  # built-ins may have no signature
        parameters = {}
    takes_any = not parameters or any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    for key in node if not takes_any else ():
        if key not in parameters and key not in HYDRA_KEYS:
            raise ConfigError(unknown_key(node._get_full_key(key), list(parameters)))
    return target


def instantiate(node: DictConfig, **more: Any) -> Any:
    """Make the object that ``node._target_`` names, see :func:`find_target`; ``more`` are further
    arguments."""
    find_target(node)
    try:
        return hydra.utils.instantiate(node, _convert_="all", **more)
    except InstantiationException as error:  # re-raise the object's own error
        raise (error.__cause__ or error) from None


def make_module(cfg: DictConfig, tokenizer: Tokenizer) -> CausalLM:
    """The module of a configuration: the correct class, unless a pitfall is switched on."""
    module_class = CausalLM
    if any((cfg.get("pitfalls") or {}).values()):
        from causal_lm.pitfalls import PITFALLS, pitfall_module

        for name in cfg.pitfalls:
            if name not in PITFALLS:
                raise ConfigError(unknown_key(f"pitfalls.{name}", list(PITFALLS)))
        module_class = pitfall_module(cfg.pitfalls, tokenizer.pad_id)
    make = partial(instantiate, cfg.model, vocab_size=tokenizer.vocab_size)
    if cfg.model._target_ in OWN_MODELS and not cfg.model.get("init_from"):
        check_size(make, "model")
    model = make()
    chunk = cfg.loss.chunk_tokens
    if chunk == "auto":
        is_large = tokenizer.vocab_size >= LARGE_VOCABULARY and model.lm_head is not None
        chunk = CHUNK_TOKENS if is_large else None
    loss = LossConfig(cfg.loss.reduction, cfg.loss.length, chunk)
    guard = NonFiniteGuard(cfg.gradients.on_nonfinite, cfg.gradients.max_skipped)
    optimizer, scheduler = make_optimizer(cfg), instantiate(cfg.scheduler)
    return module_class(model, optimizer, scheduler, tokenizer.token_bytes(), loss, guard)


def memory_bytes() -> float:
    """Memory of this machine, or of its container, in bytes; inf where it is not known."""
    found = math.inf
    with suppress(AttributeError, OSError, ValueError):
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # ValueError: "max"
        found = min(found, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return found


def check_size(make: Callable[[], Any], name: str, most: float = math.inf) -> None:
    """Raise ValueError where the model that ``make`` returns, called ``name`` in the message, has
    more than ``most`` parameters, or more than fit the memory.

    ``make`` is called on the meta device, where nothing is allocated. Errors other than of size are
    left to the call that builds the model.
    """
    most = min(most, memory_bytes() / torch.float32.itemsize)
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            total = sum(parameter.numel() for parameter in make().parameters())
    except Exception as error:
        total = 2**63 if "overflow" in str(error) else 0
    if total > most:
        size = f"{name} has at least {total:,} parameters ({total * 4e-9:,.1f} GB)"
        raise ValueError(f"{size}, but there is room for {most:,.0f} at most: lower its sizes")


def make_optimizer(cfg: DictConfig) -> Any:
    """The factory (parameter groups -> optimizer), with ``optimizer.fused=auto`` resolved."""
    # Under float16, a fused optimizer unscales gradients in its step, which is after clipping.
    if cfg.optimizer.get("fused") == "auto":
        return instantiate(cfg.optimizer, fused=not is_float16(cfg.trainer.precision))
    return instantiate(cfg.optimizer)


def make_trainer(
    cfg: DictConfig, callbacks: Iterable[Any], logger: Iterable[Any] = (), **more: Any
) -> L.Trainer:
    """Lightning's Trainer with these callbacks and loggers, and those of the configuration."""
    # Lightning's tips stay out of the log, but not the table of callbacks=model_summary.
    logging.getLogger("lightning.pytorch.callbacks.model_summary").setLevel(logging.INFO)
    more |= {"callbacks": [*callbacks], "logger": [*logger], "plugins": [AtomicCheckpointIO()]}
    for key in config.NODE_KEYS:
        more[key.rpartition(".")[2]] += map(instantiate, config.target_nodes(cfg, key))
    if cfg.trainer.get("logger") is False:
        more["logger"] = []
    node = cfg.copy().trainer  # with its parent, which it may interpolate
    node.update(dict.fromkeys(more.keys() & node.keys()))  # Hydra would merge these with more
    try:
        trainer = instantiate(node, **more)
    except (MisconfigurationException, RuntimeError, TypeError, ValueError) as error:
        if "CPUAccelerator" in str(error):
            given = f"trainer.devices={cfg.trainer.devices} numbers GPUs, and this runs on the CPU"
            raise ConfigError(f"{given}: give a number of processes") from error
        if "can not run on your system" in str(error) or "No supported gpu" in str(error):
            missing = f"trainer.accelerator={cfg.trainer.accelerator} is not available here"
            raise ValueError(f"{missing}: type trainer=cpu, or trainer=auto") from error
        raise
    parts = [trainer.strategy, *trainer.callbacks]
    check_classes([kind.__name__ for part in parts for kind in type(part).__mro__])
    return trainer


def prepare(cfg: DictConfig) -> tuple[DataModule, Corpus, CausalLM]:
    """Seed, load the data, make the module; before all that, check the keys of the Trainer, and
    replace a precision of ``auto`` in ``cfg`` by the one that is chosen. Raises ConfigError where a
    row is longer than the model's positions."""
    find_target(cfg.trainer)
    cfg.trainer.precision = precision.resolve(cfg.trainer.precision, cfg.trainer.accelerator)
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    data: DataModule = instantiate(cfg.data)
    corpus = data.load()
    module = make_module(cfg, corpus.tokenizer)
    limit = getattr(module.model, "max_positions", None)
    if limit is not None and (longest := int(data.train_windows.lengths.max())) > limit:
        rows = f"data.max_length={cfg.data.max_length} gives rows of up to {longest} tokens"
        raise ConfigError(f"{rows}, and the model has {limit} positions: lower data.max_length")
    return data, corpus, module


def restore(path: str | Path, trust: Iterable[str] = ()) -> tuple[CausalLM, Tokenizer, Any]:
    """The module of a checkpoint, in eval mode on the CPU, its tokenizer and its configuration.

    Always a plain :class:`CausalLM`, whichever pitfalls it was trained with. ``trust`` has the
    dotted names of model classes from outside causal_lm that the checkpoint may name. Raises
    FileNotFoundError, or ValueError for what ``read_checkpoint`` or :func:`make_stored_model`
    refuses.
    """
    saved = read_checkpoint(path)
    with extras.reading(f"{path} holds a tokenizer that cannot be read"):
        tokenizer = from_state(saved[TOKENIZER])
    weights = sum(w.numel() for w in saved["state_dict"].values() if isinstance(w, torch.Tensor))
    with extras.reading(f"{path} holds a model that cannot be made"):
        model = make_stored_model(saved[CONFIG]["model"], tokenizer.vocab_size, trust, weights)
    module = CausalLM(model, token_bytes=tokenizer.token_bytes())
    with extras.reading(f"{path} holds weights that do not fit its model"):
        module.load_state_dict(saved["state_dict"], strict=True)
    return module.eval(), tokenizer, saved[CONFIG]


def make_stored_model(
    stored: Mapping[str, Any], vocab_size: int, trust: Iterable[str], weights: int
) -> Any:
    """Make the model of a checkpoint: call its class with the stored options, plain values.

    ``weights`` is the number of values that the checkpoint holds, which bounds the model's size.

    A file must not decide which code runs: modules are imported only for names of
    :data:`OWN_MODELS` and ``trust``, and nothing below the model's ``_target_`` is instantiated.
    Raises ValueError where the class is not trusted, or an option names code.
    """
    options = dict(stored)
    target = str(options.pop("_target_", None))
    if _names_code(options) or (target in OWN_MODELS and options.get("init_from")):
        raise ValueError("one of its options names code or files to load")
    names = [target] if target in OWN_MODELS else list(trust)
    classes = {name: import_object(name, "--trust") for name in names}
    for kind in list(classes.values()):  # the checkpoint may name it by its own module
        classes[f"{kind.__module__}.{kind.__qualname__}"] = kind
    if target not in classes:
        todo = f"add --trust {target}, or name it as model._target_ in your own configuration"
        raise ValueError(f"{target} is not part of causal_lm; to run its code, {todo}")
    if target in OWN_MODELS:
        check_values(dict(leaves(options, "model.")))
    make = partial(classes[target], vocab_size=vocab_size, **options)
    check_size(make, "its model", 3 * weights + SMALL_MODEL)  # 3: shared ones may count again
    return make()


def _names_code(value: Any) -> bool:
    """Whether Hydra or transformers would load or call something that this option names."""
    if isinstance(value, list | tuple):
        return any(map(_names_code, value))
    return isinstance(value, Mapping) and any(
        key in CODE_KEYS
        or (str(key).endswith("_implementation") and "/" in str(option))  # a kernel of the hub
        or _names_code(option)
        for key, option in value.items()
    )

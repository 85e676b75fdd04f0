"""Old names of keys and files, which work for one more version with a warning of one line."""

import logging
from collections.abc import Iterable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict

log = logging.getLogger(__name__)

RENAMED = {
    "model.mix_previous": "model.token_smear",
    "model.zero_init_out": "model.zero_init_residual",
    "steady.ckpt": "stable.ckpt",
}
"""Old name -> new name, of keys and of a checkpoint file."""


def new_name(name: str) -> str:
    """The new name of a key or file; other names stay as they are."""
    if name in RENAMED:
        log.warning(f"{name} is now called {RENAMED[name]}; the old name will stop working")
    return RENAMED.get(name, name)


def rename_overrides(overrides: Iterable[str]) -> list[str]:
    """The same overrides with the new names of their keys."""
    words = []
    for word in overrides:
        key, equals, value = word.partition("=")
        name = key.lstrip("+~")
        words.append(f"{key[: len(key) - len(name)]}{new_name(name)}{equals}{value}")
    return words


def rename_keys(cfg: DictConfig) -> None:
    """Move the values of old keys to the new ones, and give ``ckpt_path`` its new file name."""
    for old in [key for key in RENAMED if OmegaConf.select(cfg, key) is not None]:
        group, _, name = old.rpartition(".")
        with open_dict(cfg):
            OmegaConf.update(cfg, new_name(old), cfg[group].pop(name))
    if isinstance(cfg.get("ckpt_path"), str):
        cfg.ckpt_path = str(rename_file(cfg.ckpt_path))


def rename_file(path: str | Path) -> Path:
    """``path``; where there is no such file, with the new name if its name is an old one."""
    path = Path(path)
    return path if path.exists() else path.with_name(new_name(path.name))

"""Libraries that not everybody needs."""

import importlib
from types import ModuleType


def load(module: str, extra: str) -> ModuleType:
    """Import a library of an optional extra.

    Raises:
        ModuleNotFoundError: it is not installed; the message names the extra to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != missing:
            raise  # installed, but broken
        raise ModuleNotFoundError(
            f"{missing} is not installed: pip install -e '.[{extra}]'", name=missing
        ) from error

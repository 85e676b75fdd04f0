"""Optional libraries: import them, or name the extra to install."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


def load(module: str, extra: str) -> ModuleType:
    """Import a library of an optional extra. Raises ModuleNotFoundError where it is not installed;
    the message has the command that installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != missing:
            raise  # the library is installed, but one of its own dependencies is missing
        message = f"{missing} is not installed: pip install -e '.[{extra}]'"
        raise ModuleNotFoundError(message, name=missing) from error


@contextmanager
def reading(problem: str) -> Iterator[None]:
    """Raise any error inside as a ValueError that begins with ``problem``, as libraries raise a
    dozen kinds for a bad file; an optional library that is not installed is still named."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(f"{problem}: {error}") from error

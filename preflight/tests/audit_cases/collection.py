"""A collection of set-ups of its own: right ones by name, faulty ones with label and twin."""

from collections.abc import Callable

from .registry import Setup

Build = Callable[[int], Setup]


class Collection:
    """As `registry`, but not in its tables: tests choose which of these run by default."""

    def __init__(self) -> None:
        self.right: dict[str, Build] = {}
        self.faulty: dict[str, tuple[str, str, Build]] = {}

    def add_right(self, name: str, build: Build) -> Build:
        build.__name__ = name
        self.right[name] = build
        return build

    def add(self, label: str, twin: Build, name: str, build: Build) -> None:
        build.__name__ = name
        self.faulty[name] = label, twin.__name__, build

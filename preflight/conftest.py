"""Modules whose libraries are not installed are not searched for doctests."""

from importlib.util import find_spec

needed = {"src/causal_preflight/transformers.py": ("accelerate", "transformers")}
collect_ignore = [path for path, names in needed.items() if not all(map(find_spec, names))]

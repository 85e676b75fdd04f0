"""Small models, batches and runs to test with."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch

from causal_lm.data.collate import Batch, Collate
from causal_lm.data.documents import Document
from causal_lm.masks import AttentionMask
from causal_lm.models.tiny import Tiny
from causal_lm.module import CausalLM

ROOT = Path(__file__).parents[2]
V, PAD = 11, 0


def make_documents(lengths=(5, 2, 7), seed: int = 0) -> list[Document]:
    """Random documents of these lengths, tokens 3 … V-1."""
    generator = torch.Generator().manual_seed(seed)
    return [Document(torch.randint(3, V, (n,), generator=generator)) for n in lengths]


def make_batch(lengths=(5, 2, 7), seed: int = 0, **layout) -> Batch:
    """Those documents, padded; or laid out as :class:`Collate` is told."""
    return Collate(PAD, V, **layout)(make_documents(lengths, seed))


def explicit_mask(batch: Batch) -> AttentionMask:
    """The mask of a batch in its dense form, also where plain causal would do."""
    return replace(batch.attention_mask, plain_causal=False)


def make_model(seed: int = 0, **changes) -> Tiny:
    torch.manual_seed(seed)
    sizes = {"d_model": 16, "n_heads": 2, "n_layers": 2, "d_ff": 32, "max_positions": 16}
    return Tiny(V, **(sizes | changes))


def make_module(kind: type[CausalLM] = CausalLM, seed: int = 0, loss=None, **changes) -> CausalLM:
    return kind(make_model(seed, **changes), lambda p: torch.optim.SGD(p, lr=0.1), loss=loss)


def command(*args: str, cwd: Path = ROOT, timeout: float = 300, **environment: str):
    """Run this project's Python on ``args``, as a person would."""
    return subprocess.run(
        [sys.executable, *args],
        cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def load_script(name: str) -> ModuleType:
    """The module ``scripts/NAME.py``, which is on no path."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

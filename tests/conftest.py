"""Small worlds to test in."""

import os
import subprocess
import sys
from pathlib import Path

if "OMP_WAIT_POLICY" not in os.environ:  # as the command does: see docs/NOTES.md
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
if "PYTEST_XDIST_WORKER" in os.environ:  # tests run side by side, so each makes do with one core
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

from causal_lm.data.collate import Batch, Collate
from causal_lm.data.documents import Document
from causal_lm.models.tiny import Tiny
from causal_lm.module import CausalLM

ROOT = Path(__file__).parents[1]
settings.register_profile(
    "here", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("here")

V, PAD = 11, 0


def make_documents(lengths=(5, 2, 7), seed: int = 0) -> list[Document]:
    """Random documents of these lengths, tokens 3 … V-1."""
    generator = torch.Generator().manual_seed(seed)
    return [Document(torch.randint(3, V, (n,), generator=generator)) for n in lengths]


def make_batch(lengths=(5, 2, 7), seed: int = 0, **layout) -> Batch:
    """Those documents, padded; or laid out as :class:`Collate` is told."""
    return Collate(PAD, V, **layout)(make_documents(lengths, seed))


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


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    """Tokens are kept for this session only."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def batch() -> Batch:
    return make_batch()

"""What every test session sets up."""

import os

if "OMP_WAIT_POLICY" not in os.environ:  # as the command does: see docs/NOTES.md
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
if "PYTEST_XDIST_WORKER" in os.environ:  # tests run side by side, so each makes do with one core
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

from causal_lm.data.collate import Batch
from support import make_batch

settings.register_profile(
    "here", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("here")


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    """Tokens are kept for this session only."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def batch() -> Batch:
    return make_batch()

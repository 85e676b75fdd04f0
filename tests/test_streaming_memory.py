"""A stream of a gigabyte, read to its end."""

import json
import os
import random
import sys

import pytest

from support import command

READ = """
import resource, sys
from causal_lm.data.datamodule import DataModule
from causal_lm.data.sources.huggingface import HuggingFaceDataset

if sys.argv[1].endswith("parquet"):
    import pyarrow.parquet
else:
    sys.modules |= {"pyarrow": None, "datasets": None}

def megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000  # the most until now

data = DataModule(HuggingFaceDataset, path=sys.argv[1], streaming=True, batch_size=100,
                  max_length=10_002, shuffle_buffer=1000, max_held_out=10)
before, tokens = megabytes(), 0
data.setup("fit")
for number, batch in enumerate(data._sampler()):
    tokens += sum(len(window) for window, _ in batch)
    if number == 50:
        print(megabytes() - before)
print(megabytes() - before, tokens, resource.getrusage(resource.RUSAGE_SELF).ru_utime)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", pytest.param("parquet", marks=pytest.mark.extras)])
def test_a_gigabyte_is_read_within_a_bound_of_memory(tmp_path, kind):
    """All of it: 100,000 documents of 10 kB, by the sampler that training draws its batches from.
    It needs neither pyarrow nor the datasets library for a file of lines."""
    draw, path = random.Random(0), tmp_path / f"a.{kind}"
    texts = ["".join(draw.choices("abcdefgh ", k=9_994)) for _ in range(100)]
    ...

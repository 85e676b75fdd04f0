"""A stream of a gigabyte, read to its end."""

import json
import os
import random
import sys

import pytest

from support import command

DOCUMENTS, SIZE = 100_000, 10_000  # and tokens of each, BOS and EOS included

READ = """
import resource, sys
from causal_lm.data.datamodule import DataModule
from causal_lm.data.sources.huggingface import HuggingFaceDataset

path, val_path, size = sys.argv[1:]
if path.endswith("parquet"):
    import pyarrow.parquet
else:
    sys.modules |= {"pyarrow": None, "datasets": None}  # importing them is an error

def used():
    return resource.getrusage(resource.RUSAGE_SELF)

data = DataModule(HuggingFaceDataset, path=path, val_path=val_path, streaming=True, batch_size=50,
                  max_length=int(size), shuffle_buffer=1000)
before, tokens = used().ru_maxrss, 0
data.setup("fit")
for number, batch in enumerate(data.train_dataloader().sampler):
    tokens += sum(len(window) for window, _ in batch)
    if number == 100:
        print((used().ru_maxrss - before) / 1000)  # MB, the most until now
print((used().ru_maxrss - before) / 1000, tokens)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", pytest.param("parquet", marks=pytest.mark.extras)])
def test_a_gigabyte_is_read_within_a_bound_of_memory(tmp_path, kind):
    """All of it, in the windows of each batch of a pass, before they are collated. A file of lines
    needs neither pyarrow nor the datasets library."""
    draw, path, val_path = random.Random(0), tmp_path / f"a.{kind}", tmp_path / "val.jsonl"
    texts = ["".join(draw.choices("abcdefgh ", k=SIZE - 2)) for _ in range(100)]
    rows, repeats = [{"text": text} for text in texts], DOCUMENTS // len(texts)
    val_path.write_text(json.dumps({"text": "another"}))
    if kind == "jsonl":
        block = "".join(f"{json.dumps(row)}\n" for row in rows)
        with path.open("w") as file:
            file.writelines(block for _ in range(repeats))
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        arrow = pytest.importorskip("pyarrow")
        table = arrow.concat_tables([arrow.Table.from_pylist(rows)] * repeats)
        parquet.write_table(table, path, use_dictionary=False, compression="none")
    assert path.stat().st_size > 0.99 * DOCUMENTS * SIZE
    paths = os.pathsep.join(sys.path)
    done = command("-c", READ, str(path), str(val_path), str(SIZE), PYTHONPATH=paths)
    assert done.returncode == 0, done.stderr
    early, late, tokens = map(float, done.stdout.split())
    assert tokens == DOCUMENTS * SIZE
    assert late < 300 and late < early + 60

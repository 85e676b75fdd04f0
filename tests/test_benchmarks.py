"""The benchmarks of the start and of tokenizing: that they measure what they say."""

import pytest

from support import ROOT, command, load_script
from support.runs import SHORT


@pytest.mark.slow
def test_the_start_ends_at_the_first_step(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    script = load_script("start_time")
    assert 1 < script._first_step(SHORT) < 300
    with pytest.raises(ChildProcessError, match=r"data\.batch_size"):
        script._first_step(["data.batch_size=0"])


@pytest.mark.slow
@pytest.mark.extras
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_tokenizing_beside_datasets_has_the_same_tokens(tmp_path, kind):
    """But for the hundredth of the lines that is held out here."""
    pytest.importorskip("datasets")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {n} of {n % 7} words, {n * n}\n" for n in range(4000)))
    words = ["tokenize", f"data.path={text}", f"data.tokenizer={kind}", "--rounds", "1"]
    done = command("scripts/benchmark.py", *words)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split("  ") for line in done.stdout.splitlines() if line[:5] in ("this ", "datas")]
    ours, theirs = (int(row[-1].replace(",", "")) for row in rows)
    assert 0.975 * theirs < ours < theirs


def test_a_text_is_asked_for():
    done = command("scripts/benchmark.py", "tokenize")
    assert done.returncode == 1 and "data.path" in done.stderr and done.stderr.count("\n") == 1

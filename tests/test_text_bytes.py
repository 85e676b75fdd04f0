"""Bits per byte: the bytes are those of the text, whatever a tokenizer makes of it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from causal_lm import config
from causal_lm.data.streaming import as_documents
from causal_lm.data.subwords import SubwordTokenizer
from causal_lm.data.tokenize_corpus import Chunk, tokenize
from causal_lm.evaluate import evaluate
from causal_lm.fit import run
from causal_lm.metrics import TokenPerplexity
from causal_lm.objective import IGNORE

pytest.importorskip("tokenizers")
from support.tokenizer_json import SCHEMES, like_t5, with_prefix_space

pytestmark = pytest.mark.extras

TEXT = st.text("abcé漢 \n\u0301ﬁ-")
WITH_SPACE = {
    scheme: SubwordTokenizer.resolve(
        like_t5() if scheme == "T5" else with_prefix_space(scheme), {"bos": "<s>"}
    )
    for scheme in [*SCHEMES, "T5"]
}


@pytest.mark.parametrize("scheme", WITH_SPACE)
@given(st.lists(st.one_of(TEXT.map(lambda t: (t,)), st.tuples(TEXT, TEXT)), min_size=1))
def test_bytes_are_those_of_the_text(scheme, documents):
    """Of the text that is learned, whatever a tokenizer puts before it or changes in it; where its
    tokens have bytes, these add up to the same."""
    tokenizer = WITH_SPACE[scheme]
    chunk = tokenize(Chunk(documents, False, (0.0, 0.0), None), tokenizer)
    made = as_documents(chunk, np.ones(len(documents), bool))
    learned = [document[-1] for document in documents]
    assert made.text_bytes == sum(len(text.encode()) for text in learned)
    metric = TokenPerplexity(sizes := tokenizer.token_bytes())
    assert (sizes is None) == (scheme != "never")
    for i in range(len(made)):
        tokens, mask = made[i]
        labels = tokens[1:] if mask is None else tokens[1:].masked_fill(~mask[1:], IGNORE)
        metric.update(torch.ones(1, len(labels)), labels[None])
    metric.count_text(made)
    assert int(metric.bytes) == made.text_bytes
    assert scheme == "T5" or not tokenizer.unknown(learned)


@pytest.mark.parametrize("scheme", ["first", "byte level", "T5"])
def test_bits_per_byte_of_indented_lines(scheme, tmp_path):
    """By hand, from the lines of the split; documents are cut into windows here."""
    train, val = ([f"{'  ' * (i % 3)}abc é ﬁ{i}" for i in range(n)] for n in (40, 60))
    (tmp_path / "tokenizer.json").write_text(WITH_SPACE[scheme].json)
    files = {"path": train, "val_path": val, "test_path": train}
    for key, lines in files.items():
        (tmp_path / f"{key}.txt").write_text("\n".join(lines))
    data = [
        "data=text", *(f"data.{key}={tmp_path / key}.txt" for key in files), "data.unit=line",
        f"data.tokenizer={tmp_path / 'tokenizer.json'}", f"data.cache_dir={tmp_path / 'cache'}",
        "data.max_length=8", "data.max_overlap=1",
    ]  # fmt: skip
    quick = [
        "trainer=cpu", "trainer.max_steps=1", "test=true", "preflight.on_fault=off",
        "samples.count=0", "samples.self_check.count=1", "model.d_model=8", "model.d_ff=8",
    ]  # fmt: skip
    summary = run(config.load([*data, *quick]), tmp_path / "run")
    checkpoint = str(tmp_path / "run/checkpoints/last.ckpt")
    for split, lines in (("val", val), ("test", train)):
        found = evaluate(checkpoint, data, split=split)
        assert found["bytes"] == len("".join(lines).encode())
        bits = found["loss"] * found["tokens"] / math.log(2)
        assert found["bpb"] == pytest.approx(bits / found["bytes"])
        assert summary[f"{split}/bpb"] == pytest.approx(found["bpb"], rel=1e-5)


@pytest.mark.parametrize("kind", ["NFKC", "Lowercase"])
def test_of_a_tokenizer_that_changes_the_text_tokens_have_no_bytes(kind):
    changed = SubwordTokenizer.resolve(with_prefix_space("never", normalizer={"type": kind}), {})
    assert WITH_SPACE["never"].token_bytes() is not None and changed.token_bytes() is None

"""The promises of the interface: no trace left, clear words on bad input, any shape of batch."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from audit_cases.causal import BatchNormed, Open
from audit_cases.parts import (
    EOS,
    PAD,
    Batch,
    Tiny,
    V,
    ce,
    feed,
    full,
    left,
    packed,
    padded,
    targets,
    token_mean,
)
from audit_cases.right import Recurrent, unshifted
from causal_preflight import Finding, Report, audit, preflight, to_html
from causal_preflight.report import PLAIN_WORDS

torch.set_num_threads(1)
KNOWN = {"pad_id": PAD, "eos_id": EOS}


def fingerprint(model: nn.Module) -> list[Any]:
    state = [p.detach().clone() for p in model.parameters()]
    state += [b.detach().clone() for b in model.buffers()]
    state += [torch.zeros(0) if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [
        *state,
        torch.get_rng_state(),
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        getattr(model, "state", None),
    ]


def same(a: list[Any], b: list[Any]) -> bool:
    return all(
        torch.equal(x, y) if isinstance(x, Tensor) else x is y or x == y
        for x, y in zip(a, b, strict=True)
    )


def prepared(model: nn.Module) -> nn.Module:
    """Mixed modes, a frozen part, and gradients on some parameters only."""
    params = list(model.parameters())
    params[0].requires_grad_(False)
    params[1].grad = torch.randn_like(params[1])
    list(model.children())[-1].eval()
    return model


@pytest.mark.parametrize("make", [Tiny, BatchNormed, lambda: Recurrent(stateful=True)])
def test_leaves_no_trace(make: Any) -> None:
    model = prepared(make())
    batch = padded(0)
    kept = {k: v.clone() for k, v in batch.items()}
    before = fingerprint(model)
    preflight(model, batch, token_mean, **KNOWN)
    assert same(before, fingerprint(model))
    assert all(torch.equal(batch[k], kept[k]) for k in kept)


def test_leaves_no_trace_when_a_probe_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(ctx: Any) -> Any:
        ctx.model.sandbox.params[0].data.add_(1)
        raise KeyError("its own reasons")

    monkeypatch.setattr(audit, "PROBES", (*audit.PROBES, broken))
    model = prepared(Tiny())
    before = fingerprint(model)
    report = preflight(model, padded(0), token_mean, **KNOWN)
    assert same(before, fingerprint(model))
    assert not report.faults and "its own reasons" in report.skipped["broken"]


def test_leaves_no_trace_when_the_model_raises() -> None:
    model = prepared(Tiny())
    before = fingerprint(model)

    def fails(model: nn.Module, batch: Batch) -> Tensor:
        torch.rand(3)
        raise RuntimeError("size mismatch\nand more")

    with pytest.raises(ValueError, match=r"plain batch: RuntimeError: size mismatch$"):
        preflight(model, padded(0), fails)
    assert same(before, fingerprint(model))


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({}, "needs `input_ids`"),
        ({"input_ids": torch.zeros(3, 4)}, "must be integers"),
        ({"input_ids": torch.zeros(4, dtype=torch.long)}, "must be integers"),
        ({"input_ids": torch.full((2, 4), V)}, "id 29 .* 29 rows"),
        ({"input_ids": torch.full((2, 4), 64)}, "id 64 .* 29 rows"),
        ({"input_ids": torch.full((2, 4), -1)}, "negative"),
        ({"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.ones(2, 3)}, "shape"),
    ],
)
def test_bad_batches_are_refused_in_one_line(batch: Batch, words: str) -> None:
    with pytest.raises(ValueError, match=words) as raised:
        preflight(Tiny(), batch, token_mean)
    assert "\n" not in str(raised.value)


def nano(seed: int, shift: int = 1) -> tuple[Tensor, Tensor]:
    """(x, y) as nanoGPT gives them: y is x one token on (or `shift`), cut from one stream."""
    stream = torch.randint(3, V, (4, 20), generator=torch.Generator().manual_seed(seed))
    return stream[:, :12], stream[:, shift : 12 + shift]


def xy_loss(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return ce(model(x), y)


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_tuple_of_inputs_and_shifted_labels(kind: Any) -> None:
    report = preflight(Tiny(), kind(nano(0)), xy_loss)
    assert report.clean, str(report)
    assert {"alignment", "reduction", "future"} <= set(report.passed)
    assert preflight(Tiny(), kind(nano(0, 0)), xy_loss).faults == {"shift"}
    assert preflight(Tiny(), kind(nano(0, 2)), xy_loss).faults == {"shift"}


def test_other_keys_and_a_bare_tensor() -> None:
    x, y = nano(0)
    keys = {"input_key": "x", "labels_key": "y"}
    for target, faults in ((y, set()), (x, {"shift"})):
        batch = {"x": x, "y": target, "name": "a string"}
        report = preflight(Tiny(), batch, lambda m, b: ce(m(b["x"]), b["y"]), **keys)
        assert report.faults == faults and report.audited, str(report)
    with pytest.raises(ValueError, match=r"`input_ids`.* x, y.*input_key="):
        preflight(Tiny(), {"x": x, "y": y}, xy_loss)
    report = preflight(Tiny(), x, lambda m, b: ce(m(b)[:, :-1], b[:, 1:]))
    assert report.clean, str(report)


def test_an_unknown_eos_is_not_called_checked() -> None:
    for batch in (full(0), nano(0)):
        loss = xy_loss if isinstance(batch, tuple) else token_mean
        report = preflight(Tiny(), batch, loss)
        assert "ending" in report.skipped and "ending" not in report.passed


def test_nothing_examined_is_not_clean() -> None:
    """No logits and no labels to perturb; and a batch in which nothing is trained."""
    model = nn.Embedding(V, 1)
    report = preflight(model, full(0), lambda m, b: m(b["input_ids"]).mean())
    assert not report.audited and not report.clean and not report.faults
    assert "NOT AUDITED" in str(report) and "no fault" not in str(report)
    assert "NOT AUDITED" in to_html(report)
    assert report.to_dict()["audited"] is False
    nothing = preflight(Tiny(), full(0), lambda m, b: 0.0 * m(b["input_ids"]).sum())
    assert not nothing.clean, str(nothing)


class FrozenNorm(BatchNormed):
    """BatchNorm that stays in eval mode whatever is asked of it."""

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.bn.eval()
        return self


@pytest.mark.parametrize("mode", [True, False])
def test_frozen_batch_norm_is_right(mode: bool) -> None:
    torch.manual_seed(0)
    assert preflight(FrozenNorm().train(mode), padded(0), token_mean, **KNOWN).clean
    assert preflight(BatchNormed().train(mode), padded(0), token_mean, **KNOWN).faults == {"causal"}
    by_hand = BatchNormed().train()
    by_hand.bn.eval()
    assert preflight(by_hand, padded(0), token_mean, **KNOWN).clean


def test_random_states_of_python_and_numpy_are_kept() -> None:
    numpy = pytest.importorskip("numpy")

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        noise = random.random() + float(numpy.random.rand())
        return ce(feed(model, batch) + noise * torch.arange(V) / V, targets(batch))

    before = random.getstate(), numpy.random.get_state()[1].tolist()
    report = preflight(Tiny(), padded(0), loss, **KNOWN)
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == before
    assert report.clean, str(report)  # every run draws the same


def test_a_model_without_loss_is_told_what_to_pass() -> None:
    with pytest.raises(ValueError, match="pass loss_fn"):
        preflight(Tiny(), padded(0))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_small_batches(rows: int, width: int) -> None:
    report = preflight(Tiny(), full(0, rows, width), token_mean, **KNOWN)
    assert not report.faults
    assert report.skipped["embedding"] == "no PAD in the batch"


def test_one_row_is_still_kept_apart_from_others() -> None:
    report = preflight(BatchNormed(), full(0, 1), token_mean)
    assert "causal" in report.faults


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(1, 6), width=st.integers(9, 20), seed=st.integers(0, 999),
    side=st.sampled_from(["right", "left", "both"]), hints=st.booleans(),
)  # fmt: skip
@pytest.mark.slow
def test_any_shape_and_side(rows: int, width: int, seed: int, side: str, hints: bool) -> None:
    torch.manual_seed(seed)
    batch = padded(seed, side, rows, width)
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    known = KNOWN if hints else {}
    report = preflight(Tiny(), batch, token_mean, seed=seed, **known)
    assert not report.faults, str(report)
    report = preflight(Open(), batch, unshifted, seed=seed, **known)
    assert {"shift", "causal"} <= report.faults, str(report)


def test_a_faint_leak_is_seen_and_rounding_is_not() -> None:
    class Leak(Tiny):
        size = 0.0

        def forward(self, *a: Any, **k: Any) -> Tensor:
            z = super().forward(*a, **k)
            return z + self.size * z.roll(-1, 1)

    for size, faults in ((1e-4, {"causal"}), (1e-3, {"causal"}), (1e-8, set())):
        torch.manual_seed(0)
        model = Leak(layers=4)
        model.size = size
        assert preflight(model, padded(0), token_mean, **KNOWN).faults == faults


def test_report_prints_and_serialises() -> None:
    for model, batch in ((Tiny(), packed(0)), (Open(), padded(0)), (Tiny(), left(0))):
        report = preflight(model, batch, token_mean, **KNOWN)
        plain = json.loads(json.dumps(report.to_dict()))
        assert set(plain["faults"]) == report.faults
        html = to_html(report, name=lambda i: f"<{i}>")
        assert "&lt;1&gt;" in html
        assert 'class="map"' in html and "http" not in html
        assert 'name="viewport"' in html and "prefers-color-scheme" in html
        swapped = plain["pictures"]["visibility"]["swapped"]
        assert html.count('class="na"') == swapped.count(False) * len(swapped) > 0  # BOS
        assert max(map(len, str(report).splitlines())) <= 100


def test_the_summary_has_plain_words_and_no_reasons() -> None:
    probes = {probe.__name__ for probe in audit.PROBES} - {"pictures"}
    assert set(PLAIN_WORDS) == probes
    report = preflight(Open(), padded(0), token_mean, **KNOWN)
    short, full = report.summary(), str(report)
    assert report.verdict in short and all(f.probe in short for f in report.findings)
    assert len(report.skipped) > 3
    assert not any(why in " ".join(short.split()) for why in report.skipped.values())
    assert len(short.splitlines()) < len(full.splitlines())
    words = [PLAIN_WORDS[name] for name in (*report.passed, *report.skipped)]
    assert [short.count(word) >= 1 for word in words] == [True] * len(words)


def test_a_small_change_of_a_weight_is_told_in_figures() -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        count = (targets(batch) != -100).sum() + 0.05 * (batch["attention_mask"] == 0).sum()
        return ce(feed(model, batch), targets(batch), reduction="sum") / count

    report = preflight(Tiny(), padded(0), loss, **KNOWN)
    (finding,) = [f for f in report.findings if f.probe == "extension"]
    before, after = map(float, re.findall(r"0\.\d+", finding.seen))
    assert before != after and 0.002 < finding.size < 0.05
    assert abs(after / before - 1) == pytest.approx(finding.size, abs=5e-4)


def test_evidence_names_row_position_and_token() -> None:
    report = preflight(Open(), padded(0), unshifted, **KNOWN)
    for f in report.findings:
        assert f.row is not None and f.position is not None
        assert f.remedy and f.seen
    shift = next(f for f in report.findings if f.label == "shift")
    assert shift.token == int(padded(0)["input_ids"][shift.row, shift.position])


def test_several_calls_may_take_rows_in_any_order() -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        order = torch.argsort(batch["attention_mask"].sum(1))
        parts = [{k: v[i : i + 1] for k, v in batch.items()} for i in order]
        total = (targets(batch) != -100).sum()
        return sum(ce(feed(model, p), targets(p), reduction="sum") for p in parts) / total

    assert not preflight(Tiny(), padded(0), loss, **KNOWN).faults


def test_large_batches_are_sampled_and_the_report_says_so() -> None:
    report = preflight(Tiny(), padded(0, rows=9), token_mean, **KNOWN)
    assert any(note.startswith("visibility: rows") for note in report.sampled)


def test_faults_are_an_ordered_set_of_labels() -> None:
    labels = ("loop", "reduction", "pad", "reduction")
    faults = Report([Finding(label, "", "") for label in labels]).faults
    assert list(faults) == ["pad", "reduction", "loop"]
    assert faults == {"loop", "reduction", "pad"} and {"pad"} < faults and faults != {"pad"}
    assert "reduction" in faults and "shift" not in faults
    assert Report().faults == set() and not Report().faults


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", code], check=False, env=env, capture_output=True, text=True
    )


def test_needs_torch_alone() -> None:
    done = run_python(
        "import sys, causal_preflight;"
        "bad = {'lightning', 'hydra', 'omegaconf', 'transformers', 'causal_lm'} & set(sys.modules);"
        "sys.exit(str(bad) if bad else 0)"
    )
    assert done.returncode == 0, done.stderr


def test_the_callback_without_lightning_names_the_extra() -> None:
    done = run_python(
        "import sys; sys.modules['lightning'] = None; import causal_preflight.lightning"
    )
    assert done.returncode == 1
    assert "causal-preflight[lightning]" in done.stderr.splitlines()[-1]


README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)

# The report on the page, without its first line, which holds seconds.
PAGE = README.read_text(encoding="utf-8")
SAMPLE = PAGE.partition("FAULTS shift")[2].partition("  ...")[0].splitlines()[1:]


@pytest.mark.parametrize("code", BLOCKS)
def test_the_readme_examples_run_as_printed(
    code: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    if "lightning" in code:
        pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(README), "exec"), {"__name__": "__main__"})
    if code == BLOCKS[0]:
        said = capsys.readouterr().out
        assert len(SAMPLE) > 5 and all(line in said for line in SAMPLE)


def test_the_readme_has_examples() -> None:
    assert len(BLOCKS) == 3 and "report.faults" in BLOCKS[0]

"""Every schedule at steps worked by hand, and its drawing."""

import logging
import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from causal_lm import config
from causal_lm.build import instantiate
from causal_lm.optim import optimizers, schedules
from causal_lm.optim.parameter_groups import parameter_groups
from support import ROOT, command, load_script, make_model

curve = load_script("curve")

WARMUP = {"warmup_steps": 10, "warmup_cap": 0.2}
NAMES = sorted(
    p.stem for p in (ROOT / "configs/scheduler").glob("*.yaml") if not p.stem.startswith("_")
)


# ---- the warm-up ----


@pytest.mark.parametrize(
    ("total", "steps", "expected"),
    [
        (20_000, "auto", 2000),
        (3000, "auto", 500),
        (750, "auto", 150),
        (3, "auto", 0),
        (1000, 200, 200),
        (1000, 201, 200),
        (1000, 0, 0),
    ],
)
def test_warmup(total, steps, expected):
    assert schedules.warmup(total, steps, 0.2)[0] == expected


def test_each_rule_of_the_warmup_has_a_name_of_its_own():
    cases = (20_000, "auto"), (3000, "auto"), (750, "auto"), (1000, 200)
    assert len({schedules.warmup(total, steps, 0.2)[1] for total, steps in cases}) == 4


def test_the_log_says_how_long_and_by_which_rule(caplog):
    with caplog.at_level(logging.INFO, logger="causal_lm.optim.schedules"):
        schedules.constant(750, warmup_steps="auto", warmup_cap=0.2)
    for figure in ("150", "750", schedules.warmup(750, "auto", 0.2)[1]):
        assert figure in caplog.text


# ---- the shapes: 100 steps, of which 10 warm up ----

SHAPES = [
    ("constant", {}, {10: 1, 50: 1, 99: 1}),
    # 90 steps of descent: the 30th is a third of the way down, the 45th half, the last all of it.
    (
        "warmup_cosine",
        {"final_share": 0.1},
        {39: 0.1 + 0.9 * 0.75, 54: 0.55, 69: 0.1 + 0.9 * 0.25, 99: 0.1, 999: 0.1},
    ),
    # Two periods of 45 steps: from the first to the last of each there are 44.
    (
        "cosine_restarts",
        {"period": 45, "peak_decay": 1.0, "final_share": 0.1},
        {10: 1, 32: 0.55, 54: 0.1, 55: 1, 77: 0.55, 99: 0.1},
    ),
    (
        "cosine_restarts",
        {"period": 45, "peak_decay": 0.5, "final_share": 0.0},
        {10: 1, 32: 0.5, 54: 0, 55: 0.5, 77: 0.25, 99: 0, 100: 0.25},
    ),
    ("cosine_restarts", {"period": 1, "peak_decay": 0.5, "final_share": 0.0}, {10: 1, 12: 0.25}),
    ("step", {"every": 30, "drop": 0.5}, {10: 1, 39: 1, 40: 0.5, 69: 0.5, 70: 0.25, 99: 0.25}),
    # The last 20 steps fall, from 80 on.
    (
        "warmup_stable_decay",
        {"decay_share": 0.2, "final_share": 0.0},
        {10: 1, 79: 1, 80: 0.95, 81: 0.9, 89: 0.5, 99: 0, 500: 0},
    ),
    (
        "warmup_stable_decay",
        {"decay_share": 0.2, "final_share": 0.2},
        {79: 1, 80: 0.96, 89: 0.6, 99: 0.2},
    ),
    ("warmup_stable_decay", {"decay_share": 0.0, "final_share": 0.2}, {10: 1, 99: 1}),
]


@pytest.mark.parametrize(("name", "keys", "expected"), SHAPES)
def test_at_chosen_steps(name, keys, expected):
    factor = getattr(schedules, name)(100, **WARMUP, **keys)
    warmup = [factor(step) for step in range(10)]
    assert warmup == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    for step, value in expected.items():
        assert factor(step) == pytest.approx(value, abs=1e-9), step
    values = [factor(step) for step in range(100)]
    assert [factor(step) for step in reversed(range(100))] == values[::-1]  # no state


def test_a_decay_that_meets_the_warmup_begins_at_the_peak():
    """19 steps of decay and 4 of warm-up in a run of 20: 16 are left for the decay."""
    factor = schedules.warmup_stable_decay(
        20, warmup_steps=12, warmup_cap=0.2, decay_share=0.95, final_share=0.0
    )
    expected = [0.25, 0.5, 0.75, 1.0, *(n / 16 for n in range(15, -1, -1))]
    assert [factor(step) for step in range(20)] == pytest.approx(expected)


def test_every_schedule_is_tested_here():
    assert {name for name, *_ in SHAPES} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("total", [1, 2, 7, 400])
def test_as_configured_it_scales_both_peaks_every_step(name, total):
    cfg = config.load([f"scheduler={name}", f"trainer.max_steps={total}"])
    factor = instantiate(cfg.scheduler)(total)
    model = make_model()
    optimizer = optimizers.muon(
        parameter_groups(model), muon_lr=0.02, muon_momentum=0.9, lr=0.01, weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for step in range(total):
        first, *rest = (group["lr"] for group in optimizer.param_groups)
        assert first == pytest.approx(0.02 * factor(step))
        assert rest == pytest.approx([0.01 * factor(step)] * len(rest))
        assert 0 < factor(step) <= 1
        optimizer.step()
        schedule.step()


# ---- the drawing ----


def test_text():
    values = [0.25, 0.5, 0.75, 1.0]
    lines = curve.to_text(values, "title", width=4, height=4).splitlines()
    assert lines[0] == "title"
    assert [line.partition("|")[2] for line in lines[1:5]] == ["   #", "  ##", " ###", "####"]
    assert lines[1].split()[0] == "1.000" and lines[-1].split() == ["0", "3"]


def test_svg_shows_every_step_from_left_to_right():
    root = ElementTree.fromstring(curve.to_svg([0.5, 1.0, 0.0], "a < b"))
    (line,) = root.iter("{http://www.w3.org/2000/svg}polyline")
    assert line.get("points") == "60.0,150.0 380.0,40.0 700.0,260.0"
    assert "a < b" in "".join(root.itertext())


def test_from_the_command_line(tmp_path):
    words = ["scheduler=cosine_restarts", "scheduler.period=50", "trainer.max_steps=100"]
    done = command("scripts/schedule.py", *words)
    assert done.returncode == 0, done.stderr
    title = done.stdout.partition("\n")[0]
    assert all(words in title for words in ("cosine_restarts", "optimizer.lr=0.008", "100"))
    file = tmp_path / "a.svg"
    done = command("scripts/schedule.py", *words, "--svg", str(file))
    assert done.returncode == 0, done.stderr
    factor = schedules.cosine_restarts(
        100, warmup_steps="auto", warmup_cap=0.2, period=50, peak_decay=1.0, final_share=0.01
    )
    drawn = curve.to_svg([factor(step) for step in range(100)], "")
    points = re.compile(r'points="[^"]+"')
    assert points.findall(file.read_text()) == points.findall(drawn)
    refused = command("scripts/schedule.py", "scheduler=stepp")
    assert refused.returncode == 2 and "stepp" in refused.stderr


@pytest.mark.parametrize("word", ["trainer.max_steps=-1", "trainer.max_steps=100"])
def test_a_run_by_epochs_cannot_be_drawn(word):
    done = command("scripts/schedule.py", word, "trainer.max_epochs=1")
    assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, "")
    assert "trainer.max_steps" in done.stderr and "trainer.max_epochs" in done.stderr

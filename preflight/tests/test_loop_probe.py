"""`LoopProbe` tells faulty training loops from right ones, in manual optimization too."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import IterableDataset

from causal_preflight.lightning import PreflightError
from causal_preflight.loop_checks import REMEDIES
from causal_preflight.loop_probe import LoopProbe
from loop_cases import base, gradients, settings

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def watch(case, manual=False, **options):
    probe = LoopProbe("warn")
    if scale := options.pop("scaled", None):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        options["plugins"] = MixedPrecision("16-mixed", "cpu", scaler)
    if getattr(case, "n", 1) > 1 and not manual:
        options["accumulate_grad_batches"] = case.n
    base.fit(case(manual), probe, **options)
    return probe.report


OVERFIT = {"overfit_batches": 1, "scaled": 2.0**10, "max_epochs": 5, "val_check_interval": 1}
FAULTY = [
    ("parameters", gradients.SomeParameters, {}),
    ("gradients", gradients.Detached, {}),
    ("gradients", gradients.UnusedHead, {}),
    ("gradients", gradients.WronglyCheckpointed, {}),
    ("tensors", gradients.ResizedLate, {}),
    ("tensors", gradients.ResizedInTheLoop, {}),
    ("zeroing", gradients.NotZeroed, {}),
    ("clipping", gradients.ClippedScaled, {"scaled": 2.0**10}),
    ("clipping", gradients.ClippedScaledByValue, {"scaled": 2.0**10}),
    ("division", gradients.DividedTwice, {}),
    ("train mode", settings.EvalLeftOn, {}),
    ("train mode", settings.EvalAfterValidation, {"max_steps": 8}),
    ("validation mode", settings.FunctionalDropout, {}),
    ("validation mode", settings.TrainModeInValidation, {}),
    ("tie", settings.Copied, {}),
    ("tie", settings.ResizedWithoutHead, {}),
    ("tie", settings.PartedLater, {}),
    ("rate", settings.IntegerDivision, {}),
    ("schedule", settings.WarmupByEpoch, {}),
    ("schedule", settings.CosineByEpoch, {"max_steps": 8}),
    ("schedule", settings.OneCycleByEpoch, {"max_steps": 8}),
    ("schedule", settings.SequenceByEpoch, {"max_steps": 8}),
    ("autocast", settings.NoAutocast, {"precision": "bf16-mixed"}),
    ("perplexity", settings.MeanOfExponentials, {}),
    ("perplexity", settings.MeanAtTheEnd, {}),
]
RIGHT = [
    ("parameters", base.Right, {}),
    ("parameters", gradients.Frozen, {}),
    ("parameters", gradients.UpdatedByHand, {}),
    (None, gradients.Experts, {}),
    ("gradients", gradients.RightlyCheckpointed, {}),
    ("tensors", gradients.ResizedEarly, {}),
    ("zeroing", gradients.Accumulated, {}),
    ("clipping", gradients.ClippedUnscaled, {"scaled": 2.0**10}),
    (None, gradients.DividedByCount, {"scaled": 2.0**10}),
    ("division", gradients.Accumulated, {}),
    ("division", gradients.Accumulated, {"scaled": 2.0**10}),
    (None, gradients.WeighedLoss, {}),
    (None, gradients.PadInMean, {}),
    ("train mode", gradients.Frozen, {}),
    ("train mode", base.Right, {"max_steps": 8, "val_check_interval": 2}),
    ("validation mode", settings.SampledInValidation, {}),
    ("tie", settings.Untied, {}),
    ("rate", settings.Scheduled, {}),
    ("schedule", settings.Scheduled, {}),
    ("schedule", settings.ExponentialByEpoch, {"max_steps": -1, "max_epochs": 3}),
    ("schedule", settings.StepByEpoch, {"max_steps": -1, "max_epochs": 2}),
    ("schedule", settings.CosineOfEpochs, {"max_steps": -1, "max_epochs": 2}),
    ("autocast", base.Right, {"precision": "bf16-mixed"}),
    ("perplexity", settings.ExponentialOfMean, {}),
    ("perplexity", settings.SmoothedLoss, {}),
    (None, settings.Metered, {}),
    (None, settings.TokenMeanAtTheEnd, {}),
    ("gradients", gradients.CalledLate, {"max_steps": 8}),
    (None, settings.HardlyMoves, OVERFIT),
    (None, base.Right, {"scaled": 2.0**20, "max_steps": -1}),  # the first steps are skipped
    (None, base.Right, OVERFIT),
]


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize(("check", "case", "options"), FAULTY)
def test_each_fault_is_named_and_no_other(check, case, options, manual):
    report = watch(case, manual, **options)
    assert [f.probe for f in report.findings] == [check], str(report)
    assert report.faults == {"loop"} and report.findings[0].remedy == REMEDIES[check]


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize(("check", "case", "options"), RIGHT)
def test_right_loops_pass(check, case, options, manual):
    report = watch(case, manual, **options)
    assert report.clean, str(report)
    assert check is None or check in report.passed, str(report)


@pytest.mark.slow
def test_faults_on_two_ranks(tmp_path):
    """Weights that differ at the start or after a step, and faults of each rank: both stop."""
    script = Path(__file__).with_name("loop_ranks.py")
    paths = [str(script.parent), *sys.path]
    env = os.environ | {"RECORDS": str(tmp_path), "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    records = [(tmp_path / rank).read_text() for rank in "01"]
    assert records[0] == records[1]
    expected = [["Right", [], False, True], ["BufferPerRank", [], False, True]]
    expected += [["SeededByRank", [["ranks", True]], True, False]]
    expected += [["OwnGradients", [["ranks", False]], True, False]]
    faults = {"SomeParameters": "parameters", "NotZeroed": "zeroing", "Copied": "tie"}
    faults |= {"IntegerDivision": "rate"}
    expected += [[name, [[check, False]], True, True] for name, check in faults.items()]
    expected += [[name, [], False, True] for name in ("Frozen", "Untied", "Scheduled")]
    seen = [json.loads(line) for line in records[0].splitlines()]
    assert seen == [[name, manual, *rest] for name, *rest in expected for manual in (False, True)]
    assert done.stderr.decode().count("FAULTS") == 12  # rank zero alone speaks, once for each


def test_a_fault_stops_the_fit_or_is_only_told(caplog):
    with pytest.raises(PreflightError, match=r"zeroing: [^\n]+$"):
        base.fit(gradients.NotZeroed(), LoopProbe())
    assert caplog.text.count("FAULTS") == 1
    caplog.clear()
    off = LoopProbe("off")
    assert base.fit(gradients.NotZeroed(), off).global_step == 4
    assert not off.report.audited and "training loop" not in caplog.text
    with pytest.raises(ValueError, match="on_fault"):
        LoopProbe("stop")


@pytest.mark.parametrize("manual", [False, True])
def test_it_leaves_no_trace(manual):
    """The same weights to the bit, no hook left, no scaler changed."""
    states = []
    for on_fault in ("warn", "off"):
        module = gradients.ClippedUnscaled(manual)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        trainer = base.fit(module, LoopProbe(on_fault), plugins=plugin)
        (optimizer,) = trainer.optimizers
        assert "unscale_" not in vars(scaler) and not optimizer._optimizer_step_post_hooks
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
        states.append([p.tolist() for p in module.parameters()])
    assert states[0] == states[1]


def test_what_it_could_not_see_is_skipped_never_passed(capsys):
    report = watch(base.Right, max_steps=1, limit_val_batches=0)
    assert report.steps == 1 and not {"gradients", "zeroing", "rate"} & set(report.passed)
    assert set(report.passed) | set(report.skipped) == set(REMEDIES)
    probe = LoopProbe("warn")
    trainer = base.fit(base.Right(), probe)
    trainer.fit(trainer.lightning_module, trainer.train_dataloader)  # it has made all its steps
    assert not probe.report.audited and probe.report.steps == 0
    report = watch(gradients.NeverSteps, manual=True)
    assert not report.audited and not report.clean and "NOT AUDITED" in capsys.readouterr().err
    assert "gradients" in watch(gradients.Experts).skipped
    assert "schedule" in watch(settings.NotCopied).skipped
    assert json.loads(json.dumps(watch(gradients.Detached).to_dict()))["faults"] == ["loop"]


def test_what_other_callbacks_call_is_not_trained():
    class CallsAll(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx < 3:  # as the preflight does, until a batch has a target
                [expert(torch.zeros(base.C)) for expert in pl_module.net.experts]

    probe = LoopProbe("warn")
    base.fit(gradients.Experts(), probe, CallsAll())
    assert probe.report.clean and "gradients" in probe.report.skipped


def test_nothing_stays_behind_an_error_or_a_loop_that_it_cannot_see():
    class Fails(Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("theirs")

    module = base.Right()
    with pytest.raises(RuntimeError, match="theirs"):
        base.fit(module, LoopProbe(), Fails())
    assert not any(m._forward_hooks for m in module.modules())
    report = watch(gradients.OwnBackward, manual=True)
    assert report.clean and "gradients" in report.passed and "zeroing" in report.skipped
    probe = LoopProbe("warn")
    base.fit(gradients.NeverSteps(manual=True), probe, max_steps=-1, max_epochs=26)
    assert not probe.watching and not probe.report.audited


def test_sharded_parameters_are_declined():
    class FSDPStrategy(SingleDeviceStrategy): ...

    report = watch(gradients.NotZeroed, strategy=FSDPStrategy("cpu"))
    assert not report.audited and set(report.skipped) == {"loop"}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.randint(0, base.V, (16, base.T)))


@pytest.mark.parametrize("manual", [False, True])
def test_an_epoch_of_unknown_length_tells_nothing_of_a_schedule(manual):
    report = watch(settings.CosineByEpoch, manual, max_steps=8, data=Stream())
    assert report.clean and "length" in report.skipped["schedule"]


def test_a_perplexity_slightly_above_is_told_in_figures():
    (finding,) = watch(settings.SlightlyAbove).findings
    assert finding.probe == "perplexity" and "1.0003 times" in finding.seen


@pytest.mark.parametrize("manual", [False, True])
def test_decay_of_norms_and_biases_is_a_note(manual):
    report = watch(gradients.DecayOnAll, manual)
    assert report.clean and "norm" in report.remarks[0]
    assert not watch(base.Right, manual).remarks


def test_several_optimizers():
    """Adversaries that step in turn, one of them every second time."""
    assert watch(gradients.Adversaries, manual=True, max_steps=-1).clean
    report = watch(gradients.NotZeroedAdversaries, manual=True, max_steps=-1)
    assert [f.probe for f in report.findings] == ["zeroing"]

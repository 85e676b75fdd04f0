"""One rank audits and the others wait: collectives of the loss, strategies that shard."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning")

from lightning.pytorch.strategies import SingleDeviceStrategy

from causal_preflight.lightning import Preflight
from loop_cases import base


@pytest.mark.slow
def test_collectives_of_the_loss_do_not_hang_and_are_judged(tmp_path):
    """Both ranks have the same reports and go on or stop together; rank zero alone speaks, once."""
    script = Path(__file__).with_name("audit_ranks.py")
    paths = [str(script.parent), *sys.path]
    env = os.environ | {"RECORDS": str(tmp_path), "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    records = [(tmp_path / rank).read_text() for rank in "01"]
    assert records[0] == records[1]
    seen = [json.loads(line) for line in records[0].splitlines()]
    assert [line[:4] for line in seen] == [
        ["Gathered", [], True, False], ["Reduced", [], True, False],
        ["Undone", ["reduction"], True, True], ["Shifted", ["shift"], True, True],
        ["OwnMean", ["reduction"], True, True], ["PointToPoint", [], False, False],
    ]  # fmt: skip
    assert "send" in seen[-1][4]["preflight"]
    assert done.stderr.decode().count("preflight: ") == len(seen)


class FSDPStrategy(SingleDeviceStrategy): ...


class OwnSharding(FSDPStrategy):
    """A strategy of somebody's own: its base tells that it shards."""


def test_sharded_weights_are_not_audited(capsys, caplog):
    callback = Preflight()
    assert base.fit(base.Right(), callback, strategy=OwnSharding("cpu")).global_step == 4
    assert not callback.report.audited and "OwnSharding" in callback.report.verdict
    assert (capsys.readouterr().err + caplog.text).count("NOT AUDITED") == 1

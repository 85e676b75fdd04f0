"""What loggers get: metrics, the configuration, the samples' text, the preflight page."""

import json
import struct

import pytest
from lightning.pytorch.loggers import CometLogger

from causal_lm import build, config
from causal_lm.callbacks.loggers import send_file
from causal_preflight.lightning import PreflightError
from support import command
from support.outside import Recorder
from support.runs import SHORT, short_run

SAMPLES = [("samples", "step_00000003.txt", 3), ("samples", "step_00000006.txt", 6)]


@pytest.fixture
def recorder(monkeypatch):
    """A logger of one's own in the configuration, kept to be read."""
    logger, make_trainer = Recorder(), build.make_trainer
    monkeypatch.setattr(
        build, "make_trainer", lambda cfg, calls, more: make_trainer(cfg, calls, [*more, logger])
    )
    return logger


def test_a_logger_gets_metrics_configuration_samples_and_the_page(recorder, tmp_path):
    summary = short_run(tmp_path, "extras.tags=[a,b]")
    assert recorder.hparams["extras"]["tags"] == ["a", "b"]
    assert recorder.hparams["paths"]["output_dir"] == str(tmp_path)
    page, final = ("preflight", "preflight.html", 3), ("final_samples", "samples.txt", 6)
    assert sorted(recorder.files) == sorted([page, *SAMPLES, final])
    losses = [metrics["val/loss"] for _, metrics in recorder.metrics if "val/loss" in metrics]
    assert losses[-1] == summary["val/loss"]
    assert (tmp_path / "metrics.csv").exists()


def test_the_page_of_a_fault_that_ends_the_run_is_sent(recorder, tmp_path):
    with pytest.raises(PreflightError):
        short_run(tmp_path, "pitfalls.no_causal_mask=true")
    assert recorder.files == [("preflight", "preflight.html", 0)]


@pytest.mark.parametrize("name", ["tensorboard", "comet"])
def test_a_logger_whose_package_is_missing_names_the_extra(name, monkeypatch):
    monkeypatch.setattr(config, "find_spec", lambda package: None)
    with pytest.raises(config.ConfigError, match=rf"pip install .*\[{name}\]"):
        config.load([f"logger={name}"])


class FakeComet:
    """Records the calls of an experiment of comet_ml, with its signatures."""

    def __init__(self):
        self.calls = []

    def log_text(self, text, step=None, metadata=None):
        self.calls.append(("text", text, step, metadata))

    def log_asset(self, file_data, file_name=None, overwrite=False, copy_to_tmp=True, step=None):
        self.calls.append(("asset", file_data, file_name, step))


def test_comet_gets_samples_and_the_page(tmp_path):
    logger = object.__new__(CometLogger)  # its own __init__ needs comet_ml
    logger._experiment = fake = FakeComet()
    samples, page = tmp_path / "samples.txt", tmp_path / "preflight.html"
    samples.write_text("--- 1")
    page.write_text("<!doctype html>")
    send_file(logger, "final_samples", samples, 6)
    send_file(logger, "preflight", page, 3)
    text, asset = fake.calls
    assert text == ("text", "--- 1", 6, {"name": "final_samples"})
    assert asset == ("asset", str(page), "preflight.html", 3)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A run with TensorBoard and MLflow."""
    folder = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # as configs/logger/mlflow.yaml does
        words = ["logger=[tensorboard,mlflow]", f"paths.log_dir={folder}"]
        return folder, short_run(folder / "run", *words)


@pytest.mark.extras
def test_tensorboard_reads_it_back(files):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    folder, summary = files
    found = EventAccumulator(str(folder / "run" / "tensorboard"))
    found.Reload()
    assert found.Scalars("val/loss")[-1].value == pytest.approx(summary["val/loss"])
    samples = found.Tensors("samples/text_summary")
    assert [event.step for event in samples] == [3, 6]
    for tag in ("preflight/text_summary", "final_samples/text_summary"):
        assert len(found.Tensors(tag)[0].tensor_proto.string_val[0]) > 100
    stored = found.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    hparams = HParamsPluginData.FromString(stored).session_start_info.hparams
    assert hparams["data/batch_size"].number_value == 4


@pytest.mark.extras
def test_mlflow_reads_it_back(files, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    folder, summary = files
    client = MlflowClient(f"file:{folder}/mlflow")
    experiment = client.get_experiment_by_name("causal-lm")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.data.params["data/batch_size"]) == ("FINISHED", "4")
    assert run.data.metrics["val/loss"] == pytest.approx(summary["val/loss"])
    stored = folder / "mlflow" / experiment.experiment_id / run.info.run_id / "artifacts"
    names = {str(path.relative_to(stored)) for path in stored.rglob("*.*")}
    assert names == {
        "preflight/preflight.html", "samples/step_00000003.txt", "samples/step_00000006.txt",
        "final_samples/samples.txt",
    }  # fmt: skip


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two jobs of a sweep in one process, with trackio and with W&B offline."""
    folder = tmp_path_factory.mktemp("sweep")
    done = command(
        "train.py", "-m", *SHORT, "seed=1,2", "logger=[trackio,wandb]", "logger.wandb.offline=true",
        "extras.tags=[a]", f"hydra.sweep.dir={folder}",
        TRACKIO_DIR=str(folder / "trackio"), HF_HUB_OFFLINE="1", WANDB_DIR=str(folder),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.extras
def test_trackio_has_a_run_for_each_job(sweep):
    code = (
        "import json, trackio; from trackio.sqlite_storage import SQLiteStorage as store;"
        "runs = list(trackio.Api().runs('causal-lm'));"
        "logs = [[run.config, store.get_logs('causal-lm', run.name)] for run in runs];"
        "print(json.dumps(logs))"
    )
    done = command("-c", code, TRACKIO_DIR=str(sweep / "trackio"), HF_HUB_OFFLINE="1")
    runs = json.loads(done.stdout.splitlines()[-1])
    assert sorted(stored["seed"] for stored, _ in runs) == [1, 2]
    for _, logs in runs:
        assert [row["step"] for row in logs if "samples" in row] == [3, 6]
        assert "val/loss" in logs[-2] or "val/loss" in logs[-1]
    pages = [path.read_text() for path in (sweep / "trackio").rglob("blobs/*/*/*")]
    assert [page[:15].lower() for page in pages] == 2 * ["<!doctype html>"]


def wandb_records(path):
    """The records of a ``.wandb`` file: blocks of 32 KiB, in each (crc, length, kind, bytes)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the end of one
            yield Record.FromString(whole)
            whole = b""


@pytest.mark.extras
def test_wandb_offline_has_a_run_for_each_job(sweep):
    for number in (0, 1):
        (run,) = sweep.glob(f"{number}_fix/wandb/offline-run-*")
        assert len(list(run.glob("files/media/html/preflight_*.html"))) == 1
        tables = [json.loads(p.read_text()) for p in run.glob("files/media/table/samples_*.json")]
        assert ["--- 1" in table["data"][0][0] for table in tables] == [True, True]
        records = list(wandb_records(next(run.glob("*.wandb"))))
        (start,) = [r.run for r in records if r.WhichOneof("record_type") == "run"][:1]
        assert list(start.tags) == ["a"]
        stored = {u.key: u.value_json for r in records for u in r.config.update}
        assert json.loads(stored["seed"]) == number + 1
        rows = [{i.key or i.nested_key[0]: i.value_json for i in r.history.item} for r in records]
        logged = [float(row["val/loss"]) for row in rows if "val/loss" in row]
        summary = json.loads((sweep / f"{number}_fix" / "summary.json").read_text())
        assert logged[-1] == pytest.approx(summary["val/loss"])

"""The groups that users of Hydra know: callbacks, logger, debug, paths, extras, searches, local."""

import csv
import importlib.util
import re
import shlex
import shutil

import pytest
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from causal_lm import config
from causal_lm.fit import run
from support import ROOT, command
from support.runs import SHORT, short_run

GROUPS = ["callbacks", "logger", "debug", "paths", "extras", "hparams_search"]
FILES = [path for group in GROUPS for path in sorted((ROOT / "configs" / group).glob("*.yaml"))]
DEBUG = [path.stem for path in FILES if path.parent.name == "debug"]


COMMANDS = [  # of all comments in configs/
    (str(path.relative_to(ROOT / "configs")), script, line)
    for path in sorted((ROOT / "configs").rglob("*.yaml"))
    for script, line in re.findall(r"`python ([\w/]+\.py) ((?!--).*?)`", path.read_text("utf-8"))
]


def words_of(path):
    """The arguments of the last `python train.py …` in the comment at the top of a file."""
    comment = re.match("(#.*\n)+", path.read_text())
    assert comment is not None
    return shlex.split(re.findall(r"`python train\.py (.*?)`", comment[0])[-1])


@pytest.fixture
def installed(monkeypatch):
    """As if the package of every logger were there."""
    found = importlib.util.find_spec("hydra")
    monkeypatch.setattr(config, "find_spec", lambda name: found)


def test_the_comment_of_each_option_ends_in_its_command():
    assert len(FILES) > 15
    own = {"paths": "paths.", "extras": "extras.", "many": "logger=["}
    for path in FILES:
        group, option = path.parent.name, path.stem
        expected = own.get(option) or own.get(group) or f"{group}={option}"
        assert [word for word in words_of(path) if word.startswith(expected)], path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the names FILE and FOLDER in a command may stand for."""
    folder = tmp_path_factory.mktemp("folder")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_every_group_has_commands():
    assert len(COMMANDS) > 60
    groups = {name.partition("/")[0] for name, _, _ in COMMANDS}
    assert {*config.GROUPS, "hydra", "train.yaml"} - groups - {"local"} == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "script", "line"),
    [pytest.param(*c, marks=[pytest.mark.extras] * ("launcher=slurm" in c[2])) for c in COMMANDS],
    ids=lambda text: str(text)[:60],
)
def test_the_command_in_a_comment_composes(name, script, line, installed, folder):
    line = re.sub(r"FILE\b(?!\.)", f"{folder}/tokenizer.json", line.replace("FOLDER", str(folder)))
    words = shlex.split(line.replace("runs/…/checkpoints/last.ckpt", f"{folder}/tokenizer.json"))
    assert (ROOT / script).is_file() and "…" not in str(words)
    if words[0] == "-m":
        with initialize_config_dir(str(config.CONFIG_DIR), version_base="1.3"):
            config.validate_sweep(words[1:])
    else:
        config.load(words)


def test_options_are_chosen_together_with_and_without_a_plus(installed):
    names = {g: [p.stem for p in FILES if p.parent.name == g] for g in ("callbacks", "logger")}
    words = [
        f"callbacks=[{','.join(names['callbacks'])}]",
        f"+logger=[{','.join(names['logger'])}]",
    ]
    cfg = config.load([*words, "debug=limit", "experiment=text_cpu"])
    assert set(cfg.callbacks) == {"checkpoint", *names["callbacks"]}
    assert set(cfg.logger) == set(names["logger"]) - {"csv", "many"}
    nodes = [node for group in (cfg.callbacks, cfg.logger) for node in group.values()]
    assert [node for node in nodes if "_target_" not in node] == [cfg.callbacks.checkpoint]
    assert (cfg.trainer.max_steps, cfg.callbacks.checkpoint.every_minutes) == (20, 10)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["+callbacks=ema", "callbacks=device_stats"], ["callbacks=[ema,device_stats]"]),
        (["callbacks=emma"], ["mean 'ema'", "model_summary"]),
        (["+callbacks.ema.decay=0.9"], ["callbacks.ema", "_target_", "callbacks=ema"]),
        (["+logger.mine.folder=x"], ["logger.mine", "_target_"]),
        (["callbacks.ema.decay=0.9"], ["'callbacks.ema'", "checkpoint"]),
        (["extras.tags=a"], ["extras.tags", "'a'"]),
        (["extras.tag=[a]"], ["'extras.tag'", "mean 'extras.tags'"]),
        (["nothing=here"], ["'nothing'", "seed", "valid groups: callbacks", "trainer"]),
        (["hydra/sweeper=nothing"], ["hydra/sweeper=nothing", "basic"]),
        (["trainer.profiler=simple"], ["+trainer.profiler"]),
    ],
    ids=str,
)
def test_a_mistake_is_answered_with_what_is_valid(words, named):
    with pytest.raises(config.ConfigError) as error:
        config.load(words)
    assert [word for word in named if word not in str(error.value)] == []
    assert "\n" not in str(error.value)


def test_a_group_that_no_folder_has_is_answered_with_the_groups(tmp_path):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    own = "# @package _global_\ndefaults: [/nowhere: x]\nexperiment: own\n"
    (tmp_path / "configs" / "experiment" / "own.yaml").write_text(own)
    with pytest.raises(config.ConfigError, match=r"'nowhere'.*callbacks.*trainer"):
        config.load(["experiment=own"], tmp_path / "configs")


def test_local_settings_are_of_this_checkout_alone(tmp_path):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "configs" / "local").mkdir(exist_ok=True)
    (tmp_path / "configs" / "local" / "default.yaml").write_text("# @package _global_\nseed: 7\n")
    assert config.load([], tmp_path / "configs").seed == 7
    assert config.load(["seed=8"], tmp_path / "configs").seed == 8
    assert "/configs/local/" in (ROOT / ".gitignore").read_text().splitlines()


def test_resolvers_of_ones_own_and_of_hydra():
    OmegaConf.register_new_resolver("half", lambda value: value / 2, replace=True)
    cfg = config.load(["optimizer.lr=${half:0.5}", "+paths.here='${hydra:runtime.cwd}'"])
    assert cfg.optimizer.lr == 0.25
    with pytest.raises(config.ConfigError, match=r"optimizer\.lr"):
        config.load(["optimizer.lr=${half:-1}"])


def test_help_is_a_page_with_every_group():
    done = command("train.py", "--help")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert len(lines) < 60
    assert [group for group in config.GROUPS if not any(x.startswith(group) for x in lines)] == []
    assert "callbacks: " + ", ".join(p.stem for p in FILES if p.parent.name == "callbacks") in lines
    assert "--shell-completion" in done.stdout and "${" not in done.stdout
    assert not re.search(r"[ ,]_\w", done.stdout)  # parts of other options
    assert "configs/local/default.yaml" in done.stdout


def test_tab_completes_options():
    options = [p.stem for p in sorted((ROOT / "configs" / "data").glob("[!_]*.yaml"))]
    line = "python train.py data="
    done = command("train.py", "-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line)))
    assert done.stdout.split() == [f"data={name}" for name in options]
    assert "complete" in command("train.py", "--shell-completion", "install=bash").stdout


def test_a_search_is_validated_with_the_axes_that_it_will_have(tmp_path):
    words = ["hparams_search=grid", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    done = command("train.py", *words, "optimizer.lr=abc")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "optimizer.lr" in done.stderr and not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_a_search_runs_every_combination(tmp_path):
    words = ["hparams_search=grid", f"hydra.sweep.dir={tmp_path}", "optimizer.lr=1e-3,2e-3"]
    done = command("train.py", *SHORT, *words, "extras.print_config=true")
    assert done.returncode == 0, done.stderr
    configs = [OmegaConf.load(path) for path in tmp_path.glob("*/config.yaml")]
    found = {(cfg.optimizer.lr, cfg.optimizer.weight_decay) for cfg in configs}
    assert found == {(lr, decay) for lr in (1e-3, 2e-3) for decay in (0.0, 0.1)}
    assert done.stdout.count("print_config: true") == 4


@pytest.mark.extras
def test_callbacks_of_lightning_act(tmp_path, caplog):
    names = ["model_summary", "ema", "learning_rate_monitor", "device_stats"]
    with caplog.at_level("INFO"):
        summary = short_run(tmp_path, f"callbacks=[{','.join(names)}]", "data.batch_size=8")
    assert summary["status"] == "finished"
    assert sum("Trainable params" in message for message in caplog.messages) == 1
    with (tmp_path / "metrics.csv").open() as file:
        columns = next(csv.reader(file))
    for part in ("lr-AdamW", "DeviceStatsMonitor"):
        assert [column for column in columns if part in column]


@pytest.mark.slow
@pytest.mark.parametrize("name", DEBUG)
def test_a_debug_option_runs(name, tmp_path):
    words = [word for word in SHORT if not word.startswith(("trainer.max", "trainer.val"))]
    summary = run(config.load([*words, f"debug={name}"]), tmp_path)
    steps = {"fast_dev_run": 1, "limit": 20, "overfit": 200, "profiler": 50}
    assert (summary["status"], summary["steps"]) == ("finished", steps[name])
    assert (tmp_path / "fit-profile.txt").exists() == (name == "profiler")
    if name == "overfit":
        assert summary["train/loss"] < summary["floor/loss"] < summary["val/loss"]


@pytest.mark.slow
def test_a_job_of_two_ranks_does_not_repeat_the_search(tmp_path):
    words = ["hparams_search=grid", "optimizer.lr=1e-3", "optimizer.weight_decay=0.0"]
    ranks = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    done = command("train.py", *SHORT, *words, *ranks, f"hydra.sweep.dir={tmp_path}", timeout=200)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["0_fix"]
    assert done.stdout.count("run    train/loss") == 1

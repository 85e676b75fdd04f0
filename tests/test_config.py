"""What the command line refuses, in how long, and in which words."""

import copy
import re
import shutil

import pytest
import yaml
from hydra import initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from causal_lm import config
from causal_lm.build import instantiate
from causal_lm.schema import rule_of
from support import ROOT, command

PRESETS = ["fix", "bug", "unshifted_labels", "pad_in_loss", "no_causal_mask"]

REFUSED = [  # an override, and what the error must name: the key, the value, the valid ones
    ("optimizer.lr=abc", "optimizer.lr", "'abc'"),
    ("optimizer.lr=-1", "optimizer.lr", "-1"),
    ("optimizer.lr=nan", "optimizer.lr", "nan"),
    ("+optimizer.lrr=1", "'optimizer.lrr'", "mean 'optimizer.lr'", "betas"),
    ("optimizer.lrr=1", "'optimizer.lrr'", "mean 'optimizer.lr'", "betas"),
    ("lr=1", "'lr'", "mean 'optimizer.lr'"),
    ("data.batch_size=0", "data.batch_size", "0"),
    ("data.batch_size=true", "data.batch_size", "True"),
    ("data.batch_size={}", "data.batch_size", "{}"),
    ("data.batchsize=3", "mean 'data.batch_size'"),
    ("experiment=fux", "experiment=fux", "options", "fix"),
    ("trainer=gpuu", "trainer=gpuu", "mean 'gpu'"),
    ("pitfalls.nocausal=true", "'pitfalls.nocausal'", "no_causal_mask"),
    ("pitfalls.pad_in_loss=1", "pitfalls.pad_in_loss", "true or false"),
    ("+modle.d_model=1", "'modle'", "mean 'model'"),
    ("seed=-1", "seed", "-1"),
    ("model.n_heads=5", "model.d_model=64", "model.n_heads=5"),
    ("model.max_positions=8", "data.max_length=64", "model.max_positions=8"),
    ("data.source.successors=40", "data.source.successors=40", "data.source.symbols=40"),
    ("data.source.copies=63", "data.source.copies=63", "data.source.max_length=64"),
    ("fix", "'fix'", "key=value"),
    ("trainer.devices=0", "trainer.devices", "0"),
    ("trainer.precision=foo", "trainer.precision", "32-true"),
    ("trainer.val_check_interval=0", "trainer.val_check_interval"),
    ("trainer.deterministic=abc", "trainer.deterministic"),
    ("trainer.max_time=abc", "trainer.max_time", "'abc'"),
    ("optimizer.betas=abc", "optimizer.betas"),
    ("optimizer.lr={a:1}", "optimizer.lr", "not a group"),
    ("data.source=null", "data.source"),
    ("optimizer=null", "optimizer=null"),
    ("~optimizer", "optimizer"),
    ("~trainer.max_steps", "trainer.max_steps"),
    ("~nope", "'nope'"),
    ("+optimizer.lr=1", "optimizer.lr"),
    ("ckpt_path=nowhere.ckpt", "ckpt_path", "nowhere.ckpt"),
    ("ckpt_path=/tmp/lr=1/last.ckpt", "lr=1/last.ckpt", "quote"),
    ("data.path=日本/é.txt", "日本", "beyond ASCII"),
    ("optimizer.lr=${nope}", "optimizer.lr", "'nope'"),
    ("data=_base", "data.source"),
    ("experiment=fix,bug", "experiment=fix,bug", "--multirun"),
    ("logger=tensorbord", "logger=tensorbord", "mean 'tensorboard'", "wandb"),
    ("callback=early_stopping", "'callback'", "mean 'callbacks'", "valid groups"),
    ("trainer.max_epoch=3", "'trainer.max_epoch'", "mean 'trainer.max_epochs'"),
    ("tags=[a]", "'tags'", "mean 'extras.tags'", "valid groups"),
]


READ_BY_NOTHING = [  # Hydra accepts these with a plus
    ("lr=0.5", "lr", "mean 'optimizer.lr'"),
    ("max_epochs=1", "mean 'trainer.max_epochs'"),
    ("batch_size=8", "mean 'data.batch_size'"),
    ("tags=[a]", "mean 'extras.tags'"),
    ("symbols=8", "mean 'data.source.symbols'"),
    ("self_check.count=8", "'self_check'", "mean 'samples.self_check'"),
    ("early_stopping.patience=3", "'early_stopping'", "mean 'callbacks=early_stopping'"),
    ("tensorboard.name=a", "mean 'logger=tensorboard'"),
    ("debug.trainer.max_steps=1", "debug.trainer.max_steps", "# @package _global_"),
    ("trainer.logger=true", "trainer.logger", "_target_", "True"),
    ("trainer.plugins=foo", "trainer.plugins", "_target_", "foo"),
    ("trainer.plugins=[foo]", "trainer.plugins[0]", "_target_", "foo"),
    ("trainer.callbacks=[early_stopping]", "trainer.callbacks[0]", "callbacks=early_stopping"),
    ("trainer.callbacks=[{monitor: val/loss}]", "trainer.callbacks[0]", "_target_"),
    ("trainer.callbacks.own.every=1", "trainer.callbacks.own", "_target_"),
    ("callbacks.early_stopping=true", "callbacks.early_stopping", "callbacks=early_stopping"),
    ("callbacks.chekpoint.every_minutes=1", "callbacks.chekpoint", "_target_"),
    ("logger.tensorboard=true", "logger.tensorboard", "logger=tensorboard"),
]


@pytest.fixture(scope="module")
def default():
    return config.load([])


def changed(cfg, override):
    """A copy with a key that Hydra would add by a plus."""
    cfg, (key, _, value) = copy.deepcopy(cfg), override.partition("=")
    OmegaConf.update(cfg, key, yaml.safe_load(value), force_add=True)
    return cfg


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("data", ["synthetic", "docstrings"])
def test_every_preset_composes(preset, data):
    cfg = config.load([f"experiment={preset}", f"data={data}"])
    assert cfg.experiment == preset
    on = [name for name, value in cfg.pitfalls.items() if value]
    assert on == {"fix": [], "bug": PRESETS[2:]}.get(preset, [preset])
    assert cfg.preflight.on_fault == ("error" if preset == "fix" else "warn")


@pytest.mark.parametrize(("override", "named"), [(first, rest) for first, *rest in REFUSED])
def test_refused_by_name(override, named):
    with pytest.raises(config.ConfigError) as error:
        config.load([override])
    assert [word for word in named if word not in str(error.value)] == []
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("added", "named"), [(first, rest) for first, *rest in READ_BY_NOTHING])
def test_what_nothing_would_read_is_refused_by_name(added, named, default):
    with pytest.raises(config.ConfigError) as error:
        config.validate(changed(default, added))
    assert [word for word in named if word not in str(error.value)] == []
    assert "\n" not in str(error.value)


def test_a_guess_is_made_only_where_it_is_close():
    for override in ("optimizer.xyz=1", "experiment=fux", "+pitfalls=1", "exp=fix"):
        with pytest.raises(config.ConfigError) as error:
            config.load([override])
        assert "did you mean" not in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["+trainer.fast_dev_run=true"],
        ["~trainer.val_check_interval"],
        ["+corpora=[a,b]", "+width=8", "+paths.own=here", "model.d_model=${width}"],
        ["model._target_=mine.Model", "+model.width=3", "model.n_heads=5"],
        ["data=text", "data.path=x", "data.source._target_=mine.Source", "+data.own=1"],
        ["+callbacks.mine._target_=mine.Callback", "+callbacks.mine.every=3"],
        ["+trainer.callbacks=[{_target_: mine.Callback}]", "+trainer.logger=false"],
        ["+trainer.callbacks={_target_: mine.Callback}", "+callbacks.none=null"],
        ["optimizer._target_=torch.optim.RMSprop", "+optimizer.alpha=0.9"],
        ["trainer.strategy={_target_: mine.Strategy}"],
        ["data.batch_size='${oc.decode:${oc.env:NOT_THERE,8}}'"],
    ],
    ids=str,
)
def test_keys_of_ones_own_are_accepted(overrides):
    config.load(overrides)


def test_a_misspelt_key_of_a_file_is_refused(tmp_path):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    file = tmp_path / "configs" / "experiment" / "mine.yaml"
    file.write_text("# @package _global_\nexperiment: mine\noptimizer: {weight_deacy: 0.1}\n")
    with pytest.raises(config.ConfigError, match=r"mean 'optimizer\.weight_decay'"):
        config.load(["experiment=mine"], tmp_path / "configs")


def check_sweep(*overrides):
    with initialize_config_dir(str(config.CONFIG_DIR), version_base="1.3"):
        config.validate_sweep(overrides)


def test_a_sweep_is_checked_before_it_starts():
    check_sweep("experiment=fix,bug", "optimizer.lr=1e-3,1e-2")
    with pytest.raises(config.ConfigError, match="experiment=bux"):
        check_sweep("experiment=fix,bux")
    with pytest.raises(config.ConfigError, match=r"optimizer\.lr must be"):
        check_sweep("experiment=fix", "optimizer.lr=1e-3,abc")

    check_sweep("experiment=choice(fix,bug)", "optimizer.lr=range(1,3)")
    check_sweep("experiment=glob(*)", "optimizer.lr=interval(1e-4,1e-2)")
    with pytest.raises(config.ConfigError, match=r"optimizer\.lr must be"):
        check_sweep("optimizer.lr=interval(-1,1)")


@pytest.mark.parametrize(
    "options",
    [
        ["data=synthetic", "trainer=cpu"],
        ["data=docstrings", "trainer=ddp"],
        ["data=text", "data.path=here"],
        ["data=huggingface", "data.path=here"],
        *(
            [f"{group}={path.stem}"]
            for group in ("model", "optimizer", "scheduler")
            for path in sorted((ROOT / "configs" / group).glob("[!_]*.yaml"))
        ),
    ],
)
def test_every_value_has_a_rule(options):
    """A key that nothing checks fails late, in words of a library."""
    keys = [key for key, _ in config.leaves(config.load(options))]
    assert len(keys) > 30
    free = [k for k in keys if not rule_of(k) and not k.endswith(("_target_", "_partial_"))]
    assert free == []


def test_seed_zero_is_a_seed():
    assert config.load(["seed=0"]).seed == 0


@settings(max_examples=20)
@given(
    st.floats(1e-6, 1),
    st.integers(1, 512),
    st.integers(0, 2**32 - 1),
    st.sampled_from(PRESETS),
)
def test_what_is_valid_is_accepted_as_given(lr, batch_size, seed, preset):
    cfg = config.load(
        [f"experiment={preset}", f"optimizer.lr={lr}", f"data.batch_size={batch_size}",
         f"seed={seed}"]
    )  # fmt: skip
    assert (cfg.optimizer.lr, cfg.data.batch_size, cfg.seed) == (lr, batch_size, seed)


@pytest.mark.parametrize(
    "words",
    [
        ["optimizer.lr=abc"],
        ["experiment=fux"],
        ["+optimizer.lrr=1"],
        ["-m", "optimizer.lr=1e-3,abc"],
        ["--config-dir", "own", "--config-name", "mine"],
        ["--config-name", "nowhere"],
    ],
    ids=str,
)
def test_answers_at_once_with_one_line_and_leaves_nothing(words, tmp_path):
    """torch and lightning alone take longer to load than this answer may."""
    (tmp_path / "own").mkdir()
    own = "defaults: [train, _self_]\noptimizer: {lr: abc}\n"
    (tmp_path / "own" / "mine.yaml").write_text(own)
    done = command(str(ROOT / "train.py"), *words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["own"]
    imported = command("-X", "importtime", str(ROOT / "train.py"), *words, cwd=tmp_path).stderr
    assert "hydra" in imported
    assert "| torch" not in imported
    assert "lightning" not in imported.replace("lightning-causal-lm", "")


def test_a_configuration_without_our_callback_is_checked_at_the_start(tmp_path):
    text = (ROOT / "configs" / "train.yaml").read_text()
    (tmp_path / "train.yaml").write_text(re.sub(r"    validate:\n.*\n", "", text))
    words = ["--config-dir", ".", "--config-name", "train", "optimizer.lr=abc"]
    done = command(str(ROOT / "train.py"), *words, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "optimizer.lr" in done.stderr


def test_the_traceback_is_there_for_who_asks():
    done = command("train.py", "seed=-1", HYDRA_FULL_ERROR="1")
    assert "Traceback" in done.stderr
    assert done.returncode != 0


def test_the_preset_for_small_text_has_the_last_word():
    cfg = config.load(["experiment=text_cpu", "data=text", "data.path=here"])
    assert cfg.trainer.val_check_interval > cfg.trainer.max_steps
    assert (cfg.optimizer._target_, cfg.optimizer.lr) == ("causal_lm.optim.optimizers.muon", 0.02)
    assert cfg.model.token_smear == 5


def test_as_many_copies_as_fit():
    """62 of one symbol, beside BOS and EOS."""
    cfg = config.load(["data.source.copies=62", "data.source.train_documents=2"])
    corpus = instantiate(cfg.data).load()
    assert corpus.train.lengths.tolist() == [64, 64]

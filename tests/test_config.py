"""What the command line refuses, in how long, and in which words."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from causal_lm import config
from causal_lm.build import instantiate
from causal_lm.schema import rule_of
from support import ROOT, command

PRESETS = ["fix", "bug", "unshifted_labels", "pad_in_loss", "no_causal_mask"]

REFUSED = [
    ("optimizer.lr=abc", "optimizer.lr must be a number above 0, or auto, not 'abc'"),
    ("optimizer.lr=-1", "optimizer.lr must be a number above 0, or auto, not -1"),
    ("optimizer.lr=nan", "optimizer.lr must be a number"),
    ("+optimizer.lrr=1", "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
    ("optimizer.lrr=1", "did you mean 'optimizer.lr'?"),
    ("data.batch_size=0", "data.batch_size must be a whole number of at least 1, not 0"),
    ("data.batch_size=true", "data.batch_size must be a whole number"),
    ("data.batchsize=3", "did you mean 'data.batch_size'?"),
    ("experiment=fux", "there is no such experiment; did you mean 'fix'?"),
    ("trainer=gpuu", "did you mean 'gpu'?"),
    ("pitfalls.nocausal=true", "did you mean 'pitfalls.no_causal_mask'?"),
    ("pitfalls.pad_in_loss=1", "pitfalls.pad_in_loss must be true or false"),
    ("seed=-1", "seed must be a whole number from 0"),
    ("model.n_heads=5", "model.d_model=64 must be a multiple of model.n_heads=5"),
    ("model.max_positions=8", "data.max_length=64 is longer than model.max_positions=8"),
    ("data.source.successors=40", "must be below data.source.symbols=40"),
    ("data.source.copies=63", "do not fit a document of data.source.max_length=64 tokens"),
    ("fix", "'fix' is no override"),
    ("trainer.devices=0", "trainer.devices must be a whole number of at least 1"),
    ("trainer.precision=foo", "trainer.precision must be one of 32-true"),
    ("trainer.val_check_interval=0", "trainer.val_check_interval must be"),
    ("trainer.deterministic=abc", "trainer.deterministic must be true or false"),
    ("optimizer.betas=abc", "optimizer.betas must be two numbers"),
    ("optimizer.lr={a:1}", "optimizer.lr must be a number above 0, or auto, not a group of keys"),
    ("data.source=null", "data.source is missing or empty"),
    ("optimizer=null", "optimizer=None: choose one among adam, adamw"),
    ("~optimizer", "~optimizer: nothing can be taken away"),
    ("~trainer.val_check_interval", "~trainer.val_check_interval: nothing can be taken away"),
    ("ckpt_path=nowhere.ckpt", "ckpt_path must be a file that exists, auto, or null"),
    ("ckpt_path=/tmp/lr=1/last.ckpt", "cannot be read: quote a value"),
    ("optimizer.lr=${nope}", "Interpolation key 'nope' not found"),
    ("data=_base", "there is no such data"),
    ("experiment=fix,bug", "several values"),
]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("data", ["synthetic", "docstrings"])
def test_every_preset_composes(preset, data):
    cfg = config.load([f"experiment={preset}", f"data={data}"])
    assert cfg.experiment == preset
    on = [name for name, value in cfg.pitfalls.items() if value]
    assert on == {"fix": [], "bug": PRESETS[2:]}.get(preset, [preset])
    assert cfg.preflight.on_fault == ("error" if preset == "fix" else "warn")


@pytest.mark.parametrize(("override", "words"), REFUSED)
def test_refused_by_name(override, words):
    with pytest.raises(config.ConfigError) as error:
        config.load([override])
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_sweep_is_checked_before_it_starts():
    config.load_sweep(["experiment=fix,bug", "optimizer.lr=1e-3,1e-2"])
    with pytest.raises(config.ConfigError, match="no such experiment"):
        config.load_sweep(["experiment=fix,bux"])
    with pytest.raises(config.ConfigError, match=r"optimizer\.lr must be"):
        config.load_sweep(["experiment=fix", "optimizer.lr=1e-3,abc"])

    config.load_sweep(["experiment=glob(*)", "optimizer.lr=interval(1e-4,1e-2)"])
    with pytest.raises(config.ConfigError, match=r"optimizer\.lr must be"):
        config.load_sweep(["optimizer.lr=interval(-1,1)"])


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
    cfg = OmegaConf.to_container(config.load(options))
    keys = [key for key, _ in config.leaves(cfg)]
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


@pytest.mark.parametrize("override", ["optimizer.lr=abc", "experiment=fux", "+optimizer.lrr=1"])
def test_answers_at_once_with_one_line_and_leaves_nothing(override, tmp_path):
    """torch and lightning alone take longer to load than this answer may."""
    done = command(str(ROOT / "train.py"), override, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not done.stdout
    assert not list(tmp_path.iterdir())
    imported = command("-X", "importtime", "train.py", override).stderr
    assert "hydra" in imported
    assert "| torch" not in imported
    assert "lightning" not in imported.replace("lightning-causal-lm", "")


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

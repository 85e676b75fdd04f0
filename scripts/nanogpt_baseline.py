"""The recipe that nanoGPT publishes for a text of a megabyte on a CPU, as a baseline.

Four layers of width 128 with four heads, learned positions, LayerNorm and GELU, no biases, tied
head; 2,000 steps of 12 blocks of 64 characters; AdamW from 1e-3 down to 1e-4
(https://github.com/karpathy/nanoGPT, "I only have a macbook").
"""

import importlib.util
import math
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from causal_lm import config
from causal_lm.build import make_trainer, prepare
from causal_lm.callbacks.run_statistics import RunStatistics
from causal_lm.data.documents import FileArray
from causal_lm.report.table import table

WIDTH, HEADS, LAYERS, BLOCK, BATCH = 128, 4, 4, 64, 12
PEAK_LR, FINAL_LR, WARMUP_STEPS = 1e-3, 1e-4, 100


class Layer(nn.Module):
    """A pre-norm transformer block without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH, bias=False) for _ in range(2))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1))  # (B, T, 3, H, D)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class GPT(nn.Module):
    """The model of the recipe; its head is tied to the token embedding."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, WIDTH)
        self.positions = nn.Embedding(BLOCK, WIDTH)
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                is_residual = name.endswith(("out.weight", "down.weight"))
                scale = (2 * LAYERS) ** -0.5 if is_residual else 1.0
                nn.init.normal_(parameter, std=0.02 * scale)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        return F.linear(self.norm(self.layers(x)), self.tokens.weight)


class NanoGPTBaseline:
    """Training by that recipe; :meth:`advance` can be called several times.

    Args:
        train, val: (N,) tokens, in memory or in a file; those that occur are the vocabulary.
        steps: optimizer steps in all.
    """

    def __init__(self, train: Tensor | FileArray, val: Tensor | FileArray, steps: int) -> None:
        used, ids = torch.cat([train[:], val[:]]).unique(return_inverse=True)
        self.train, self.val = ids[: len(train)], ids[len(train) :]
        self.steps, self.step, self.seconds = steps, 0, 0.0
        self.generator = torch.Generator().manual_seed(0)
        self.model = GPT(len(used))
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        rest = [p for p in self.model.parameters() if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
            lr=PEAK_LR, betas=(0.9, 0.99),
        )  # fmt: skip

    def lr(self) -> float:
        """Learning rate of the next step."""
        if self.step < WARMUP_STEPS:
            return PEAK_LR * (self.step + 1) / (WARMUP_STEPS + 1)
        progress = (self.step - WARMUP_STEPS) / max(1, self.steps - WARMUP_STEPS)
        return FINAL_LR + (PEAK_LR - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * progress))

    def advance(self, until_step: int) -> None:
        """Take steps until ``until_step`` have been taken in all."""
        started = time.perf_counter()
        while self.step < until_step:
            first = torch.randint(len(self.train) - BLOCK, (BATCH, 1), generator=self.generator)
            block = self.train[first + torch.arange(BLOCK + 1)]
            logits = self.model(block[:, :-1])
            F.cross_entropy(logits.flatten(0, 1), block[:, 1:].flatten()).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
        self.seconds += time.perf_counter() - started

    @torch.no_grad()
    def loss(self) -> float:
        """Nats per token over the whole validation text, in blocks."""
        rows = (len(self.val) - 1) // BLOCK
        inputs = self.val[: rows * BLOCK].view(rows, BLOCK)
        targets = self.val[1 : rows * BLOCK + 1].view(rows, BLOCK)
        nats = [
            F.cross_entropy(self.model(x).flatten(0, 1), y.flatten(), reduction="sum")
            for x, y in zip(inputs.split(256), targets.split(256), strict=True)
        ]
        return float(torch.stack(nats).sum()) / targets.numel()


def compare(args: Namespace, machine: str) -> None:
    """Train both to the end, in turns; the clock of each runs only in its own turns. With
    ``args.target``, both are evaluated after each turn, and the time to that loss is printed."""
    cfg = config.load(
        ["experiment=text_cpu", "data=text", "trainer.enable_progress_bar=false", *args.overrides]
    )
    if cfg.trainer.max_steps < 1:
        raise config.ConfigError("trainer.max_steps must be above 0, as it is divided into turns")
    data, corpus, module = prepare(cfg)
    baseline = NanoGPTBaseline(corpus.train.tokens, corpus.val.tokens, args.baseline_steps)

    class Turns(L.Callback):
        start = seconds = 0.0  # of the training of text_cpu, and in which it does not train
        passed: ClassVar[dict[str, str]] = {}

        def on_train_batch_start(self, *_) -> None:
            self.start = self.start or time.perf_counter()

        def on_train_batch_end(self, trainer, *_) -> None:
            turn, rest = divmod(trainer.global_step * args.rounds, trainer.max_steps)
            if rest >= args.rounds:
                return
            started = time.perf_counter()
            baseline.advance(args.baseline_steps * turn // args.rounds)
            if args.target is not None:
                ours = started - self.start - self.seconds
                self._look("nanoGPT's recipe", baseline.seconds, baseline.loss())
                self._look("text_cpu", ours, _validation_loss(module, data))
            self.seconds += time.perf_counter() - started

        def _look(self, name: str, seconds: float, nats: float) -> None:
            if nats <= args.target:
                self.passed.setdefault(name, f"{name} {seconds:.1f} s")

    run_statistics, turns = RunStatistics(), Turns()
    trainer = make_trainer(cfg, callbacks=[run_statistics, turns], enable_checkpointing=False)
    trainer.fit(module, data)
    (figures,) = trainer.validate(module, data, verbose=False)
    ours, theirs = run_statistics.seconds_train - turns.seconds, baseline.seconds
    rows = [["", "parameters", "steps", "ms a step", "seconds", "nats a token"]]
    for name, model, steps, seconds, nats in (
        ("nanoGPT's recipe", baseline.model, args.baseline_steps, theirs, baseline.loss()),
        ("text_cpu", module.model, trainer.global_step, ours, figures["val/loss"]),
    ):
        size = sum(p.numel() for _, p in model.named_parameters())
        rows.append([name, f"{size:,}", f"{steps:,}", f"{1000 * seconds / steps:.1f}",
                     f"{seconds:.1f}", f"{nats:.3f}"])  # fmt: skip
    print(f"{table(rows)}\n\n1/{theirs / ours:.1f} of the time, {machine}")
    if args.target is not None:
        found = ", ".join(turns.passed.values()) or "neither"
        print(f"at most {args.target:g} nats a token, looked at {args.rounds} times: {found}")


def _validation_loss(module: Any, data: Any) -> float:
    """Nats per token over the validation split, as a run measures them."""
    module.eval()
    with torch.no_grad():
        for batch in data.val_dataloader():
            module.val_metric.update(module.token_nll(batch), batch.labels)
    module.train()
    nats = float(module.val_metric.compute()["loss"])
    module.val_metric.reset()
    return nats


def load_nanogpt(folder: Path) -> Any:
    """nanoGPT's ``model.py`` as a module; FileNotFoundError where the folder has none."""
    spec: Any = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    nanogpt = sys.modules["nanogpt_model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nanogpt)
    return nanogpt

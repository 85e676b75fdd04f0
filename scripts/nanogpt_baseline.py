"""The recipe that nanoGPT publishes for a text of a megabyte on a CPU, as a baseline.

Four layers of width 128 with four heads, learned positions, LayerNorm and GELU, no biases, tied
head; 2,000 steps of 12 blocks of 64 characters; AdamW from 1e-3 down to 1e-4
(https://github.com/karpathy/nanoGPT, "I only have a macbook").
"""

import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from causal_lm.data.documents import FileArray

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

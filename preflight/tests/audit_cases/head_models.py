"""Models with several heads: multi-token prediction, deep supervision, auxiliary heads."""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parts import Batch, Tiny, V, ce


def ahead(batch: Batch, k: int) -> Tensor:
    """(B, T): the token k further on in the same document, -100 where there is none."""
    ids = batch["input_ids"]
    doc = batch.get("document_ids", batch.get("attention_mask", torch.ones_like(ids)) - 1)
    out = torch.full_like(ids, -100)
    for t in range(max(0, -k), ids.shape[1] - max(0, k)):
        keep = (doc[:, t] == doc[:, t + k]) & (doc[:, t] >= 0)
        out[:, t] = torch.where(keep, batch.get("labels", ids)[:, t + k], -100)
    return out


class Trunk(Tiny):
    """Tiny without its head: `hidden` gives the states of the last layer, or of every layer."""

    def hidden(self, input_ids: Tensor, **given: Any) -> list[Tensor]:
        states: list[Tensor] = []
        hook = self.final.register_forward_pre_hook(lambda _, a: states.append(a[0]))
        hooks = [hook, *(m.register_forward_pre_hook(lambda _, a: states.append(a[0]))
                         for m in list(self.ln)[1:])]  # fmt: skip
        super().forward(input_ids, **given)
        for h in hooks:
            h.remove()
        return [self.final(x) for x in states]


class Medusa(Trunk):
    """Heads of one residual block each beside the head of the model."""

    def __init__(self, extra: int = 2, **kw: Any) -> None:
        super().__init__(**kw)
        self.blocks = nn.ModuleList(nn.Linear(self.d, self.d) for _ in range(extra))
        self.heads_ = nn.ModuleList(nn.Linear(self.d, V) for _ in range(extra))

    def forward(self, input_ids: Tensor, **given: Any) -> Any:
        x = self.hidden(input_ids, **given)[-1]
        pairs = zip(self.blocks, self.heads_, strict=True)
        return [self.head(x), *(head(x + F.silu(block(x))) for block, head in pairs)]


class Stacked(Medusa):
    """A block per head, one unembedding for all of them at once: (B, T, k, V)."""

    def forward(self, input_ids: Tensor, **given: Any) -> Any:
        x = self.hidden(input_ids, **given)[-1]
        return self.head(torch.stack([x, *(x + F.silu(b(x)) for b in self.blocks)], 2))


class Frozen(Medusa):
    """Only the further heads are trained."""

    def forward(self, input_ids: Tensor, **given: Any) -> Any:
        with torch.no_grad():
            x = self.hidden(input_ids, **given)[-1]
        pairs = zip(self.blocks, self.heads_, strict=True)
        return [head(x + F.silu(block(x))) for block, head in pairs]


class Deepseek(Trunk):
    """Each further head reads the embedding of one more token, and shares the unembedding."""

    step, depth, train_only = 1, 1, False

    def __init__(self, **kw: Any) -> None:
        super().__init__(**kw)
        self.join = nn.ModuleList(nn.Linear(2 * self.d, self.d) for _ in range(self.depth))
        self.mtp = nn.ModuleList(nn.Linear(self.d, 3 * self.d) for _ in range(self.depth))

    def forward(self, input_ids: Tensor, **given: Any) -> Any:
        x = self.hidden(input_ids, **given)[-1]
        out = [self.head(x)]
        see = self.visible(input_ids, given.get("attention_mask"), given.get("document_ids"))
        for i in range(self.depth if self.training or not self.train_only else 0):
            coming = self.tok(input_ids.roll(-(i + 1) * self.step, 1))
            x = self.join[i](torch.cat([x, coming], -1))
            q, k, v = (self.split(z) for z in self.mtp[i](x).chunk(3, -1))
            x = x + self.merge(self.weights(q @ k.transpose(-1, -2), self.opened(see)) @ v)
            out.append(self.head(self.final(x)))
        return out

    def opened(self, see: Tensor) -> Tensor:
        return see


class Chain(Deepseek):
    depth = 2


class TrainOnly(Deepseek):
    train_only = True


class TwoOn(Deepseek):
    """Reads the token after the next one: its own target."""

    step = 2


class OpenBlock(Deepseek):
    """The block of the further head has no causal mask."""

    def opened(self, see: Tensor) -> Tensor:
        return torch.ones_like(see)


class OpenTrainOnly(OpenBlock):
    train_only = True


class OneMore(Deepseek):
    """The mask of the further head is open to the token after its own."""

    def opened(self, see: Tensor) -> Tensor:
        return see | torch.ones_like(see).tril(1)


class Sliced(Deepseek):
    """One column less: the states of t with the embedding of t + 1."""

    def forward(self, input_ids: Tensor, **given: Any) -> Any:
        x = self.hidden(input_ids, **given)[-1]
        y = self.join[0](torch.cat([x[:, :-1], self.tok(input_ids[:, 1:])], -1))
        z = F.pad(self.head(self.final(y)), (0, 0, 0, 1))
        return [self.head(x), z]


class Deep(Trunk):
    """The same head on the states of every layer."""

    def forward(self, input_ids: Tensor, **given: Any) -> Any:
        return [self.head(x) for x in reversed(self.hidden(input_ids, **given))]


class DeepOpen(Deep):
    """The head of the first layer pools over the row."""

    def forward(self, input_ids: Tensor, **given: Any) -> Any:
        last, *first = self.hidden(input_ids, **given)[::-1]
        return [self.head(last), *(self.head(x + x.mean(1, keepdim=True)) for x in first)]


class Mixed(Deepseek):
    """Heads on every layer, and one that reads a token more."""

    def forward(self, input_ids: Tensor, **given: Any) -> Any:
        first = self.head(self.hidden(input_ids, **given)[0])
        return [first, *super().forward(input_ids, **given)]


class Functional(Deepseek):
    """The embedding is the head; logits are entries of an object."""

    def forward(self, input_ids: Tensor, **given: Any) -> Any:
        self.head = nn.Identity()
        z, *more = super().forward(input_ids, **given)
        table = self.tok.weight.T
        return SimpleNamespace(logits=z @ table, mtp_logits=[y @ table for y in more])


class TimeFirst(Medusa):
    """Logits (T, B, V)."""

    def forward(self, input_ids: Tensor, **given: Any) -> Any:
        x = self.hidden(input_ids, **given)[-1].transpose(0, 1)
        pairs = zip(self.blocks, self.heads_, strict=True)
        return [self.head(x), *(head(x + F.silu(block(x))) for block, head in pairs)]


class NextRow(Deepseek):
    """The further head reads the row above as well."""

    def merge(self, z: Tensor) -> Tensor:
        out = super().merge(z)
        self.calls = getattr(self, "calls", 0) + 1
        return out + out.roll(1, 0) if self.calls % 3 == 0 else out


class SeesDocuments(Deepseek):
    """The further head attends over the edges of documents."""

    def opened(self, see: Tensor) -> Tensor:
        return torch.ones_like(see).tril()


class Beside(Medusa):
    """A model with another head of some width, whose output comes second."""

    def __init__(self, width: int, pool: bool = False) -> None:
        super().__init__(extra=0)
        self.other, self.pool = nn.Linear(self.d, width), pool

    def forward(self, input_ids: Tensor, **given: Any) -> Any:
        x = self.hidden(input_ids, **given)[-1]
        return [self.head(x), self.other(x[:, 5] if self.pool else x)]


class Loss(Deepseek):
    """Computes the weighted loss itself and returns it only."""

    second = 2

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **k: Any) -> Any:
        z, y = super().forward(input_ids, **k)
        batch = {"input_ids": input_ids, "labels": labels, **k}
        loss = ce(z, ahead(batch, 1)) + 0.3 * ce(y, ahead(batch, self.second))
        return {"loss": loss}


class LossLate(Loss):
    second = 3

"""The objective: which token is the target of position t, which targets count, and how much.

These questions are answered here and nowhere else. A batch arrives *not shifted*; the labels are
made once, from where documents begin and end, and never by comparing token values with PAD. That
is why PAD may equal EOS:

    input_ids      BOS  the  cat  EOS  PAD  PAD
    document_ids     0    0    0    0   -1   -1
    labels         the  cat  EOS    ·    ·    ·      (· = IGNORE)

Every loss here is one formula, sum(weight * nll) / denominator, in which the two parts stay apart
until all micro-batches and ranks have been added up (see ``module.py``). Units: losses are in nats;
counts are in tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""The label of a position that does not count (the default ``ignore_index`` of torch)."""
REDUCTIONS = ("token", "sequence", "padded")


@dataclass(frozen=True)
class LossConfig:
    """How the token losses become one number.

    reduction: ``token``, each counted token weighs the same; ``sequence``, each document (or window
        of one) weighs the same, whatever its length; ``padded``, each token weighs one slot of
        ``length``, counted or not, so that short documents weigh less.
    length: slots per document for ``padded``.
    chunk_tokens: compute head and loss for so many tokens at a time (:func:`chunked_nll`); None
        does it for all at once.
    """

    reduction: str = "token"
    length: int | None = None
    chunk_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.reduction not in REDUCTIONS:
            known = ", ".join(REDUCTIONS)
            raise ValueError(f"loss.reduction must be one of {known}, not {self.reduction!r}")
        if self.reduction == "padded" and not self.length:
            raise ValueError("loss.reduction=padded needs loss.length, the slots of a document")


def next_tokens(input_ids: Tensor) -> Tensor:
    """The token after each position: (B, T) -> (B, T). Nothing follows the last: IGNORE."""
    return F.pad(input_ids[:, 1:], (0, 1), value=IGNORE)


def has_target(document_ids: Tensor, loss_mask: Tensor | None = None) -> Tensor:
    """True where the next position holds the same document: (B, T) -> bool (B, T).

    Document ids are >= 0, and -1 at PAD. The last token of a document (its EOS) predicts nothing,
    and neither does PAD; so each document of n tokens has n - 1 targets, the last of them EOS.

    loss_mask: bool (B, T), False at tokens that are given and not to be learned (a prompt). It
        speaks of the *target*: the last token of a prompt still predicts the first of its answer.
    """
    following = F.pad(document_ids[:, 1:], (0, 1), value=-1)
    counted = (document_ids >= 0) & (document_ids == following)
    return counted if loss_mask is None else counted & F.pad(loss_mask[:, 1:], (0, 1))


def make_labels(targets: Tensor, counted: Tensor) -> Tensor:
    """Targets (B, T) where they count, IGNORE elsewhere."""
    return targets.masked_fill(~counted, IGNORE)


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each label, in nats, float32; 0 where the label is IGNORE.

    logits (B, T, V), labels (B, T) -> (B, T). Computed in float32 whatever the logits' dtype.
    """
    return F.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORE, reduction="none"
    ).view_as(labels)


def token_weights(labels: Tensor, document_ids: Tensor, loss: LossConfig) -> tuple[Tensor, Tensor]:
    """The weight of each token's loss, (B, T), and the denominator, a scalar.

    Two rows of three slots, of which three and one count (x marks a target that counts):

                 token      sequence            padded, length 3
        x x x    1  1  1    1/3  1/3  1/3       1  1  1
        x · ·    1  ·  ·     1    ·    ·        1  ·  ·
        over        4            2                 6

    So a token of the first row weighs 1/4, 1/6 or 1/6, and that of the second 1/4, 1/2 or 1/6. The
    denominators add up over micro-batches and ranks; a quotient of theirs would not.
    """
    counted = labels != IGNORE
    if loss.reduction == "token":
        return counted.float(), counted.sum()
    # Documents lie side by side: each begins where the id changes. (PAD is one; nothing counts.)
    begins = torch.ones_like(counted)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    owner = begins.flatten().cumsum(0) - 1  # (B T,)
    lengths = torch.zeros_like(owner).scatter_add_(0, owner, counted.flatten().long())
    documents = (lengths > 0).sum()
    if loss.reduction == "padded":
        assert loss.length is not None
        return counted.float(), documents * loss.length
    return counted.float() / lengths[owner].view_as(counted).clamp(min=1), documents


def weighted_nll(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Sum of weight * nll over the labels that count, a scalar, in nats.

    logits (B, T, V), labels and weights (B, T).

    >>> logits = torch.zeros(1, 3, 4)  # uniform over four tokens: ln 4 each
    >>> weighted_nll(logits, torch.tensor([[1, 2, IGNORE]]), torch.tensor([[1.0, 0.5, 1.0]]))
    tensor(2.0794)
    """
    return (token_nll(logits, labels) * weights).sum()


def chunked_nll(
    hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor, chunk_tokens: int
) -> Tensor:
    """:func:`weighted_nll` of the logits ``hidden @ head.T``, which never exist all at once.

    Labels that do not count are dropped before the projection. Of the rest, one chunk at a time
    gets its logits, its loss and its gradients, so the memory is that of ``chunk_tokens`` rows of
    logits, whatever the batch. The logits of a chunk have the dtype that autocast would give them;
    loss and softmax are float32 (the idea: Cut Your Losses, arXiv 2411.09009).

    hidden (B, T, C), head (V, C), labels and weights (B, T) -> scalar, in nats. It can be
    differentiated once.
    """
    counted = labels != IGNORE
    return _ChunkedNLL.apply(hidden[counted], head, labels[counted], weights[counted], chunk_tokens)


@torch.no_grad()
def chunked_token_nll(hidden: Tensor, head: Tensor, labels: Tensor, chunk_tokens: int) -> Tensor:
    """:func:`token_nll` of the logits ``hidden @ head.T``, a chunk at a time, for evaluation."""
    nll = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
    counted = labels != IGNORE
    chunks = zip(
        hidden[counted].split(chunk_tokens), labels[counted].split(chunk_tokens), strict=True
    )
    nll[counted] = torch.cat([token_nll(F.linear(x, head), y) for x, y in chunks])
    return nll


class _ChunkedNLL(torch.autograd.Function):
    """Makes the gradients in the forward pass, while a chunk's logits are there."""

    @staticmethod
    def forward(ctx, hidden, head, labels, weights, chunk_tokens):
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        with torch.autocast(kind, enabled=False):
            matrix = head.to(dtype)
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head)
            for start in range(0, len(hidden), chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                x, y, w = hidden[rows].to(dtype), labels[rows, None], weights[rows, None]
                z = (x @ matrix.T).float()  # (chunk, V)
                z -= z.amax(dim=-1, keepdim=True)
                of_label = z.gather(1, y)
                sums = z.exp_().sum(dim=-1, keepdim=True)
                total += ((sums.log() - of_label) * w).sum()
                # d nll / d z = softmax - onehot, written over z, as the chunk's logits are large
                z.div_(sums).scatter_add_(1, y, -torch.ones_like(w))
                grad = z.to(dtype)  # without w: float16 has no room below 1 / V
                grad_hidden[rows] = ((grad @ matrix) * w).to(grad_hidden.dtype)
                weighted = (x * w).to(dtype)
                if dtype == grad_head.dtype:
                    grad_head.addmm_(grad.T, weighted)
                else:
                    grad_head += grad.T @ weighted
        ctx.save_for_backward(grad_hidden, grad_head)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * grad, grad_head * grad, None, None, None

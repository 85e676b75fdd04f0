"""The objective: which token is the target of each position, which targets count, and how much.

A batch is *not shifted*. Its labels are made once, from where documents begin and end, and never by
comparing token values with PAD; so PAD may equal EOS:

    input_ids      BOS  the  cat  EOS  PAD  PAD
    document_ids     0    0    0    0   -1   -1
    labels         the  cat  EOS    ·    ·    ·      (· = IGNORE)

Every loss is sum(weight * nll) / denominator. Both are summed over all micro-batches and ranks
before they are divided (see ``accumulation.py``). Losses are in nats, counts in tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # label of a position without a counted target (torch's default ``ignore_index``)
REDUCTIONS = ("token", "sequence", "padded")


@dataclass(frozen=True)
class LossConfig:
    """How the token losses are reduced to one number.

    token: every counted token has the same weight.
    sequence: every document (or window of one) has the same weight, whatever its length.
    padded: the sum is divided by ``length`` × documents, so that a short document weighs less.
    """

    reduction: str = "token"
    length: int | None = None  # slots per document, for ``padded``
    chunk_tokens: int | None = None  # tokens whose logits exist at a time (:func:`chunked_nll`)

    def __post_init__(self) -> None:
        if (name := self.reduction) not in REDUCTIONS:
            raise ValueError(f"loss.reduction must be one of {', '.join(REDUCTIONS)}, not {name!r}")
        if self.reduction == "padded" and not self.length:
            raise ValueError("loss.reduction=padded needs loss.length, the slots of a document")


def shift_left(input_ids: Tensor) -> Tensor:
    """The token after each position: (B, T) -> (B, T), IGNORE in the last column."""
    return F.pad(input_ids[:, 1:], (0, 1), value=IGNORE)


def has_target(document_ids: Tensor, loss_mask: Tensor | None = None) -> Tensor:
    """True where the next position belongs to the same document: (B, T) -> bool (B, T).

    Document ids are >= 0, and -1 at PAD. A document of n tokens has n - 1 targets, the last of
    which is its EOS. ``loss_mask``, bool (B, T), is False at tokens that are context only (a
    prompt), as *targets*: the last one still predicts the first token of the answer.
    """
    next_document_ids = F.pad(document_ids[:, 1:], (0, 1), value=-1)
    same_document = (document_ids >= 0) & (document_ids == next_document_ids)
    return same_document if loss_mask is None else same_document & F.pad(loss_mask[:, 1:], (0, 1))


def make_labels(input_ids: Tensor, document_ids: Tensor, loss_mask: Tensor | None = None) -> Tensor:
    """(B, T): the next token of the same document, IGNORE where :func:`has_target` is False."""
    return shift_left(input_ids).masked_fill(~has_target(document_ids, loss_mask), IGNORE)


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each label, in nats and float32; 0 where the label is IGNORE.
    logits (B, T, V), labels (B, T) -> (B, T)."""
    flat = logits.flatten(0, -2).float()  # (B T, V)
    nll = F.cross_entropy(flat, labels.flatten(), ignore_index=IGNORE, reduction="none")
    return nll.view_as(labels)


def token_weights(
    labels: Tensor, document_ids: Tensor, config: LossConfig
) -> tuple[Tensor, Tensor]:
    """Weight of each token's loss, (B, T), and the denominator of the weighted sum, a scalar.

    Two documents with three targets and one (· = no target):

                       token      sequence            padded, length 3
        x x x          1  1  1    1/3  1/3  1/3       1  1  1
        x · ·          1  ·  ·     1    ·    ·        1  ·  ·
        denominator       4            2                 6
    """
    counted = labels != IGNORE
    if config.reduction == "token":
        return counted.float(), counted.sum()
    # A document begins where the id changes. (A run of PAD is numbered too, but has no targets.)
    begins = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)
    index = begins.flatten().cumsum(0) - 1  # (B T,) document of each slot
    n_targets = torch.zeros_like(index).scatter_add_(0, index, counted.flatten().long())
    n_documents = (n_targets > 0).sum()
    if config.reduction == "padded":
        assert config.length is not None
        return counted.float(), n_documents * config.length
    return counted.float() / n_targets[index].view_as(counted).clamp(min=1), n_documents


def weighted_nll(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Sum of weight * nll in nats; logits (B, T, V), labels and weights (B, T) -> scalar."""
    return (token_nll(logits, labels) * weights).sum()


def chunked_nll(
    hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor, chunk_tokens: int
) -> Tensor:
    """:func:`weighted_nll` of the logits ``hidden @ head.T``, computed a chunk at a time.

    Loss and gradients of a chunk are computed together, so peak memory is ``chunk_tokens`` rows of
    logits; positions without a label are dropped before (Cut Your Losses,
    https://arxiv.org/abs/2411.09009). Logits have autocast's dtype, loss and softmax are float32.

    hidden (B, T, C), head (V, C), labels and weights (B, T) -> scalar; differentiable once.
    """
    counted = labels != IGNORE
    return _ChunkedNLL.apply(hidden[counted], head, labels[counted], weights[counted], chunk_tokens)


@torch.no_grad()
def chunked_token_nll(hidden: Tensor, head: Tensor, labels: Tensor, chunk_tokens: int) -> Tensor:
    """:func:`token_nll` of the logits ``hidden @ head.T``, a chunk at a time, without gradients."""
    nll = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
    counted = labels != IGNORE
    parts = (x[counted].split(chunk_tokens) for x in (hidden, labels))
    nll[counted] = torch.cat([token_nll(F.linear(x, head), y) for x, y in zip(*parts, strict=True)])
    return nll


class _ChunkedNLL(torch.autograd.Function):
    """Computes the gradients in the forward pass, while the logits of a chunk exist."""

    @staticmethod
    def forward(ctx, hidden, head, labels, weights, chunk_tokens):
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        with torch.autocast(kind, enabled=False):
            head_cast = head.to(dtype)
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head)
            for start in range(0, len(hidden), chunk_tokens):
                chunk = slice(start, start + chunk_tokens)
                x, y, w = hidden[chunk].to(dtype), labels[chunk, None], weights[chunk, None]
                logits = (x @ head_cast.T).float()  # (chunk, V)
                logits -= logits.amax(dim=-1, keepdim=True)
                label_logit = logits.gather(1, y)
                exp_sum = logits.exp_().sum(dim=-1, keepdim=True)
                total += ((exp_sum.log() - label_logit) * w).sum()
                # d nll / d logits = softmax - onehot, written over the logits to save memory
                logits.div_(exp_sum).scatter_add_(1, y, -torch.ones_like(w))
                grad = logits.to(dtype)  # w is applied later: softmax / V underflows in float16
                grad_hidden[chunk] = ((grad @ head_cast) * w).to(grad_hidden.dtype)
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

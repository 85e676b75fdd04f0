"""Probes of PAD: nothing at a PAD slot may move the loss or the logits of a real token."""

import torch
from torch import Tensor

from causal_preflight.context import NONE_COUNTS, Context, Move
from causal_preflight.locate import EmbeddingNoise
from causal_preflight.report import Finding, require
from causal_preflight.visibility import Setting, find_leak, leak_finding


def finite(ctx: Context) -> list[Finding]:
    """Loss, logits of real tokens and gradients must be numbers."""
    model, batch = ctx.model, ctx.work
    sound = all(bool(torch.isfinite(p).all()) for p in model.sandbox.params)
    require(sound, "the parameters themselves are not finite")
    nan = torch.isnan(ctx.base.logits).any(-1) & ctx.base.made
    broken = nan & batch.real
    losses = float(model.run(ctx.full, True).detach()), ctx.base.loss
    bad_loss = not all(abs(loss) < float("inf") for loss in losses)
    if not bad_loss and not bool(broken.any()):
        grads = model.grads(model.run(batch, True), model.sandbox.params)
        if all(g is None or bool(torch.isfinite(g).all()) for g in grads):
            return []
    ctx.explained.add("finite")
    if bad_loss and not bool(nan.any()):  # 0/0
        require(ctx.full.has_target.any(), "no position of the batch has a next token")
        seen = "the loss is NaN though every logit is finite: a mean over no targets"
        return [ctx.finding("reduction", seen, "clamp", Move(float("nan")))]
    move = Move(float("nan"), int(batch.slot.flatten()[broken.long().argmax()]))
    what = "the loss" if bad_loss else "the logits of a real token" if broken.any() else "gradients"
    bare = batch.unpadded_row(int(batch.real.sum(1).argmax()))
    tried = [("finite once the PAD is removed", "no key", bare)] if batch.has_pad else []
    mask = bare.raw.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == bare.ids.shape:
        inverted = bare.with_tensor("attention_mask", (mask == 0).to(mask))
        tried.append(("finite once attention_mask is inverted", "pad keys", inverted))
    for text, remedy, other in tried:
        o = model.observe(other)
        if o.loss == o.loss and not bool(torch.isnan(o.logits[o.made]).any()):
            return [ctx.finding("pad", f"{what}: NaN as the batch stands, {text}", remedy, move)]
    seen = f"{what}: NaN without any PAD; a query has no key left, as if the mask were inverted"
    return [ctx.finding("causal", seen, "mask future", move)]


def embedding(ctx: Context) -> list[Finding]:
    """Add noise to the embedding of PAD: the logits of real tokens must not move."""
    work = ctx.work
    require(work.has_pad, "no PAD in the batch")
    sides = [work.left_pad]
    if not ctx.explained & {"future", "cross_row"}:  # else PAD on the right is seen as well
        sides.append(~work.real & ~work.left_pad)
    sides = [side for side in sides if bool(side.any())]
    require(sides, "a causal leak was found, which explains a dependence on PAD on the right")

    def changed(ctx: Context, s: Setting, part: Tensor) -> Tensor:
        with EmbeddingNoise(s.batch, part, ctx.seed) as noise:
            logits = ctx.model.observe(s.batch, s.train).logits
        require(noise.hits, "the lookup of the embeddings was not found")
        return logits

    leak = find_leak(ctx, [Setting(work, both, both, sides) for both in (False, True)], changed)
    seen = "{where} with the embedding at PAD slots"
    return leak_finding(ctx, leak, "padding", "pad", seen, "pad keys")


def extension(ctx: Context) -> list[Finding]:
    """Add PAD on the side where the batch has it: logits, weights and loss must not move.

    Weights that shrink: the denominator counts PAD. A loss that moves alone, free of the rounding
    in the logits (`InstrumentedModel.readout`): an auxiliary term counts PAD.
    """
    require(ctx.work.has_pad, "no PAD in the batch")
    work, width = ctx.work, ctx.work.ids.shape[1]
    more = max(2, width // 4)
    require(width > more + 2, "needs rows of five tokens")
    # Cut by as much first: a table of positions may end where the batch does.
    base = work.cols(0, width - more)
    base = base.rows(base.real.any(1).nonzero()[:, 0])
    longer = base.pad(more, work.pads_left, work)
    examined = False
    if not ctx.explained & {"future", "cross_row", "padding", "context", "finite"}:
        if move := ctx.compare(base, longer):
            label = "pad" if move.size == float("inf") else "position"
            return [ctx.finding(label, "{where} when PAD is added", "length", move)]
        examined = True
    if ctx.explained & {"pad target", "shift", "reduction", "inexact weights"}:
        require(examined, "another fault moves logits and weights already")
        return []
    for train in (True, False):
        r, s = (ctx.model.readout(batch, train) for batch in (base, longer))
        before, after = r.weight[r.trained], s.weight[longer.slot >= 0][r.trained.flatten()]
        if not len(before):
            continue
        if bool((after == 0).any()):  # of a model that makes the logits of the last columns alone?
            made = ctx.model.observe(longer).made[longer.slot >= 0][r.trained.flatten()]
            require(made.all(), "with PAD added, the loss is that of other positions")
        examined, change = True, (after / before - 1).abs()
        if float(change.max()) > max(2e-3, 3 * r.residual):
            most = change.argmax()
            seen = f"the weight of a real token goes from {float(before[most]):.4g} to "
            seen += f"{float(after[most]):.4g} when columns of PAD are added"
            return [ctx.finding("reduction", seen, "divide", Move(float(change[most])))]
        drift = abs(s.loss - r.loss) / max(1e-9, abs(r.loss))
        # A NaN drift is no finding.
        first, *others = ctx.model.heads  # the logits of others are not replaced: they round
        bound = ctx.tolerance * (1.0 if others else 0.1)
        if not (drift > max(2e-6, bound) and first == ctx.model.head and first.replaceable):
            continue
        ctx.model.seed += 1  # does dropout reach the loss by another way than the logits?
        reseeded = ctx.model.readout(base, train).loss if train else r.loss
        ctx.model.seed -= 1
        if abs(reseeded - r.loss) <= 1e-7 * abs(r.loss):
            seen = "the loss moves by {size} of itself with PAD added; logits and weights do not: "
            return [ctx.finding("pad", seen + "a term counts PAD", "pad targets", Move(drift))]
    require(examined, NONE_COUNTS)
    return []

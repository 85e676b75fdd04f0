"""The order of documents: a function of (seed, epoch, rank) and of where a resumed run goes on."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Sampler

from causal_lm.data.packing import filled_batches

POOL_BATCHES = 100  # batches within which documents are sorted by length, or packed


class Arrangement(NamedTuple):
    """Which documents share a batch: of similar length, or, with a row length, such as fill rows.
    Without a batch size they are left in their order."""

    batch_size: int = 0
    world_size: int = 1  # ranks that read a batch each at a time
    row_length: int = 0


class Start(NamedTuple):
    """Where a run goes on in its documents; by default, at the first of the first epoch."""

    batches: int = 0  # micro-batches that were read before, over all epochs
    epoch: int = 0
    segments: Sequence[tuple[Sequence[int], int]] = ()
    """What was read of this epoch: (arrangement, documents) of each resumed part. Replayed in turn,
    they give what is left."""
    pool: int = 0  # of a stream: pools that were read before, over all epochs
    pool_size: int = 0  # windows of the pool in hand, at most; 0: it has not been read yet
    address: tuple[Any, int] = (None, 0)  # of its first window, see ``TextStream.read``


class DocumentSampler(Sampler[int]):
    """Indices of every document once per epoch over all ranks, in a new order each epoch.

    A resumed run may read the rest of an epoch in batches of another size, on more or fewer ranks,
    or in another layout, as its position is counted in documents.

    All ranks must take the same number of steps. Where torch's ``DistributedSampler`` repeats
    documents to get there, which an evaluation then counts twice, this one gives index -1, which
    collates to a row of PAD.

    ``batches_done`` is called as each epoch starts, so that a resumed run continues where it
    stopped.
    """

    def __init__(
        self,
        size: int,  # number of documents
        *, shuffle: bool, seed: int = 0,  # draw an order per epoch; otherwise 0, 1, 2 …
        rank: int = 0, world_size: int = 1,  # every ``world_size``-th index, from ``rank`` on
        by_length: bool = False,  # batch documents of similar length together
        row_length: int | None = None,  # with ``shuffle``: or such as fill rows of so many tokens
        lengths: Callable[[], np.ndarray] = lambda: np.empty(0),  # (size,) tokens, for these
        batch_size: int = 1,  # indices per batch and rank
        batches_done: Callable[[], int] = lambda: 0,  # of this rank, over all epochs
        start: Start | None = None,  # where the run goes on, from the position that was saved
    ) -> None:  # fmt: skip
        self.size, self.shuffle, self.seed = size, shuffle, seed
        self.rank, self.world_size, self.lengths = rank, world_size, lengths
        self.batches_done, self.start = batches_done, start or Start()
        self.group_size = batch_size * world_size  # documents that all ranks read at a step
        self.arrangement = Arrangement(self.group_size) if by_length else Arrangement()
        if row_length is not None and shuffle:
            self.arrangement = Arrangement(batch_size, world_size, row_length)

    def __len__(self) -> int:
        return -(-self.size // self.world_size)

    def __iter__(self) -> Iterator[int]:
        return self.remaining_indices(self.batches_done())

    def n_batches(self, segments: Sequence[tuple[Sequence[int], int]] = ()) -> int:
        """Batches of an epoch that are left after these segments."""
        return -(-(self.size - sum(n for _, n in segments)) // self.group_size)

    def position(self, batches_done: int) -> Start:
        """Where a run goes on that stops after ``batches_done`` batches over all epochs."""
        batches, epoch, segments = self.start[:3]
        batches = batches_done - batches
        if batches >= (left := self.n_batches(segments)):
            epochs, batches = divmod(batches - left, self.n_batches())
            epoch, segments = epoch + 1 + epochs, ()
        parts, read = list(segments), batches * self.group_size
        if read and parts and tuple(parts[-1][0]) == self.arrangement:  # arranged alike: one part
            read += parts.pop()[1]
        return Start(batches_done, epoch, parts + ([([*self.arrangement], read)] if read else []))

    def remaining_indices(self, batches_done: int) -> Iterator[int]:
        """The rest of the current epoch, after ``batches_done`` batches over all epochs."""
        _, epoch, segments = self.position(batches_done)[:3]
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(self.size) if self.shuffle else np.arange(self.size)
        arranged = Arrangement()
        for arrangement, documents in [*segments, (self.arrangement, 0)]:
            if (wanted := Arrangement(*arrangement)) not in (Arrangement(), arranged):
                order = arrange(order, self.lengths(), wanted, rng if self.shuffle else None)
            arranged, order = wanted, order[documents:]
        local = order[self.rank :: self.world_size]
        yield from map(int, local)
        yield from [-1] * (-(-len(order) // self.world_size) - len(local))


def arrange(
    order: np.ndarray, lengths: np.ndarray, how: Arrangement, rng: np.random.Generator | None
) -> np.ndarray:
    """Reorder the (D,) indices ``order`` into groups, which all ranks together read at a step.

    It is done within pools of :data:`POOL_BATCHES` groups, so that which documents share a batch
    still changes from epoch to epoch. ``rng`` draws the order of the groups; with None they stay
    sorted.
    """
    size = how.batch_size * how.world_size
    pools = np.split(order, range(0, len(order), size * POOL_BATCHES)[1:])
    if not how.row_length:  # by length
        order = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")] for pool in pools])
        whole = len(order) // size * size  # a last, incomplete group stays last
        by_length = order[:whole].reshape(-1, size)
        groups = by_length if rng is None else rng.permutation(by_length)
        return np.concatenate([groups.ravel(), order[whole:]])
    assert rng is not None, "documents are packed together only where they are shuffled"
    fill = (filled_batches(lengths[p], how.row_length, how.batch_size, rng) for p in pools)
    order = np.concatenate([pool[i] for pool, i in zip(pools, fill, strict=True)])
    whole = len(order) // size * size
    # Of each group, rank r takes the indices r, r + world size, …: its own batch.
    batches = order[:whole].reshape(-1, how.world_size, how.batch_size)
    return np.concatenate([batches.transpose(0, 2, 1).ravel(), order[whole:]])

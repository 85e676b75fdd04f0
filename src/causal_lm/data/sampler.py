"""The order of documents: a function of (seed, epoch, rank) and of where a resumed run goes on."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

POOL_BATCHES = 100  # batches within which documents are sorted by length
CHUNK_INDICES = 2**16  # indices that are turned into Python integers at a time


class Start(NamedTuple):
    """Where a run goes on in its documents; by default, at the first of the first epoch."""

    batches: int = 0  # micro-batches that were read before, over all epochs
    epoch: int = 0
    segments: Sequence[tuple[int, int]] = ()
    """What was read of this epoch: (bucket size, documents) of each resumed part; the bucket size
    is 0 where documents were not sorted by length. Replayed in turn, they give what is left."""


class DocumentSampler(Sampler[int]):
    """Indices of every document once per epoch over all ranks, in a new order each epoch.

    A resumed run may read the rest of an epoch in batches of another size, on more or fewer ranks,
    or in another layout, as its position is counted in documents.

    All ranks must take the same number of steps. Where torch's ``DistributedSampler`` repeats
    documents to get there, which an evaluation then counts twice, this one gives index -1, which
    collates to a row of PAD.

    Args:
        size: number of documents.
        shuffle: draw an order per epoch from ``seed``; otherwise 0, 1, 2 …
        rank, world_size: this process takes every ``world_size``-th index, from ``rank`` on.
        by_length: batch documents of similar length together (:func:`bucketed`).
        lengths: returns the (size,) tokens of each document, for that.
        batch_size: indices per batch and rank.
        batches_done: returns the number of batches that this rank has finished, over all epochs;
            called as each epoch starts, so that a resumed run continues where it stopped.
        start: where the run goes on, from the position that was saved.
    """

    def __init__(
        self, size: int, *, shuffle: bool, seed: int = 0, rank: int = 0, world_size: int = 1,
        by_length: bool = False, lengths: Callable[[], np.ndarray] = lambda: np.empty(0),
        batch_size: int = 1, batches_done: Callable[[], int] = lambda: 0,
        start: Start | None = None,
    ) -> None:  # fmt: skip
        self.size, self.shuffle, self.seed = size, shuffle, seed
        self.rank, self.world_size, self.lengths = rank, world_size, lengths
        self.batches_done, self.start = batches_done, start or Start()
        self.group_size = batch_size * world_size  # documents that all ranks read at a step
        self.bucket_size = self.group_size if by_length else 0

    def __len__(self) -> int:
        return -(-self.size // self.world_size)

    def __iter__(self) -> Iterator[int]:
        return self.remaining_indices(self.batches_done())

    def n_batches(self, segments: Sequence[tuple[int, int]] = ()) -> int:
        """Batches of an epoch that are left after these segments."""
        return -(-(self.size - sum(n for _, n in segments)) // self.group_size)

    def position(self, batches_done: int) -> Start:
        """Where a run goes on that stops after ``batches_done`` batches over all epochs."""
        batches, epoch, segments = self.start
        batches = batches_done - batches
        if batches >= (left := self.n_batches(segments)):
            epochs, batches = divmod(batches - left, self.n_batches())
            epoch, segments = epoch + 1 + epochs, ()
        parts, read = list(segments), batches * self.group_size
        if read and parts and parts[-1][0] == self.bucket_size:  # arranged alike: one part
            read += parts.pop()[1]
        return Start(batches_done, epoch, parts + ([(self.bucket_size, read)] if read else []))

    def remaining_indices(self, batches_done: int) -> Iterator[int]:
        """The rest of the current epoch, after ``batches_done`` batches over all epochs."""
        _, epoch, segments = self.position(batches_done)
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(self.size) if self.shuffle else np.arange(self.size)
        sorted_by = 0
        for bucket_size, documents in [*segments, (self.bucket_size, 0)]:
            if bucket_size not in (0, sorted_by):
                order = bucketed(order, self.lengths(), bucket_size, rng if self.shuffle else None)
            sorted_by, order = bucket_size, order[documents:]
        local = order[self.rank :: self.world_size]
        for start in range(0, len(local), CHUNK_INDICES):
            yield from local[start : start + CHUNK_INDICES].tolist()
        yield from [-1] * (-(-len(order) // self.world_size) - len(local))


def bucketed(
    order: np.ndarray, lengths: np.ndarray, group_size: int, rng: np.random.Generator | None
) -> np.ndarray:
    """Reorder the (D,) indices ``order`` into groups of similar length, whose order ``rng`` draws.

    A group is what all ranks together read at a step. Documents are sorted by length within pools
    of :data:`POOL_BATCHES` groups, so that which of them share a batch still changes from epoch to
    epoch. With ``rng`` None the groups stay sorted.
    """
    edges = range(0, len(order), group_size * POOL_BATCHES)[1:]
    pools = [pool[np.argsort(lengths[pool], kind="stable")] for pool in np.split(order, edges)]
    by_length = np.concatenate(pools)
    if rng is None:
        return by_length
    whole = len(order) // group_size * group_size  # a last, incomplete group stays last
    groups = rng.permutation(by_length[:whole].reshape(-1, group_size))
    return np.concatenate([groups.ravel(), by_length[whole:]])

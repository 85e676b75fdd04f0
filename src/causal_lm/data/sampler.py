"""The order of documents: a function of (seed, epoch, rank), with no state to save."""

from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Sampler

POOL_BATCHES = 100
"""Batches within which documents are sorted by length."""
CHUNK_INDICES = 2**16
"""Indices that are turned into Python integers at a time."""


class DocumentSampler(Sampler[int]):
    """Indices of every document once per epoch over all ranks, in a new order each epoch.

    All ranks must take the same number of steps. Where torch's ``DistributedSampler`` repeats
    documents to get there, which an evaluation then counts twice, this one gives index -1, which
    collates to a row of PAD.

    Args:
        size: number of documents.
        shuffle: draw an order per epoch from ``seed``; otherwise 0, 1, 2 …
        rank, world_size: this process takes every ``world_size``-th index, from ``rank`` on.
        lengths: (size,) tokens of each document: batch those of similar length together (see
            :func:`bucketed`); None: keep the drawn order.
        batch_size: documents per batch and rank.
        done: returns the number of batches that this rank has finished, over all epochs; asked at
            the start of each epoch, so that a resumed run continues inside its epoch.
    """

    def __init__(
        self, size: int, *, shuffle: bool, seed: int = 0, rank: int = 0, world_size: int = 1,
        lengths: np.ndarray | None = None, batch_size: int = 1, done: Callable[[], int] = lambda: 0,
    ) -> None:  # fmt: skip
        self.size, self.shuffle, self.seed = size, shuffle, seed
        self.rank, self.world_size = rank, world_size
        self.lengths, self.batch_size, self.done = lengths, batch_size, done

    def __len__(self) -> int:
        return -(-self.size // self.world_size)

    def __iter__(self) -> Iterator[int]:
        return self.rest(self.done())

    def rest(self, done: int) -> Iterator[int]:
        """The remaining indices of the current epoch, after ``done`` batches over all epochs."""
        epoch, batches = divmod(done, -(-len(self) // self.batch_size))
        draw = np.random.default_rng([self.seed, epoch])
        order = draw.permutation(self.size) if self.shuffle else np.arange(self.size)
        if self.lengths is not None:
            group = self.batch_size * self.world_size
            order = bucketed(order, self.lengths, group, draw if self.shuffle else None)
        own = order[self.rank :: self.world_size]
        for start in range(batches * self.batch_size, len(own), CHUNK_INDICES):
            yield from own[start : start + CHUNK_INDICES].tolist()
        yield from [-1] * (len(self) - len(own))


def bucketed(
    order: np.ndarray, lengths: np.ndarray, group: int, draw: np.random.Generator | None
) -> np.ndarray:
    """Reorder the (D,) indices ``order`` into groups of similar length, in an order from ``draw``.

    A group is what all ranks together read at a step. Documents are sorted by length within pools
    of :data:`POOL_BATCHES` groups, so that which of them share a batch still changes from epoch to
    epoch. With ``draw`` None the groups stay sorted.
    """
    edges = range(group * POOL_BATCHES, len(order), group * POOL_BATCHES)
    pools = [pool[np.argsort(lengths[pool], kind="stable")] for pool in np.split(order, edges)]
    by_length = np.concatenate(pools)
    if draw is None:
        return by_length
    whole = len(order) // group * group  # a last, incomplete group stays last
    groups = draw.permutation(by_length[:whole].reshape(-1, group))
    return np.concatenate([groups.ravel(), by_length[whole:]])

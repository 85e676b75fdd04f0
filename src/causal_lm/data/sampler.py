"""The order of documents: a function of (seed, epoch, rank), with no state to save."""

from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Sampler

POOL_BATCHES = 100  # batches within which documents are sorted by length
CHUNK_INDICES = 2**16  # indices that are turned into Python integers at a time


class DocumentSampler(Sampler[int]):
    """Indices of every document once per epoch over all ranks, in a new order each epoch.

    All ranks must take the same number of steps. Where torch's ``DistributedSampler`` repeats
    documents to get there, which an evaluation then counts twice, this one gives index -1, which
    collates to a row of PAD.

    Args:
        size: number of documents.
        shuffle: draw an order per epoch from ``seed``; otherwise 0, 1, 2 …
        rank, world_size: this process takes every ``world_size``-th index, from ``rank`` on.
        lengths: (size,) tokens of each document: batch like ones together (:func:`bucketed`).
        batch_size: indices per batch and rank.
        batches_done: returns the number of batches that this rank has finished, over all epochs;
            called as each epoch starts, so that a resumed run continues where it stopped.
    """

    def __init__(
        self, size: int, *, shuffle: bool, seed: int = 0, rank: int = 0, world_size: int = 1,
        lengths: np.ndarray | None = None, batch_size: int = 1,
        batches_done: Callable[[], int] = lambda: 0,
    ) -> None:  # fmt: skip
        self.size, self.shuffle, self.seed = size, shuffle, seed
        self.rank, self.world_size = rank, world_size
        self.lengths, self.batch_size, self.batches_done = lengths, batch_size, batches_done

    def __len__(self) -> int:
        return -(-self.size // self.world_size)

    def __iter__(self) -> Iterator[int]:
        return self.remaining_indices(self.batches_done())

    def remaining_indices(self, batches_done: int) -> Iterator[int]:
        """The rest of the current epoch, after ``batches_done`` batches over all epochs."""
        epoch, batches = divmod(batches_done, -(-len(self) // self.batch_size))
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(self.size) if self.shuffle else np.arange(self.size)
        if self.lengths is not None:
            group_size = self.batch_size * self.world_size
            order = bucketed(order, self.lengths, group_size, rng if self.shuffle else None)
        local = order[self.rank :: self.world_size]
        for start in range(batches * self.batch_size, len(local), CHUNK_INDICES):
            yield from local[start : start + CHUNK_INDICES].tolist()
        yield from [-1] * (len(self) - len(local))


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

"""Which document comes when: a function of (seed, epoch, rank), with nothing to lose on the way."""

from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Sampler

POOL = 100
"""Batches among which documents are sorted by length."""
CHUNK_DOCUMENTS = 2**16
"""Documents that are Python numbers at a time."""


class DocumentSampler(Sampler[int]):
    """Every document once per epoch, over all ranks; the order is drawn anew each epoch.

    Ranks must take the same number of steps. torch's ``DistributedSampler`` gets there by
    repeating documents, which then count twice in the evaluation. Here the gap is filled with
    index -1, which collates to a row of PAD and counts nothing.

    Where it begins is asked each time, so a run that is continued goes on inside its epoch.

    Args:
        size: number of documents.
        shuffle: draw an order per epoch from ``seed``; otherwise 0, 1, 2 …
        seed: of the order.
        rank, world_size: this process takes every ``world_size``-th document from ``rank`` on.
        lengths: (size,) of the documents; put those of like length together (see
            :func:`bucketed`). None leaves the order as drawn.
        batch_size: documents per batch and rank, which a bucket is made of.
        done: how many batches of this rank are behind, over all epochs.
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
        """What is left of an epoch when so many batches are behind, over all epochs."""
        epoch, begun = divmod(done, -(-len(self) // self.batch_size))
        draw = np.random.default_rng([self.seed, epoch])  # the pair: no two runs share one
        order = draw.permutation(self.size) if self.shuffle else np.arange(self.size)
        if self.lengths is not None:
            group = self.batch_size * self.world_size
            order = bucketed(order, self.lengths, group, draw if self.shuffle else None)
        mine = order[self.rank :: self.world_size]
        for start in range(
            begun * self.batch_size, len(mine), CHUNK_DOCUMENTS
        ):  # Python's are large
            yield from mine[start : start + CHUNK_DOCUMENTS].tolist()
        yield from [-1] * (len(self) - len(mine))


def bucketed(
    order: np.ndarray, lengths: np.ndarray, group: int, draw: np.random.Generator | None
) -> np.ndarray:
    """The same documents in groups of like length, the groups in a drawn order.

    Within each :data:`POOL` groups' worth of ``order`` documents are sorted by length, so which
    documents meet still changes from epoch to epoch.
    """
    edges = range(group * POOL, len(order), group * POOL)
    pools = [pool[np.argsort(lengths[pool], kind="stable")] for pool in np.split(order, edges)]
    sorted_ = np.concatenate(pools)
    if draw is None:
        return sorted_
    whole = len(order) // group * group  # a last, smaller group stays last
    return np.concatenate([draw.permutation(sorted_[:whole].reshape(-1, group)).ravel(),
                           sorted_[whole:]])  # fmt: skip

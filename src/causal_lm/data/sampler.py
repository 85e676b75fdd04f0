"""Which document comes when: a function of (seed, epoch, rank), with nothing to lose on the way."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class DocumentSampler(Sampler[int]):
    """Every document once per epoch, over all ranks; the order is drawn anew each epoch.

    Ranks must take the same number of steps. torch's ``DistributedSampler`` gets there by
    repeating documents, which then count twice in the evaluation. Here the gap is filled with
    index -1, which collates to a row of PAD and counts nothing.

    Args:
        size: number of documents.
        shuffle: draw an order per epoch from ``seed``; otherwise 0, 1, 2 …
        seed: of the order.
        rank, world_size: this process takes every ``world_size``-th document from ``rank`` on.
    """

    def __init__(
        self, size: int, *, shuffle: bool, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.size, self.shuffle, self.seed = size, shuffle, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.size // self.world_size)

    def __iter__(self) -> Iterator[int]:
        order = np.arange(self.size)
        if self.shuffle:  # seeded by the pair: seed 0's epoch 1 is not seed 1's epoch 0
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)
        filler = np.full(len(self) * self.world_size - self.size, -1)
        yield from np.concatenate([order, filler])[self.rank :: self.world_size].tolist()

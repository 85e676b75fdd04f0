"""A data set of your own: a class with ``load() -> Corpus``, and a YAML that names it.

python train.py --config-dir examples/configs data=sums

The YAML is configs/data/sums.yaml beside this file. For text in files of your own, see the keys of
`data=text` first; to tokenize large text once and cache it, derive from
`causal_lm.data.sources.base.TextSource`, as `causal_lm.data.sources.docstrings` does.
"""

import random

import torch

from causal_lm.data.documents import Corpus, Documents
from causal_lm.data.tokenizers import ByteTokenizer


class Sums:
    """Source of additions such as ``17+25=42``; only what follows ``=`` is learned.

    Args:
        largest: largest number to add.
        val_fraction: fraction of the pairs that are held out.
        seed: of the order of the pairs, and so of the split.
    """

    def __init__(self, largest: int, val_fraction: float = 0.1, seed: int = 0) -> None:
        self.largest, self.val_fraction, self.seed = largest, val_fraction, seed

    def load(self) -> Corpus:
        numbers = range(self.largest + 1)
        pairs = [(a, b) for a in numbers for b in numbers]
        random.Random(self.seed).shuffle(pairs)
        held_out = int(len(pairs) * self.val_fraction)
        tokenizer = ByteTokenizer()
        train, val = (
            self._documents(part, tokenizer) for part in (pairs[held_out:], pairs[:held_out])
        )
        return Corpus(train, val, tokenizer)

    @staticmethod
    def _documents(pairs: list[tuple[int, int]], tokenizer: ByteTokenizer) -> Documents:
        """``BOS a+b=c EOS`` for each pair, end to end, with a loss mask that omits ``a+b=``."""
        tokens, loss_mask, offsets = [], [], [0]
        for a, b in pairs:
            prompt, answer = tokenizer.encode(f"{a}+{b}="), tokenizer.encode(f"{a + b}")
            tokens += [tokenizer.bos_id, *prompt, *answer, tokenizer.eos_id]
            loss_mask += [False] * (1 + len(prompt)) + [True] * (len(answer) + 1)
            offsets.append(len(tokens))
        return Documents(torch.tensor(tokens), torch.tensor(offsets), torch.tensor(loss_mask))

"""SyntheticLanguage: a source whose lowest possible loss (entropy floor) is known."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from causal_lm.data.documents import Corpus, Documents
from causal_lm.data.tokenizers import BOS, EOS, SPECIAL, SymbolTokenizer


class MarkovLanguage:
    """Documents ``BOS s1 … sn EOS`` in which each symbol depends on the one before it.

    Each symbol may be followed by ``successors`` others (never by itself), with probabilities
    drawn once from ``seed``. After each symbol the document ends with probability ``1 / mean``, and
    after ``max_symbols`` always, so about three quarters of a padded batch is PAD.
    """

    def __init__(
        self, symbols: int, successors: int, mean: float, max_symbols: int, seed: int
    ) -> None:
        self.p_end, self.max_symbols = 1 / mean, max_symbols
        generator = torch.Generator().manual_seed(seed)
        first = len(SPECIAL)
        transitions = torch.zeros(first + symbols, first + symbols, dtype=torch.float64)  # (V, V)
        transitions[BOS, first:] = 1 / symbols
        for symbol in range(symbols):
            others = torch.randperm(symbols - 1, generator=generator)[:successors]
            others = others + (others >= symbol)  # never itself
            weights = torch.rand(successors, generator=generator, dtype=torch.float64) + 0.1
            transitions[first + symbol, first + others] = weights / weights.sum()
        self.transitions = transitions  # probability of the next symbol, where the document goes on

    def sample(self, count: int, generator: torch.Generator) -> Documents:
        """Draw ``count`` complete documents at once, symbol by symbol."""
        columns, lengths = [torch.full((count,), BOS)], torch.full((count,), 2)
        unfinished = torch.ones(count, dtype=torch.bool)
        for _ in range(self.max_symbols):
            probabilities = self.transitions[columns[-1][unfinished]]
            symbol = torch.full((count,), EOS)
            symbol[unfinished] = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
            columns.append(symbol)
            lengths += unfinished
            unfinished &= torch.rand(count, generator=generator) >= self.p_end
        columns.append(torch.full((count,), EOS))
        padded = torch.stack(columns, dim=1)  # (D, max_symbols + 2), EOS from the end on
        tokens = padded[torch.arange(padded.shape[1]) < lengths[:, None]].int()
        return Documents(tokens, F.pad(lengths.cumsum(0), (1, 0)))

    def nll(self, documents: Documents) -> tuple[float, int]:
        """Sum of the true negative log-likelihood in nats, and number of targets."""
        tokens, starts = documents.tokens[:].long(), documents.offsets[:-1]
        positions = torch.arange(len(tokens)) - starts.repeat_interleave(documents.lengths)
        is_target = positions[1:] > 0  # BOS is given
        previous, following = tokens[:-1][is_target], tokens[1:][is_target]
        symbols = positions[:-1][is_target]  # up to the token before each target: none at BOS
        p_end = torch.full(symbols.shape, self.p_end, dtype=torch.float64)
        p_end[symbols == 0], p_end[symbols == self.max_symbols] = 0.0, 1.0
        p_symbol = (1 - p_end) * self.transitions[previous, following]
        probability = torch.where(following == EOS, p_end, p_symbol)
        return float(-probability.log().sum()), len(following)

    def legal(self, previous: Tensor, following: Tensor) -> Tensor:
        is_possible = self.transitions.to(previous.device)[previous, following] > 0
        return torch.where(following == EOS, previous >= len(SPECIAL), is_possible)


@dataclass(kw_only=True)
class SyntheticLanguage:
    """Source of documents of a seeded :class:`MarkovLanguage`; needs no download and no disk. With
    more than one copy it knows neither the entropy floor nor which tokens are legal."""

    symbols: int
    successors: int
    mean: float
    max_length: int  # tokens of the longest document, BOS and EOS included
    train_documents: int
    val_documents: int  # drawn by a generator of their own
    seed: int
    test_documents: int = 0  # the same; 0: there is no test split
    copies: int = 1  # how often the symbol sequence of each document is repeated
    copies_after: int = 0  # number of unrepeated training documents that come first

    def load(self) -> Corpus:
        sizes = (self.train_documents, self.val_documents, self.test_documents)
        generators = [torch.Generator().manual_seed(self.seed + 1 + i) for i in range(3)]
        tokenizer, language = SymbolTokenizer(self.symbols), self._language(copies=1)
        if self.copies == 1:
            train, val, test = map(language.sample, sizes, generators)
            return Corpus(train, val, tokenizer, language, test)
        plain = language.sample(self.copies_after, generators[0])
        train, val, test = map(self._sample_repeated, sizes, generators)
        tokens = torch.cat([plain.tokens[:], train.tokens[:]])
        offsets = torch.cat([plain.offsets[:-1], train.offsets[:] + len(plain.tokens)])
        return Corpus(Documents(tokens, offsets), val, tokenizer, test=test)

    def _language(self, copies: int) -> MarkovLanguage:
        longest = (self.max_length - 2) // copies
        return MarkovLanguage(self.symbols, self.successors, self.mean, longest, self.seed)

    def _sample_repeated(self, size: int, generator: torch.Generator) -> Documents:
        documents = self._language(self.copies).sample(size, generator)
        lists = (documents[i].tokens.tolist() for i in range(size))
        return Documents.from_lists([bos, *s * self.copies, eos] for bos, *s, eos in lists)

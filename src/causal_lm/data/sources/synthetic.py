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
    drawn once from ``seed``. After each symbol the document ends with probability ``1 / mean``;
    after ``max_symbols`` it always ends. So lengths are geometric: many documents are short, a
    few are long, and about three quarters of a padded batch is PAD.
    """

    def __init__(
        self, symbols: int, successors: int, mean: float, max_symbols: int, seed: int
    ) -> None:
        self.end, self.max_symbols = 1 / mean, max_symbols
        generator = torch.Generator().manual_seed(seed)
        first = len(SPECIAL)
        chain = torch.zeros(first + symbols, first + symbols, dtype=torch.float64)  # (V, V)
        chain[BOS, first:] = 1 / symbols
        for symbol in range(symbols):
            others = torch.randperm(symbols - 1, generator=generator)[:successors]
            others = others + (others >= symbol)  # never itself
            weights = torch.rand(successors, generator=generator, dtype=torch.float64) + 0.1
            chain[first + symbol, first + others] = weights / weights.sum()
        self.chain = chain
        """(V, V) probability of the next symbol, given that the document goes on."""

    def sample(self, documents: int, generator: torch.Generator) -> Documents:
        """Draw so many complete documents at once, symbol by symbol."""
        columns = [torch.full((documents,), BOS)]
        unfinished = torch.ones(documents, dtype=torch.bool)
        lengths = torch.full((documents,), 2)
        for _ in range(self.max_symbols):
            probabilities = self.chain[columns[-1][unfinished]]
            symbol = torch.full((documents,), EOS)
            symbol[unfinished] = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
            columns.append(symbol)
            lengths += unfinished
            unfinished &= torch.rand(documents, generator=generator) >= self.end
        columns.append(torch.full((documents,), EOS))
        padded = torch.stack(columns, dim=1)  # (D, max_symbols + 2), EOS from the end on
        tokens = padded[torch.arange(padded.shape[1]) < lengths[:, None]].int()
        return Documents(tokens, F.pad(lengths.cumsum(0), (1, 0)))

    def nll(self, documents: Documents) -> tuple[float, int]:
        """Nats and number of all targets of ``documents`` under the true distribution. Nats /
        targets is the lowest expected loss on these documents, exactly."""
        tokens, starts = documents.tokens[:].long(), documents.offsets[:-1]
        is_target = torch.ones(len(tokens), dtype=torch.bool)
        is_target[starts] = False  # BOS is given
        previous, following = tokens[:-1][is_target[1:]], tokens[1:][is_target[1:]]
        # Symbols up to the token before each target: none at BOS.
        symbols = torch.arange(len(tokens)) - starts.repeat_interleave(documents.lengths)
        symbols = symbols[:-1][is_target[1:]]
        end = torch.full(symbols.shape, self.end, dtype=torch.float64)
        end[symbols == 0], end[symbols == self.max_symbols] = 0.0, 1.0
        go_on = (1 - end) * self.chain[previous, following]
        probability = torch.where(following == EOS, end, go_on)
        return float(-probability.log().sum()), len(following)

    def legal(self, previous: Tensor, following: Tensor) -> Tensor:
        """bool, elementwise: ``following`` has a chance after ``previous``."""
        in_chain = self.chain.to(previous.device)[previous, following] > 0
        return torch.where(following == EOS, previous >= len(SPECIAL), in_chain)


@dataclass(kw_only=True)
class SyntheticLanguage:
    """Source of documents of a seeded :class:`MarkovLanguage`; needs no download and no disk.

    With more than one copy it knows neither the entropy floor nor which tokens are legal.
    """

    symbols: int
    successors: int
    mean: float
    max_length: int  # tokens of the longest document, BOS and EOS included
    train_documents: int
    val_documents: int  # drawn from a stream of their own
    seed: int
    copies: int = 1  # times that a document's symbols are repeated, as lines are in crawled text
    copies_after: int = 0  # number of training documents, before those, that are not repeated

    def load(self) -> Corpus:
        sizes = (self.train_documents, self.val_documents)
        streams = [torch.Generator().manual_seed(self.seed + 1 + i) for i in range(2)]
        tokenizer, language = SymbolTokenizer(self.symbols), self._language(copies=1)
        if self.copies == 1:
            train, val = map(language.sample, sizes, streams)
            return Corpus(train, val, tokenizer, language)
        plain = language.sample(self.copies_after, streams[0])
        train, val = map(self._sample_repeated, sizes, streams)
        tokens = torch.cat([plain.tokens[:], train.tokens[:]])
        offsets = torch.cat([plain.offsets[:-1], train.offsets[:] + len(plain.tokens)])
        return Corpus(Documents(tokens, offsets), val, tokenizer)

    def _language(self, copies: int) -> MarkovLanguage:
        longest = (self.max_length - 2) // copies
        return MarkovLanguage(self.symbols, self.successors, self.mean, longest, self.seed)

    def _sample_repeated(self, size: int, stream: torch.Generator) -> Documents:
        """Documents ``BOS s s … s EOS``."""
        documents = self._language(self.copies).sample(size, stream)
        lists = (documents[i].tokens.tolist() for i in range(size))
        return Documents.from_lists([bos, *s * self.copies, eos] for bos, *s, eos in lists)

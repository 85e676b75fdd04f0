"""A language whose own probabilities are known, so that the lowest possible loss is known too."""

import torch
from torch import Tensor

from causal_lm.data.documents import Corpus, Documents
from causal_lm.data.tokenizers import BOS, EOS, SPECIAL, Symbols


class MarkovLanguage:
    """Documents ``BOS s1 … sn EOS`` in which each symbol depends on the one before it.

    Each symbol may be followed by ``successors`` others (never by itself), with probabilities
    drawn once from ``seed``. After each symbol the document ends with probability ``1 / mean``;
    after ``max_symbols`` it ends for certain. Lengths are therefore geometric: many short
    documents, a long tail, and about three quarters of a padded batch is PAD.

    Args:
        symbols: size of the alphabet.
        successors: symbols that may follow each symbol.
        mean: of the geometric length, in symbols, before the cut at ``max_symbols``.
        max_symbols: longest document.
        seed: of the language itself.
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
        """(V, V) probability of the next symbol, given that there is one."""

    def sample(self, documents: int, generator: torch.Generator) -> Documents:
        """Draw whole documents, all of them at once, symbol by symbol."""
        columns = [torch.full((documents,), BOS)]
        going = torch.ones(documents, dtype=torch.bool)
        lengths = torch.ones(documents, dtype=torch.int64)
        for _ in range(self.max_symbols):
            symbol = torch.full((documents,), EOS)
            symbol[going] = torch.multinomial(
                self.chain[columns[-1][going]], 1, generator=generator
            ).squeeze(1)
            columns.append(symbol)
            lengths += going
            going &= torch.rand(documents, generator=generator) >= self.end
        columns.append(torch.full((documents,), EOS))
        rows = torch.stack(columns, dim=1)  # (D, max_symbols + 2), EOS from the end on
        lengths += 1
        flat = rows[torch.arange(rows.shape[1]) < lengths[:, None]].int()
        return Documents(flat, torch.nn.functional.pad(lengths.cumsum(0), (1, 0)))

    def nll(self, documents: Documents) -> tuple[float, int]:
        """(nats, targets): the negative log-probability of every target under the language.

        Their quotient is the exact lowest expected loss on these documents.
        """
        flat = documents.tokens[:].long()
        targets = torch.ones(len(flat), dtype=torch.bool)
        starts = documents.offsets[:-1]
        targets[starts] = False  # BOS is given
        previous, following = flat[:-1][targets[1:]], flat[1:][targets[1:]]
        ending = following == EOS
        # Symbols so far, at the token before each target: BOS sits at place 0 of its document.
        place = torch.arange(len(flat)) - starts.repeat_interleave(documents.lengths)
        place = place[:-1][targets[1:]]
        end = torch.full(place.shape, self.end, dtype=torch.float64)
        end[place == 0], end[place == self.max_symbols] = 0.0, 1.0
        probability = torch.where(ending, end, (1 - end) * self.chain[previous, following])
        return float(-probability.log().sum()), len(following)

    def legal(self, previous: Tensor, following: Tensor) -> Tensor:
        """bool, elementwise: the language gives ``following`` a chance after ``previous``."""
        symbol_before = previous >= len(SPECIAL)
        return torch.where(
            following == EOS, symbol_before, self.chain.to(previous.device)[previous, following] > 0
        )


class Synthetic:
    """Source of a seeded :class:`MarkovLanguage`; nothing to download, nothing on disk.

    Args:
        train_documents, val_documents: how many to draw, from independent streams.
        max_length: tokens of the longest document, BOS and EOS counted.
        copies: times that a document's symbols are written, one after the other, as crawled text
            repeats its lines. With more than one the source knows neither floor nor legality.
        copies_after: training documents, before those, that are written once.
        Others: see :class:`MarkovLanguage`.
    """

    def __init__(
        self,
        *,
        symbols: int,
        successors: int,
        mean: float,
        max_length: int,
        train_documents: int,
        val_documents: int,
        seed: int,
        copies: int = 1,
        copies_after: int = 0,
    ) -> None:
        self.language, self.short = (
            MarkovLanguage(symbols, successors, mean, (max_length - 2) // times, seed)
            for times in (1, copies)
        )
        self.sizes, self.symbols, self.seed = (train_documents, val_documents), symbols, seed
        self.copies, self.copies_after = copies, copies_after

    def load(self) -> Corpus:
        streams = [torch.Generator().manual_seed(self.seed + 1 + i) for i in range(2)]
        if self.copies == 1:
            train, val = map(self.language.sample, self.sizes, streams)
            return Corpus(train, val, Symbols(self.symbols), self.language)
        once = self.language.sample(self.copies_after, streams[0])
        train, val = map(self._copied, self.sizes, streams)
        tokens = torch.cat([once.tokens[:], train.tokens[:]])
        offsets = torch.cat([once.offsets[:-1], train.offsets[:] + len(once.tokens)])
        return Corpus(Documents(tokens, offsets), val, Symbols(self.symbols))

    def _copied(self, size: int, stream: torch.Generator) -> Documents:
        """BOS s EOS -> BOS s s … s EOS."""
        documents = self.short.sample(size, stream)
        rows = (documents[i].tokens.tolist() for i in range(size))
        return Documents.from_lists([*row[:1], *row[1:-1] * self.copies, *row[-1:]] for row in rows)

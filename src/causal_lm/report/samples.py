"""What the model writes, in figures and in text."""

from dataclasses import asdict, dataclass

from torch import Tensor

from causal_lm.data.documents import Language
from causal_lm.data.tokenizers import Tokenizer, show
from causal_lm.generation import until_eos


@dataclass(frozen=True)
class SampleFigures:
    """Shares in [0, 1] over samples that ran to full length, whatever they said on the way.

    pad_eos_share: of all generated tokens, those that are PAD or EOS. A model that was trained
        on PAD goes on writing it after the first EOS.
    repeat_share: of all generated tokens, those equal to the token before. A model that was
        trained without the shift repeats its input.
    legal_rate: of the transitions up to the first EOS, those that the language allows; None where
        the source does not know.
    """

    pad_eos_share: float
    repeat_share: float
    legal_rate: float | None


def measure(rows: Tensor, tokenizer: Tokenizer, language: Language | None) -> SampleFigures:
    """rows: (B, T) ids, each beginning with BOS (which is given, not generated)."""
    previous, generated = rows[:, :-1], rows[:, 1:]
    ends = generated == tokenizer.eos_id
    legal_rate = None
    if language is not None:
        judged = ends.cumsum(dim=1) - ends.long() == 0  # nothing ended before this token
        legal_rate = float(language.legal(previous, generated)[judged].double().mean())
    return SampleFigures(
        pad_eos_share=float((ends | (generated == tokenizer.pad_id)).double().mean()),
        repeat_share=float((generated == previous).double().mean()),
        legal_rate=legal_rate,
    )


def printable(text: str) -> str:
    """Control characters as escapes: a sample must not drive the terminal that shows it."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def as_text(rows: Tensor, tokenizer: Tokenizer, figures: SampleFigures) -> str:
    """The samples, each to its first EOS, with the special tokens that follow in a row shown."""
    lines = [f"{name} {value}" for name, value in asdict(figures).items() if value is not None]
    for number, row in enumerate(rows.tolist(), start=1):
        document = until_eos(row, tokenizer.eos_id)
        rest = row[len(document) :][:8]
        after = " ".join(show(tokenizer, token) for token in rest)
        lines += ["", f"--- {number}", printable(tokenizer.decode(document))]
        if rest:
            lines.append(f"    after <eos>: {after} …")
    return "\n".join(lines) + "\n"

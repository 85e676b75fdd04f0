"""Chats, lists of messages, as context and learned text in turn: only the assistant is learned."""

import re
from functools import partial
from itertools import chain, pairwise
from typing import Any, TypeGuard

from causal_lm import extras
from causal_lm.data.tokenize_corpus import Rendered, Segments


def is_text(value: Any) -> TypeGuard[str]:
    """Whether a value is a string, without half surrogate pairs (JSON can spell these)."""
    return isinstance(value, str) and value.encode(errors="ignore").decode() == value


def segments_of(messages: list[Any], template: "ChatTemplate | None" = None) -> Segments:
    """A chat through the last turn of the assistant, by a tokenizer's own ``template``, or by ours:
    EOS is put behind each turn of the assistant.

    Raises ValueError where a message has no text as role or content, or none is the assistant's, or
    the template cannot show the chat.

    >>> segments_of([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hm"}])
    ('user:\\nHi\\nassistant:\\n', 'Hm')
    """
    segments, context = list[str](), ""
    for message in messages:
        values = message if isinstance(message, dict) else {}
        role, content = (values.get(key) for key in ("role", "content"))
        if not is_text(role) or not is_text(content):
            raise ValueError(f"a message needs texts as role and content, not {message!r:.40}")
        if role == "assistant":
            segments, context = [*segments, f"{context}{role}:\n", content], ""
        else:
            context += f"{role}:\n{content}\n"
    if not segments:
        raise ValueError("no message has the role assistant")
    return template.segments(messages) if template else tuple(segments)


class ChatTemplate:
    """The Jinja template of a tokenizer that has one, as transformers renders it (in a sandbox).

    The assistant's turns are what it marks with ``{% generation %}``. Without such marks, a turn is
    what a message adds to the prompt for it, up to the special token that ends the turn."""

    def __init__(self, tokenizer: Any) -> None:
        library = extras.load("transformers.utils.chat_template_utils", "huggingface")
        template, special = tokenizer.chat_template, tokenizer.special_tokens
        ids = {f"{role}_token": getattr(tokenizer, f"{role}_id") for role in ("pad", "bos", "eos")}
        names = {name: special[i] for name, i in ids.items()}
        self._render = partial(library.render_jinja_template, chat_template=template, **names)
        self._is_marked = re.search(r"{%-?\s*generation\s*-?%}", template)
        self._special = re.compile("|".join(map(re.escape, special.values())))

    def segments(self, messages: list[Any]) -> Rendered:
        """The rendered text, cut at both ends of each turn of the assistant. Raises ValueError
        where a message holds a special token, or the template fails."""
        for text in chain.from_iterable((m["role"], m["content"]) for m in messages):
            if found := self._special.search(text):
                raise ValueError(f"a message holds the special token {found[0]}")
        with extras.reading("the chat template cannot show it"):
            if self._is_marked:
                (text,), (turns,) = self._render([messages], return_assistant_tokens_mask=True)
            else:
                text, turns = self._render_by_turn(messages)
        return Rendered(text[start:stop] for start, stop in pairwise([0, *chain(*turns)]))

    def _render_by_turn(self, messages: list[Any]) -> tuple[str, list[tuple[int, int]]]:
        text, turns = "", list[tuple[int, int]]()
        for i in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
            (prompt,), _ = self._render([messages[:i]], add_generation_prompt=True)
            (whole,), _ = self._render([messages[: i + 1]])
            if not (prompt.startswith(text) and whole.startswith(prompt)):
                raise ValueError("a turn changes what is before it; mark turns by {% generation %}")
            ends = [found.end() for found in self._special.finditer(whole, len(prompt))]
            turns.append((len(prompt), ends[-1] if ends else len(whole)))
            text = whole
        return text, turns

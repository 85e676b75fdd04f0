"""Chats, lists of messages, as context and learned text in turn: only the assistant is learned."""

from typing import Any, TypeGuard

from causal_lm.data.tokenize_corpus import Segments


def is_text(value: Any) -> TypeGuard[str]:
    """Whether a value is a string, without half surrogate pairs (JSON can spell these)."""
    return isinstance(value, str) and value.encode(errors="ignore").decode() == value


def segments_of(messages: list[Any]) -> Segments:
    """A chat through the last turn of the assistant; EOS is put behind each of its turns.

    Raises ValueError where a message has no text as role or content, or none is the assistant's.

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
    return tuple(segments)

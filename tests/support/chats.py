"""Chats, and what of them is learned."""

import json

import torch

from causal_lm.data.sources.text_files import TextFiles


def says(role, content):
    return {"role": role, "content": content}


def chat_of(i):
    return [
        says("system", "Add."), says("user", f"{i}+1?"), says("assistant", f"It is {i + 1}."),
        says("user", "Why é?"), says("assistant", "So."),
    ]  # fmt: skip


CHATS = [chat_of(i) for i in range(40)]


def load_chats(folder, chats, name="chats.jsonl", **options):
    """The corpus of chats that are written to a file of ``folder``."""
    rows = [json.dumps({"messages": chat}) for chat in chats]
    (folder / name).write_text("\n".join(rows))
    cache = {"cache_dir": str(folder / "cache"), "val_share": 0.3, "num_proc": 1}
    return TextFiles(path=str(folder / name), field="messages", **cache | options).load()


def documents(corpus):
    return [split[i] for split in (corpus.train, corpus.val) for i in range(len(split))]


def learned(document, tokenizer):
    """The text of each learned run of tokens, and whether it ends in EOS."""
    found, run = [], []
    for token, counts in zip(*map(torch.Tensor.tolist, document), strict=True):
        if counts and token != tokenizer.bos_id:
            run.append(token)
        elif run:
            found.append(run)
            run = []
    return [(tokenizer.decode(run), run[-1] == tokenizer.eos_id) for run in [*found, run] if run]

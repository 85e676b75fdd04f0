"""A short description of a set of documents, by which two of them are told apart."""

import zlib

import numpy as np

from causal_lm.data.documents import Documents

CHUNKS, CHUNK_TOKENS = 16, 2**16  # what is read of the tokens, however many there are


def fingerprint(documents: Documents) -> list[int]:
    """Number of documents, number of tokens, and a CRC of chunks spread evenly over the tokens."""
    tokens, crc = documents.tokens, 0
    step = max(-(-len(tokens) // CHUNKS), CHUNK_TOKENS)
    for start in range(0, len(tokens), step):
        chunk = np.asarray(tokens[start : start + CHUNK_TOKENS], dtype="<i4")
        crc = zlib.crc32(chunk.tobytes(), crc)
    return [len(documents), len(tokens), crc]

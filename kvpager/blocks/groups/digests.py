"""Digests of a prompt's prefixes: they name the blocks of groups with a window."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from kvpager.blocks.mm_hashes import MMHashes
from kvpager.plans import Int32

_FRONT = bytes(32)  # the digest before the first token


def extend_digests(digests: list[bytes], blocks: Int32, mm_hashes: MMHashes) -> None:
    """Append the digests of further blocks of token ids, [n, block_size]. O(tokens).

    A digest covers all tokens up to the end of its block, and their `mm_hashes`. It is the same on
    every machine.
    """
    before = digests[-1] if digests else _FRONT
    begin, end = len(digests), len(digests) + len(blocks)
    data = np.ascontiguousarray(blocks, "<i4")
    for stop, tag in mm_hashes.stretches(blocks.shape[1], begin, end):
        shown = b"" if tag is None else repr(tag).encode()
        for position in range(len(digests), stop):
            tokens = data[position - begin].tobytes()
            before = blake2b(before + tokens + shown, digest_size=32).digest()
            digests.append(before)

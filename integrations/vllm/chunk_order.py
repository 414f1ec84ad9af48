"""The order of a prompt's chunks. vLLM tells their positions, not which chunk continues which."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from kvpager.integrations.vllm.interface import ReqContext
from kvpager.integrations.vllm.places import position

_GROUP_BYTES = 4  # a key ends in the number of its group of layers

Seen = dict[bytes, dict[int, bytes]]  # keys of one request by group and position


class Ancestry(NamedTuple):
    """Where chunks are in their prompt.

    Attributes:
        depths: for each key, how many chunks of its group come before it.
        parents: for each key, the key of the chunk right before it, or None.
    """

    depths: list[int]
    parents: list[bytes | None]


class ChunkOrder:
    """Depths and parents of chunks.

    The position of a chunk is the number of tokens up to its end. So it is a multiple of the tokens
    per chunk of its group. The greatest common divisor of the positions seen is that number.
    """

    def __init__(self) -> None:
        self._chunk_tokens: dict[bytes, int] = {}  # of each group, as far as seen

    def ancestry(self, keys: Iterable[bytes], req_context: ReqContext, seen: Seen) -> Ancestry:
        """Return where `keys` are, and add them to `seen`, the keys of the request. O(keys).

        A group with a window may skip chunks. A chunk has no parent if it follows a gap,
        or if its predecessor was not seen.
        """
        depths, parents = list[int](), list[bytes | None]()
        for key in keys:
            group = key[-_GROUP_BYTES:]
            known = seen.setdefault(group, {})
            end = position(req_context, key)
            tokens = math.gcd(self._chunk_tokens.get(group, 0), end)
            self._chunk_tokens[group] = tokens
            depths.append(max(end // tokens - 1, 0) if tokens else 0)
            parents.append(known.get(end - tokens) if end else None)
            known[end] = key
        return Ancestry(depths, parents)


def in_order(keys: Iterable[bytes], req_context: ReqContext) -> list[bytes]:
    """Return keys in the order of the prompt, first to last. O(keys log keys)."""
    return sorted(keys, key=lambda key: position(req_context, key))

"""What `kvpager.testing.reference` is made of: handles, counts, and reading what callers pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvpager._text import counted

Pair = tuple[int, int]


class NaiveSequence:
    """A handle, and all that is known of its sequence. A token of unknown id is None."""

    def __init__(self, namespace: str | None) -> None:
        self.namespace = namespace
        self.tokens: list[int | None] = []
        self.blocks: list[int] = []
        self.host_blocks: dict[int, int] = {}  # column -> host block, while swapped
        self.is_swapped = False
        self.num_committed = 0
        self.num_cached_tokens = 0
        self.copies: NDArray[np.int32] = pairs_array([])

    def __len__(self) -> int:
        return len(self.tokens)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"<NaiveSequence: {counted(len(self), 'token')} in blocks {self.blocks}>"


Named = NaiveSequence | list[NaiveSequence]


@dataclass(frozen=True)
class NaiveStats:
    """The counts that the kit looks at; names as in `kvpager.blocks.stats.Stats`."""

    num_blocks: int
    num_free: int
    num_held: int
    num_cached: int
    num_host_blocks: int
    num_host_free: int
    num_sequences: int
    total_evicted: int
    num_kept: int = 0  # it has neither pins nor fences


def pairs_array(pairs: list[Pair]) -> NDArray[np.int32]:
    """Pairs of blocks as int32 [n, 2]. O(pairs)."""
    return np.array(pairs, np.int32).reshape(-1, 2)


def new_tokens(
    sequences: Named, tokens: int | list[int] | list[list[int]], counts: list[int] | None
) -> list[list[int | None]]:
    """What `append` is to add to each sequence; None for a token of unknown id. O(tokens)."""
    single = isinstance(sequences, NaiveSequence)
    num_rows = 1 if single else len(sequences)
    if counts is not None:
        return [[None] * count for count in counts]
    if isinstance(tokens, int):
        return [[None] * tokens for _ in range(num_rows)]
    if single:
        return [list(tokens)]  # type: ignore[arg-type]
    rows = [[ids] if isinstance(ids, int) else list(ids) for ids in tokens]
    if len(rows) != num_rows:
        raise ValueError(f"token ids for {len(rows)} sequences, but {num_rows} were named")
    return rows  # type: ignore[return-value]


def known(tokens: list[int | None]) -> tuple[int, ...]:
    """The ids of tokens that are all known. O(tokens)."""
    return tuple(token for token in tokens if token is not None)


def num_common(a: Iterable[int | None], b: Iterable[int | None]) -> int:
    """How many leading tokens are equal. O(tokens)."""
    count = 0
    for left, right in zip(a, b, strict=False):
        if left != right:
            break
        count += 1
    return count

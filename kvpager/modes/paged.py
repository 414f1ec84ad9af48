"""Paged: blocks anywhere in one tensor, block-first. Attention follows block tables."""

from __future__ import annotations

from typing import NoReturn

from kvpager.modes.plain_memory import PlainMemory
from kvpager.modes.protocol import Memory
from kvpager.storage.layout import StorageLayout


class Paged(PlainMemory):
    """Blocks in ordinary memory, one run of bytes each. There are no rows."""

    name = "paged"
    token_first = None

    def open_rows(  # noqa: D102
        self, memory: Memory, layout: StorageLayout, num_rows: int, num_blocks: int
    ) -> NoReturn:
        raise ValueError(
            'mode="paged": rows are not runs of memory. Read blocks through block tables, or take '
            'mode="virtual".'
        )

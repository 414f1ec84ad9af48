"""What a mode of managing KV memory provides: memory for blocks, and rows over them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kvpager.ops import LayerCaches
from kvpager.plans import Int32
from kvpager.storage.layout import StorageLayout

NO_PAGE = -1


class PageRange(Protocol):
    """A range of addresses, in which each place shows a page of a pool or none."""

    def tensor(self) -> Tensor:
        """Return the range, uint8 [bytes]. Views of it keep the range and its mappings. O(1)."""

    @property
    def is_in_use(self) -> bool:
        """True if a view of a `tensor` still exists. O(tensors)."""

    def enter(self) -> None:
        """Note that work queued from now on may read the range. O(1)."""

    def show(self, changes: Iterable[tuple[int, int, int]]) -> None:
        """Show runs of pages at runs of places. O(pages).

        A change is (place, first page or `NO_PAGE`, count). Raises: the system's error if it
        refuses. Then call `show` again with all changes.
        """

    def part_from_pages(self, place: int, count: int) -> None:
        """Replace the pages at `count` places from `place` on by a private copy. O(bytes)."""


class Pages(Protocol):
    """Pages of memory of one size, as one tensor. Ranges of addresses show the same memory again.

    Attributes:
        page_bytes: bytes of a page.
        pages: all pages, uint8 [pages, page_bytes].
        num_drops: grows when pages are dropped. A page with the same number may then be other
            memory, and ranges still show the old memory.
    """

    page_bytes: int
    pages: Tensor
    num_drops: int

    def resize(self, num_pages: int) -> None:
        """Shrink or grow `pages` to `num_pages` pages. Raises: errors of the allocation."""

    def open_range(self, num_pages: int, num_mappings: int) -> PageRange:
        """Reserve addresses of `num_pages` pages, for at most `num_mappings` runs. O(pages).

        Raises: `ValueError` if the system allows fewer mappings; the system's error if it has no
        addresses left.
        """


class Memory(NamedTuple):
    """The memory of blocks, [blocks, elements per block]. `pool` has its pages, if mappable."""

    tier: Tensor
    pool: Pages | None = None


class Rows(Protocol):
    """Rows of a batch, each of which is one run of tokens in every layer.

    A row shows the blocks of one sequence in order. `caches(layer)` are tensors
    [rows, tokens, heads, dim], which attention reads without a block table.
    """

    @property
    def num_rows(self) -> int:
        """The number of rows."""

    @property
    def num_blocks(self) -> int:
        """The maximum number of blocks of a row."""

    def caches(self, layer: int) -> LayerCaches:
        """Return a layer's keys and values, [rows, tokens, heads, dim]. O(1).

        Slots beyond a row's blocks must not be written. Raises: `IndexError` for an unknown layer.
        """

    def follow(self, rows: Int32, tables: Int32) -> None:
        """Make `rows`, int32 [n], show the blocks of `tables`, int32 [n, columns], -1 for none.

        Call it after each change of block tables, and before the rows are read. O(blocks).
        """

    def detach(self) -> None:
        """Preserve the content of tensors of `caches` that callers still use, if the mode can.

        Call it before the blocks of rows change, except when tokens are only appended. O(bytes) if
        tensors are in use, else O(1).
        """

    def release(self, rows: Int32) -> None:
        """Remove all blocks from rows. O(blocks)."""


class Mode(Protocol):
    """A way to manage KV memory."""

    @property
    def name(self) -> str:
        """ "paged", "virtual" or "reserved"."""

    @property
    def token_first(self) -> int | None:
        """None for block-first blocks. Token-first blocks are a multiple of this many bytes."""

    def allocate(
        self,
        num_blocks: int,
        layout: StorageLayout,
        dtype: torch.dtype,
        device: torch.device,
        pinned: bool,
    ) -> Memory:
        """Return uninitialised memory for blocks of `layout`, [blocks, elements] of `dtype`.

        O(1), O(bytes) if page-locked. Raises: errors of the allocation; `ValueError` for a layout,
        device or `pinned` that the mode has no memory for.
        """

    def resized(self, memory: Memory, num_blocks: int, pinned: bool) -> Memory:
        """Return memory for `num_blocks` with the contents of the first blocks of `memory`.

        "virtual" shares them, in O(1), on a GPU in O(blocks), and its rows stay as they are. Other
        modes copy, in O(bytes). Raises: errors of the allocation.
        """

    def open_rows(
        self, memory: Memory, layout: StorageLayout, num_rows: int, num_blocks: int
    ) -> Rows:
        """Return rows of up to `num_blocks` blocks each over `memory`. O(rows * blocks).

        Raises: `ValueError` if the mode has no rows, or too few blocks or mappings for them.
        """


def layer_caches(views: list[Tensor]) -> LayerCaches:
    """Return key, value and scales, if there are any, as one object. O(1)."""
    key, value, *scales = views
    return LayerCaches(key, value, (scales[0], scales[1]) if scales else None)

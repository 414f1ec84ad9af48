"""The pages of SGLang's host memory, as blocks of a store."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
_STAGED_BYTES = 64 << 20


class HostPages:
    """Reads and writes pages where SGLang keeps them.

    A page has keys and values of all layers. In layouts that keep a page together, its keys are one
    run of bytes, and its values another. Each run is a block, which moves without a copy. In the
    layout `layer_first` a page is in pieces, so it is copied and is one block.

    Attributes:
        num_parts: blocks of a page.
        part_bytes: bytes of a block.
        batch: pages to move at a time, so that copies take at most 64 MiB.
        text: describes the bytes of a page, for the keys.
    """

    def __init__(self, pool: Any) -> None:
        """Read the layout from the first page of SGLang's pool.

        Raises: `NotImplementedError` for a layout, or a draft model, that kvpager cannot keep.
        """
        self._pool, self._page_size = pool, pool.page_size
        try:
            tensor = pool.get_data_page(0, flat=False)
            page = self._page(0)
        except (NotImplementedError, RuntimeError, ValueError) as error:
            raise NotImplementedError(
                f"kvpager cannot keep pages of SGLang's {type(pool).__name__} in the layout "
                f"{pool.layout!r}: {error}. Set hicache_mem_layout to page_first."
            ) from None
        draft = pool.layer_num - getattr(pool, "target_layer_num", pool.layer_num)
        if draft:
            raise NotImplementedError(
                f"kvpager cannot keep pages that hold {draft} layers of a draft model. "
                "Switch speculative decoding off."
            )
        is_whole = page.flags.c_contiguous
        self._splits = not is_whole and len(page) == 2 and page[0].flags.c_contiguous
        self.num_parts = 2 if self._splits else 1
        self.part_bytes = page.nbytes // self.num_parts
        is_copied = not is_whole and not self._splits
        self.batch = max(1, _STAGED_BYTES // page.nbytes) if is_copied else 1 << 30
        self.text = (
            f"{type(pool).__name__} {pool.layout} {pool.storage_format_tag}; "
            f"page of {pool.page_size} tokens {tuple(tensor.shape)} {pool.dtype}; "
            f"layers {pool.start_layer} to {pool.end_layer}; {self.num_parts} parts"
        )

    def parts(self, host_indices: torch.Tensor) -> list[Bytes]:
        """Return the parts of the pages of tokens, given by their host indices. O(pages)."""
        firsts = host_indices[:: self._page_size].tolist()
        return [part for first in firsts for part in self._parts(first)]

    def _parts(self, first: int) -> Iterator[Bytes]:
        page = self._page(first)
        yield from page if self._splits else (page,)

    def _page(self, first: int) -> Bytes:
        """Return the page whose first token has the index `first`, as a view of its bytes."""
        page = self._pool.get_data_page(first, flat=False).view(torch.uint8)
        view: Bytes = page.numpy()
        return view

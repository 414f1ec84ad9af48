"""The blocks that groups with a window need, and those behind it."""

from __future__ import annotations

import numpy as np

from kvpager.blocks.truncation import Truncation
from kvpager.plans import Int64


def first_visible(num_tokens: int, window: int | None) -> int:
    """Return the first token that the token after `num_tokens` attends to. O(1)."""
    return 0 if window is None else max(num_tokens - window + 1, 0)


def first_needed(num_tokens: int, window: int | None, block_size: int) -> int:
    """Return the first block that the token after `num_tokens` attends to. O(1)."""
    return first_visible(num_tokens, window) // block_size


def blocks_for(
    num_tokens: int, block_size: int, windows: tuple[int | None, ...], max_chunk: int | None
) -> int:
    """Return the most blocks that a sequence holds in all groups. O(groups).

    A group with a window holds at most the window and a chunk of `max_chunk` tokens.
    """
    total = 0
    for window in windows:
        blocks = -(-num_tokens // block_size)
        if window is not None and max_chunk is not None:
            blocks = min(blocks, -(-(window + max_chunk - 1) // block_size) + 1)
        total += blocks
    return total


class Windows:
    """Releases the blocks behind the windows of groups. The caller holds the lock.

    `windows` has an entry for each group; None is skipped.
    """

    def __init__(self, truncation: Truncation, windows: tuple[int | None, ...]) -> None:
        self._truncation = truncation
        self._spans: Int64 = np.array([w for w in windows if w is not None], np.int64)[:, None]

    def free_behind(self, rows: Int64, num_written: Int64) -> None:
        """Release the blocks that tokens after the first `num_written` do not read.

        Both are int64 [groups with a window, n]. O(n * groups + released blocks).
        """
        # The window of the next token includes the token itself.
        starts = np.maximum(num_written - self._spans + 1, 0)
        self._truncation.release_before(rows.ravel(), starts.ravel())

"""Windows: the tokens that a layer attends to, and the blocks that hold them."""

from __future__ import annotations


def first_visible(num_tokens: int, window: int | None) -> int:
    """Return the first token that the token after `num_tokens` attends to. O(1).

    A window includes the attending token itself. None: full attention.
    """
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

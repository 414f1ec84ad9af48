"""Numbers with their nouns, for texts that people read."""

from __future__ import annotations


def counted(count: int, thing: str) -> str:
    """Return `1 layer`, or `2 layers`. O(1)."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"

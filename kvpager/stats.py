"""What a manager holds and has done, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class BlockState(IntEnum):
    """Who keeps a device block."""

    FREE = 0
    CACHED = 1  # the prefix index alone
    HELD = 2  # one block table
    SHARED = 3  # several block tables


@dataclass(frozen=True, slots=True)
class Stats:
    """A moment's counts. Blocks unless the name says otherwise; totals since the manager began.

    On the device, `num_held + num_cached + num_free == num_blocks`, and `num_never_used` of the
    free ones were never handed out.
    """

    block_size: int
    num_blocks: int
    num_free: int
    num_held: int
    num_cached: int  # only the prefix index keeps them
    num_never_used: int
    num_shared: int  # held by more than one table
    num_host_blocks: int
    num_host_free: int
    num_sequences: int
    num_tokens: int  # token slots that hold a token, shared ones counted once
    total_copied: int
    total_evicted: int
    total_swapped_out: int
    total_swapped_in: int
    prefix_query_tokens: int
    prefix_hit_tokens: int

"""Plans of the control plane for the data plane: arrays that can be sent to another process.

Apply plans in the order in which the manager returned them, each before the writes of its step.
Then the manager may reuse a block as soon as a plan that reads it exists. If copies run
asynchronously, on another stream or thread, make the manager with `fences=True`: then it does not
reuse the blocks of a plan before `copies.complete(plan)`. The order among plans still holds: a
plan may read what an earlier, unfinished plan writes.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
UInt64 = NDArray[np.uint64]
Float64 = NDArray[np.float64]
UInt8 = NDArray[np.uint8]
Tier = Literal["device", "host"]

NO_BLOCKS: Int32 = np.empty(0, np.int32)
NO_COPIES: Int32 = np.empty((0, 2), np.int32)
NO_COPIES.flags.writeable = False


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """Blocks to move between tiers, or on the device.

    `copies` is int32 [n, 2]: a block of tier `source`, and the block of tier `destination` that
    receives its bytes. No destination is also a source. `ticket` identifies the plan for
    `complete`; 0 if nothing waits for it.
    """

    copies: Int32
    source: Tier
    destination: Tier
    ticket: int = 0

    def __len__(self) -> int:
        return len(self.copies)


@dataclass(frozen=True, slots=True)
class AppendPlan:
    """The slots of the tokens of one `append`.

    `slots` is int64 [tokens], `block * block_size + offset`, sequence by sequence in the order
    given; of a `GroupedManager`, [groups, tokens]. `copies` is int32 [n, 2]: device blocks to
    copy before any write, because another sequence still reads the source (copy-on-write).
    `ticket`: as in `CopyPlan`.
    """

    slots: Int64
    copies: Int32
    ticket: int = 0


class Reason(Enum):
    """The reason why a request ended."""

    FINISHED = "finished"  # it has no sequence left, or `finish` was called
    CANCELLED = "cancelled"
    EXPIRED = "expired"  # the deadline passed
    FAILED = "failed"  # its step was aborted


class GroupStep(NamedTuple):
    """The slots and block tables of one group of layers in a step; as in `StepPlan`.

    The layers of a group share a block table; see `GroupedManager`.
    """

    slot_mapping: Int64
    block_tables: Int32


class FetchBlocks(NamedTuple):
    """Load a follower's shard of blocks into its staging, as many leading ones as it can.

    Attributes:
        ticket: identifies the fetch.
        keys: uint8 [n, 32], the leader's content keys. A follower derives its own from them.
        wait_s: how long to load at most, in seconds.
    """

    ticket: int
    keys: UInt8
    wait_s: float


class LoadBlocks(NamedTuple):
    """Copy blocks of a fetch from staging to the device.

    Attributes:
        ticket: the fetch, which every follower has answered.
        start: the first of the blocks, by its index in the keys of the fetch.
        blocks: int32 [n], the device blocks that receive them.
    """

    ticket: int
    start: int
    blocks: Int32


class SaveBlocks(NamedTuple):
    """Copy device blocks to staging, and save them.

    Attributes:
        keys: uint8 [n, 32], as in `FetchBlocks`.
        blocks: int32 [n], the device blocks.
        stores: uint8 [n]; bit i is set if store number i is offered the block.
    """

    keys: UInt8
    blocks: Int32
    stores: UInt8


class DropBlocks(NamedTuple):
    """Drop blocks from a store.

    Attributes:
        keys: uint8 [n, 32], as in `FetchBlocks`.
        store: the number of the store.
    """

    keys: UInt8
    store: int


class EndFetch(NamedTuple):
    """Free the staging of a fetch. A follower that does not know the ticket ignores it."""

    ticket: int


Transfer = FetchBlocks | LoadBlocks | SaveBlocks | DropBlocks | EndFetch


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """One step of a `Scheduler`: plain arrays and ids, so it can be sent to another process.

    A follower applies `transfers` first. Apply `swaps` in order, then `copies` (all reads before
    all writes). Then compute `num_scheduled[i]` tokens of each row i: write their KV to
    `slot_mapping`. They attend to the first `seq_lens[i]` tokens through `block_tables[i]`.
    Decoding rows come first. The rows of a request are adjacent.

    Attributes:
        swaps: blocks to move between device and host.
        copies: int32 [n, 2], pairs of device blocks to copy next: source, destination. A block may
            be the source of one pair and the destination of another, but never the destination of
            two.
        request_ids: the request of each row.
        seq_ids: int32 [rows], the sequence of each row. An id stays the same while the sequence
            lives. Plans after the one that lists it in `freed` may reuse it.
        num_computed: int32 [rows], tokens computed in earlier steps.
        num_scheduled: int32 [rows], tokens to compute in this step.
        token_ids: int32 [tokens], the tokens to compute, row by row.
        slot_mapping: int64 [tokens], `block * block_size + offset`, of the first group of layers
            (a group shares a block table; see `GroupedManager`).
        seq_lens: int32 [rows], `num_computed + num_scheduled`.
        block_tables: int32 [rows, blocks] of the first group of layers; -1: no block, for
            example before the start of a sliding window.
        needs_logits: bool [rows], True if the logits of the row's last token choose the next one.
        freed: int32, sequences that ended since the last plan.
        ended: the requests that ended since the last plan, each with its reason.
        more_groups: slot mapping and block tables of further groups of layers.
        transfers: what followers do with their shards of blocks and with their stores, in order.
            The leader's `Tiering` has done its own part. See `TierFollower`.
    """

    swaps: list[CopyPlan]
    copies: Int32
    request_ids: list[Hashable]
    seq_ids: Int32
    num_computed: Int32
    num_scheduled: Int32
    token_ids: Int32
    slot_mapping: Int64
    seq_lens: Int32
    block_tables: Int32
    needs_logits: NDArray[np.bool_]
    freed: Int32
    ended: list[tuple[Hashable, Reason]]
    more_groups: tuple[GroupStep, ...] = ()
    transfers: tuple[Transfer, ...] = ()

    @property
    def groups(self) -> tuple[GroupStep, ...]:
        """Return the slot mapping and the block tables of each group of layers. O(groups)."""
        return GroupStep(self.slot_mapping, self.block_tables), *self.more_groups

    def __len__(self) -> int:
        """Return the number of rows. O(1)."""
        return len(self.request_ids)

    def __bool__(self) -> bool:
        """Return True: a plan without rows may have swaps, transfers, or ends to report."""
        return True

"""Swap sequences between device and host.

A block is in one tier for all its holders. It leaves the device when all sequences that hold it are
swapped, and returns with the first of them. So forks share blocks on the host as on the device.
"""

from __future__ import annotations

import numpy as np

from kvpager.blocks.accounts import Accounts
from kvpager.blocks.pool import BlockPool
from kvpager.blocks.sequences import NO_BLOCK, SequenceTable
from kvpager.blocks.state import BlockState
from kvpager.errors import OutOfBlocks, SequenceSwapped
from kvpager.plans import CopyPlan, Int32, Int64


class Swap:
    """Moves sequences between the tiers. The caller holds the lock.

    Writes the block tables, `swapped` and `duplicates` of sequences.
    """

    def __init__(self, state: BlockState) -> None:
        self._state = state

    def out(self, sequences: Int64, at_most: int | None) -> CopyPlan:
        """Move the blocks that only these and swapped sequences hold to the host. O(blocks)."""
        state, table, host = self._state, self._state.rows, self._state.host
        for first in sequences[table.swapped[sequences]].tolist():
            members = table.rows_of(first)
            is_away = any(len(table.host_blocks(row)) for row in members)
            if is_away and not any(len(table.device_blocks(row)) for row in members):
                raise SequenceSwapped(f"{state.handle(first).name} is wholly on the host already")
        rows = table.members(sequences)
        blocks, holders = _leaving_device(table, state.pool, rows, at_most)
        need = len(blocks)
        state.call_back_host(need)
        if need > host.num_free:
            raise OutOfBlocks(
                need, host.num_free, 0, host.num_blocks, "host", "raise num_host_blocks"
            )
        copies = np.empty((need, 2), np.int32)
        plan = CopyPlan(copies, "device", "host", state.fences.ticket(copies))
        copies[:, 0], copies[:, 1] = blocks, state.take_free(host, need)
        host.receive(copies[:, 1], state.pool.ids[blocks], holders)
        table.swapped[rows] = True
        everyone = table.swapped.nonzero()[0]
        table.replace(everyone, blocks, -2 - copies[:, 1])
        # The published blocks stay in the index, as duplicates.
        table.duplicates[everyone] |= table.published[everyone] > 0
        table.epoch += 1
        state.moved(plan.copies, plan.ticket, "device", "host")
        state.release(blocks, holders)
        state.totals["total_swapped_out"] += need
        return plan

    def back(self, sequences: Int64, at_most: int | None, reserve: int) -> CopyPlan:
        """Move the host blocks of sequences to the device; leave `reserve` available. O(blocks)."""
        state, table = self._state, self._state.rows
        sequences = sequences[table.swapped[sequences]]
        rows = table.members(sequences)
        blocks = _leaving_host(table, rows, at_most)
        need, holders = len(blocks), state.host.refs[blocks]
        owners = _owners(table, rows, blocks, state.accounts) if state.accounts.limits else None
        state.refuse(need + reserve, owners)
        copies = np.empty((need, 2), np.int32)
        plan = CopyPlan(copies, "host", "device", state.fences.ticket(copies))
        copies[:, 0], copies[:, 1] = blocks, state.take(need, owners)
        state.pool.receive(copies[:, 1], state.host.ids[blocks], holders)
        table.replace(table.swapped.nonzero()[0], -2 - blocks, copies[:, 1])
        for first in sequences.tolist():
            members = table.rows_of(first)
            is_away = any(len(table.host_blocks(row)) for row in members)
            table.swapped[members.start : members.stop] = is_away
        state.moved(plan.copies, plan.ticket, "host", "device")
        state.host.release(blocks, holders)
        state.totals["total_swapped_in"] += need
        return plan


def _leaving_device(
    table: SequenceTable, device: BlockPool, rows: Int64, at_most: int | None
) -> tuple[Int32, Int32]:
    """Return the device blocks that only `rows` and swapped sequences hold, and their holders.

    With `at_most`, return the last ones. O(blocks of `rows` and of all swapped sequences).
    """
    entries, columns = _entries(table, rows)
    others = np.setdiff1d(np.flatnonzero(table.swapped), rows)
    held, _ = _entries(table, others)
    mine = entries >= 0
    blocks, first = np.unique(entries[mine], return_index=True)
    everyone, counts = np.unique(
        np.concatenate([entries[mine], held[held >= 0]]), return_counts=True
    )
    holders = counts[np.searchsorted(everyone, blocks)]
    alone = holders == device.refs[blocks]
    blocks, holders, depth = blocks[alone], holders[alone], columns[mine][first][alone]
    order = np.argsort(depth, kind="stable")
    if at_most is not None:
        order = order[::-1][:at_most]
    return blocks[order], holders[order].astype(np.int32)


def _leaving_host(table: SequenceTable, rows: Int64, at_most: int | None) -> Int32:
    """Return the host blocks that `rows` hold; with `at_most`, the first ones. O(blocks)."""
    entries, columns = _entries(table, rows)
    away = entries < NO_BLOCK
    blocks, first = np.unique(-2 - entries[away], return_index=True)
    order = np.argsort(columns[away][first], kind="stable")[:at_most]
    return blocks[order].astype(np.int32)


def _owners(table: SequenceTable, rows: Int64, blocks: Int32, accounts: Accounts) -> Int64:
    """Return the account of each host block for its return. O(blocks)."""
    number_of = {}
    for row in rows.tolist():
        owner = accounts.owner(table.prompt(row).namespace)
        number_of.update(dict.fromkeys(table.host_blocks(row).tolist(), owner))
    return np.array([number_of[block] for block in blocks.tolist()], np.int64)


def _entries(table: SequenceTable, rows: Int64) -> tuple[Int32, Int64]:
    """Return the table entries of `rows` that are blocks, and their columns."""
    places, columns = table.places(rows)
    entries = table.tables.data[places]
    is_block = entries != NO_BLOCK
    return entries[is_block], columns[is_block]

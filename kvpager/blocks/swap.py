"""Blocks that change their place: between device and host, and to the front of a pool that shrinks.

A block is in exactly one tier, with all its holders. It leaves the device when every table that
holds it belongs to a swapped sequence, and comes back when the first of them does; so forks that
were swapped together share on the host, and share again on the device.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvpager.blocks.pool import BlockPool
from kvpager.blocks.quotas import Quotas
from kvpager.blocks.sequences import NO_BLOCK, SequenceTable

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


class Leaving(NamedTuple):
    """Blocks of one tier that are to move, and how many tables hold each."""

    blocks: Int32
    holders: Int32


def leaving_device(
    table: SequenceTable, device: BlockPool, rows: list[int], at_most: int | None
) -> Leaving:
    """The device blocks that nobody but `rows` and already swapped sequences holds.

    O(blocks of `rows` and of all swapped sequences). With `at_most`, those furthest from the front.
    """
    entries, columns = _entries(table, np.array(rows, np.int64))
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
    return Leaving(blocks[order], holders[order].astype(np.int32))


def leaving_host(
    table: SequenceTable, host: BlockPool, rows: list[int], at_most: int | None
) -> Leaving:
    """The host blocks that `rows` hold, with `at_most` those nearest to the front. O(blocks)."""
    entries, columns = _entries(table, np.array(rows, np.int64))
    away = entries < NO_BLOCK
    blocks, first = np.unique(-2 - entries[away], return_index=True)
    order = np.argsort(columns[away][first], kind="stable")[:at_most]
    blocks = blocks[order].astype(np.int32)
    return Leaving(blocks, host.refs[blocks])


def replace(table: SequenceTable, rows: Int64, old: Int32, new: Int32) -> None:
    """Write table entry `new` wherever `rows` have `old`. O(blocks of `rows`)."""
    if not len(old) or not len(rows):
        return
    order = np.argsort(old)
    keys, values = old[order], new[order]
    places, _ = table.places(rows)
    entries = table.tables.data[places]
    at = np.minimum(np.searchsorted(keys, entries), len(keys) - 1)
    table.tables.data[places] = np.where(keys[at] == entries, values[at], entries)


def hand_over(source: BlockPool, target: BlockPool, leaving: Leaving, arrived: Int32) -> None:
    """Let `arrived` stand for `leaving`: token ids and holders move along. O(blocks)."""
    target.ids[arrived] = source.ids[leaving.blocks]
    target.refs[arrived] = leaving.holders


def owners(table: SequenceTable, rows: list[int], leaving: Leaving, quotas: Quotas) -> Int64:
    """Under whose number each host block counts when it is back on the device. O(blocks)."""
    number_of = {}
    for row in rows:
        owner = quotas.owner(table.prompt(row).namespace)
        number_of.update(dict.fromkeys(table.host_blocks(row).tolist(), owner))
    return np.array([number_of[block] for block in leaving.blocks.tolist()], np.int64)


def _entries(table: SequenceTable, rows: Int64) -> tuple[Int32, Int64]:
    """All table entries of `rows` but the empty ones, and the column of each."""
    places, columns = table.places(rows)
    entries = table.tables.data[places]
    is_block = entries != NO_BLOCK
    return entries[is_block], columns[is_block]

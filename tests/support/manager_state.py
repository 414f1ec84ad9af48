"""Everything a block manager knows, as plain arrays, to compare managers or moments.

    before = state_of(manager)
    ...
    assert same_state(state_of(manager), before)

One way only: no manager can be made of it. Room that is reserved and not used is no part of it, nor
are unread events.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvpager.blocks.eviction import Evictor
from kvpager.blocks.manager import BlockManager
from kvpager.blocks.policies.failsafe import FailSafe
from kvpager.blocks.pool import BlockPool
from kvpager.blocks.radix import Forest, Node
from kvpager.blocks.sequences import SequenceHandle, SequenceTable
from kvpager.blocks.state import BlockState

Arrays = dict[str, NDArray[Any]]


def state_of(manager: BlockManager) -> Arrays:
    """Return everything that `manager` knows. O(blocks + tokens)."""
    state = manager._state
    with state.lock:
        rows, pool, nodes = state.rows, state.pool, list(state.forest.walk())
        place = {node: number for number, node in enumerate(nodes)}
        return {
            **_pool_arrays("device", pool, rows),
            **_pool_arrays("host", state.host, rows),
            **_row_arrays(rows, state.forest, place),
            **_node_arrays(state.evictor, nodes, place),
            **_policy_arrays(state.evictor.policy),
            "prints": np.where(pool.cached, state.index.arrivals.prints, np.uint64(0)),
            "meta": np.frombuffer(repr(_words(state, nodes)).encode(), np.uint8),
        }


def same_state(one: Arrays, other: Arrays) -> bool:
    """True if two states are equal to the bit. O(arrays)."""
    return not differences(one, other)


def refused(
    manager: BlockManager, error: Any, call: Callable[[], object], match: str = "."
) -> None:
    """Check that `call` raises `error` and leaves everything as it was."""
    before = state_of(manager)
    with pytest.raises(error, match=match):
        call()
    assert same_state(state_of(manager), before)
    manager.check()


def differences(one: Arrays, other: Arrays) -> list[str]:
    """Return the names under which two states are not equal to the bit. O(arrays)."""
    names = one.keys() & other.keys()
    return sorted(one.keys() ^ other.keys()) + sorted(
        name
        for name in names
        if (one[name].dtype, one[name].shape) != (other[name].dtype, other[name].shape)
        or one[name].tobytes() != other[name].tobytes()
    )


def handles_of(manager: BlockManager) -> dict[str, SequenceHandle]:
    """Return a handle for every live sequence, by its `name`. O(sequences)."""
    state = manager._state
    with state.lock:
        handles = [state.handle(row) for row in state.rows.live_rows()]
        return {handle.name: handle for handle in handles}


def _words(state: BlockState, nodes: list[Node]) -> dict[str, Any]:
    fences, rows, accounts = state.fences, state.rows, state.accounts
    return {
        "last_ticket": fences.last_ticket,
        "in_flight": [[t, d.tolist(), h.tolist()] for t, (d, h) in fences.in_flight.items()],
        "cut_off": sorted(fences.cut_off),
        "pins": [[ticket, blocks.tolist()] for ticket, blocks in fences.pins.items()],
        "quotas": list(accounts.limits.items()),
        "parked": [[name, b.tolist()] for name, b in accounts.parked(state.pool)],
        "totals": state.totals,
        "prompts": [p and (*p[:2], p.mm_hashes.items) for p in rows.prompts[: _used(rows)]],
        "trees": [node.tree for node in nodes if node.parent is None],
        "tags": [node.tag for node in nodes],
    }


def _pool_arrays(tier: str, pool: BlockPool, rows: SequenceTable) -> Arrays:
    in_use = pool.in_use().nonzero()[0]
    # Behind the known tokens of a block stand those of its last holder, which mean nothing.
    known = np.where(pool.cached, pool.ids.shape[1], 0)
    for row in rows.live_rows():
        table = -2 - rows.blocks(row) if tier == "host" else rows.blocks(row)
        ends = np.arange(len(table)) * pool.ids.shape[1]
        ends = np.clip(rows.known[row] - ends, 0, pool.ids.shape[1])
        known[table[table >= 0]] = np.maximum(known[table[table >= 0]], ends[table >= 0])
    is_known = np.arange(pool.ids.shape[1]) < known[in_use, None]
    return {
        f"{tier}.refs": pool.refs.copy(),
        f"{tier}.holds": pool.holds.copy(),
        f"{tier}.free": pool._stack[: pool._stack_size].copy(),
        f"{tier}.used_ever": np.array(pool.num_blocks - pool.num_never_used),
        f"{tier}.in_use": in_use.astype(np.int32),
        f"{tier}.ids": np.where(is_known, pool.ids[in_use], 0),
    }


def _row_arrays(rows: SequenceTable, forest: Forest, place: dict[Node, int]) -> Arrays:
    live, count = rows.live_rows(), _used(rows)
    nodes = np.full(count, -1, np.int32)
    for row in live:
        node = forest.locate(rows.nodes[row], int(rows.published[row]))
        nodes[row] = place[node] if node is not None and rows.published[row] else -1
    return {
        **{f"rows.{name}": getattr(rows, name)[:count].copy() for name in rows.COLUMNS},
        "rows.free": np.array([row for row in rows.free_rows if row < count], np.int32),
        "rows.node": nodes,
        "rows.table": np.concatenate([np.empty(0, np.int32), *map(rows.blocks, live)]),
    }


def _used(rows: SequenceTable) -> int:
    """Return the number of rows up to the last one that was ever used."""
    used = rows.generations.nonzero()[0].tolist() + rows.live_rows()
    return 1 + max(used, default=-1)


def _node_arrays(evictor: Evictor, nodes: list[Node], place: dict[Node, int]) -> Arrays:
    parents = [-1 if node.parent is None else place[node.parent] for node in nodes]
    order, ranks, deferred = list[Node](), list[float](), list[Node]()
    for queue in map(evictor._queues.__getitem__, evictor._queues):
        order += sorted(queue.ranks, key=queue.ranks.__getitem__)
        ranks += [queue.ranks[node][0] for node in order[len(ranks) :]]
        deferred += queue.deferred
    return {
        "nodes.parent": np.array(parents, np.int32),
        "nodes.size": np.array([node.end - node.start for node in nodes], np.int32),
        "nodes.sealed": np.array([node.sealed for node in nodes], np.bool_),
        "nodes.blocks": np.concatenate([np.empty(0, np.int32), *(node.blocks for node in nodes)]),
        "queue.order": np.array([place[node] for node in order], np.int32),
        "queue.rank": np.array(ranks, np.float64),
        "queue.deferred": np.array([place[node] for node in deferred], np.int32),
    }


def _policy_arrays(policy: object, name: str = "policy") -> Arrays:
    """Return the arrays and numbers that a policy, and the parts it is made of, keep."""
    found: Arrays = {}
    kept = policy.in_charge if isinstance(policy, FailSafe) else policy
    for key, value in getattr(kept, "__dict__", {}).items():
        if isinstance(value, np.ndarray | int | float):
            found[f"{name}.{key}"] = np.array(value)
        elif type(value).__module__.startswith("kvpager.blocks.policies"):
            found |= _policy_arrays(value, f"{name}.{key}")
    return found

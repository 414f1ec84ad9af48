"""The whole manager as plain arrays, and back: for a restart, a replay, or a comparison.

    arrays = manager.snapshot()                 # np.savez(file, **arrays), or safetensors
    manager = BlockManager.restore(arrays)      # np.load(file, allow_pickle=False)
    handles = manager.sequences()               # by name, as the handles of the original say

Nothing here can run code, no length is believed before the array that goes with it was seen, and
what was read is checked against every law before anybody gets it. Events that nobody fetched are
not part of it: who follows them begins anew from `offered`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvpager import _validate as arguments
from kvpager.blocks.contents import Content, Contents
from kvpager.blocks.eviction import EvictionPolicy
from kvpager.blocks.policies import POLICIES
from kvpager.blocks.policies.failsafe import FailSafe
from kvpager.blocks.prefix import PrefixIndex
from kvpager.blocks.quotas import Quota
from kvpager.blocks.radix import Node
from kvpager.blocks.sequences import Prompt, SequenceTable
from kvpager.errors import BrokenInvariant

if TYPE_CHECKING:
    from kvpager.blocks.manager import BlockManager
    from kvpager.blocks.pool import BlockPool

Arrays = dict[str, NDArray[Any]]
_VERSION = 1
_BLOCK_SIZE_MAX = 2**16  # of a snapshot, whose arrays need not prove it


def take(manager: BlockManager) -> Arrays:
    """Everything `manager` knows. O(blocks + tokens). The caller holds its lock."""
    rows, index, fences = manager._rows, manager._index, manager._fences
    nodes = list(index.walk())
    place = {node: number for number, node in enumerate(nodes)}
    arrays: Arrays = {
        **_pool_arrays("device", manager._pool, rows),
        **_pool_arrays("host", manager._host, rows),
        **_row_arrays(rows, index, place),
        **_node_arrays(nodes, place),
        **_queue_arrays(index, place),
        **{f"policy.{name}": np.array(value) for name, value in index.policy.state().items()},
        "prints": np.where(manager._pool.cached, index.arrivals.prints, np.uint64(0)),
    }
    limits = manager._quotas.limits
    meta = {
        "version": _VERSION,
        "block_size": manager.block_size,
        "eviction": _policy_name(index.policy),
        "null_block": manager._pool.num_reserved,
        "fences": fences.is_on,
        "last_ticket": fences.last_ticket,
        "in_flight": [[t, d.tolist(), h.tolist()] for t, (d, h) in fences.in_flight.items()],
        "cut_off": sorted(fences.cut_off),
        "pins": [[ticket, blocks.tolist()] for ticket, blocks in fences.pins.items()],
        "quotas": [[name, quota.floor, quota.ceiling] for name, quota in limits.items()],
        "parked": [[name, b.tolist()] for name, b in manager._quotas.parked(manager._pool)],
        "totals": manager._totals,
        "prompts": [None if p is None else _prompt_out(p) for p in rows.prompts[: _used(rows)]],
        "trees": [list(node.tree) for node in nodes if node.parent is None],
        "tags": [[place[node], _contents_out(node.tag)] for node in nodes if node.tag],
    }
    arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    return arrays


def restore(
    cls: type[BlockManager],
    arrays: Mapping[str, NDArray[Any]],
    eviction: EvictionPolicy | None,
    num_events: int,
) -> BlockManager:
    """A manager that knows what `arrays` say. O(blocks + tokens).

    Raises: `ValueError` where they are not a snapshot, or one that breaks a law.
    """
    try:
        if "meta" not in arrays:
            raise ValueError("array 'meta' is missing")
        meta = json.loads(bytes(np.asarray(arrays["meta"], np.uint8)))
        if meta["version"] != _VERSION:
            raise ValueError(f"version {meta['version']}, and this kvpager reads {_VERSION}")
        if eviction is None and meta["eviction"] not in POLICIES:
            raise ValueError(f"policy {meta['eviction']!r} is not one of ours; pass it as eviction")
        if meta["block_size"] > _BLOCK_SIZE_MAX:
            raise ValueError(f"block_size {meta['block_size']}: at most {_BLOCK_SIZE_MAX}")
        if arrays["device.ids"].shape[1:] != (meta["block_size"],):
            raise ValueError(f"block_size {meta['block_size']} is not that of its token ids")
        manager = cls(
            len(arrays["device.refs"]),
            meta["block_size"],
            len(arrays["host.refs"]),
            eviction=eviction or meta["eviction"],
            null_block=bool(meta["null_block"]),
            fences=bool(meta["fences"]),
            num_events=num_events,
        )
        _fill(manager, arrays, meta)
        manager.check()
    except (
        ArithmeticError, AttributeError, BrokenInvariant, LookupError, MemoryError,
        RecursionError, StopIteration, TypeError, ValueError,
    ) as error:  # fmt: skip
        raise ValueError(f"not a snapshot that can be restored: {error!r}") from error
    return manager


def _fill(manager: BlockManager, arrays: Mapping[str, NDArray[Any]], meta: dict[str, Any]) -> None:
    rows, index, fences, pool = manager._rows, manager._index, manager._fences, manager._pool
    nodes = _read_nodes(index, arrays, meta)
    _read_rows(rows, nodes, arrays, meta)
    for ticket, device, host in meta["in_flight"]:
        kept = _blocks(device, pool), _blocks(host, manager._host)
        fences.in_flight[int(ticket)] = kept
        pool.holds[kept[0]] += 1
        manager._host.holds[kept[1]] += 1
    for ticket, blocks in meta["pins"]:
        fences.pins[int(ticket)] = _blocks(blocks, pool)
        pool.holds[fences.pins[int(ticket)]] += 1
    fences.last_ticket = int(meta["last_ticket"])
    fences.cut_off = {int(ticket) for ticket in meta["cut_off"]}
    _read_pool("device", pool, arrays)
    _read_pool("host", manager._host, arrays)
    state = {
        k.removeprefix("policy."): np.asarray(v)
        for k, v in arrays.items()
        if k.startswith("policy.")
    }
    index.policy.restore(state)
    index.arrivals.prints[:] = arrays["prints"]
    for name in manager._totals:
        manager._totals[name] = int(meta["totals"][name])
    parked = [(name, _blocks(blocks, pool)) for name, blocks in meta["parked"]]
    manager._recount(dict(_quota(*fields) for fields in meta["quotas"]), parked)
    ranks = np.asarray(arrays["queue.rank"], np.float64).tolist()
    index.queue_again(_at(nodes, arrays["queue.order"]), ranks, _at(nodes, arrays["queue.aside"]))


def _quota(namespace: str | None, floor: int, ceiling: int | None) -> tuple[str | None, Quota]:
    arguments.label("namespace", namespace)
    floor = arguments.count("floor", floor)
    if ceiling is not None:
        ceiling = arguments.count("ceiling", ceiling, at_least=max(floor, 1))
    return namespace, Quota(floor, ceiling)


def _blocks(numbers: Any, pool: BlockPool) -> NDArray[np.int32]:
    """Distinct blocks of a pool, from outside."""
    blocks = np.asarray(numbers, np.int32)
    is_inside = np.all((blocks >= 0) & (blocks < pool.num_blocks))
    if blocks.ndim != 1 or not is_inside or len(np.unique(blocks)) != len(blocks):
        raise ValueError("blocks that are not in the pool, or named twice")
    return blocks


# -------------------------------------------------------------------- pools


def _pool_arrays(tier: str, pool: BlockPool, rows: SequenceTable) -> Arrays:
    in_use = pool.in_use().nonzero()[0]
    # Behind what is known stand ids of whoever had the block before: nobody's business.
    known = rows.fill(pool.num_blocks, rows.known, is_host=tier == "host")
    known[pool.cached] = pool.ids.shape[1]
    is_known = np.arange(pool.ids.shape[1]) < known[in_use, None]
    return {
        f"{tier}.refs": pool.refs.copy(),
        f"{tier}.free": pool.free_list(),
        f"{tier}.used_ever": np.array(pool.num_blocks - pool.num_never_used),
        f"{tier}.in_use": in_use.astype(np.int32),
        f"{tier}.ids": np.where(is_known, pool.ids[in_use], 0),
    }


def _read_pool(tier: str, pool: BlockPool, arrays: Mapping[str, NDArray[Any]]) -> None:
    pool.refs[:] = arrays[f"{tier}.refs"]
    pool.ids[_blocks(arrays[f"{tier}.in_use"], pool)] = arrays[f"{tier}.ids"]
    free = np.asarray(arrays[f"{tier}.free"], np.int32)
    if len(free) > pool.num_blocks:
        raise ValueError(f"{len(free)} free blocks of {pool.num_blocks}")
    pool.restore(free, int(arrays[f"{tier}.used_ever"]))


# -------------------------------------------------------------------- sequences


def _row_arrays(rows: SequenceTable, index: PrefixIndex, place: dict[Node, int]) -> Arrays:
    live, count = rows.live_rows(), _used(rows)
    tables = [rows.blocks(row) for row in live]
    nodes = np.full(count, -1, np.int32)
    for row in live:
        node = index.locate(rows.nodes[row], int(rows.published[row]))
        nodes[row] = place[node] if node is not None and rows.published[row] else -1
    return {
        **{f"rows.{name}": getattr(rows, name)[:count].copy() for name in rows.COLUMNS},
        "rows.free": np.array([row for row in rows.free_rows if row < count], np.int32),
        "rows.node": nodes,
        "rows.table": np.concatenate([np.empty(0, np.int32), *tables]),
    }


def _used(rows: SequenceTable) -> int:
    """Rows up to the last one that was ever used: how many there is room for says nothing."""
    used = rows.generations.nonzero()[0].tolist() + rows.live_rows()
    return 1 + max(used, default=-1)


def _read_rows(
    rows: SequenceTable,
    nodes: list[Node],
    arrays: Mapping[str, NDArray[Any]],
    meta: dict[str, Any],
) -> None:
    rows.prompts = [None if p is None else _prompt_in(p) for p in meta["prompts"]]
    count, table = len(rows.prompts), np.asarray(arrays["rows.table"], np.int32)
    for name, dtype in rows.COLUMNS.items():
        column = np.asarray(arrays[f"rows.{name}"], dtype).copy()
        if column.shape != (count,) or (column < 0).any() or (column >= 2**62).any():
            raise ValueError(f"rows.{name}: {column.shape} for {count} rows, or below 0")
        setattr(rows, name, column)
    rows.list_columns()
    places = arrays["rows.node"].tolist()
    rows.nodes = [None if place < 0 else nodes[place] for place in places]
    rows.free_rows = [int(row) for row in arrays["rows.free"]]
    sizes = [rows.num_blocks(row) for row in rows.live_rows()]
    if len(rows.nodes) != count or min(sizes, default=0) < 0 or sum(sizes) != len(table):
        raise ValueError(f"{len(table)} table entries for sequences of {sum(sizes)} blocks")
    rows.tables.add_rows(count)
    rows.tables.reserve(np.array(rows.live_rows(), np.int64), np.array(sizes, np.int64))
    for row, blocks in zip(rows.live_rows(), np.split(table, np.cumsum(sizes)[:-1]), strict=False):
        rows.tables.row(row)[: len(blocks)] = blocks
    rows.count_special()


def _prompt_out(prompt: Prompt) -> list[Any]:
    return [prompt.namespace, prompt.adapter, _contents_out(prompt.contents.items)]


def _prompt_in(fields: list[Any]) -> Prompt:
    namespace, adapter, contents = fields
    arguments.label("namespace", namespace)
    arguments.label("adapter", adapter)
    return Prompt(namespace, adapter, Contents(_contents_in(contents)))


# -------------------------------------------------------------------- prefix index


def _node_arrays(nodes: list[Node], place: dict[Node, int]) -> Arrays:
    """Parents before children, siblings in order; a node without a parent begins the next tree."""
    parents = [-1 if node.parent is None else place[node.parent] for node in nodes]
    return {
        "nodes.parent": np.array(parents, np.int32),
        "nodes.size": np.array([node.end - node.start for node in nodes], np.int32),
        "nodes.sealed": np.array([node.sealed for node in nodes], np.bool_),
        "nodes.blocks": np.concatenate([np.empty(0, np.int32), *(node.blocks for node in nodes)]),
    }


def _read_nodes(
    index: PrefixIndex, arrays: Mapping[str, NDArray[Any]], meta: dict[str, Any]
) -> list[Node]:
    parents, sizes = arrays["nodes.parent"].tolist(), arrays["nodes.size"].tolist()
    blocks = np.asarray(arrays["nodes.blocks"], np.int32)
    if min(sizes, default=0) < 0 or sum(sizes) != len(blocks):
        raise ValueError(f"{len(blocks)} blocks for runs of {sum(sizes)}")
    blocks = _blocks(blocks, index.pool)
    index.pool.ids[_blocks(arrays["device.in_use"], index.pool)] = arrays["device.ids"]
    tags = {place: _contents_in(tag) for place, tag in meta["tags"]}
    trees = iter([_prompt_in([*fields, []]).tree for fields in meta["trees"]])
    nodes: list[Node] = []
    start = 0
    for parent, size, sealed in zip(parents, sizes, arrays["nodes.sealed"], strict=True):
        if not -1 <= parent < len(nodes):
            raise ValueError(f"node {len(nodes)} below node {parent}, which comes later")
        run, start = blocks[start : start + size].copy(), start + size
        tree, above = (next(trees), None) if parent < 0 else (None, nodes[parent])
        node = index.adopt(above, tree, run, tags.get(len(nodes)))
        node.sealed = bool(sealed)
        nodes.append(node)
    return nodes


def _queue_arrays(index: PrefixIndex, place: dict[Node, int]) -> Arrays:
    order, ranks, aside = index.queued()
    return {
        "queue.order": np.array([place[node] for node in order], np.int32),
        "queue.rank": np.array(ranks, np.float64),
        "queue.aside": np.array([place[node] for node in aside], np.int32),
    }


def _at(nodes: list[Node], places: NDArray[Any]) -> list[Node]:
    if np.any(places < 0):
        raise ValueError("a node before the first one")
    return [nodes[place] for place in places.tolist()]


def _contents_out(contents: tuple[Content, ...]) -> list[Any]:
    return [[start, stop, digest.hex(), end] for start, stop, digest, end in contents]


def _contents_in(fields: list[Any]) -> tuple[Content, ...]:
    found = []
    for start, stop, digest, end in fields:
        given = [(start, stop, bytes.fromhex(digest))]
        [content] = arguments.contents(given, arguments.COUNT_MAX).items
        found.append((*content[:3], arguments.count("end", end, at_least=start, at_most=stop)))
    return tuple(found)


def _policy_name(policy: EvictionPolicy) -> str:
    in_charge = policy.in_charge if isinstance(policy, FailSafe) else policy
    return next((name for name, made in POLICIES.items() if made is type(in_charge)), "")

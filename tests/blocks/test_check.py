"""`BlockManager.check` detects damage of every kind."""

from __future__ import annotations

import pytest

from kvpager import BlockManager
from kvpager.blocks.sequences import SequenceHandle
from kvpager.errors import BrokenInvariant
from tests.support.prefixes import committed, prompt


@pytest.fixture
def manager() -> BlockManager:
    return BlockManager(num_blocks=8, block_size=4, num_host_blocks=4)


def test_check_names_the_broken_invariant(manager: BlockManager) -> None:
    block = manager.block_tables(manager.allocate(4))[0][0]
    manager._state.pool.refs[block] = 2
    with pytest.raises(BrokenInvariant, match=f"block {block}: refcount 2, but 1 tables hold it"):
        manager.check()


def put(manager: BlockManager, sequence: SequenceHandle, column: int, block: int) -> None:
    """Overwrite an entry of a block table."""
    manager._state.rows.tables.row(sequence._row)[column] = block


BREAK = {
    "refcount": lambda m, s: m._state.pool.refs.__setitem__(m.block_tables(s)[0][0], 2),
    "evictable count": lambda m, s: setattr(m._state.pool, "num_evictable", 2),
    "free twice": lambda m, s: m._state.pool._stack.__setitem__(
        slice(0, 2), m._state.pool._stack[0]
    ),
    "free and used": lambda m, s: m._state.pool._stack.__setitem__(0, m.block_tables(s)[0][0]),
    "bump pointer": lambda m, s: setattr(m._state.pool, "_num_used_ever", 1),
    "held back": lambda m, s: m._state.pool.holds.__setitem__(0, 1),
    "pins": lambda m, s: m._state.fences.pins.popitem(),
    "length": lambda m, s: m._state.rows.lengths.__setitem__(s._row, 40),
    "committed": lambda m, s: m._state.rows.committed.__setitem__(s._row, 99),
    "speculative tokens": lambda m, s: m._state.rows.speculative.__setitem__(s._row, 4),
    "rows with speculative tokens": lambda m, s: setattr(m._state.rows, "num_speculating", 3),
    "hole": lambda m, s: put(m, s, 0, -1),
    "twice": lambda m, s: put(m, s, 0, m.block_tables(s)[0][1]),
    "no such block": lambda m, s: put(m, s, 0, 99),
    "stray": lambda m, s: put(m, s, 3, 1),
    "free row": lambda m, s: m._state.rows.free_rows.append(s._row),
    "swapped": lambda m, s: put(m, s, 2, -2),
    "published": lambda m, s: m._state.rows.published.__setitem__(s._row, 3),
    "knows too much": lambda m, s: m._state.rows.known.__setitem__(s._row, 16),
    "other tokens": lambda m, s: m._state.pool.ids.__setitem__((m.block_tables(s)[0][0], 0), 55),
    "namespace": lambda m, s: setattr(m._state.rows.nodes[s._row], "tree", ("acme", None)),
    "run's start": lambda m, s: setattr(m._state.rows.nodes[s._row], "start", 7),
    "run's end": lambda m, s: setattr(m._state.rows.nodes[s._row], "end", 1),
    "run's parent": lambda m, s: setattr(m._state.rows.nodes[s._row], "parent", None),
    "look-up": lambda m, s: m._state.forest.node_of.__setitem__(m.block_tables(s)[0][0], 9),
    "cached flag": lambda m, s: m._state.pool.cached.__setitem__(m.block_tables(s)[0][0], False),
    "never evicted": lambda m, s: m._state.evictor._queues[0].ranks.clear(),
    "quota": lambda m, s: setattr(m._state.accounts._accounts[1], "used", 7),
    "host refcount": lambda m, s: m._state.host.refs.__setitem__(0, 1),
}


@pytest.mark.parametrize("damage", BREAK)
def test_check_detects_every_kind_of_damage(damage: str) -> None:
    manager = BlockManager(12, 4, num_host_blocks=4)
    others = [manager.allocate(4) for _ in range(3)]
    manager.free(committed(manager, prompt(4, first=60)))
    sequence = committed(manager, prompt(10))
    manager.pins.pin(sequence)
    manager.quotas.set("acme", floor=1)
    manager.free(others)
    manager.check()
    BREAK[damage](manager, sequence)
    with pytest.raises(BrokenInvariant):
        manager.check()

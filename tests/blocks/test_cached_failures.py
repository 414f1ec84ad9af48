"""Content keys that cannot be made: the manager stays as it was."""

from __future__ import annotations

import numpy as np
import pytest

from kvpager import BlockManager
from kvpager.storage.keys import ContentKeying, KeyContext, content_keys
from tests.support.manager_state import differences, state_of

SIZE, PROMPT = 4, [1, 2, 3, 4, 5, 6, 7, 8]


def context_of(namespace: str | None, lora: str | None) -> KeyContext:
    if namespace == "unknown":
        raise LookupError(namespace)
    return KeyContext("layout", "model")


def test_a_namespace_without_a_context_changes_nothing() -> None:
    manager, maker, blocks = BlockManager(8, SIZE), ContentKeying(SIZE, context_of), list[int]()
    for namespace in (None, "unknown"):
        sequence = manager.allocate(PROMPT, namespace=namespace)
        manager.commit(sequence)
        blocks += manager.block_tables([sequence])[0].tolist()
        manager.free(sequence)
    before = state_of(manager)
    with pytest.raises(LookupError, match="unknown"):
        manager.cached.keys(np.array(blocks, np.int32), maker)
    assert not differences(before, state_of(manager))
    manager.check()
    keys = manager.cached.keys(np.array(blocks[:2], np.int32), maker)
    assert keys == content_keys(PROMPT, SIZE, KeyContext("layout", "model"))
    manager.cached.mark_clean(keys, 0)
    assert manager.cached.leaving(8).tolist() == sorted(blocks[2:], reverse=True)

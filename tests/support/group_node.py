"""A process whose model has groups of layers, some with a window, and shares blocks by stores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kvpager import BlockStorage
from kvpager.blocks.groups.manager import GroupedManager
from kvpager.blocks.windows import first_visible
from kvpager.storage.keys import PromptKeys
from kvpager.storage.staging import Staging
from kvpager.storage.tiers.tiering import Tiering
from tests.support.dict_store import DictStore
from tests.support.tier_node import SHAPE, SIZE, Node, context_of, kv

CHUNK = 8


class GroupNode(Node):
    """As `Node`. The KV of a token is a function of all tokens up to it, and of the group."""

    manager: GroupedManager

    def __init__(
        self, windows: tuple[int | None, ...], stores: Sequence[Any] | None = None, *,
        num_blocks: int = 64, slots: int = 64, **options: Any,
    ) -> None:  # fmt: skip
        self.manager = GroupedManager(windows, num_blocks, SIZE, max_chunk=CHUNK)
        self.storage = BlockStorage(num_blocks, SIZE, [SHAPE], dtype=torch.float32)
        self.staging = Staging(self.storage, slots)
        self.stores = [DictStore(self.storage.block_bytes)] if stores is None else list(stores)
        options = {"max_wait_s": 60.0} | options
        self.tiering = Tiering(self.manager, self.staging, self.stores, context_of, **options)

    def compute(self, tokens: list[int], reply: int = 0, **key: Any) -> int:
        """Prefill a prompt in chunks, decode a reply, and free it. Returns the cached tokens."""
        manager = self.manager
        sequence = manager.allocate(tokens, **key)
        said = [*tokens, *(200 + number for number in range(reply))]
        expected = torch.tensor(kv(said, key), dtype=torch.float32)
        start = sequence.num_cached_tokens
        self._read(sequence, start, expected)
        for first in range(start, len(tokens), CHUNK):
            stop = min(first + CHUNK, len(tokens))
            self._write(manager.open_slots(sequence, first, stop), expected[first:stop])
            manager.commit(sequence, stop)
            self._read(sequence, stop, expected)
        for at in range(len(tokens), len(said)):
            self._write(manager.append(sequence, [said[at]]).slots, expected[at : at + 1])
            manager.commit(sequence)
        manager.free(sequence)
        return start

    def _write(self, slots: Any, values: torch.Tensor) -> None:
        keys, _ = self.storage.layer(0)
        for group, of_group in enumerate(slots):
            keys[of_group // SIZE, of_group % SIZE] = (values + group)[:, None, None]

    def _read(self, sequence: Any, length: int, expected: torch.Tensor) -> None:
        """Check what the token after `length` attends to in each group."""
        keys, _ = self.storage.layer(0)
        tables = self.manager.block_tables([sequence])[:, 0]
        for group, window in enumerate(self.manager.windows):
            at = np.arange(first_visible(length, window), length)
            found = keys[tables[group, at // SIZE], at % SIZE, 0, 0]
            assert torch.equal(found, expected[at] + group), f"group {group} reads wrong"

    def saved(self, tokens: list[int], **key: Any) -> list[list[int]]:
        """Return the positions of a prompt's blocks in the first store, for each group."""
        context = context_of(key.get("namespace"), key.get("lora"))
        keys = PromptKeys(np.array(tokens, np.int32), SIZE, context, [], self.manager.windows)
        return [
            [at for at in range(len(tokens) // SIZE) if keys.of(group, at) in self.stores[0].blocks]
            for group in range(len(self.manager.windows))
        ]

"""A process that computes prompts and shares their blocks through stores."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from kvpager import BlockManager, BlockStorage
from kvpager.storage.keys import KeyContext
from kvpager.storage.staging import Staging
from kvpager.storage.tiers.loading import Fetch
from kvpager.storage.tiers.tiering import Tiering
from tests.support.dict_store import DictStore

SIZE, SHAPE = 4, (1, 2, 2)


class Node:
    """A process: a manager, a storage whose KV is a function of the tokens, and its tiering."""

    def __init__(
        self, stores: Sequence[Any] | None = None, *, num_blocks: int = 16, slots: int = 32,
        **options: Any,
    ) -> None:  # fmt: skip
        self.manager = BlockManager(num_blocks, SIZE)
        self.storage = BlockStorage(num_blocks, SIZE, [SHAPE], dtype=torch.float32)
        self.staging = Staging(self.storage, slots)
        self.stores = [DictStore(self.storage.block_bytes)] if stores is None else list(stores)
        self.tiering = Tiering(self.manager, self.staging, self.stores, context_of, **options)

    def compute(self, tokens: list[int], **key: Any) -> int:
        """Prefill a prompt as a model would, and free it. Returns the tokens that were cached."""
        manager, (keys, values) = self.manager, self.storage.layer(0)
        sequence = manager.allocate(tokens, **key)
        self.storage.copy(sequence.copies)
        slots = manager.slots(sequence, 0, len(tokens))
        expected = kv(tokens, key)
        start = sequence.num_cached_tokens
        for at in range(start, len(tokens)):
            block, offset = divmod(int(slots[at]), SIZE)
            keys[block, offset] = values[block, offset] = expected[at]
        manager.commit(sequence)
        for at in range(len(tokens)):
            block, offset = divmod(int(slots[at]), SIZE)
            assert (keys[block, offset] == expected[at]).all(), f"token {at} reads wrong"
            assert (values[block, offset] == expected[at]).all()
        manager.free(sequence)
        return start

    def fetch(self, tokens: list[int], **key: Any) -> int:
        """Fetch and attach a prompt's blocks; return how many were added."""
        fetch = self.tiering.begin(tokens, **key)
        if fetch is None:
            return 0
        finished(fetch)
        return sum(self.tiering.attach(fetch).values()) // SIZE

    def clean(self) -> int:
        """Save all blocks that are idle."""
        count = 0
        while True:
            count += self.tiering.clean(1000)
            self.settle()
            if self.tiering.is_clean:
                return count

    def settle(self) -> None:
        """Wait until all saves have ended."""
        self.tiering._saver._thread.submit(lambda: None).result(60)

    def end(self) -> None:
        self.tiering.close()
        assert self.staging.num_free == self.staging.num_slots
        self.manager.check()
        stats = self.manager.stats()
        assert stats.num_free + stats.num_cached == stats.num_blocks
        assert all(store.is_closed for store in self.stores)


def context_of(namespace: str | None, lora: str | None) -> KeyContext:
    secret = b"" if namespace is None else namespace.encode().ljust(16)
    return KeyContext("layout", "model", secret, lora)


def kv(tokens: list[int], key: dict[str, Any]) -> list[int]:
    """A number for each token that depends on all before it, and on namespace and LoRA."""
    chain, values = hash(str(key)) % 1000, []
    for token in tokens:
        chain = (chain * 31 + token + 1) % 100_003
        values.append(chain)
    return values


def finished(fetch: Fetch) -> None:
    fetch.work.exception(60)


def prompt(seed: int, length: int = 21) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(50) for _ in range(length)]

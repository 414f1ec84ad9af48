"""Keep the blocks of a prompt on disk, without a model library.

A toy "model" writes a number for each token. The first run computes a prompt and saves its blocks.
The second run begins with an empty pool, as after a restart: it finds the blocks on disk, and their
bytes are the same. Run it: `python examples/tiers.py`.
"""

from __future__ import annotations

import tempfile

import torch

from kvpager import BlockManager, BlockStorage, LayerShape
from kvpager.ops import append_kv, gather_kv
from kvpager.storage.keys import KeyContext
from kvpager.storage.staging import Staging
from kvpager.storage.tiers.layout import BlockLayout
from kvpager.storage.tiers.tiering import Tiering
from kvpager.storage.tiers.urls import open_stores

HEADS, HEAD_DIM, BLOCK_SIZE, NUM_BLOCKS = 2, 16, 16, 32
KV = torch.randn(1000, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(0))


def run(folder: str, prompt: list[int]) -> None:
    """Compute what the stores do not have of a prompt, check all of it, and save it."""
    manager = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
    shape = LayerShape(HEADS, HEAD_DIM, HEAD_DIM)
    storage = BlockStorage(NUM_BLOCKS, BLOCK_SIZE, [shape], dtype=torch.float32)
    layout = BlockLayout("toy 2x16 float32", storage.block_bytes)
    stores = open_stores(["host:1MiB", f"disk:{folder}?capacity=8MiB"], layout=layout)
    staging = Staging(storage, num_slots=16)
    tiering = Tiering(
        manager, staging, stores, lambda namespace, lora: KeyContext(layout.text, "toy model")
    )
    if (fetch := tiering.begin(prompt)) is not None:
        fetch.work.result()  # a server computes other requests until `fetch.is_done`
        print("fetched:", tiering.attach(fetch), end=" ")
    sequence = manager.allocate(prompt)
    storage.copy(sequence.copies)
    key_cache, value_cache = storage.layer(0)
    first = sequence.num_cached_tokens
    slots, rest = torch.from_numpy(manager.slots(sequence, first)), KV[prompt[first:]]
    append_kv(rest, rest, key_cache, value_cache, slots)
    manager.commit(sequence)
    print("computed:", len(rest), "tokens")
    table, length = torch.from_numpy(manager.block_tables([sequence])), len(prompt)
    assert torch.equal(gather_kv(key_cache, table, torch.tensor([length]), length)[0], KV[prompt])
    manager.free(sequence)
    while tiering.clean():  # between steps: copies blocks, which threads save
        pass
    tiering.close()  # waits for them


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        for _ in ("first", "after a restart"):
            run(f"{directory}/kv", list(range(100, 200)))

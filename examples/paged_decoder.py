"""Use the block manager, the storage and the kernels without a model library.

A toy "model" of random projections decodes two sequences that share a prompt. The second sequence
finds the prompt's blocks in the pool. A fork continues with other tokens. One sequence is swapped
to host memory and back. At the end, attention through the blocks is compared with attention over
plain tensors. Run it: `python examples/paged_decoder.py`.
"""

from __future__ import annotations

import torch

from kvpager import BlockManager, BlockStorage, LayerShape, SequenceHandle
from kvpager.ops import append_kv, paged_attention

LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 16
BLOCK_SIZE, NUM_BLOCKS = 16, 64

manager = BlockManager(NUM_BLOCKS, BLOCK_SIZE, num_host_blocks=16)
storage = BlockStorage(
    NUM_BLOCKS,
    BLOCK_SIZE,
    [LayerShape(KV_HEADS, HEAD_DIM, HEAD_DIM)] * LAYERS,
    dtype=torch.float32,
    num_host_blocks=16,
)
torch.manual_seed(0)
# The key and value of each token id in each layer. Any numbers will do here.
KEYS = torch.randn(LAYERS, 1000, KV_HEADS, HEAD_DIM)
VALUES = torch.randn(LAYERS, 1000, KV_HEADS, HEAD_DIM)


def write(token_ids: list[int], slots: torch.Tensor) -> None:
    """Write the tokens' keys and values to their slots, in every layer."""
    for layer in range(LAYERS):
        key_cache, value_cache = storage.layer(layer)
        append_kv(KEYS[layer, token_ids], VALUES[layer, token_ids], key_cache, value_cache, slots)


def start(prompt: list[int]) -> SequenceHandle:
    """Begin a sequence, and write the tokens that the pool does not hold yet."""
    sequence = manager.allocate(prompt)
    storage.copy(sequence.copies)
    first = sequence.num_cached_tokens
    write(prompt[first:], torch.from_numpy(manager.slots(sequence, first)))
    manager.commit(sequence)
    print(f"prompt of {len(prompt)} tokens, {first} of them found in the pool")
    return sequence


def step(sequences: list[SequenceHandle], token_ids: list[int]) -> None:
    """Append one token to each sequence."""
    appended = manager.append(sequences, token_ids)
    storage.copy(appended.copies)
    write(token_ids, torch.from_numpy(appended.slots))
    manager.commit(sequences)


def attend(query: torch.Tensor, sequences: list[SequenceHandle], layer: int) -> torch.Tensor:
    """Return attention of one query per sequence, [sequences, query_heads, head_dim]."""
    tables = torch.from_numpy(manager.block_tables(sequences))
    lengths = torch.from_numpy(manager.lengths(sequences))
    return paged_attention(query, *storage.layer(layer), tables, lengths)


def attend_plainly(query: torch.Tensor, token_ids: list[int], layer: int) -> torch.Tensor:
    """Return the same for one sequence, computed over plain tensors."""
    groups = QUERY_HEADS // KV_HEADS
    keys = KEYS[layer, token_ids].repeat_interleave(groups, dim=1)
    values = VALUES[layer, token_ids].repeat_interleave(groups, dim=1)
    scores = torch.einsum("hd,thd->ht", query, keys) * HEAD_DIM**-0.5
    return torch.einsum("ht,thd->hd", scores.softmax(-1), values)


def main() -> None:
    """Decode, fork, swap, compare."""
    prompt = list(range(100, 150))
    texts = [[*prompt, 1], [*prompt, 2, 3]]
    sequences = [start(text) for text in texts]
    sequences.append(manager.fork(sequences[0]))
    texts.append(list(texts[0]))
    for token in range(500, 520):
        if token == 510:
            storage.apply(manager.swap(sequences[1], "host"))
            storage.apply(manager.swap(sequences[1], "device"))
        new = [token, token + 100, token + 200]
        step(sequences, new)
        for text, one in zip(texts, new, strict=True):
            text.append(one)
    query = torch.randn(len(sequences), QUERY_HEADS, HEAD_DIM)
    for layer in range(LAYERS):
        paged = attend(query, sequences, layer)
        for row, text in enumerate(texts):
            expected = attend_plainly(query[row], text, layer)
            torch.testing.assert_close(paged[row], expected, atol=1e-5, rtol=1e-5)
    stats = manager.stats()
    print(f"{sum(map(len, texts))} tokens in {stats.num_held} blocks, {stats.num_shared} shared")
    manager.free(sequences)
    manager.check()
    print("attention through the blocks is attention over plain tensors")


if __name__ == "__main__":
    main()

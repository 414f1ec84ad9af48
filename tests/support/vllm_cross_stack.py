"""An engine of `vllm_steps` that shares a store, with pages of numbers, packed as vLLM does."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from kvpager.storage.tiers.agreement import Blocks, CommonLayout
from tests.support.dict_store import DictStore
from tests.support.vllm_parts import page_order, synchronous
from tests.support.vllm_steps import Engine, Group, Request

BLOCK, HEADS, DIM = 32, 2, 4
LAYER = HEADS, DIM, DIM
PAGE_BYTES = BLOCK * HEADS * 2 * DIM * 4


def common(per_chunk: int = 1) -> CommonLayout:
    return CommonLayout.of(BLOCK * per_chunk, [LAYER], "float32")


def numbers(tokens: Sequence[int], start: int, stop: int) -> Any:
    """Return keys and values of some tokens of a prompt: float32 [2, tokens, heads, dim]."""
    made = []
    for end in range(start + 1, stop + 1):
        seed = blake2b(np.array(tokens[:end], "<i4").tobytes(), digest_size=8).digest()
        choose = np.random.default_rng(int.from_bytes(seed, "little"))
        made.append(choose.standard_normal((2, HEADS, DIM)).astype(np.float32))
    return np.stack(made, axis=1)


def computed(tokens: Sequence[int], block_size: int) -> Blocks:
    """Return the full blocks of a prompt as another stack computes them."""
    stops = range(block_size, len(tokens) + 1, block_size)
    blocks = [numbers(tokens, stop - block_size, stop).reshape(-1) for stop in stops]
    return np.stack(blocks).view(np.uint8)


def pack_transposed(keys: Tensor, values: Tensor, pages: Tensor, slots: Tensor) -> None:
    """Write to pages [blocks, heads, tokens, 2 * dim]; keys of a head lie transposed."""
    num_tokens = pages.shape[2]
    halves = pages.view(len(pages), pages.shape[1], 2, num_tokens, -1)
    for key, value, slot in zip(keys, values, slots.tolist(), strict=True):
        block, place = divmod(slot, num_tokens)
        for head in range(len(key)):
            halves[block, head, 0].view(-1, num_tokens)[:, place] = key[head]
            halves[block, head, 1, place] = value[head]


class SharingEngine(Engine):
    """Shares `store`. `spoil` changes the page of each block that it computes."""

    def __init__(
        self, folder: Path, store: DictStore, *, per_chunk: int = 1, spoil: Any = None, **extra: Any
    ) -> None:
        self._spoil = spoil or (lambda numbers: numbers)
        pages = torch.zeros(64, HEADS, BLOCK, 2 * DIM)
        orders = [page_order.page_order(pack_transposed, pages, BLOCK, LAYER)]
        settings = {"cross_stack": True, "model_id": "m", "tiers": ["disk:/kv?capacity=1GiB"]}
        size = {"per_chunk": per_chunk, "page_bytes": PAGE_BYTES}
        with patch.object(synchronous, "page_orders", lambda *_: orders):
            try:
                super().__init__(
                    folder, (Group(BLOCK),), stores=[store], **size, **settings, **extra
                )
            except BaseException:
                self.stack.close()  # undo what is replaced
                raise

    def _content(self, request: Request, number: int, index: int) -> bytes:
        made = self._spoil(numbers(request.tokens, index * BLOCK, (index + 1) * BLOCK))
        page = torch.zeros(1, HEADS, BLOCK, 2 * DIM)
        pack_transposed(*torch.from_numpy(np.ascontiguousarray(made)), page, torch.arange(BLOCK))
        return page.numpy().tobytes()

"""Valid arguments of each kernel, to be changed one at a time."""

from __future__ import annotations

from typing import Any

import torch

from tests.support.kernel_cases import strided_caches


def attention_arguments() -> dict[str, Any]:
    key_cache, value_cache = strided_caches(4, 4, 2, 8, 8, torch.float32)
    return {
        "query": torch.zeros(2, 4, 8),
        "key_cache": key_cache,
        "value_cache": value_cache,
        "block_tables": torch.zeros(2, 1, dtype=torch.int32),
        "seq_lens": torch.ones(2, dtype=torch.int32),
    }


def append_arguments() -> dict[str, Any]:
    key_cache, value_cache = strided_caches(4, 4, 2, 8, 8, torch.float32)
    token, slots = torch.zeros(1, 2, 8), torch.zeros(1, dtype=torch.int64)
    return {
        "key": token, "value": token, "key_cache": key_cache, "value_cache": value_cache,
        "slots": slots,
    }  # fmt: skip


def gather_arguments() -> dict[str, Any]:
    attention = attention_arguments()
    rows = {name: attention[name] for name in ("block_tables", "seq_lens")}
    return {"cache": attention["key_cache"], **rows, "length": 1}

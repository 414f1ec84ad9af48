"""vLLM's attention on the CPU: its compiled operators, called as `cpu_attn.py` of vLLM 0.32 does.

Only the shared library is loaded, into this process and torch, so vLLM's Python dependencies are
not needed: the folder of an unpacked wheel will do. The torch here has to be the one it was built
for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK_SIZES = (16, 32, 64, 128)


def load(folder: Path) -> str | None:
    """Load the operators from a folder that holds `vllm/` or is it. None, or why that failed."""
    inside = folder / "vllm" if (folder / "vllm").is_dir() else folder
    path = inside / _library_name()
    if not path.is_file():
        return f"there is no {path}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} cannot be loaded with torch {torch.__version__}: {error}"
    needed = ("cpu_attention_with_kv_cache", "cpu_attn_reshape_and_cache", "get_scheduler_metadata")
    missing = [name for name in needed if not hasattr(torch.ops._C, name)]
    return f"{path.name} has no {missing}" if missing else None


def _library_name() -> str:
    """The variant that vLLM's `CpuPlatform.import_kernels` chooses for this processor."""
    if not torch.cpu._is_avx512_supported():
        return "_C_AVX2.abi3.so"
    return "_C.abi3.so" if torch.cpu._is_avx512_bf16_supported() else "_C_AVX512.abi3.so"


def _isa(dtype: torch.dtype, block_size: int) -> str:
    """Return the result of vLLM's `_get_attn_isa` on x86, for head sizes divisible by 32."""
    if block_size % 32:
        return "vec16"
    if torch.cpu._is_amx_tile_supported() and dtype == torch.bfloat16:
        return "amx"
    return "vec"


class Batch(NamedTuple):
    """What one decode step of vLLM shares between layers; made before the clock starts, because
    vLLM makes it once a step too."""

    tables: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor
    schedule: Tensor


class Decode:
    """Decode of a batch whose rows all have `length` tokens, in blocks of `block_size`."""

    def __init__(
        self,
        rows: int,
        length: int,
        query_heads: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        block_size: int,
    ) -> None:
        self._isa = _isa(dtype, block_size)
        self._scale = head_dim**-0.5
        columns = -(-length // block_size)
        self._shape = (rows * columns, kv_heads, block_size, 2 * head_dim)
        self._dtype = dtype
        tables = torch.randperm(rows * columns, dtype=torch.int32).view(rows, columns)
        seq_lens = torch.full((rows,), length, dtype=torch.int32)
        starts = torch.arange(rows + 1, dtype=torch.int32)
        schedule = torch.ops._C.get_scheduler_metadata(
            rows, query_heads, kv_heads, head_dim, seq_lens, dtype, starts,
            True, -1, self._isa, True, None, "auto",
        )  # fmt: skip
        self._batch = Batch(tables, seq_lens, starts, schedule)
        positions = torch.arange(length)
        blocks = tables.long()[:, positions // block_size]
        self._slots = (blocks * block_size + positions % block_size).flatten()
        self._output = torch.empty(rows, query_heads, head_dim, dtype=dtype)

    def layer(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's cache, filled from keys and values [rows, length, kv_heads, head_dim]."""
        blocks, heads, block_size, width = self._shape
        cache = torch.zeros(self._shape, dtype=self._dtype)
        key_cache, value_cache = cache.view(blocks, heads, 2 * block_size, width // 2).chunk(2, 2)
        torch.ops._C.cpu_attn_reshape_and_cache(
            keys.flatten(0, 1), values.flatten(0, 1), key_cache, value_cache,
            self._slots, self._isa, 1.0, 1.0, "auto",
        )  # fmt: skip
        return key_cache, value_cache

    def attend(self, query: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        """The output for query [rows, query_heads, head_dim], in a tensor that is used again."""
        tables, seq_lens, starts, schedule = self._batch
        operator: Any = torch.ops._C.cpu_attention_with_kv_cache
        operator(
            query, *cache, self._output, starts, seq_lens, self._scale, True, None, -1,
            tables, 0.0, schedule, None, None, 1.0, 1.0, "auto",
        )  # fmt: skip
        return self._output

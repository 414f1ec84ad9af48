"""`append_kv`, `gather_kv` and `copy_blocks` by the native kernels, or the reference kernels for
unsupported dtypes. Arguments are those of `reference.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpager.kernels import reference
from kvpager.kernels.args import unknown_block, wrong_length
from kvpager.kernels.cpu.library import TYPES, Kernel, address, int32_rows, integers

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# A plain copy uses the element size alone, so its type does not matter.
_NO_TYPE = TYPES[torch.float32]


class AppendKV(Kernel):
    """`append_kv` of one library."""

    def __call__(
        self,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slots: Tensor,
        *,
        scales: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Compute `reference.append_kv`.

        Raises: `ValueError` for a slot beyond the cache, before writing.
        """
        key_scales, value_scales = scales or (None, None)
        scale_strides = (0, 0, 0) if key_scales is None else key_scales.stride()
        # The native kernel takes one set of strides for both scales.
        if value_scales is not None and not (
            key_cache.dtype == torch.int8
            and key.dtype in _FLOATS
            and value_scales.stride() == scale_strides
        ):
            reference.append_kv(key, value, key_cache, value_cache, slots, scales=scales)
            return
        num_blocks, block_size, kv_heads, key_dim = key_cache.shape
        slots = slots.contiguous()
        # Read once each: for one token, reading strides takes most of the time.
        key_strides, value_strides = key.stride(), value.stride()
        key_cache_strides, value_cache_strides = key_cache.stride(), value_cache.stride()
        problem = self._library.call(
            "append_kv",
            key.data_ptr(), value.data_ptr(), key_cache.data_ptr(), value_cache.data_ptr(),
            address(key_scales), address(value_scales), *integers(slots),
            TYPES.get(key.dtype, _NO_TYPE), TYPES.get(key_cache.dtype, _NO_TYPE),
            key_cache.element_size(),
            key.shape[0], kv_heads, num_blocks, block_size, torch.get_num_threads(),
            key_dim, value_cache.shape[3],
            key_strides[0], value_strides[0], key_strides[1], value_strides[1],
            key_cache_strides[0], value_cache_strides[0],
            key_cache_strides[1], value_cache_strides[1],
            key_cache_strides[2], value_cache_strides[2],
            *scale_strides,
        )  # fmt: skip
        if problem is not None:
            token, _, slot = problem.numbers
            raise ValueError(
                f"slots[{token}]={slot}: the cache has slots 0 to {num_blocks * block_size - 1}"
            )


class GatherKV(Kernel):
    """`gather_kv` of one library."""

    def __call__(
        self,
        cache: Tensor,
        block_tables: Tensor,
        seq_lens: Tensor,
        length: int,
        *,
        scales: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Compute `reference.gather_kv`.

        Raises: `ValueError` for an unknown block, before reading.
        """
        dtype = dtype or cache.dtype
        # The native kernel widens int8. The reference handles other changes of dtype.
        is_widened = cache.dtype == torch.int8 and dtype in _FLOATS
        if not (cache.dtype == dtype if scales is None else is_widened):
            tables = block_tables, seq_lens
            return reference.gather_kv(cache, *tables, length, scales=scales, dtype=dtype)
        block_tables = int32_rows(block_tables)
        rows, columns = block_tables.shape
        num_blocks, block_size, kv_heads, dim = cache.shape
        seq_lens = seq_lens.contiguous()
        output = cache.new_empty(rows, length, kv_heads, dim, dtype=dtype)
        problem = self._library.call(
            "gather_kv",
            cache.data_ptr(), output.data_ptr(), address(scales), block_tables.data_ptr(),
            *integers(seq_lens),
            TYPES.get(cache.dtype, _NO_TYPE), TYPES.get(dtype, _NO_TYPE),
            cache.element_size(), output.element_size(),
            rows, length, kv_heads, dim,
            num_blocks, block_size, columns, block_tables.stride(0),
            *cache.stride()[:3], *((0, 0, 0) if scales is None else scales.stride()),
            torch.get_num_threads(),
        )  # fmt: skip
        if problem is not None:
            row, column, value = problem.numbers
            if problem.code == 1:
                raise wrong_length(row, value, columns * block_size)
            raise unknown_block(row, column, value, num_blocks)
        return output


class CopyBlocks(Kernel):
    """`copy_blocks` of one library."""

    def __call__(self, storage: Tensor, copies: Tensor) -> None:
        """Compute `reference.copy_blocks`.

        Raises: `ValueError` for an unknown block, before writing.
        """
        copies = copies.contiguous()
        size = storage.element_size()
        problem = self._library.call(
            "copy_blocks",
            storage.data_ptr(), *integers(copies), len(copies), len(storage),
            storage.stride(0) * size, storage[0].numel() * size if len(storage) else 0,
            torch.get_num_threads(),
        )  # fmt: skip
        if problem is not None:
            pair, _, block = problem.numbers
            raise ValueError(
                f"copies[{pair}] names block {block}; the storage has blocks 0 to "
                f"{len(storage) - 1}, and a negative number skips the pair"
            )

"""Virtual on a GPU: blocks in pages of GPU memory, mapped through CUDA's driver."""

from __future__ import annotations

import torch

from kvpager._text import size
from kvpager.modes.cuda_device import cuda_device
from kvpager.modes.gpu_pages import GpuPagePool
from kvpager.modes.protocol import Memory
from kvpager.modes.virtual import MappedMemory
from kvpager.storage.layout import PART_ALIGNMENT_BYTES, StorageLayout

# A GPU maps pages of 2 MiB: a small block would leave most of its page unused.
UNUSED_MOST = 1 / 8


class VirtualOnGpu(MappedMemory):
    """Blocks in GPU pages that can be mapped at several addresses, token-first.

    A block takes whole pages, and may leave at most an eighth of them unused. Needs the extra
    `kvpager[virtual]`.
    """

    def __init__(self, device: torch.device) -> None:
        """Use `device`, a CUDA device. O(1).

        Raises: `ModuleNotFoundError` without cuda-bindings; `RuntimeError` if the GPU or its driver
        cannot map memory; torch's errors without a GPU.
        """
        index = torch.cuda.current_device() if device.index is None else device.index
        self._gpu = cuda_device(index)

    @property
    def token_first(self) -> int:  # noqa: D102
        return self._gpu.page_bytes

    def allocate(  # noqa: D102
        self,
        num_blocks: int,
        layout: StorageLayout,
        dtype: torch.dtype,
        device: torch.device,
        pinned: bool,
    ) -> Memory:
        self._refuse_waste(layout, dtype)
        pool = GpuPagePool(self._gpu, num_blocks, layout.num_elements * dtype.itemsize)
        return Memory(pool.pages.view(dtype), pool)

    def _refuse_waste(self, layout: StorageLayout, dtype: torch.dtype) -> None:
        """Raise `ValueError` if blocks leave too much of their pages unused."""
        tokens, page = layout.num_tokens or 1, self._gpu.page_bytes
        used = layout.used_elements * dtype.itemsize  # of a token
        fits = tokens
        while page // fits > PART_ALIGNMENT_BYTES and _unused(used, page // fits) > UNUSED_MOST:
            fits *= 2
        if fits == tokens:
            return
        raise ValueError(
            f"block_size={tokens}: a block holds {size(tokens * used)}, and takes "
            f"{size(layout.num_elements * dtype.itemsize)}, since a GPU maps pages of "
            f'{size(page)}. Take block_size={fits} or mode="paged".'
        )


def _unused(num_bytes: int, unit: int) -> float:
    """Return the unused fraction of the fewest units that hold `num_bytes`. O(1)."""
    return 1 - num_bytes / (-(-num_bytes // unit) * unit)

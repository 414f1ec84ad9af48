"""Memory for blocks: tensors without zeroing, on huge pages if the system provides them.

Blocks are scattered over a pool of gigabytes. With pages of 4 KiB, nearly every block costs a walk
of the page tables (two nested walks in a virtual machine). A page of 2 MiB covers dozens of blocks.
Reading a pool in random order took 8 to 20 % less time with huge pages.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from functools import cache

import numpy as np
import torch
from torch import Tensor

HUGE_PAGE_BYTES = 2 << 20
# In smaller tensors, huge pages waste more memory than they save time.
_LEAST_BYTES = 4 * HUGE_PAGE_BYTES
_MADV_HUGEPAGE = 14
_MADV_POPULATE_WRITE = 23  # since Linux 5.14
_PAGE_BYTES = 4096
_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for all GPUs, not only the current one


def allocate(
    num_blocks: int,
    run: int,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    pinned: bool = False,
) -> Tensor:
    """Return an uninitialised, contiguous [num_blocks, run] of `dtype`. O(1), O(bytes) if `pinned`.

    On Linux, CPU tensors of at least 8 MiB request transparent huge pages. Memory never written
    still takes no space, in steps of 2 MiB. Raises: errors of torch's allocation, `MemoryError`.
    """
    if pinned:
        return host_pages(num_blocks, run, dtype, pinned=True)
    tensor = torch.empty(num_blocks, run, dtype=dtype, device=device)
    if tensor.device.type == "cpu":
        _advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def host_pages(num_blocks: int, run: int, dtype: torch.dtype, *, pinned: bool) -> Tensor:
    """Return uninitialised memory of exactly [num_blocks, run], which begins at a page.

    O(1), O(bytes) if `pinned`: page-locked. torch's own page-locked memory rounds up to a power of
    two: 9 GiB would take 16 GiB. The memory is unlocked when its last tensor is freed.
    """
    num_bytes = num_blocks * run * dtype.itemsize
    if not num_bytes:
        return torch.empty(num_blocks, run, dtype=dtype)
    memory = np.empty(num_bytes + _PAGE_BYTES, np.uint8)
    start = -memory.ctypes.data % _PAGE_BYTES
    pages = memory[start : start + num_bytes]
    address = pages.ctypes.data
    _advise_huge_pages(address, num_bytes)
    if pinned:
        lock_pages(address, num_bytes)
        # The tensor keeps `pages` alive, and a finalizer runs before its object is freed.
        weakref.finalize(pages, unlock_pages, address).atexit = False
    return torch.from_numpy(pages).view(dtype).view(num_blocks, run)


def populate(memory: Tensor, num_bytes: int) -> None:
    """Let the system provide the first `num_bytes` of a CPU tensor now. O(bytes).

    Otherwise the first write waits for that, which takes longer than the copy. The content stays.
    No effect on systems that lack the call.
    """
    stop = memory.data_ptr() + min(num_bytes, memory.nbytes)
    start = -(-memory.data_ptr() // _PAGE_BYTES) * _PAGE_BYTES
    if (advise := _madvise()) is not None and start < stop:
        advise(start, stop - start, _MADV_POPULATE_WRITE)


def lock_pages(address: int, num_bytes: int) -> None:
    """Page-lock memory for GPUs. O(bytes). Raises: `RuntimeError` if the system refuses."""
    if not torch.cuda.is_available():
        raise RuntimeError("pinned=True: needs a GPU that torch can use. Pass pinned=False.")
    _check(torch.cuda.cudart().cudaHostRegister(address, num_bytes, _PORTABLE))


def unlock_pages(address: int) -> None:
    """Unlock the memory of `lock_pages`, after all copies that use it have ended."""
    torch.cuda.synchronize()
    _check(torch.cuda.cudart().cudaHostUnregister(address))


def _check(code: object) -> None:
    if int(code):  # type: ignore[call-overload]
        raise torch.cuda.CudaError(int(code))  # type: ignore[call-overload]


def _advise_huge_pages(address: int, num_bytes: int) -> None:
    """Request huge pages. A system that does not support them ignores the request."""
    advise = _madvise() if num_bytes >= _LEAST_BYTES else None
    if advise is None:
        return
    start = -(-address // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    end = (address + num_bytes) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    advise(start, end - start, _MADV_HUGEPAGE)


@cache
def _madvise() -> ctypes._NamedFuncPointer | None:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function

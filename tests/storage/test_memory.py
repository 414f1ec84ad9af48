"""Memory of blocks takes space when it is written, or when `populate` says so."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kvpager.storage.memory import host_pages, populate

PAGE = 4096


def pages_there(memory: torch.Tensor) -> list[bool]:
    """Return for each page of a tensor whether it takes space."""
    pages = np.zeros(memory.nbytes // PAGE, np.uint8)
    function = ctypes.CDLL(None, use_errno=True).mincore
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    assert function(memory.data_ptr(), memory.nbytes, pages.ctypes.data) == 0
    return [bool(page & 1) for page in pages]


@pytest.mark.skipif(sys.platform != "linux", reason="mincore")
def test_the_first_bytes_are_there_before_a_write() -> None:
    memory = host_pages(256, 64 * PAGE, torch.uint8, pinned=False)  # beyond any heap: mapped
    assert not all(pages_there(memory)[: 32 * 64])
    memory[:8] = 7
    populate(memory, 32 * 64 * PAGE)
    assert all(pages_there(memory)[: 32 * 64])
    assert bool((memory[:8] == 7).all())


def test_what_is_asked_is_page_locked_and_unlocked_with_the_last_view(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    locked: dict[int, int] = {}
    monkeypatch.setattr("kvpager.storage.memory.lock_pages", locked.__setitem__)
    monkeypatch.setattr("kvpager.storage.memory.unlock_pages", locked.__delitem__)
    view = host_pages(9, 64 * PAGE, torch.uint8, pinned=True)[3:]
    ((address, num_bytes),) = locked.items()
    assert (address % PAGE, num_bytes) == (0, 9 * 64 * PAGE)
    del view
    gc.collect()
    assert not locked


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


@pytest.mark.gpu
def test_gpu_page_locked_memory_takes_what_is_asked() -> None:
    host_pages(1, PAGE, torch.uint8, pinned=True)  # what CUDA takes at first
    before = resident_bytes()
    memory = host_pages(9, 16 << 20, torch.uint8, pinned=True)  # torch's own would take 256 MiB
    assert memory.is_pinned()
    memory.fill_(1)
    taken = resident_bytes() - before
    assert 144 << 20 <= taken <= 160 << 20
    del memory
    assert resident_bytes() - before <= 16 << 20

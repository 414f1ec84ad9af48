"""Memory of blocks takes space when it is written, or when `populate` says so."""

from __future__ import annotations

import ctypes
import sys

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

"""Pages of memory that may be mapped at several addresses, on Linux.

The pages are those of a file in memory (memfd). The whole file is mapped once, as the pool. Beside
it, a range of addresses is reserved, and single pages of the file are mapped into the range. So a
page has an address in the pool, and another one wherever it is mapped. A write to one address shows
at all of them.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvpager.modes.protocol import NO_PAGE

SYSTEM_PAGE_BYTES = mmap.PAGESIZE
_READ, _READ_WRITE = mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE
_SHARED, _PRIVATE, _ANONYMOUS = mmap.MAP_SHARED, mmap.MAP_PRIVATE, mmap.MAP_ANONYMOUS
_FIXED, _NO_RESERVE = 0x10, 0x4000
_FALLOC_KEEP_SIZE, _FALLOC_PUNCH_HOLE = 1, 2
_FAILED = ctypes.c_void_p(-1).value
_MAX_MAP_COUNT = Path("/proc/sys/vm/max_map_count")
# The interpreter, torch and their libraries have some thousand mappings.
_OTHER_MAPPINGS = 5_000


class PagePool:
    """Equal pages, mapped once as a pool and again wherever `AddressRange` puts them.

    A forked child process cannot access the pages: its writes would reach its parent.
    """

    def __init__(self, num_pages: int, page_bytes: int) -> None:
        """Make pages of zeros, which take no memory until they are written. O(1).

        Raises: `ValueError` if `page_bytes` is not a multiple of the system's pages; `OSError` if
        the system has no address space for them, or is not Linux.
        """
        if page_bytes % SYSTEM_PAGE_BYTES:
            raise ValueError(
                f"page_bytes={page_bytes}: expected a multiple of {SYSTEM_PAGE_BYTES}, the size of "
                "the system's pages"
            )
        if not sys.platform.startswith("linux"):
            raise OSError('mode="virtual": needs Linux. Take mode="paged".')
        self.page_bytes, self.num_drops = page_bytes, 0  # a page stays a place in the file
        self._file = os.memfd_create("kvpager", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self._file)
        #: All pages, uint8 [pages, page_bytes]. Views of it keep the memory mapped.
        self.pages: Tensor = torch.empty(0, page_bytes, dtype=torch.uint8)
        self.resize(num_pages)

    def resize(self, num_pages: int) -> None:
        """Let `pages` be the first `num_pages` pages; new ones are zeros. O(1 + pages dropped).

        The memory of dropped pages goes back to the system. Earlier views of `pages` show the same
        memory, and zeros for what is dropped. Raises: `OSError`; the pool is unchanged.
        """
        size = num_pages * self.page_bytes
        if size > os.fstat(self._file).st_size:
            os.ftruncate(self._file, size)
        memory = mmap.mmap(self._file, size, _SHARED, _READ_WRITE)
        memory.madvise(mmap.MADV_DONTFORK)
        num_dropped = len(self.pages) - num_pages
        self.pages = torch.frombuffer(memory, dtype=torch.uint8).view(num_pages, self.page_bytes)
        if num_dropped > 0:
            # The file keeps its size: beyond its end, earlier views would end the process.
            mode = _FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE
            if _libc().fallocate(self._file, mode, size, num_dropped * self.page_bytes):
                raise _error("cannot give memory back")

    def open_range(self, num_pages: int, num_mappings: int) -> AddressRange:
        """Reserve addresses of `num_pages` pages, as `AddressRange` describes."""
        return AddressRange(self, num_pages, num_mappings)

    def map(self, address: int, page: int, count: int = 1) -> None:
        """Map `count` pages from `page` on at `address`, in place of what is there. O(1).

        Raises: `OSError` if the system refuses.
        """
        size, offset = count * self.page_bytes, page * self.page_bytes
        _map(address, size, _READ_WRITE, _SHARED | _FIXED, self._file, offset)


class AddressRange:
    """A range of addresses in which pages are mapped. What is not mapped reads as zeros.

    A write outside of the mapped pages ends the process with SIGSEGV.
    """

    def __init__(self, pool: PagePool, num_pages: int, num_mappings: int) -> None:
        """Reserve addresses, which take no memory, for up to `num_mappings` runs of pages. O(1).

        Raises: `ValueError` if the system allows fewer mappings; `OSError` if it lacks addresses.
        """
        _check_num_mappings(num_mappings)
        self._pool, num_bytes = pool, num_pages * pool.page_bytes
        flags = _PRIVATE | _ANONYMOUS | _NO_RESERVE
        self._memory = mmap.mmap(-1, num_bytes, flags, _READ_WRITE)
        self.address = self._bytes().ctypes.data
        self._users: list[weakref.ref[NDArray[np.uint8]]] = []
        self.unmap(0, num_bytes)
        _ranges[self._memory] = num_mappings

    def tensor(self) -> Tensor:
        """Return the range, uint8 [bytes]. Views of it keep the range and its mappings. O(1)."""
        array = self._bytes()
        self._users = [user for user in self._users if user() is not None]
        self._users.append(weakref.ref(array))
        return torch.from_numpy(array)  # which keeps the array as long as a view lives

    @property
    def is_in_use(self) -> bool:
        """True if a view of a `tensor` still exists. O(tensors)."""
        return any(user() is not None for user in self._users)

    def enter(self) -> None:
        """Do nothing: a CPU reads at once."""

    def show(self, changes: Iterable[tuple[int, int, int]]) -> None:
        """Show runs of pages at runs of places: (place, first page or `NO_PAGE`, count) each.

        One call of the system for each. O(changes). Raises: `OSError` if the system refuses.
        """
        page_bytes = self._pool.page_bytes
        for place, page, count in changes:
            if page == NO_PAGE:
                self.unmap(place * page_bytes, count * page_bytes)
            else:
                self._pool.map(self.address + place * page_bytes, page, count)

    def unmap(self, start: int, num_bytes: int) -> None:
        """Let `num_bytes` from `start` on read as zeros, and refuse writes. O(pages)."""
        flags = _PRIVATE | _ANONYMOUS | _NO_RESERVE | _FIXED
        _map(self.address + start, num_bytes, _READ, flags)

    def part_from_pages(self, place: int, count: int) -> None:
        """Replace the pages shown at places by a private copy of their content. O(bytes)."""
        page_bytes = self._pool.page_bytes
        start, num_bytes = place * page_bytes, count * page_bytes
        content = self._bytes()[start : start + num_bytes].copy()
        flags = _PRIVATE | _ANONYMOUS | _FIXED
        _map(self.address + start, num_bytes, _READ_WRITE, flags)
        self._bytes()[start : start + num_bytes] = content

    def _bytes(self) -> NDArray[np.uint8]:
        return np.frombuffer(self._memory, np.uint8)


_ranges = weakref.WeakKeyDictionary[mmap.mmap, int]()  # the maximum number of mappings in each


def _keep_from_children() -> None:
    """Exclude the ranges from the child process that is about to be forked. O(mappings).

    Each fork needs this: the flag belongs to a mapping, and pages mapped since lack it.
    """
    for memory in list(_ranges):
        memory.madvise(mmap.MADV_DONTFORK)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_keep_from_children)


def _check_num_mappings(more: int) -> None:
    """Raise `ValueError` if the system may refuse `more` mappings. O(ranges)."""
    try:
        allowed = int(_MAX_MAP_COUNT.read_text())
    except OSError:
        return
    most = more + sum(_ranges.values()) + _OTHER_MAPPINGS
    if most > allowed:
        raise ValueError(
            f"vm.max_map_count={allowed}: up to {most} mappings are needed, since blocks may be "
            "mapped apart from each other. Lower the number of rows or their length, take larger "
            f"blocks, or let an administrator run `sysctl vm.max_map_count={most}`."
        )


def _map(
    address: int, num_bytes: int, access: int, flags: int, file: int = -1, offset: int = 0
) -> None:
    if _libc().mmap(address, num_bytes, access, flags, file, offset) == _FAILED:
        raise _error("cannot map memory")


def _error(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")


@cache
def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    size, offset = ctypes.c_size_t, ctypes.c_longlong
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = (
        ctypes.c_void_p, size, ctypes.c_int, ctypes.c_int, ctypes.c_int, offset
    )  # fmt: skip
    library.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, offset, offset)
    return library

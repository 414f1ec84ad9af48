"""Pages of GPU memory that can be mapped at several addresses, with CUDA's virtual memory.

    create   makes the memory of a page once; it is mapped in the pool and in ranges of addresses
    unmap    happens after the work queued so far; nothing waits until a place is needed again

All addresses of a page are the same memory. But a kernel may not see its own writes through another
address; it sees those of earlier kernels. So appends, copies and attention are separate kernels.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvpager._text import size
from kvpager.modes.cuda_device import CudaDevice, Handle, Mark
from kvpager.modes.protocol import NO_PAGE


class GpuPagePool:
    """Equal pages of one GPU: mapped once as a pool, and again wherever `open_range` shows them."""

    def __init__(self, device: CudaDevice, num_pages: int, page_bytes: int) -> None:
        """Allocate uninitialised pages. O(pages).

        Raises: `ValueError` if `page_bytes` is not a multiple of the GPU's pages;
        `torch.OutOfMemoryError`; `RuntimeError` if the GPU or its driver cannot map memory.
        """
        if page_bytes % device.page_bytes:
            raise ValueError(
                f"page_bytes={page_bytes}: expected a multiple of {size(device.page_bytes)}, the "
                "size of the GPU's pages"
            )
        self.page_bytes, self.num_drops = page_bytes, 0
        self._device = device
        self._handles: list[Handle] = []  # of each page
        self._dropped: list[Handle] = []  # still to be released
        # A process that ends leaves its memory to the driver: kernels may still run then.
        close = weakref.finalize(self, _release, device, self._handles, self._dropped)
        close.atexit = False
        #: All pages, uint8 [pages, page_bytes]. Views of it keep their memory.
        self.pages: Tensor
        self.resize(num_pages)

    def resize(self, num_pages: int) -> None:
        """Shrink or grow `pages` to `num_pages` pages. New ones are uninitialised. O(pages).

        Earlier views of `pages` show the same memory. The memory of dropped pages is freed when no
        view and no row shows it. Raises: as the constructor; the pool is unchanged.
        """
        dropped = self._handles[num_pages:]
        made = self._device.create(max(num_pages - len(self._handles), 0), self.page_bytes)
        handles = self._handles[:num_pages] + made
        memory = None
        try:
            memory = self.open_range(num_pages)
            memory.map(0, handles)
            self.pages = memory.tensor().view(num_pages, self.page_bytes)
        except BaseException:
            if memory is not None:
                memory.close()
            self._device.release(made)
            raise
        self._handles[:] = handles
        self._dropped += dropped
        self.num_drops += bool(dropped)
        self._device.release(self._dropped)

    def open_range(self, num_pages: int, num_mappings: int = 0) -> GpuAddressRange:
        """Reserve addresses of `num_pages` pages. A GPU bounds no number of mappings. O(pages)."""
        return GpuAddressRange(self._device, self._handles, num_pages, self.page_bytes)


class GpuAddressRange:
    """A range of addresses in which pages are shown. Not thread-safe.

    If a kernel reads or writes outside of the mapped pages, this process can no longer use the GPU
    ("illegal memory access").
    """

    def __init__(
        self, device: CudaDevice, pages: list[Handle], num_pages: int, page_bytes: int
    ) -> None:
        """Reserve addresses, which take no memory, to show some of `pages`. O(pages).

        Raises: `RuntimeError`, `torch.OutOfMemoryError` if the driver has no addresses left.
        """
        # Not the pool: tensors keep the range alive, and the pool keeps such a tensor.
        self._device, self._pages, self._page_bytes = device, pages, page_bytes
        self._size = num_pages * page_bytes
        self._mapped: list[Handle | None] = [None] * num_pages  # the memory at each place
        # Places to unmap when the work that may read them has ended.
        self._leaving: list[tuple[Mark, set[int]]] = []
        self._streams: list[torch.cuda.Stream] = []
        self._own: list[Handle] = []  # of private copies
        self._users: list[weakref.ref[NDArray[np.uint8]]] = []
        self._address = self._device.reserve(self._size)
        self._close = weakref.finalize(
            self, _tear_down, device, self._address, self._size, page_bytes, self._mapped,
            self._own,
        )  # fmt: skip
        self._close.atexit = False  # see `GpuPagePool`

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """Describe the addresses to NumPy, whose arrays keep this object alive. O(1)."""
        data = (self._address, False)
        return {"shape": (self._size,), "typestr": "|u1", "data": data, "version": 3}

    def tensor(self) -> Tensor:
        """Return the range, uint8 [bytes]. Views of it keep the range and its mappings. O(1)."""
        array = np.asarray(self)
        self._users = [user for user in self._users if user() is not None]
        self._users.append(weakref.ref(array))
        return self._device.tensor(array)

    @property
    def is_in_use(self) -> bool:
        """True if a view of a `tensor` still exists. O(tensors)."""
        return any(user() is not None for user in self._users)

    def enter(self) -> None:
        """Note that the current stream is about to read the range. O(streams)."""
        stream = self._device.current_stream()
        if stream not in self._streams:
            self._streams.append(stream)

    def show(self, changes: Iterable[tuple[int, int, int]]) -> None:
        """Show runs of pages at runs of places. O(pages changed + places to unmap).

        A change is (place, first page or `NO_PAGE`, count). A place keeps its memory until the work
        queued so far has ended. The call waits for that only if a place shows another page at once.

        Raises: `RuntimeError` while a CUDA graph is captured, or if the driver refuses;
        `torch.OutOfMemoryError`. Then the next call shows what is missing.
        """
        if self._device.is_capturing():
            raise RuntimeError(
                "rows cannot change while a CUDA graph is captured. Call follow before the capture."
            )
        wanted: dict[int, Handle | None] = {}
        for place, page, count in changes:
            none = [None] * count
            memory = none if page == NO_PAGE else self._pages[page : page + count]
            wanted.update(zip(range(place, place + count), memory, strict=True))
        for _, places in self._leaving:  # the code below decides on `wanted` again
            places.difference_update(wanted)
        leaving = {
            place
            for place, memory in wanted.items()
            if self._mapped[place] is not None and self._mapped[place] is not memory
        }
        if leaving:
            self._leaving.append((Mark(self._streams), leaving))
        shown = [place for place, memory in wanted.items() if memory is not None]
        self._unmap_left({*shown})
        for first, count in _runs(sorted(p for p in shown if self._mapped[p] is None)):
            self.map(first, [wanted[place] for place in range(first, first + count)])

    def map(self, place: int, handles: Sequence[Handle]) -> None:
        """Map memory at places that have none. O(handles). Raises: as `show`; maps nothing then."""
        self._device.map(self._address_of(place), self._page_bytes, handles)
        self._mapped[place : place + len(handles)] = handles

    def part_from_pages(self, place: int, count: int) -> None:
        """Replace the pages shown at places by a private copy of their content. O(bytes).

        Waits for the work queued so far. Raises: `torch.OutOfMemoryError`.
        """
        places = range(place, place + count)
        for run in _runs([place for place in places if self._mapped[place] is not None]):
            self._part(*run)

    def _part(self, place: int, count: int) -> None:
        start = place * self._page_bytes
        shown = self.tensor()[start : start + count * self._page_bytes]
        own = self._device.create(count, self._page_bytes)
        self._own += own
        content = shown.clone()
        self.enter()
        Mark(self._streams).wait()
        self._unmap({*range(place, place + count)})
        self.map(place, own)
        shown.copy_(content)

    def close(self) -> None:
        """Unmap everything and free the addresses. O(pages). No tensor may be used afterwards."""
        self._close()

    def _unmap_left(self, wanted: set[int]) -> None:
        """Unmap places whose work has ended. Wait for the work of those that are wanted."""
        for entry in [*self._leaving]:
            mark, places = entry
            if not places.isdisjoint(wanted):
                mark.wait()
            if mark.is_over():
                self._unmap(places)
                self._leaving.remove(entry)

    def _unmap(self, places: set[int]) -> None:
        for first, count in _runs(sorted(places)):
            self._device.unmap(self._address_of(first), count * self._page_bytes)
            self._mapped[first : first + count] = [None] * count
            places.difference_update(range(first, first + count))

    def _address_of(self, place: int) -> int:
        return self._address + place * self._page_bytes


def _release(device: CudaDevice, *lists: list[Handle]) -> None:
    for handles in lists if device.is_of_this_process else ():
        device.release(handles)


def _tear_down(
    device: CudaDevice,
    address: int,
    num_bytes: int,
    page_bytes: int,
    mapped: list[Handle | None],
    own: list[Handle],
) -> None:
    """Unmap what is mapped and free the addresses, after all work of the GPU. O(pages)."""
    if not device.is_of_this_process:
        return
    places = [place for place, memory in enumerate(mapped) if memory is not None]
    if places:
        device.wait()  # if it raises, all stays mapped: work may still read it
    with ExitStack() as last_first:  # goes on after an error, and raises it at the end
        last_first.callback(device.release, own)
        last_first.callback(device.free, address, num_bytes)
        for first, count in _runs(places):
            last_first.callback(device.unmap, address + first * page_bytes, count * page_bytes)


def _runs(places: Sequence[int]) -> list[tuple[int, int]]:
    """Return ascending numbers as runs: the first number of each, and its length. O(places)."""
    runs: list[tuple[int, int]] = []
    for place in places:
        first, count = runs[-1] if runs else (place, 0)
        if place == first + count:
            runs[-1:] = [(first, count + 1)]
        else:
            runs.append((place, 1))
    return runs

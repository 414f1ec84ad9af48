"""A stand-in for CUDA's driver, for machines without a GPU: it maps memory of the host.

`FakeDriver` has the functions of `cuda.bindings.driver` that `CudaDevice` calls. It records each
call, and refuses what a real driver would refuse, or what would break a program on a GPU: mapping
over a mapping, unmapping part of one, unmapping what unfinished work may read. Memory that is not
mapped and accessible ends the process when it is touched.

Work is queued by `launch` on the current stream. It is unfinished until `finish`, or until a
program waits for an event.
"""

from __future__ import annotations

import enum
import mmap
import os
from collections import Counter
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from kvpager.modes.cuda_device import CudaDevice
from kvpager.modes.page_pool import _map

PAGE = mmap.PAGESIZE  # of the fake GPU, so that tests take little memory
_NO_ACCESS = 0
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_HOLE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10 | 0x4000  # MAP_FIXED, MAP_NORESERVE


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NOT_PERMITTED = 800
    CUDA_ERROR_NOT_SUPPORTED = 801


class _Handle:
    """A piece of memory: pages of a file."""

    def __init__(self, start: int, num_bytes: int) -> None:
        self.start, self.num_bytes = start, num_bytes
        self.is_released, self.num_mappings = False, 0


class FakeStream:
    """A queue of work. Work number n ends before work number n + 1."""

    def __init__(self) -> None:
        self.num_queued = self.num_done = 0

    def record_event(self) -> FakeEvent:
        return FakeEvent(self, self.num_queued)


class FakeEvent:
    def __init__(self, stream: FakeStream, number: int) -> None:
        self.stream, self.number = stream, number

    def query(self) -> bool:
        return self.stream.num_done >= self.number

    def synchronize(self) -> None:
        if not self.query():
            FakeDriver.current.waits += 1
        self.stream.num_done = max(self.stream.num_done, self.number)


class FakeDriver:
    """The driver and its one GPU, which has `num_bytes` of memory."""

    current: FakeDriver

    CUresult = CUresult
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED=1)
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE=1)
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3)
    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_MINIMUM=0)

    def __init__(self, num_bytes: int = 1 << 30, page_bytes: int = PAGE) -> None:
        FakeDriver.current = self
        self.num_bytes, self.page_bytes = num_bytes, page_bytes
        self.calls: list[tuple[Any, ...]] = []
        self.fail: dict[int, CUresult] = {}  # by the number of the call
        self.waits = 0  # events that a program waited for
        self.stream = FakeStream()
        self.streams = [self.stream]
        self._file = os.memfd_create("fake-gpu", os.MFD_CLOEXEC)
        self._end = 0
        self.handles: set[_Handle] = set()
        self.ranges: dict[int, mmap.mmap] = {}
        self.mappings: dict[int, tuple[int, _Handle]] = {}  # address -> bytes, memory
        self.accessible: set[int] = set()
        self._last_reads: dict[int, Counter[FakeStream]] = {}

    def CUmemAllocationProp(self) -> Any:
        return SimpleNamespace(type=None, location=SimpleNamespace(type=None, id=None))

    def CUmemAccessDesc(self) -> Any:
        return SimpleNamespace(flags=None, location=SimpleNamespace(type=None, id=None))

    # ---------------------------------------------------------------- what a test does

    def names(self) -> list[str]:
        """Return the names of the calls so far, without the prefix, and forget the calls."""
        names = [call[0].removeprefix("cuMem") for call in self.calls]
        self.calls.clear()
        return names

    def use_stream(self, number: int) -> None:
        while len(self.streams) <= number:
            self.streams.append(FakeStream())
        self.stream = self.streams[number]

    def launch(self, addresses: Iterable[int] | None = None) -> None:
        """Queue work on the current stream that reads pages, all that are mapped unless given."""
        self.stream.num_queued += 1
        for address in self.mappings if addresses is None else addresses:
            self._last_reads.setdefault(address, Counter())[self.stream] = self.stream.num_queued

    def finish(self) -> None:
        """Let all queued work end."""
        for stream in self.streams:
            stream.num_done = stream.num_queued

    def left(self) -> tuple[int, int, int]:
        """Return the numbers of pieces of memory, mappings and ranges that are not freed."""
        return len(self.handles), len(self.mappings), len(self.ranges)

    # ---------------------------------------------------------------- the driver's functions

    def cuGetErrorString(self, code: CUresult) -> Any:
        return CUresult.CUDA_SUCCESS, code.name.lower().encode()

    def cuMemGetAllocationGranularity(self, properties: Any, option: int) -> Any:
        return self._result("cuMemGetAllocationGranularity", lambda: self.page_bytes)

    def cuMemAddressReserve(self, num_bytes: int, alignment: int, hint: int, flags: int) -> Any:
        def reserve() -> int:
            assert num_bytes % self.page_bytes == alignment % self.page_bytes == hint == flags == 0
            memory = mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 0)
            address = _address(memory)
            self.ranges[address] = memory
            return address

        return self._result("cuMemAddressReserve", reserve, num_bytes)

    def cuMemAddressFree(self, address: int, num_bytes: int) -> Any:
        def free() -> None:
            assert len(self.ranges[address]) == num_bytes
            assert not any(address <= each < address + num_bytes for each in self.mappings)
            self.ranges.pop(address).close()

        return self._result("cuMemAddressFree", free, address, num_bytes)

    def cuMemCreate(self, num_bytes: int, properties: Any, flags: int) -> Any:
        assert (properties.type, properties.location.type, properties.location.id) == (1, 1, 0)
        if sum(each.num_bytes for each in self.handles) + num_bytes > self.num_bytes:
            self.calls.append(("cuMemCreate", num_bytes))
            return CUresult.CUDA_ERROR_OUT_OF_MEMORY, None

        def create() -> _Handle:
            assert num_bytes % self.page_bytes == flags == 0
            handle = _Handle(self._end, num_bytes)
            self._end += num_bytes
            os.ftruncate(self._file, self._end)
            self.handles.add(handle)
            return handle

        return self._result("cuMemCreate", create, num_bytes)

    def cuMemRelease(self, handle: _Handle) -> Any:
        def release() -> None:
            assert not handle.is_released
            handle.is_released = True
            self._free_unused(handle)

        return self._result("cuMemRelease", release, handle)

    def cuMemMap(
        self, address: int, num_bytes: int, offset: int, handle: _Handle, flags: int
    ) -> Any:
        def map_one() -> None:
            assert offset == flags == 0
            assert num_bytes == handle.num_bytes
            assert not handle.is_released
            assert any(start <= address < start + len(r) for start, r in self.ranges.items())
            assert not self._mapped_in(address, num_bytes), "mapped already"
            self.mappings[address] = num_bytes, handle
            handle.num_mappings += 1

        return self._result("cuMemMap", map_one, address, num_bytes)

    def cuMemSetAccess(self, address: int, num_bytes: int, access: list[Any], count: int) -> Any:
        def set_access() -> None:
            [desc] = access
            assert (desc.flags, desc.location.type, desc.location.id, count) == (3, 1, 0, 1)
            within = self._mapped_in(address, num_bytes)
            assert sum(self.mappings[each][0] for each in within) == num_bytes, "not all mapped"
            for each in within:
                size, handle = self.mappings[each]
                _map(each, size, _READ_WRITE, mmap.MAP_SHARED | 0x10, self._file, handle.start)
                self.accessible.add(each)

        return self._result("cuMemSetAccess", set_access, address, num_bytes)

    def cuMemUnmap(self, address: int, num_bytes: int) -> Any:
        within = self._mapped_in(address, num_bytes)
        if not within:
            self.calls.append(("cuMemUnmap", address, num_bytes))
            return (CUresult.CUDA_ERROR_INVALID_VALUE,)

        def unmap() -> None:
            assert sum(self.mappings[each][0] for each in within) == num_bytes, "not all mapped"
            for each in within:
                for stream, number in self._last_reads.pop(each, Counter()).items():
                    assert stream.num_done >= number, "unfinished work may read this"
                size, handle = self.mappings.pop(each)
                _map(each, size, _NO_ACCESS, _HOLE)
                self.accessible.discard(each)
                handle.num_mappings -= 1
                self._free_unused(handle)

        return self._result("cuMemUnmap", unmap, address, num_bytes)

    def _mapped_in(self, address: int, num_bytes: int) -> list[int]:
        return [each for each in self.mappings if address <= each < address + num_bytes]

    def _free_unused(self, handle: _Handle) -> None:
        if handle.is_released and not handle.num_mappings:
            self.handles.remove(handle)

    def _result(self, name: str, work: Any, *args: Any) -> Any:
        self.calls.append((name, *args))
        code = self.fail.get(len(self.calls) - 1, CUresult.CUDA_SUCCESS)
        if code:
            return code, None
        value = work()
        return (code,) if value is None else (code, value)


class FakeDevice(CudaDevice):
    """A `CudaDevice` whose tensors are of the CPU, and whose streams are those of `FakeDriver`."""

    def __init__(self, driver: FakeDriver) -> None:
        super().__init__(0, driver)
        self.driver = driver
        self.is_recording = False
        self.drops = 0

    def current_stream(self) -> Any:
        return self.driver.stream

    def is_capturing(self) -> bool:
        return self.is_recording

    def wait(self) -> None:
        self.driver.finish()

    def _dlpack_device(self) -> tuple[int, int]:
        return 1, 0  # kDLCPU

    def _drop_unused(self) -> None:
        self.drops += 1


def _address(memory: mmap.mmap) -> int:
    """Return the address of a mapping without access, which ctypes cannot borrow for long."""
    import numpy as np

    return int(np.frombuffer(memory, np.uint8).ctypes.data)

"""The calls of CUDA's driver that map memory, with their errors in plain words.

torch has no calls for that. They come from NVIDIA's `cuda-bindings` (extra `kvpager[virtual]`),
which is imported when it is first needed.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import cache
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvpager._text import counted, size

Handle = Any  # CUmemGenericAllocationHandle
_DLPACK_CUDA = 2  # kDLCUDA
_REFUSED = {"CUDA_ERROR_NOT_SUPPORTED", "CUDA_ERROR_NOT_PERMITTED"}


@cache
def cuda_device(index: int) -> CudaDevice:
    """Return the GPU with torch's number `index`. O(1).

    Raises: `ModuleNotFoundError` without cuda-bindings; torch's errors without a GPU.
    """
    try:
        from cuda.bindings import driver
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'mode="virtual" on a GPU: cuda-bindings is not installed. '
            "Run: pip install 'kvpager[virtual]'",
            name="cuda.bindings",
        ) from None
    torch.cuda.synchronize(index)  # creates the context in which torch works
    return CudaDevice(index, driver)


class Mark:
    """The work that streams had queued at one moment."""

    def __init__(self, streams: Sequence[torch.cuda.Stream]) -> None:
        """Record an event on each stream. O(streams)."""
        self._events = [stream.record_event() for stream in streams]

    def is_over(self) -> bool:
        """Return True if the work has ended. Does not wait. O(streams)."""
        return all(event.query() for event in self._events)

    def wait(self) -> None:
        """Wait until the work has ended."""
        for event in self._events:
            event.synchronize()


class CudaDevice:
    """Memory and addresses of one GPU, and the calls that map memory at addresses.

    A forked child process cannot use a GPU of its parent: each call raises `RuntimeError` there.

    Attributes:
        index: torch's number of the GPU.
        page_bytes: the granularity of mappings, 2 MiB on GPUs so far.
    """

    def __init__(self, index: int, driver: Any) -> None:
        """Use a GPU through `driver`, which has the functions of `cuda.bindings.driver`. O(1).

        Raises: `RuntimeError` if the GPU or its driver cannot map memory.
        """
        self.index, self._driver, self._process = index, driver, os.getpid()
        self._properties = driver.CUmemAllocationProp()
        self._properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._access = driver.CUmemAccessDesc()
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        for location in (self._properties.location, self._access.location):
            location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
            location.id = index
        least = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self.page_bytes = int(self._call("cuMemGetAllocationGranularity", self._properties, least))

    @property
    def is_of_this_process(self) -> bool:
        """False in a child process that was forked since. O(1)."""
        return os.getpid() == self._process

    def create(self, count: int, num_bytes: int) -> list[Handle]:
        """Return `count` pieces of memory of `num_bytes` each, not yet mapped. O(count).

        If memory is short, empties torch's cache of unused memory and tries again. Raises:
        `torch.OutOfMemoryError`; then no memory is taken.
        """
        made: list[Handle] = []
        try:
            while len(made) < count:
                made.append(self._create(num_bytes))
        except torch.OutOfMemoryError:
            num_made = len(made)
            self.release(made)
            raise torch.OutOfMemoryError(
                f"CUDA out of memory: {counted(count, 'block')} of {size(num_bytes)} needed on "
                f"cuda:{self.index}, which has room for {num_made}. Take fewer blocks."
            ) from None
        except BaseException:
            self.release(made)
            raise
        return made

    def _create(self, num_bytes: int) -> Handle:
        try:
            return self._call("cuMemCreate", num_bytes, self._properties, 0)
        except torch.OutOfMemoryError:
            self._drop_unused()
            return self._call("cuMemCreate", num_bytes, self._properties, 0)

    def release(self, handles: list[Handle]) -> None:
        """Release the memory of `create`, and empty the list. O(handles).

        Mapped memory is freed with its last mapping. If a release fails, its handle stays in the
        list, and the error is raised after the other releases.
        """
        failed: list[Handle] = []
        problem: RuntimeError | None = None
        while handles:
            handle = handles.pop()
            try:
                self._call("cuMemRelease", handle)
            except RuntimeError as error:
                failed.append(handle)
                problem = error
        handles += failed
        if problem is not None:
            raise problem

    def reserve(self, num_bytes: int) -> int:
        """Return the first of `num_bytes` new addresses without memory. O(1)."""
        return int(self._call("cuMemAddressReserve", num_bytes, self.page_bytes, 0, 0))

    def free(self, address: int, num_bytes: int) -> None:
        """Give all addresses of `reserve` back. Nothing may be mapped there. O(1)."""
        self._call("cuMemAddressFree", address, num_bytes)

    def map(self, address: int, num_bytes: int, handles: Sequence[Handle]) -> None:
        """Map handles of `num_bytes` each, one after the other, from `address` on. O(handles).

        Nothing may be mapped there before. After an error, nothing is mapped there.
        """
        try:
            for number, handle in enumerate(handles):
                self._call("cuMemMap", address + number * num_bytes, num_bytes, 0, handle, 0)
            # Mapped memory is not accessible yet: one call for all of it.
            total = len(handles) * num_bytes
            self._call("cuMemSetAccess", address, total, [self._access], 1)
        except BaseException:
            for number in range(len(handles)):  # an interrupt does not tell what is mapped
                self._driver.cuMemUnmap(address + number * num_bytes, num_bytes)
            raise

    def unmap(self, address: int, num_bytes: int) -> None:
        """Remove whole mappings, after the work that reads them has ended. O(mappings)."""
        self._call("cuMemUnmap", address, num_bytes)

    def tensor(self, array: NDArray[np.uint8]) -> Tensor:
        """Return a tensor over the addresses of `array`, which lives as long as its views. O(1).

        Nothing is read: the addresses may have no memory yet. torch looks for memory behind an
        address that comes through `__cuda_array_interface__`, but not through DLPack.
        """
        capsule = array.__dlpack__()
        pointer = _capsule_pointer()(capsule, b"dltensor")
        # A DLManagedTensor begins with the data's address, then the type and number of its device.
        device = (ctypes.c_int32 * 2).from_address(pointer + ctypes.sizeof(ctypes.c_void_p))
        device[:] = [*self._dlpack_device()]
        return torch.utils.dlpack.from_dlpack(capsule)

    def current_stream(self) -> torch.cuda.Stream:
        """Return torch's current stream of the GPU. O(1)."""
        return torch.cuda.current_stream(self.index)

    def is_capturing(self) -> bool:
        """Return True if the current stream records a CUDA graph. O(1)."""
        return torch.cuda.is_current_stream_capturing()

    def wait(self) -> None:
        """Wait until all work queued on the GPU has ended."""
        torch.cuda.synchronize(self.index)

    def _dlpack_device(self) -> tuple[int, int]:
        return _DLPACK_CUDA, self.index

    def _drop_unused(self) -> None:
        torch.cuda.empty_cache()

    def _call(self, name: str, *args: Any) -> Any:
        if not self.is_of_this_process:
            raise RuntimeError(
                f"{name}: a forked process cannot use the GPU memory of its parent. Start "
                'processes with the method "spawn".'
            )
        code, *values = getattr(self._driver, name)(*args)
        if code != self._driver.CUresult.CUDA_SUCCESS:
            self._fail(name, code)
        return values[0] if values else None

    def _fail(self, name: str, code: Any) -> NoReturn:
        _, text = self._driver.cuGetErrorString(code)
        known = "no description" if text is None else text.decode(errors="replace")
        problem = f"{name} on cuda:{self.index}: {code.name} ({known})"
        if code.name == "CUDA_ERROR_OUT_OF_MEMORY":
            raise torch.OutOfMemoryError(f"CUDA out of memory: {problem}")
        if code.name in _REFUSED:
            problem += '. The GPU or its driver cannot map memory. Take mode="paged".'
        raise RuntimeError(problem)


@cache
def _capsule_pointer() -> Any:
    function = ctypes.pythonapi.PyCapsule_GetPointer
    function.restype, function.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    return function

"""Rows over pages of a GPU: the order of the driver's calls, and what is left when they fail.

`FakeDriver` refuses what a driver refuses, and maps memory of the host. So contents are compared,
and touching what is not mapped ends the process. `test_gpu.py` has the tests that need a GPU.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from kvpager.modes import cuda_device
from kvpager.plans import Int32
from kvpager.storage.block_storage import BlockStorage
from kvpager.testing.simulator import simulate
from tests.support.fake_cuda import PAGE, CUresult, FakeDevice, FakeDriver
from tests.support.row_memory import RowMemory

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux")

LAYERS = [(2, 32, 32), (4, 16, 16)]  # 1 KiB per token: four tokens are a page


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDevice]:
    """Let `cuda:0` be a fake GPU. At the end nothing may be left on it."""
    device = FakeDevice(FakeDriver())
    monkeypatch.setattr("kvpager.modes.virtual_gpu.cuda_device", lambda index: device)
    yield device
    gc.collect()
    assert device.driver.left() == (0, 0, 0)


def storage(num_blocks: int = 12, block_size: int = 4, **options: Any) -> BlockStorage:
    return BlockStorage(
        num_blocks, block_size, options.pop("layers", LAYERS), dtype=torch.float32,
        device="cuda:0", mode="virtual", **options,
    )  # fmt: skip


def numbered(made: BlockStorage) -> BlockStorage:
    """Give every number of every block a value of its own."""
    for index in range(len(made.layers)):
        for which, cache in enumerate(made.layer(index)):
            numbers = torch.arange(cache.numel(), dtype=torch.float32).view(cache.shape)
            cache.copy_(numbers + (10 * index + which) * 100_000)
    return made


def array(*numbers: Any) -> Int32:
    return np.array(numbers, np.int32)


def shows(made: BlockStorage, rows: Any, row: int, blocks: list[int]) -> bool:
    """Return True if the row shows the blocks in order, in all layers."""
    size = len(blocks) * made.block_size
    return all(
        torch.equal(shown[row, :size], torch.cat([*cache[blocks]]))
        for index in range(len(made.layers))
        for shown, cache in zip(rows.caches(index).tensors, made.layer(index), strict=True)
    )


def forget_all(driver: FakeDriver) -> None:
    """Forget what is left on purpose. It ends with the fake."""
    for left in (driver.handles, driver.mappings, driver.ranges):
        left.clear()


def test_a_block_is_made_once_and_mapped_at_each_address_it_is_shown(gpu: FakeDevice) -> None:
    made = storage(3)
    assert gpu.driver.names()[1:] == [
        *["Create"] * 3, "AddressReserve", *["Map"] * 3, "SetAccess",
    ]  # fmt: skip
    rows = numbered(made).open_rows(2, max_length=12)
    assert gpu.driver.names() == ["AddressReserve"]
    rows.follow(array(0, 1), array([2, 0], [2, 1]))
    # Row 0 is two neighbours; row 1 begins after its empty last place.
    assert gpu.driver.names() == ["Map", "Map", "SetAccess"] * 2
    assert shows(made, rows, 0, [2, 0])
    assert shows(made, rows, 1, [2, 1])
    made.layer(1)[0][2, 3] = -1.0
    assert (rows.caches(1).key[:, 3] == -1.0).all()
    rows.follow(array(0, 1), array([2, 0], [2, 1]))
    assert gpu.driver.names() == []


def test_what_a_row_no_longer_shows_is_unmapped_after_the_work_that_reads_it(
    gpu: FakeDevice,
) -> None:
    made = numbered(storage())
    rows = made.open_rows(2, max_length=12)
    rows.follow(array(0), array([5, 6]))
    gpu.driver.launch()
    gpu.driver.names()
    rows.release(array(0))
    rows.follow(array(1), array([5]))
    assert gpu.driver.names() == ["Map", "SetAccess"]
    gpu.driver.finish()
    rows.follow(array(1), array([5, 1]))
    assert gpu.driver.names() == ["Unmap", "Map", "SetAccess"]  # one call for both neighbours
    assert gpu.driver.waits == 0


def test_only_a_place_that_shows_another_block_at_once_waits(gpu: FakeDevice) -> None:
    made = numbered(storage())
    rows = made.open_rows(2, max_length=12)
    rows.follow(array(0, 1), array([5, 6], [5, 7]))
    gpu.driver.launch()
    rows.follow(array(0, 1), array([5, 6, 8], [5, 7, 9]))  # both rows grow
    assert gpu.driver.waits == 0
    rows.follow(array(1), array([5, 10, 9]))  # copy on write: block 7 becomes block 10
    assert gpu.driver.waits == 1
    assert shows(made, rows, 0, [5, 6, 8])
    assert shows(made, rows, 1, [5, 10, 9])


def test_a_block_that_returns_to_its_place_stays_mapped(gpu: FakeDevice) -> None:
    made = numbered(storage())
    rows = made.open_rows(1, max_length=12)
    rows.follow(array(0), array([5, 6]))
    gpu.driver.launch()
    gpu.driver.names()
    rows.release(array(0))
    rows.follow(array(0), array([5, 6]))
    gpu.driver.finish()
    rows.follow(array(0), array([5, 6, 7]))
    assert gpu.driver.names() == ["Map", "SetAccess"]
    assert (gpu.driver.waits, shows(made, rows, 0, [5, 6, 7])) == (0, True)


def test_every_stream_that_read_rows_is_waited_for(gpu: FakeDevice) -> None:
    made = numbered(storage())
    rows = made.open_rows(1, max_length=8)
    rows.follow(array(0), array([1, 2]))
    gpu.driver.use_stream(1)
    rows.follow(array(0), array([1, 2]))  # unchanged, and read by another stream
    gpu.driver.launch()
    gpu.driver.use_stream(0)
    rows.follow(array(0), array([1, 3]))
    assert gpu.driver.waits == 1
    assert shows(made, rows, 0, [1, 3])


def test_growing_keeps_blocks_and_rows_and_earlier_views(gpu: FakeDevice) -> None:
    made = numbered(storage(4))
    rows, earlier = made.open_rows(1, max_length=16), made.layer(0)[0]
    rows.follow(array(0), array([3, 1]))
    made.grow(6)
    made.layer(0)[0][1] = -5.0
    assert (earlier[1] == -5.0).all()
    assert shows(made, rows, 0, [3, 1])
    assert len(gpu.driver.handles) == 6


def test_dropped_blocks_are_freed_with_their_last_view_and_never_shown_again(
    gpu: FakeDevice,
) -> None:
    made = numbered(storage(6))
    rows, earlier = made.open_rows(1, max_length=16), made.layer(0)[0]
    rows.follow(array(0), array([5, 1]))
    made.shrink(4)
    assert len(gpu.driver.handles) == 6
    assert (earlier[5, 0, 0, :2].tolist()) == [1280.0, 1281.0]
    del earlier
    gpu.driver.finish()
    assert len(gpu.driver.handles) == 5  # the row still shows block 5
    made.grow(6)
    numbered(made)
    rows.follow(array(0), array([5, 1]))  # the same numbers, but block 5 is other memory
    assert shows(made, rows, 0, [5, 1])
    assert len(gpu.driver.handles) == 6


def test_tensors_in_use_keep_what_they_show_after_detach(gpu: FakeDevice) -> None:
    made = numbered(storage())
    rows = made.open_rows(1, max_length=12)
    rows.follow(array(0), array([7, 3]))
    held = rows.caches(1).key[0, :8]
    wanted = held.clone()
    gpu.driver.launch()
    rows.detach()
    made.tier()[:] = -1.0
    rows.follow(array(0), array([4, 3, 1]))
    assert torch.equal(held, wanted)
    assert shows(made, rows, 0, [4, 3, 1])


def test_detaching_makes_no_call_if_no_tensor_is_left(gpu: FakeDevice) -> None:
    rows = storage().open_rows(1, max_length=12)
    rows.follow(array(0), array([7, 3]))
    assert rows.caches(0).key.shape == (1, 12, 2, 32)
    gpu.driver.names()
    rows.detach()
    assert gpu.driver.names() == []


def test_views_keep_their_memory_when_the_storage_is_gone(gpu: FakeDevice) -> None:
    made = numbered(storage())
    rows = made.open_rows(1, max_length=8)
    rows.follow(array(0), array([3, 1]))
    key, block = rows.caches(0).key[0], made.layer(0)[0][3]
    wanted = block.clone()
    gpu.driver.launch()
    del made, rows
    gc.collect()
    assert torch.equal(key[:4], wanted)
    assert torch.equal(block, wanted)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_nothing_is_unmapped_if_the_end_of_work_cannot_be_awaited(
    gpu: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = storage(3)
    kept = gpu.driver.left()

    def fail() -> None:
        raise RuntimeError("a CUDA graph is captured")

    monkeypatch.setattr(gpu, "wait", fail)
    del made
    gc.collect()
    assert gpu.driver.left() == kept
    forget_all(gpu.driver)


def test_eight_bit_rows_have_their_scales(gpu: FakeDevice) -> None:
    made = storage(4, block_size=16, layers=[(1, 112, 112)], kv_cache_dtype="int8")
    for tensor in made.caches(0).tensors:
        tensor.copy_(torch.arange(tensor.numel()).remainder(100).view(tensor.shape).to(tensor))
    rows = made.open_rows(1, max_length=48)
    rows.follow(array(0), array([2, 0]))
    for shown, cache in zip(rows.caches(0).tensors, made.caches(0).tensors, strict=True):
        assert torch.equal(shown[0, :32], torch.cat([*cache[[2, 0]]]))


# -------------------------------------------------------------------- refusals


def test_a_block_that_leaves_much_of_its_page_unused_is_refused_with_a_size(
    gpu: FakeDevice,
) -> None:
    with pytest.raises(ValueError, match=r"block_size=2: a block holds 2.0 KiB, and takes 4.0 KiB"):
        storage(block_size=2)
    with pytest.raises(ValueError, match=r"Take block_size=16 or mode=.paged."):
        storage(block_size=2, layers=[(3, 10, 10)])  # 240 bytes per token
    assert storage(block_size=16, layers=[(3, 10, 10)]).block_bytes == PAGE
    sizes = {"dtype": torch.float32, "mode": "virtual", "device": "cuda:0"}
    assert BlockStorage.bytes_of_a_block(8, LAYERS, **sizes) == 2 * PAGE  # type: ignore[arg-type]


def test_a_full_gpu_is_said_and_keeps_nothing_of_what_was_made(gpu: FakeDevice) -> None:
    gpu.driver.num_bytes = 10 * PAGE
    with pytest.raises(torch.OutOfMemoryError, match=r"12 blocks of 4.0 KiB needed on cuda:0, whi"):
        storage(12)
    assert gpu.driver.left() == (0, 0, 0)
    assert gpu.drops == 1  # torch's unused memory, and then one more try
    made = numbered(storage(8))
    before = made.tier().clone()
    with pytest.raises(
        torch.OutOfMemoryError, match=r"4 blocks of 4.0 KiB needed on cuda:0, which"
    ):
        made.grow(12)
    assert gpu.driver.left() == (8, 8, 1)
    assert torch.equal(made.tier(), before)


def test_memory_that_torch_held_unused_is_taken(gpu: FakeDevice) -> None:
    gpu.driver.num_bytes = 3 * PAGE

    def drop() -> None:
        gpu.driver.num_bytes = 4 * PAGE

    gpu._drop_unused = drop  # type: ignore[method-assign]
    assert storage(4).num_blocks == 4


def test_codes_of_the_driver_become_errors_in_words(gpu: FakeDevice) -> None:
    gpu.driver.fail = {1: CUresult.CUDA_ERROR_NOT_SUPPORTED}
    with pytest.raises(RuntimeError, match=r"cuMemCreate on cuda:0: CUDA_ERROR_NOT_SUPPORTED \(cu"):
        storage()
    gpu.driver.fail = {len(gpu.driver.calls): CUresult.CUDA_ERROR_NOT_PERMITTED}
    with pytest.raises(RuntimeError, match=r'driver cannot map memory\. Take mode="paged"'):
        storage()
    gpu.driver.fail = {len(gpu.driver.calls): CUresult.CUDA_ERROR_INVALID_VALUE}
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE") as refused:
        storage()
    assert "paged" not in str(refused.value)


def test_rows_do_not_change_while_a_graph_is_captured(gpu: FakeDevice) -> None:
    rows = storage().open_rows(1, max_length=8)
    rows.follow(array(0), array([1, 2]))
    gpu.is_recording = True
    rows.follow(array(0), array([1, 2]))
    with pytest.raises(RuntimeError, match="rows cannot change while a CUDA graph is captured"):
        rows.follow(array(0), array([1, 3]))


def test_a_forked_process_is_told_and_calls_no_driver(
    gpu: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = storage()
    rows = made.open_rows(1, max_length=8)
    gpu.driver.names()
    parent = os.getpid()
    monkeypatch.setattr(cuda_device.os, "getpid", lambda: parent + 1)
    with pytest.raises(RuntimeError, match="a forked process cannot use the GPU memory of its par"):
        rows.follow(array(0), array([1]))
    monkeypatch.undo()


def test_a_forked_process_frees_nothing_of_its_parent(
    gpu: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = storage()
    rows = made.open_rows(1, max_length=8)
    kept = gpu.driver.left()
    parent = os.getpid()
    monkeypatch.setattr(cuda_device.os, "getpid", lambda: parent + 1)
    del made, rows
    gc.collect()
    assert gpu.driver.left() == kept
    monkeypatch.undo()
    forget_all(gpu.driver)


def test_without_cuda_bindings_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r"on a GPU: .* pip install 'kvpager\[virtual\]'"):
        storage()


def test_cuda_bindings_have_the_functions_that_are_called() -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    signatures = {
        "cuMemGetAllocationGranularity": ["prop", "option"],
        "cuMemAddressReserve": ["size", "alignment", "addr", "flags"],
        "cuMemAddressFree": ["ptr", "size"],
        "cuMemCreate": ["size", "prop", "flags"],
        "cuMemRelease": ["handle"],
        "cuMemMap": ["ptr", "size", "offset", "handle", "flags"],
        "cuMemSetAccess": ["ptr", "size", "desc", "count"],
        "cuMemUnmap": ["ptr", "size"],
        "cuGetErrorString": ["error"],
    }
    for name, expected in signatures.items():
        line = getattr(driver, name).__doc__.split("\n")[0]
        given = line[line.index("(") + 1 : -1].split(", ")
        assert [each.split(":")[0].split()[-1] for each in given] == expected, name
    fake = FakeDriver
    for code in fake.CUresult:
        real = getattr(driver.CUresult, code.name)
        assert (real, real.name) == (code, code.name)
    for group in ("CUmemAllocationType", "CUmemLocationType", "CUmemAccess_flags",
                  "CUmemAllocationGranularity_flags"):  # fmt: skip
        for name, value in vars(getattr(fake, group)).items():
            assert int(getattr(getattr(driver, group), name)) == value
    made = driver.CUmemAllocationProp()
    made.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    made.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    made.location.id = 3
    assert (int(made.location.type), made.location.id) == (1, 3)


# -------------------------------------------------------------------- failures and histories


def one_life(device: FakeDevice) -> list[str]:
    """Make, share, copy on write, release, grow, detach and shrink; return the calls."""
    made = storage(5)
    rows = made.open_rows(2, max_length=12)
    rows.follow(array(0, 1), array([0, 1, 2], [0, 1, -1]))
    device.driver.launch()
    rows.follow(array(1), array([0, 3, -1]))
    rows.release(array(0))
    device.driver.finish()
    made.grow(7)
    held = rows.caches(0).key
    rows.detach()
    rows.follow(array(0, 1), array([5, 6], [0, 3]))
    made.shrink(6)
    assert held.shape[0] == 2
    return [call[0] for call in device.driver.calls]


# An error in a finalizer reaches no caller: Python prints it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_failure_of_any_call_leaves_nothing_behind(gpu: FakeDevice) -> None:
    failed = set()
    for number, name in enumerate(one_life(gpu)):
        driver = gpu.driver = gpu._driver = FakeDriver()
        # The fake was asked for its granularity before: keep the numbers of the calls.
        driver.calls.append(("cuMemGetAllocationGranularity",))
        driver.fail = {number: CUresult.CUDA_ERROR_INVALID_VALUE}
        try:
            one_life(gpu)
        except RuntimeError:
            failed.add(name)
        else:
            continue
        gc.collect()
        assert driver.left() == (0, 0, 0), (number, name)
    assert failed == {
        "cuMemAddressReserve", "cuMemCreate", "cuMemMap", "cuMemRelease", "cuMemSetAccess",
        "cuMemUnmap",
    }  # fmt: skip
    gpu.driver = gpu._driver = FakeDriver()


def test_a_failed_growth_frees_its_memory_before_the_error_is_handled(gpu: FakeDevice) -> None:
    made = storage(4)
    before = gpu.driver.left()
    gpu.driver.fail = {len(gpu.driver.calls) + 5: CUresult.CUDA_ERROR_INVALID_VALUE}
    with pytest.raises(RuntimeError, match="cuMemMap") as refused:
        made.grow(6)
    assert gpu.driver.left() == before
    del refused


@pytest.mark.parametrize("failing", ["cuMemMap", "cuMemSetAccess", "cuMemUnmap"])
def test_rows_are_right_again_after_a_call_that_failed(gpu: FakeDevice, failing: str) -> None:
    made = numbered(storage())
    rows = made.open_rows(2, max_length=16)
    rows.follow(array(0, 1), array([1, 2, 3], [4, 5, 6]))
    real = getattr(gpu.driver, failing)

    def refuse_the_second(*args: Any) -> Any:
        setattr(gpu.driver, failing, refuse)
        return real(*args)

    def refuse(*_: Any) -> Any:
        setattr(gpu.driver, failing, real)
        return (CUresult.CUDA_ERROR_INVALID_VALUE,)

    setattr(gpu.driver, failing, refuse_the_second)
    gpu.driver.launch()
    with pytest.raises(RuntimeError, match=failing):
        rows.follow(array(0, 1), array([7, 2, 8, 9], [4, 10, 6, -1]))
    rows.follow(array(0, 1), array([7, 2, 8, 9], [4, 10, 6, -1]))
    assert shows(made, rows, 0, [7, 2, 8, 9])
    assert shows(made, rows, 1, [4, 10, 6])


class GpuRowMemory(RowMemory):
    """Rows over the fake GPU, where work is queued before each read and seldom ends."""

    def make_storage(self, num_blocks: int, block_size: int) -> BlockStorage:
        dim = max(PAGE // (32 * block_size), 1)
        return BlockStorage(
            num_blocks, block_size, [(1, dim, dim)] * 2, dtype=torch.float64,
            device="cuda:0", mode="virtual",
        )  # fmt: skip

    def read(self, table: Any, length: int, start: int = 0) -> list[int]:
        driver = FakeDriver.current
        values = super().read(table, length, start)
        rows: Any = self.rows
        places = np.flatnonzero(rows._mapped.ravel() >= 0)
        driver.launch(rows._range._address + place * PAGE for place in places.tolist())
        if driver.stream.num_queued % 7 == 0:
            driver.finish()
        return values


@pytest.mark.parametrize("seed", range(3))
def test_every_history_reads_back_and_leaves_nothing(gpu: FakeDevice, seed: int) -> None:
    report = simulate(seed, 1_000, make_memory=GpuRowMemory)
    assert report.ok, report
    assert {"Map", "Unmap", "Create", "Release"} <= set(gpu.driver.names())

"""CUDA streams and page-locked host memory of a storage."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from kvpager.plans import CopyPlan
from kvpager.storage import memory, streams
from kvpager.storage.block_storage import BlockStorage, LayerShape
from tests.support.fake_devices import fake_devices, late_copies
from tests.support.storages import numbered, pairs


@dataclass(eq=False)
class LoggedStream:
    """A stream that logs the streams it waits for."""

    name: str
    log: list[str]

    def wait_stream(self, other: LoggedStream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


class Streams:
    """Two fake streams on a CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.first, self.second = LoggedStream("first", self.log), LoggedStream("second", self.log)
        self.current = self.first
        self.kept: list[tuple[int, str]] = []
        self.capturing = False
        monkeypatch.setattr(streams, "current_stream", lambda device: self.current)
        monkeypatch.setattr(streams, "is_capturing", lambda: self.capturing)
        monkeypatch.setattr(streams, "keep_for", self.keep)

    def keep(self, tensor: torch.Tensor, stream: LoggedStream) -> None:
        self.kept.append((tensor.data_ptr(), stream.name))

    def take_log(self) -> list[str]:
        log, self.log[:] = list(self.log), []
        return log


@pytest.fixture
def two_streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    return Streams(monkeypatch)


USES: dict[str, Callable[[BlockStorage], object]] = {
    "layer": lambda storage: storage.layer(0),
    "tier": lambda storage: storage.tier(),
    "copy": lambda storage: storage.copy(pairs((0, 1))),
}


@pytest.mark.parametrize("use", USES)
def test_a_cpu_storage_never_asks_for_streams(use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(device: torch.device) -> None:
        raise AssertionError("a CPU has no streams")

    storage = numbered()
    monkeypatch.setattr(streams, "current_stream", asked)
    USES[use](storage)


@pytest.mark.parametrize("use", USES)
def test_a_stream_waits_for_other_streams_that_used_the_blocks(
    use: str, two_streams: Streams
) -> None:
    storage = numbered()
    for _ in range(3):
        USES[use](storage)
    assert two_streams.take_log() == []  # work on one stream is in order
    two_streams.current = two_streams.second
    USES[use](storage)
    assert two_streams.take_log() == ["second waits for first"]
    two_streams.current = two_streams.first
    USES[use](storage)
    assert two_streams.take_log() == ["first waits for second"]


@pytest.mark.parametrize(
    "change",
    [lambda s: s.grow(9), lambda s: s.shrink(2), lambda s: s.keep_layers(1)],
    ids=["grow", "shrink", "keep_layers"],
)
def test_a_new_tensor_is_filled_between_old_and_new_writes(
    change: Callable[[BlockStorage], None],
    two_streams: Streams,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage = numbered()
    old = storage.tier().data_ptr()
    two_streams.current = two_streams.second
    storage.layer(0)
    two_streams.current = two_streams.first
    two_streams.take_log()

    def allocate(*arguments: Any, **options: Any) -> torch.Tensor:
        two_streams.log.append("a new tensor")
        return memory.allocate(*arguments, **options)

    monkeypatch.setattr("kvpager.modes.plain_memory.allocate", allocate)
    change(storage)
    log = [line for line in two_streams.take_log() if "first waits for first" not in line]
    assert log[:2] == ["first waits for second", "a new tensor"]
    assert log[-1] == "second waits for first"
    new = storage.tier().data_ptr()
    assert {(old, "first"), (old, "second"), (new, "first"), (new, "second")} <= set(
        two_streams.kept
    )


def test_a_stream_that_records_a_graph_waits_for_no_other(two_streams: Streams) -> None:
    storage = numbered()
    two_streams.current, two_streams.capturing = two_streams.second, True
    storage.layer(0)
    assert two_streams.take_log() == []


@pytest.mark.parametrize(
    "touch",
    [
        lambda storage: storage.tier("host").fill_(0),
        lambda storage: storage.apply(CopyPlan(pairs((5, 0)), "host", "host")),
        lambda storage: storage.apply(CopyPlan(pairs((0, 0)), "device", "host")),
        lambda storage: storage.keep_layers(1),
    ],
    ids=["by hand", "copy within", "swap out", "layers dropped"],
)
def test_host_memory_is_not_written_during_a_copy_from_it(
    touch: Callable[[BlockStorage], None],
) -> None:
    with fake_devices() as fake_device, late_copies() as stream:
        layers = [LayerShape(1, 8, 8)] * 2
        storage = BlockStorage(
            6, 4, layers, dtype=torch.float32, device=fake_device(0), num_host_blocks=6
        )
        storage.tier("host").copy_(torch.arange(6.0 * 128).view(6, 128))
        storage.apply(CopyPlan(pairs((0, 1), (2, 3)), "host", "device"))
        assert stream.num_made < len(stream.copies)
        touch(storage)
        found = storage.tier().cpu()
    expected = torch.arange(6.0 * 128).view(6, 128)
    width = found.shape[1]
    assert torch.equal(found[[1, 3]], expected[[0, 2], :width])


class Runtime:
    """The page-locking part of the CUDA runtime, logging its calls."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.locked: dict[int, int] = {}

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        if not self.code:
            self.locked[address] = num_bytes
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        ctypes.string_at(address, self.locked.pop(address))  # still allocated
        return 0


def with_runtime(monkeypatch: pytest.MonkeyPatch, runtime: Runtime) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def test_pinned_memory_is_exact_and_unlocked_with_its_last_view(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime = Runtime()
    with_runtime(monkeypatch, runtime)
    storage = BlockStorage(9, 16, [LayerShape(2, 64, 64)], dtype=torch.bfloat16, pinned=True)
    assert list(runtime.locked.values()) == [storage.nbytes]
    assert all(address % 4096 == 0 for address in runtime.locked)
    key = storage.layer(0)[0]
    key.fill_(3)
    storage.grow(18)
    assert sorted(runtime.locked.values()) == [storage.nbytes // 2, storage.nbytes]
    assert storage.layer(0)[0][:9].eq(3).all()
    del storage
    gc.collect()
    assert len(runtime.locked) == 1
    assert key.eq(3).all()
    del key
    gc.collect()
    assert runtime.locked == {}


def test_pages_that_cannot_be_locked_are_torchs_error(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(code=2)
    with_runtime(monkeypatch, runtime)
    monkeypatch.setattr(torch.cuda, "CudaError", lambda code: RuntimeError(f"CUDA error {code}"))
    with pytest.raises(RuntimeError, match="CUDA error 2"):
        BlockStorage(9, 16, [LayerShape(2, 64, 64)], dtype=torch.bfloat16, pinned=True)


def test_pinned_must_be_a_bool() -> None:
    with pytest.raises(TypeError, match="pinned='no': expected True or False"):
        BlockStorage(9, 16, [LayerShape(2, 64, 64)], dtype=torch.bfloat16, pinned="no")  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_page_locked_memory_without_a_gpu_is_refused() -> None:
    with pytest.raises(RuntimeError, match="pinned=True: needs a GPU"):
        BlockStorage(9, 16, [LayerShape(2, 64, 64)], dtype=torch.bfloat16, pinned=True)


@pytest.mark.gpu
def test_gpu_growth_keeps_what_another_stream_is_still_writing() -> None:
    storage, side = numbered("cuda"), torch.cuda.Stream()
    with torch.cuda.stream(side):
        key, _ = storage.layer(0)
        torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]
        key.fill_(7)
    storage.grow(9)
    assert storage.layer(0)[0][:6].eq(7).all()


@pytest.mark.gpu
def test_gpu_blocks_copied_from_host_memory_keep_their_content() -> None:
    storage = numbered("cuda", num_host_blocks=6)
    expected = storage.tier("host")[:3].clone()
    torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]
    storage.apply(CopyPlan(pairs((0, 0), (1, 1), (2, 2)), "host", "device"))
    storage.tier("host").fill_(0)
    assert torch.equal(storage.tier()[:3].cpu(), expected)

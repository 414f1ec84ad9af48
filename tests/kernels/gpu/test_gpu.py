"""Copy kernels and the device-side allocator on a GPU, with races and CUDA graphs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpager.kernels import reference, step_alloc
from kvpager.kernels.device_allocator import DeviceAllocator
from kvpager.storage.block_storage import BlockStorage
from tests.support.allocator_history import History, perform, random_operation

pytestmark = pytest.mark.gpu

KV_CACHE_DTYPES: list[Any] = [None, "int8", "fp8_e4m3"]


@pytest.fixture
def copy_kernels() -> Any:
    pytest.importorskip("triton")
    from kvpager.kernels.gpu import copies as copy_kernels

    return copy_kernels


@pytest.fixture(params=["one_program", "many_programs"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The entry points, with programs as they are, and so small that there are many."""
    pytest.importorskip("triton")
    from kvpager.kernels.gpu import allocator

    if request.param == "many_programs":
        monkeypatch.setattr(allocator, "LANES_ALONE_MAX", 0)
        monkeypatch.setattr(allocator, "LANES", 32)
    monkeypatch.setattr(allocator, "COLUMNS", 32)
    return step_alloc


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raise if the host waits for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def storage_pair(*arguments: Any, **options: Any) -> tuple[BlockStorage, BlockStorage]:
    """Make one storage on the GPU and one on the CPU, both with the bytes of NaNs."""
    storages = (
        BlockStorage(*arguments, **options, device="cuda"),
        BlockStorage(*arguments, **options),
    )
    for storage in storages:
        storage.tier().view(torch.uint8).fill_(0xFF)
    return storages


def assert_same_bytes(on_gpu: Tensor, on_cpu: Tensor) -> None:
    assert torch.equal(on_gpu.cpu().view(torch.uint8), on_cpu.view(torch.uint8))


@pytest.mark.parametrize("seed", range(8))
def test_rows_read_back_what_was_written_after_any_history(kernels: Any, seed: int) -> None:
    chance = random.Random(seed)
    history = History(kernels, chance.randint(10, 40), chance.choice([1, 2, 16]), 24, 6, "cuda")
    for _ in range(60):
        perform(history, random_operation(history, chance))
        history.check()
    history.release(list(range(24)))
    history.check()


@pytest.mark.parametrize("free", [0, 1, 500, 1998, 1999])
def test_thousands_of_rows_race_for_one_shared_block(kernels: Any, free: int) -> None:
    num_rows = 2000
    history = History(kernels, free + 1, 4, num_rows, 1, "cuda")
    for attempt in range(5):
        history.step([0])
        history.fork([(0, target) for target in range(1, num_rows)])
        rows = list(range(num_rows))
        random.Random(attempt).shuffle(rows)
        slots = history.step(rows)
        history.check()
        # All but one row copy. If a row cannot, the last row cannot keep the block either.
        assert sum(slot >= 0 for slot in slots) == (num_rows if free == num_rows - 1 else free)
        history.release(rows)
        history.check()


def test_thousands_of_rows_race_for_the_last_blocks(kernels: Any) -> None:
    num_rows = 3000
    history = History(kernels, 700, 2, num_rows, 3, "cuda")
    for _ in range(3):
        slots = history.step(list(range(num_rows)))
        assert sum(slot >= 0 for slot in slots) == 700
        history.step(list(range(num_rows)))
        history.check()
        history.release(list(range(num_rows)))
        history.check()


def test_no_call_of_the_allocator_waits_for_the_gpu(kernels: Any) -> None:
    allocator = DeviceAllocator(40, 4, 9, 5, device="cuda")
    rows = torch.arange(8, dtype=torch.int32, device="cuda")
    with no_waiting():
        kernels.step_alloc(allocator, rows)
        kernels.fork_rows(allocator, rows[:1], rows[:1] + 8)
        kernels.step_alloc(allocator, rows)
        kernels.release_rows(allocator, rows)
    allocator.check()
    assert allocator.seq_lens.tolist() == [0] * 8 + [1]


def test_captured_steps_are_replayed(kernels: Any, copy_kernels: Any) -> None:
    """Allocate, copy and append in a CUDA graph; fork and release between its replays."""
    num_rows, num_blocks, block_size = 24, 70, 4
    allocator = DeviceAllocator(num_blocks, block_size, num_rows, 6, device="cuda")
    storage = BlockStorage(
        num_blocks, block_size, [(2, 16, 16)], dtype=torch.float32, device="cuda"
    )
    rows = torch.full((num_rows,), -1, dtype=torch.int32, device="cuda")
    key = torch.zeros(num_rows, 2, 16, device="cuda")

    def step() -> Tensor:
        slots, copies = kernels.step_alloc(allocator, rows)
        copy_kernels.copy_blocks(storage.tier(), copies)
        copy_kernels.append_kv(key, -key, *storage.layer(0), slots)
        return slots

    # Compiles; with rows of -1 it changes nothing.
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step()
    torch.cuda.current_stream().wait_stream(aside)
    allocator.check()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        slots = step()

    chance = random.Random(0)
    tokens: list[list[int]] = [[] for _ in range(num_rows)]
    written = refused = 0
    for _ in range(200):
        chosen = chance.sample(range(num_rows), chance.randint(1, num_rows))
        chosen += [-1] * (num_rows - len(chosen))
        numbers = range(written, written + num_rows)
        written += num_rows
        rows.copy_(torch.tensor(chosen))
        key.copy_(torch.tensor(numbers)[:, None, None].expand_as(key))
        graph.replay()
        for row, slot, number in zip(chosen, slots.tolist(), numbers, strict=True):
            if row >= 0 and slot >= 0:
                tokens[row].append(number)
            elif row >= 0:
                refused += 1
        allocator.check()
        assert int(allocator.failures) == refused
        assert_reads_back(copy_kernels, storage, allocator, tokens)
        between_replays(kernels, allocator, tokens, chance)
    assert refused > 0


def between_replays(
    kernels: Any, allocator: DeviceAllocator, tokens: list[list[int]], chance: random.Random
) -> None:
    """Release some rows, and fork others into them."""
    leaving = chance.sample(range(len(tokens)), 4)
    staying = [row for row in range(len(tokens)) if row not in leaving]
    sources, targets = chance.choices(staying, k=3), leaving[:3]
    as_rows = [torch.tensor(each, device="cuda") for each in (leaving, sources, targets)]
    kernels.release_rows(allocator, as_rows[0])
    kernels.fork_rows(allocator, as_rows[1], as_rows[2])
    tokens[leaving[3]] = []
    for source, target in zip(sources, targets, strict=True):
        tokens[target] = list(tokens[source])
    allocator.check()


def assert_reads_back(
    copy_kernels: Any, storage: BlockStorage, allocator: DeviceAllocator, tokens: list[list[int]]
) -> None:
    longest = max(map(len, tokens))
    for cache, sign in zip(storage.layer(0), (1, -1), strict=True):
        read = copy_kernels.gather_kv(cache, allocator.block_tables, allocator.seq_lens, longest)
        for row, numbers in enumerate(tokens):
            expected = torch.tensor([0] * (longest - len(numbers)) + numbers) * sign
            assert torch.equal(read[row].cpu(), expected[:, None, None].expand(-1, 2, 16).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_cache_dtype", KV_CACHE_DTYPES)
@pytest.mark.parametrize(
    ("block_size", "heads", "key_dim", "value_dim"),
    [(16, 8, 128, 128), (1, 3, 80, 80), (64, 2, 96, 192), (32, 1, 576, 512), (4, 2, 1, 7)],
)
def test_appended_and_gathered_bytes_equal_the_cpu_reference(
    copy_kernels: Any,
    dtype: torch.dtype,
    kv_cache_dtype: Any,
    block_size: int,
    heads: int,
    key_dim: int,
    value_dim: int,
) -> None:
    layers = [(1, 8, 8), (heads, key_dim, value_dim)]
    ours, theirs = storage_pair(
        -(-300 // block_size), block_size, layers, dtype=dtype, kv_cache_dtype=kv_cache_dtype
    )
    key = normal(260, heads, key_dim, dtype=dtype)
    value = normal(260, heads, value_dim, dtype=dtype, seed=1)
    key[3], value[5, 0] = 0, 1e-5
    slots = torch.randperm(300, generator=torch.Generator().manual_seed(2))[:260]
    slots[::7] = -1
    on_gpu = [tensor.cuda() for tensor in (key, value, slots)]
    with no_waiting():
        copy_kernels.append_kv(*on_gpu[:2], *ours.layer(1), on_gpu[2], scales=ours.scales(1))
    reference.append_kv(key, value, *theirs.layer(1), slots, scales=theirs.scales(1))
    assert_same_bytes(ours.tier(), theirs.tier())

    num_blocks = ours.num_blocks
    tables = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(3)).int()
    tables = torch.stack((tables, tables.roll(1), torch.full_like(tables, -1)))
    lens = torch.tensor([num_blocks * block_size, block_size * (num_blocks // 2) + 1, 0])
    where = [tensor.cuda() for tensor in (tables, lens)]
    for index in range(2):
        scales = [None if s is None else s[index] for s in (ours.scales(1), theirs.scales(1))]
        caches = [storage.layer(1)[index] for storage in (ours, theirs)]
        with no_waiting():
            got = copy_kernels.gather_kv(caches[0], *where, 290, scales=scales[0], dtype=dtype)
        expected = reference.gather_kv(caches[1], tables, lens, 290, scales=scales[1], dtype=dtype)
        torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("num_pairs", [1, 2, 5, 62, 200, 254, 300])
@pytest.mark.parametrize(("dtype", "columns"), [(torch.bfloat16, 1 << 17), (torch.float16, 999)])
def test_blocks_change_places_in_one_copy(
    copy_kernels: Any, num_pairs: int, dtype: torch.dtype, columns: int
) -> None:
    """Cycles of blocks, each source and destination: a write before a read would show."""
    num_blocks = num_pairs + 3
    original = torch.randn(num_blocks, columns, device="cuda").to(dtype)
    cycle = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0))[: num_pairs + 1]
    copies = torch.stack((cycle[:-1], cycle[1:]), 1).int()
    copies = torch.cat((copies, torch.tensor([[-1, 0], [0, -1]], dtype=torch.int32)))
    expected = original.cpu()
    reference.copy_blocks(expected, copies)
    on_gpu = copies.cuda()
    for _ in range(10):
        storage = original.clone()
        with no_waiting():
            copy_kernels.copy_blocks(storage, on_gpu)
        assert torch.equal(storage.cpu(), expected)


def test_pools_of_more_than_2_31_elements_are_reached_everywhere(copy_kernels: Any) -> None:
    block_size, heads, dim, num_layers = 16, 8, 128, 32
    num_blocks = (1 << 31) // (block_size * heads * dim * 2 * num_layers) + 2
    needed = num_blocks * block_size * heads * dim * 2 * num_layers * 2
    if torch.cuda.mem_get_info()[0] < needed + (1 << 30):
        pytest.skip(f"needs {needed >> 30} GiB of GPU memory")
    storage = BlockStorage(
        num_blocks,
        block_size,
        [(heads, dim, dim)] * num_layers,
        dtype=torch.bfloat16,
        device="cuda",
    )
    last = num_blocks - 1
    key = normal(block_size, heads, dim, dtype=torch.bfloat16).cuda()
    slots = torch.arange(block_size, device="cuda") + last * block_size
    copy_kernels.append_kv(key, -key, *storage.layer(num_layers - 1), slots)
    copy_kernels.copy_blocks(storage.tier(), torch.tensor([[last, 0]], device="cuda"))
    for block in (0, last):
        tables = torch.tensor([[block]], dtype=torch.int32, device="cuda")
        lens = torch.tensor([block_size], device="cuda")
        for cache, expected in zip(storage.layer(num_layers - 1), (key, -key), strict=True):
            assert torch.equal(copy_kernels.gather_kv(cache, tables, lens, block_size)[0], expected)

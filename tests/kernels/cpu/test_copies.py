"""append_kv, gather_kv and copy_blocks on a CPU: exact bits, and the bounds of all reads."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvpager.kernels.cpu import compiler
from kvpager.kernels.quantisation import quantise
from tests.support.kernel_cases import (
    CASES,
    NAN,
    REFERENCE,
    Call,
    Paged,
    attend,
    strided_caches,
    tables_for,
)
from tests.support.native_kernels import (
    FLOATS,
    VARIANTS,
    Native,
    blocks_of,
    call_of,
    native_of,
    require,
    small,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=VARIANTS)
def native(request: pytest.FixtureRequest) -> Native:
    return require(request.param)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64])
def test_appended_bits_equal_the_reference(
    dtype: torch.dtype, slot_dtype: torch.dtype, native: Native
) -> None:
    key = torch.randn(3, 9, 6).to(dtype).transpose(0, 1)
    value = torch.randn(9, 5, 17).to(dtype)[:, 1:4, 2:15]
    slots = torch.full((9, 2), 12345, dtype=slot_dtype)
    slots[:, 0] = torch.tensor([4, 0, -1, 31, 17, -9, 8, 30, 2])
    for given in (slots[:, 0], slots[:, 0].contiguous()):
        caches = strided_caches(8, 4, 3, 6, 13, dtype)
        expected = strided_caches(8, 4, 3, 6, 13, dtype)
        native.kernels.append_kv(key, value, *caches, given)
        REFERENCE.append_kv(key, value, *expected, slots[:, 0])
        for found, right in zip(caches, expected, strict=True):
            assert torch.equal(bits(found), bits(right))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dim", [2, 512])  # the wide ones are written by several threads
def test_runs_of_slots_end_where_blocks_do(dim: int, threads: int, native: Native) -> None:
    torch.set_num_threads(threads)
    slots = torch.cat((torch.arange(2, 23), torch.tensor([-1]), torch.arange(31, 24, -1)))
    key, value = torch.randn(2, len(slots), 3, dim)
    caches, expected = (strided_caches(8, 4, 3, dim, dim, torch.float32) for _ in range(2))
    native.kernels.append_kv(key, value, *caches, slots)
    REFERENCE.append_kv(key, value, *expected, slots)
    # Both are parts of one tensor. The bytes between them must stay, too.
    found, right = (
        cache.as_strided((8 * cache.stride(0),), (1,), 0) for cache in (caches[0], expected[0])
    )
    assert torch.equal(bits(found), bits(right))


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", FLOATS)
def test_quantised_bits_equal_the_reference(dtype: torch.dtype, native: Native) -> None:
    key = (torch.randn(40, 3, 19) * 10.0 ** torch.randint(-5, 4, (40, 3, 1))).to(dtype)
    key[0], key[1, 1], key[2, 0, 4] = 0, 1e-44, NAN
    key[3, 0] = (torch.arange(19) - 9.5).to(dtype)
    key[3, 0, 0] = 127  # the scale is 1, so that halves are ties
    value = key.flip(0)
    scales = torch.full((2, 12, 4, 3), 5.0)
    caches = torch.full((2, 12, 4, 3, 19), 77, dtype=torch.int8)
    slots = torch.randperm(48)[:40]
    slots[5] = -1
    native.kernels.append_kv(key, value, *caches, slots, scales=(scales[0], scales[1]))
    kept = slots >= 0
    for which, x in enumerate((key, value)):
        stored, scale = quantise(x[kept], torch.int8)
        assert torch.equal(caches[which].view(48, 3, 19)[slots[kept]], stored)
        found = scales[which].view(48, 3)[slots[kept]]
        torch.testing.assert_close(found, scale, rtol=0, atol=0, equal_nan=True)
    untouched = torch.ones(48, dtype=torch.bool)
    untouched[slots[kept]] = False
    assert caches.view(2, 48, 3, 19)[:, untouched].eq(77).all()
    assert scales.view(2, 48, 3)[:, untouched].eq(5).all()


@pytest.mark.parametrize("slot", [32, 1 << 40])
def test_a_slot_outside_is_refused_before_anything_is_written(slot: int, native: Native) -> None:
    caches = strided_caches(8, 4, 1, 2, 2, torch.float32)
    token = torch.ones(3, 1, 2)
    with pytest.raises(ValueError, match=rf"slots\[2\]={slot}: the cache has slots 0 to 31"):
        native.kernels.append_kv(token, token, *caches, torch.tensor([0, 1, slot]))
    assert all(cache.isnan().all() for cache in caches)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64, torch.int8])
def test_gathered_bits_equal_the_reference(dtype: torch.dtype, native: Native) -> None:
    seq_lens = torch.tensor([[37, 7], [0, 7], [5, 7], [300, 7]])
    tables, blocks = tables_for([37, 0, 5, 300], 4)
    tables[3, 2], tables[0, 11:] = -1, 1 << 30
    cache, scales, outputs = strided_caches(blocks, 4, 3, 10, 10, torch.float32)[0], None, [dtype]
    cache.copy_(torch.randn(cache.shape))
    if dtype == torch.int8:
        cache, scales = quantise(cache, torch.int8)
        outputs = FLOATS
    else:
        cache = cache.to(dtype)
    for out in outputs:
        options = {"scales": scales, "dtype": out}
        for source in (cache, cache.transpose(1, 2).contiguous().transpose(1, 2)):
            for length in (0, 1, 36, 38, 290, 310):
                for lens in (seq_lens[:, 0], seq_lens[:, 0].int()):
                    found = native.kernels.gather_kv(source, tables, lens, length, **options)
                    expected = REFERENCE.gather_kv(source, tables, lens, length, **options)
                    assert found.dtype == out
                    assert torch.equal(bits(found), bits(expected))


def test_a_gather_from_outside_is_refused(native: Native) -> None:
    cache, tables = torch.zeros(3, 4, 1, 2), torch.tensor([[0, 3]]).int()
    with pytest.raises(ValueError, match=r"block_tables\[0, 1\]=3: the cache has blocks 0 to 2"):
        native.kernels.gather_kv(cache, tables, torch.tensor([5]), 5)
    assert native.kernels.gather_kv(cache, tables, torch.tensor([4]), 4).shape == (1, 4, 1, 2)
    with pytest.raises(ValueError, match=r"seq_lens\[0\]=-1"):
        native.kernels.gather_kv(cache, tables, torch.tensor([-1]), 5)


@pytest.mark.parametrize("width", [3, 60_000])  # the wide ones are copied by several threads
def test_copied_blocks_equal_the_reference(width: int, native: Native) -> None:
    torch.set_num_threads(2)
    chains = [[0, 1], [1, 2], [2, 0], [3, 4], [4, 3], [5, 5], [-1, 6], [6, -1], [0, 7]]
    for dtype in (torch.int32, torch.int64):
        storage = torch.randint(0, 255, (9, width + 5), dtype=torch.uint8)[:, :width]
        expected = storage.clone()
        spread = torch.full((9, 4), 8, dtype=dtype)
        spread[:, 1:3] = torch.tensor(chains)
        native.kernels.copy_blocks(storage, spread[:, 1:3])
        REFERENCE.copy_blocks(expected, torch.tensor(chains))
        assert torch.equal(storage, expected)


@pytest.mark.parametrize("pair", [[1, 4], [4, 1]])
def test_a_copy_outside_is_refused_before_anything_is_written(
    pair: list[int], native: Native
) -> None:
    storage = torch.arange(8.0).view(4, 2)
    with pytest.raises(ValueError, match=r"copies\[1\] names block 4; the storage has blocks 0 to"):
        native.kernels.copy_blocks(storage, torch.tensor([[0, 2], pair]))
    assert storage.flatten().tolist() == list(range(8))


# -------------------------------------------------------------------- bounds


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="maps pages as Linux does")
def test_nothing_outside_the_tensors_is_read() -> None:
    """Run in a separate process: a failure is a segmentation fault."""
    for variant in compiler.variants():
        require(variant.name)
    process = multiprocessing.get_context("spawn").Process(target=run_everything_at_page_ends)
    process.start()
    process.join()
    assert process.exitcode == 0


def run_everything_at_page_ends() -> None:
    torch.set_num_threads(1)
    for variant in compiler.variants():
        kernels = native_of(variant.name).kernels
        for name in ("sinks_softcap_window", "float_mask_per_head", "bool_mask", "odd_head_dims"):
            for dtype in FLOATS:
                for kv_cache_dtype in (None, "int8"):
                    call, blocks = call_of(name, dtype), blocks_of(name, dtype, 16, kv_cache_dtype)
                    expected = attend(CASES[name], call, blocks, kernels=kernels)
                    call, blocks = at_page_ends(call, blocks)
                    assert torch.equal(attend(CASES[name], call, blocks, kernels=kernels), expected)
        arguments = {name: at_page_end(tensor) for name, tensor in small().items()}
        kernels.paged_attention(**arguments)
        kernels.gather_kv(
            arguments["key_cache"], arguments["block_tables"], arguments["seq_lens"], 48
        )
        caches, slots = (arguments["key_cache"], arguments["value_cache"]), torch.tensor([63, 1])
        token = at_page_end(torch.ones(2, 2, 32))
        kernels.append_kv(token, token, *caches, at_page_end(slots))
        kernels.copy_blocks(caches[0], at_page_end(torch.tensor([[0, 3], [3, 1]])))


def at_page_ends(call: Call, blocks: Paged) -> tuple[Call, Paged]:
    queries = at_page_end(torch.cat(call.queries))
    optional = {"sinks": call.sinks, "mask": call.mask}
    moved = {name: x if x is None else at_page_end(x) for name, x in optional.items()}
    caches, scales = blocks.caches, blocks.scales
    return replace(call, queries=[queries], **moved), Paged(
        (at_page_end(caches[0]), at_page_end(caches[1])),
        None if scales is None else (at_page_end(scales[0]), at_page_end(scales[1])),
        at_page_end(blocks.block_tables),
        at_page_end(blocks.seq_lens),
    )


def at_page_end(tensor: Tensor) -> Tensor:
    """Return a copy with the same strides that ends at a page; reading past it faults. Never freed,
    because the process ends soon."""
    extent = 1 + sum(
        (n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    size = extent * tensor.element_size()
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, room + mmap.PAGESIZE)
    memory = (ctypes.c_char * (room + mmap.PAGESIZE)).from_buffer(pages)
    behind = ctypes.addressof(memory) + room
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    assert protect(ctypes.c_void_p(behind), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=extent, offset=room - size)
    return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)

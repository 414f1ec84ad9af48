"""The native CPU kernels, in every variant that this CPU can run, against the twins and float64."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from kernel_cases import (
    CASES,
    NAN,
    REFERENCE,
    Call,
    Case,
    Kernels,
    Paged,
    attend,
    dense,
    in_blocks,
    make_call,
    slots_of,
    strided_caches,
    tables_for,
)
from torch import Tensor

from kvpager.kernels.cpu import compiler
from kvpager.kernels.cpu.attention import PagedAttention
from kvpager.kernels.cpu.library import Library
from kvpager.kernels.cpu.moves import AppendKV, CopyBlocks, GatherKV
from kvpager.kernels.quantisation import quantise

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
VARIANTS = [variant.name for variant in compiler.VARIANTS]
BEST = compiler.variants()[0].name
# What every variant runs; the best one runs all.
FEW = [
    "decode",
    "ragged_mix_of_prefill_and_decode",
    "sinks_softcap_window",
    "non_causal_window",
    "float_mask_per_head",
    "odd_head_dims",
    "groups_of_seven",
    "longer_than_one_tile",
]
SELECTION = [
    (variant, name, block_size)
    for variant in VARIANTS
    for name in (CASES if variant == BEST else FEW)
    for block_size in ((1, 16, 64) if variant == BEST else (16,))
]


@dataclass(frozen=True)
class Native:
    """The kernels of one variant, without the entry points before them."""

    library: Library
    kernels: Kernels


@cache
def native_of(variant: str) -> Native:
    built = compiler.ensure(compiler.variant_named(variant))
    library = Library(built.path)
    return Native(
        library,
        Kernels(AppendKV(library), GatherKV(library), PagedAttention(library), CopyBlocks(library)),
    )


def require(variant: str) -> Native:
    if variant not in [able.name for able in compiler.variants()]:
        pytest.skip(f"this CPU cannot run {variant}")
    try:
        return native_of(variant)
    except compiler.BuildError as error:
        pytest.skip(f"no native kernels: {error}")


@pytest.fixture(params=VARIANTS)
def native(request: pytest.FixtureRequest) -> Native:
    return require(request.param)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# What a case needs is worked out once; no kernel here writes to it.
call_of = cache(lambda name, dtype: make_call(CASES[name], dtype))
blocks_of = cache(
    lambda name, dtype, block_size, kv_dtype=None: in_blocks(
        CASES[name], call_of(name, dtype), block_size, dtype, REFERENCE, kv_dtype
    )
)
exact_of = cache(lambda name, dtype: dense(CASES[name], call_of(name, dtype), torch.float64))
plain_of = cache(lambda name, dtype: dense(CASES[name], call_of(name, dtype), dtype))


def largest_error(output: Tensor, exact: Tensor) -> float:
    assert output.shape == exact.shape
    return (output.double() - exact.double()).abs().max().item()


def rounding(dtype: torch.dtype, exact: Tensor, dim: int) -> float:
    """What sums of `dim` products may round off besides."""
    largest = max(exact.abs().max().item(), 1.0)
    return 4 * max(1, dim / 16) ** 0.5 * torch.finfo(dtype).eps * largest


def assert_agrees(output: Tensor, expected: Tensor) -> None:
    """Both sum in float32 and round once; int8 adds 15-bit queries and weights."""
    assert output.dtype == expected.dtype
    eps = max(2.5 * torch.finfo(output.dtype).eps, 2e-5)
    largest = max(expected.abs().max().item() if expected.numel() else 0, 1.0)
    torch.testing.assert_close(output, expected, rtol=0, atol=eps * largest)


# -------------------------------------------------------------------- attention


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("variant", "name", "block_size"), SELECTION)
def test_attention_is_as_exact_as_plain_torch(
    variant: str, name: str, block_size: int, dtype: torch.dtype
) -> None:
    kernels = require(variant).kernels
    served = kernels.paged_attention.num_calls
    call, exact = call_of(name, dtype), exact_of(name, dtype)
    output = attend(CASES[name], call, blocks_of(name, dtype, block_size), kernels=kernels)
    plain_error = largest_error(plain_of(name, dtype), exact)
    bound = 2 * plain_error + rounding(dtype, exact, CASES[name].key_dim)
    assert output.dtype == dtype
    assert largest_error(output, exact) <= bound
    assert kernels.paged_attention.num_calls == served + 1  # and did not leave it to the twin


@cache
def dequantised(name: str, dtype: torch.dtype) -> Call:
    """The call over what the eight bits mean, rounded to `dtype`."""
    blocks = blocks_of(name, dtype, 16, "int8")
    stored = [blocks.stored(row) for row in range(len(CASES[name].rows))]
    keys, values = [key.to(dtype) for key, _ in stored], [value.to(dtype) for _, value in stored]
    return replace(call_of(name, dtype), keys=keys, values=values)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", [*FEW, "bool_mask", "head_dim_256", "head_dim_80", "kv_starts"])
def test_int8_attention_costs_no_more_than_dequantising_first(
    name: str, dtype: torch.dtype, native: Native
) -> None:
    case, call = CASES[name], call_of(name, dtype)
    blocks = blocks_of(name, dtype, 16, "int8")
    output = attend(case, call, blocks, kernels=native.kernels)
    assert_agrees(output, attend(case, call, blocks, kernels=REFERENCE))
    exact = exact_of(name, dtype)
    plain = dense(case, dequantised(name, dtype), dtype)
    bound = 2 * largest_error(plain, exact) + rounding(dtype, exact, case.key_dim)
    assert largest_error(output, exact) <= bound


DIMS = [(n, n) for n in (8, 16, 24, 32, 64, 80, 96, 112, 128, 192, 256)]


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize(("key_dim", "value_dim"), [*DIMS, (1, 1), (33, 65), (576, 512), (7, 130)])
def test_every_head_dim_and_group_size_agrees_with_the_twin(
    key_dim: int, value_dim: int, kv_dtype: Any, native: Native
) -> None:
    groups = (1, 2, 3, 4, 5, 6, 7, 8, 12, 17)
    for number, group in enumerate(groups):
        heads = 1 if key_dim > 256 else 2
        case = Case(((3, 35), (1, 34), (1, 0)), heads * group, heads, key_dim, value_dim)
        dtype = FLOATS[number % 3]
        call = make_call(case, dtype)
        blocks = in_blocks(case, call, 16, dtype, REFERENCE, kv_dtype)
        expected = attend(case, call, blocks, kernels=REFERENCE)
        assert_agrees(attend(case, call, blocks, kernels=native.kernels), expected)


@pytest.mark.parametrize("kind", [torch.bool, *FLOATS])
def test_masks_of_every_dtype_and_stride_agree_with_the_twin(
    kind: torch.dtype, native: Native
) -> None:
    case = Case(((3, 40), (2, 34)), mask="float", mask_heads=True, causal=False)
    call = make_call(case, torch.float32)
    mask = call.mask
    assert mask is not None
    mask = mask > -1e30 if kind == torch.bool else mask.clamp(min=torch.finfo(kind).min).to(kind)
    wide = torch.ones(2, 4, 9, 100, dtype=kind)
    wide[:, :, 1:7:2, 5:85:2] = mask
    blocks = in_blocks(replace(case, mask=None), replace(call, mask=None), 16, torch.float32)
    for view in (
        mask,
        wide[:, :, 1:7:2, 5:85:2],
        mask.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        mask[:1, :1].expand(2, 4, 3, 40),
        mask[:, :1].expand(2, 4, 3, 40),
        mask[:1],
    ):
        masked = replace(call, mask=view)
        expected = attend(case, masked, blocks, kernels=REFERENCE)
        assert_agrees(attend(case, masked, blocks, kernels=native.kernels), expected)


def long_rows(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A row of 100,000 tokens beside one of a single token and one of none."""
    tables, blocks = tables_for([100_000, 1, 0], 16)
    key_cache, value_cache = strided_caches(blocks, 16, 1, 32, 32, dtype)
    generator = torch.Generator().manual_seed(3)
    key, value, query = (
        torch.randn(count, heads, 32, generator=generator).to(dtype)
        for count, heads in ((100_001, 1), (100_001, 1), (4, 2))
    )
    slots = slots_of(tables[0], torch.arange(100_000), 16)
    slots = torch.cat((slots, tables[1, :1].long() * 16))
    REFERENCE.append_kv(key, value, key_cache, value_cache, slots)
    return {
        "query": query,
        "key_cache": key_cache,
        "value_cache": value_cache,
        "block_tables": tables,
        "kv_lens": torch.tensor([100_000, 1, 0]),
        "query_starts": torch.tensor([0, 2, 3, 4]),
        "sinks": torch.tensor([6.0, -1.0]),
    }


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_long_row_is_shared_among_threads(threads: int, native: Native) -> None:
    arguments = long_rows()
    exact = REFERENCE.paged_attention(
        **{
            name: tensor.double() if tensor.is_floating_point() else tensor
            for name, tensor in arguments.items()
        }
    )
    torch.set_num_threads(threads)
    output = native.kernels.paged_attention(**arguments)
    # Outputs are about 0.005: averages of so many values.
    torch.testing.assert_close(output.double(), exact, rtol=1e-3, atol=2e-6)
    assert torch.equal(output[3], torch.zeros(2, 32))
    assert torch.equal(native.kernels.paged_attention(**arguments), output)


def small(kv_dtype: str | None = None, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """One row of 40 tokens in three blocks of 16, four blocks in all; two queries."""
    generator = torch.Generator().manual_seed(5)
    key, value, query = (
        torch.randn(count, heads, 32, generator=generator).to(dtype)
        for count, heads in ((64, 2), (64, 2), (2, 4))
    )
    arguments = {
        "query": query,
        "key_cache": key.view(4, 16, 2, 32),
        "value_cache": value.view(4, 16, 2, 32),
        "block_tables": torch.tensor([[3, 0, 2]]).int(),
        "kv_lens": torch.tensor([40]).int(),
        "query_starts": torch.tensor([0, 2]).int(),
    }
    if kv_dtype:
        quantise_caches(arguments)
    return arguments


def quantise_caches(arguments: dict[str, Any]) -> None:
    key, key_scales = quantise(arguments["key_cache"], torch.int8)
    value, value_scales = quantise(arguments["value_cache"], torch.int8)
    arguments |= {"key_cache": key, "value_cache": value, "scales": (key_scales, value_scales)}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("where", ["query", "key_cache", "value_cache"])
def test_a_nan_in_use_comes_out_as_nan_where_it_was_used(
    where: str, kv_dtype: str | None, dtype: torch.dtype, native: Native
) -> None:
    # In block 3 are the row's tokens 0 to 15: the first ones of a tile, and one in its middle.
    for offset in (0, 1, 7, 15):
        arguments = small(dtype=dtype)
        place = (0, 1) if where == "query" else (3, offset, 1)
        arguments[where][place][offset] = NAN
        if kv_dtype:
            quantise_caches(arguments)
        faulty = native.kernels.paged_attention(**arguments).isnan().any(-1)
        # Query heads 2 and 3 read kv head 1.
        expected = [[False, where == "query", False, False], [False] * 4]
        if where != "query":
            expected = [[False, False, True, True]] * 2
        assert faulty.tolist() == expected


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("fault", [float("inf"), -float("inf")])
def test_an_infinite_value_does_not_come_out_finite(
    fault: float, kv_dtype: str | None, native: Native
) -> None:
    arguments = small(dtype=torch.bfloat16)
    arguments["value_cache"][3, 5, 1, 7] = fault
    if kv_dtype:
        quantise_caches(arguments)
    output = native.kernels.paged_attention(**arguments)
    assert not output[:, 2:, 7].isfinite().any()
    assert output[:, :2].isfinite().all()


def test_an_infinite_score_that_is_negative_weighs_nothing(native: Native) -> None:
    arguments = small()
    arguments["query"].abs_()
    arguments["key_cache"][0, 4] = -float("inf")
    output = native.kernels.paged_attention(**arguments)
    assert_agrees(output, REFERENCE.paged_attention(**arguments))
    assert output.isfinite().all()


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_holes_in_a_table_are_not_seen(kv_dtype: str | None, native: Native) -> None:
    arguments = small(kv_dtype)
    arguments["block_tables"] = torch.tensor([[3, -1, 2]]).int()
    cache = arguments["scales"][0] if kv_dtype else arguments["key_cache"]
    cache[:2] = NAN
    output = native.kernels.paged_attention(**arguments)
    assert output.isfinite().all()
    assert_agrees(output, REFERENCE.paged_attention(**arguments))
    arguments["block_tables"].fill_(-1)
    assert native.kernels.paged_attention(**arguments).eq(0).all()


@pytest.mark.parametrize("start", [39, 40, 41, 47, 48, 49, 1 << 40, -3])
def test_rows_may_start_anywhere_even_past_their_end(start: int, native: Native) -> None:
    arguments = small()
    # What stands behind the table in memory has to stay unread.
    wide = torch.full((1, 64), 999, dtype=torch.int32)
    wide[:, :3] = arguments["block_tables"]
    arguments |= {"block_tables": wide[:, :3], "kv_starts": torch.tensor([start])}
    output = native.kernels.paged_attention(**arguments)
    assert_agrees(output, REFERENCE.paged_attention(**arguments))


def test_integers_of_either_width_and_any_stride_mean_the_same(native: Native) -> None:
    expected = native.kernels.paged_attention(**small(), kv_starts=torch.tensor([3]))
    for dtype in (torch.int32, torch.int64):
        arguments = small() | {"kv_starts": torch.tensor([3])}
        for name in ("kv_lens", "query_starts", "kv_starts"):
            spread = torch.full((len(arguments[name]), 3), -9, dtype=dtype)
            spread[:, 1] = arguments[name]
            arguments[name] = spread[:, 1]
        tables = torch.full((3, 7), 1 << 30, dtype=dtype)
        tables[:, 2] = arguments["block_tables"][0]
        arguments["block_tables"] = tables[:, 2:3].T
        assert torch.equal(native.kernels.paged_attention(**arguments), expected)


def test_queries_may_be_strided(native: Native) -> None:
    for dtype in FLOATS:
        arguments = small(dtype=dtype)
        expected = native.kernels.paged_attention(**arguments)
        wide = torch.full((9, 6, 40), NAN, dtype=dtype)
        wide[1::4, 1:5, 3:35] = arguments["query"]
        arguments["query"] = wide[1::4, 1:5, 3:35]
        assert torch.equal(native.kernels.paged_attention(**arguments), expected)


def test_queries_of_no_row_give_zeros(native: Native) -> None:
    arguments = small()
    arguments["query"] = torch.randn(50, 4, 32)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # new tensors begin as NaN
    try:
        assert torch.empty(3).isnan().all()
        assert native.kernels.paged_attention(**arguments)[2:].eq(0).all()
    finally:
        torch.use_deterministic_algorithms(before)


def test_values_too_small_to_invert_are_still_averaged(native: Native) -> None:
    arguments = small(dtype=torch.bfloat16)
    arguments["value_cache"] *= 1e-35
    quantise_caches(arguments)
    output = native.kernels.paged_attention(**arguments)
    expected = REFERENCE.paged_attention(**arguments)
    torch.testing.assert_close(output * 1e35, expected * 1e35, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_call_gives_the_same_bits(threads: int, native: Native) -> None:
    torch.set_num_threads(threads)
    case = CASES["long_with_mask"]
    call = call_of("long_with_mask", torch.bfloat16)
    blocks: Paged = blocks_of("long_with_mask", torch.bfloat16, 16)
    first = attend(case, call, blocks, kernels=native.kernels)
    for _ in range(3):
        assert torch.equal(attend(case, call, blocks, kernels=native.kernels), first)


def test_python_threads_may_call_at_once(native: Native) -> None:
    torch.set_num_threads(2)
    names = ["longer_than_one_tile", "ragged_mix_of_prefill_and_decode", "multi_head", "prefill"]
    expected = {name: run(name, native) for name in names}
    wrong = []

    def repeat(name: str) -> None:
        torch.set_num_threads(2)
        wrong.extend(name for _ in range(20) if not torch.equal(run(name, native), expected[name]))

    threads = [threading.Thread(target=repeat, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def run(name: str, native: Native) -> Tensor:
    call, blocks = call_of(name, torch.bfloat16), blocks_of(name, torch.bfloat16, 16)
    return attend(CASES[name], call, blocks, kernels=native.kernels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_lens": torch.tensor([49])}, r"kv_lens\[0\] is 49, but block_tables has room for 0 t"),
        ({"kv_lens": torch.tensor([-1])}, r"kv_lens\[0\] is -1"),
        ({"kv_lens": torch.tensor([1 << 62])}, r"kv_lens\[0\] is 46116860"),
        ({"block_tables": torch.tensor([[0, 4, 1]]).int()}, r"block_tables\[0, 1\] is 4; the cach"),
        ({"query_starts": torch.tensor([0, 3])}, "query_starts reaches 3 at row 0"),
        ({"query_starts": torch.tensor([0, -1])}, "query_starts reaches -1 at row 0"),
        ({"query_starts": torch.tensor([1, 2])}, "query_starts reaches 1 at row 0"),
        ({"mask": torch.ones(1, 1, 1, 40)}, "mask has 1 query rows, but row 0 has 2 queries"),
    ],
)
def test_attention_refuses_what_leads_outside(
    changes: dict[str, Any], message: str, native: Native
) -> None:
    with pytest.raises(ValueError, match=message):
        native.kernels.paged_attention(**small() | changes)


# -------------------------------------------------------------------- moves


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64])
def test_appended_bits_are_the_twins(
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


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", FLOATS)
def test_quantised_bits_are_the_twins(dtype: torch.dtype, native: Native) -> None:
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
    with pytest.raises(ValueError, match=rf"slots\[2\] is {slot}; the cache has slots 0 to 31"):
        native.kernels.append_kv(token, token, *caches, torch.tensor([0, 1, slot]))
    assert all(cache.isnan().all() for cache in caches)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64, torch.int8])
def test_gathered_bits_are_the_twins(dtype: torch.dtype, native: Native) -> None:
    kv_lens = torch.tensor([[37, 7], [0, 7], [5, 7], [300, 7]])
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
                for lens in (kv_lens[:, 0], kv_lens[:, 0].int()):
                    found = native.kernels.gather_kv(source, tables, lens, length, **options)
                    expected = REFERENCE.gather_kv(source, tables, lens, length, **options)
                    assert found.dtype == out
                    assert torch.equal(bits(found), bits(expected))


def test_a_gather_from_outside_is_refused(native: Native) -> None:
    cache, tables = torch.zeros(3, 4, 1, 2), torch.tensor([[0, 3]]).int()
    with pytest.raises(ValueError, match=r"block_tables\[0, 1\] is 3; the cache has blocks 0 to 2"):
        native.kernels.gather_kv(cache, tables, torch.tensor([5]), 5)
    assert native.kernels.gather_kv(cache, tables, torch.tensor([4]), 4).shape == (1, 4, 1, 2)
    with pytest.raises(ValueError, match=r"kv_lens\[0\] is -1"):
        native.kernels.gather_kv(cache, tables, torch.tensor([-1]), 5)


@pytest.mark.parametrize("width", [3, 60_000])  # the wide ones are copied by several threads
def test_copied_blocks_are_the_twins(width: int, native: Native) -> None:
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


@pytest.mark.skipif(sys.platform != "linux", reason="maps pages as Linux does")
def test_nothing_outside_the_tensors_is_read() -> None:
    """In a process of its own: where this fails, it ends with a segmentation fault."""
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
                for kv_dtype in (None, "int8"):
                    call, blocks = call_of(name, dtype), blocks_of(name, dtype, 16, kv_dtype)
                    expected = attend(CASES[name], call, blocks, kernels=kernels)
                    call, blocks = at_page_ends(call, blocks)
                    assert torch.equal(attend(CASES[name], call, blocks, kernels=kernels), expected)
        arguments = {name: at_page_end(tensor) for name, tensor in small().items()}
        kernels.paged_attention(**arguments)
        kernels.gather_kv(
            arguments["key_cache"], arguments["block_tables"], arguments["kv_lens"], 48
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
        at_page_end(blocks.tables),
        at_page_end(blocks.kv_lens),
    )


def at_page_end(tensor: Tensor) -> Tensor:
    """A copy, strides included, that ends where a page does; reading behind it faults. Never
    freed: it is for a process that ends soon."""
    extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))
    size = extent * tensor.element_size()
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, room + mmap.PAGESIZE)
    memory = (ctypes.c_char * (room + mmap.PAGESIZE)).from_buffer(pages)
    behind = ctypes.addressof(memory) + room
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    assert protect(ctypes.c_void_p(behind), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=extent, offset=room - size)
    return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)

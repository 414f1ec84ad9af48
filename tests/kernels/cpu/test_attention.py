"""Attention by the native CPU kernels in each variant, against the reference and float64."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.kernel_cases import (
    CASES,
    NAN,
    REFERENCE,
    Call,
    Case,
    Paged,
    attend,
    dense,
    in_blocks,
    make_call,
    slots_of,
    strided_caches,
    tables_for,
)
from tests.support.native_kernels import (
    BEST,
    FLOATS,
    VARIANTS,
    Native,
    blocks_of,
    call_of,
    exact_of,
    plain_of,
    quantise_caches,
    require,
    small,
)

# Cases for every variant; the best variant runs all cases.
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


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=VARIANTS)
def native(request: pytest.FixtureRequest) -> Native:
    return require(request.param)


def largest_error(output: Tensor, exact: Tensor) -> float:
    assert output.shape == exact.shape
    return (output.double() - exact.double()).abs().max().item()


def rounding(dtype: torch.dtype, exact: Tensor, dim: int) -> float:
    """Return the allowed extra rounding error of sums of `dim` products."""
    largest = max(exact.abs().max().item(), 1.0)
    return 4 * max(1, dim / 16) ** 0.5 * torch.finfo(dtype).eps * largest


def assert_agrees(output: Tensor, expected: Tensor) -> None:
    """Compare results that are summed in float32 and rounded once, or use 15 bits for int8."""
    assert output.dtype == expected.dtype
    eps = max(2.5 * torch.finfo(output.dtype).eps, 2e-5)
    largest = max(expected.abs().max().item() if expected.numel() else 0, 1.0)
    torch.testing.assert_close(output, expected, rtol=0, atol=eps * largest)


@pytest.mark.mostly_slow(quick=16)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("variant", "name", "block_size"), SELECTION)
def test_attention_is_as_exact_as_plain_torch(
    variant: str, name: str, block_size: int, dtype: torch.dtype
) -> None:
    kernels = require(variant).kernels
    served = kernels.paged_attention.kernel.num_calls
    call, exact = call_of(name, dtype), exact_of(name, dtype)
    output = attend(CASES[name], call, blocks_of(name, dtype, block_size), kernels=kernels)
    plain_error = largest_error(plain_of(name, dtype), exact)
    bound = 2 * plain_error + rounding(dtype, exact, CASES[name].key_dim)
    assert output.dtype == dtype
    assert largest_error(output, exact) <= bound
    assert (
        kernels.paged_attention.kernel.num_calls == served + 1
    )  # and not by the plain torch reference


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


@pytest.mark.mostly_slow(quick=7)
@pytest.mark.parametrize("kv_cache_dtype", [None, "int8"])
@pytest.mark.parametrize(("key_dim", "value_dim"), [*DIMS, (1, 1), (33, 65), (576, 512), (7, 130)])
def test_every_head_dim_and_group_size_agrees_with_the_reference(
    key_dim: int, value_dim: int, kv_cache_dtype: Any, native: Native
) -> None:
    groups = (1, 2, 3, 4, 5, 6, 7, 8, 12, 17)
    for number, group in enumerate(groups):
        heads = 1 if key_dim > 256 else 2
        case = Case(((3, 35), (1, 34), (1, 0)), heads * group, heads, key_dim, value_dim)
        dtype = FLOATS[number % 3]
        call = make_call(case, dtype)
        blocks = in_blocks(case, call, 16, dtype, REFERENCE, kv_cache_dtype)
        expected = attend(case, call, blocks, kernels=REFERENCE)
        assert_agrees(attend(case, call, blocks, kernels=native.kernels), expected)


@pytest.mark.parametrize("kind", [torch.bool, *FLOATS])
def test_masks_of_every_dtype_and_stride_agree_with_the_reference(
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
        "seq_lens": torch.tensor([100_000, 1, 0]),
        "cu_seqlens_q": torch.tensor([0, 2, 3, 4]),
        "sinks": torch.tensor([6.0, -1.0]),
    }


@pytest.mark.mostly_slow(quick=2)
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
    # Outputs are about 0.005, averages of many values.
    torch.testing.assert_close(output.double(), exact, rtol=1e-3, atol=2e-6)
    assert torch.equal(output[3], torch.zeros(2, 32))
    assert torch.equal(native.kernels.paged_attention(**arguments), output)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kv_cache_dtype", [None, "int8"])
@pytest.mark.parametrize("where", ["query", "key_cache", "value_cache"])
def test_a_nan_in_use_stays_nan_where_used(
    where: str, kv_cache_dtype: str | None, dtype: torch.dtype, native: Native
) -> None:
    # In block 3 are the row's tokens 0 to 15: the first ones of a tile, and one in its middle.
    for offset in (0, 1, 7, 15):
        arguments = small(dtype=dtype)
        place = (0, 1) if where == "query" else (3, offset, 1)
        arguments[where][place][offset] = NAN
        if kv_cache_dtype:
            quantise_caches(arguments)
        faulty = native.kernels.paged_attention(**arguments).isnan().any(-1)
        # Query heads 2 and 3 read kv head 1.
        expected = [[False, where == "query", False, False], [False] * 4]
        if where != "query":
            expected = [[False, False, True, True]] * 2
        assert faulty.tolist() == expected


@pytest.mark.parametrize("kv_cache_dtype", [None, "int8"])
@pytest.mark.parametrize("fault", [float("inf"), -float("inf")])
def test_an_infinite_value_does_not_come_out_finite(
    fault: float, kv_cache_dtype: str | None, native: Native
) -> None:
    arguments = small(dtype=torch.bfloat16)
    arguments["value_cache"][3, 5, 1, 7] = fault
    if kv_cache_dtype:
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


@pytest.mark.parametrize("kv_cache_dtype", [None, "int8"])
def test_holes_in_a_table_are_not_seen(kv_cache_dtype: str | None, native: Native) -> None:
    arguments = small(kv_cache_dtype)
    arguments["block_tables"] = torch.tensor([[3, -1, 2]]).int()
    cache = arguments["scales"][0] if kv_cache_dtype else arguments["key_cache"]
    cache[:2] = NAN
    output = native.kernels.paged_attention(**arguments)
    assert output.isfinite().all()
    assert_agrees(output, REFERENCE.paged_attention(**arguments))
    arguments["block_tables"].fill_(-1)
    assert native.kernels.paged_attention(**arguments).eq(0).all()


@pytest.mark.parametrize("start", [39, 40, 41, 47, 48, 49, 1 << 40, -3])
def test_rows_may_start_anywhere_even_past_their_end(start: int, native: Native) -> None:
    arguments = small()
    # Memory behind the table must stay unread.
    wide = torch.full((1, 64), 999, dtype=torch.int32)
    wide[:, :3] = arguments["block_tables"]
    arguments |= {"block_tables": wide[:, :3], "kv_starts": torch.tensor([start])}
    output = native.kernels.paged_attention(**arguments)
    assert_agrees(output, REFERENCE.paged_attention(**arguments))


def test_integers_of_either_width_and_any_stride_mean_the_same(native: Native) -> None:
    expected = native.kernels.paged_attention(**small(), kv_starts=torch.tensor([3]))
    for dtype in (torch.int32, torch.int64):
        arguments = small() | {"kv_starts": torch.tensor([3])}
        for name in ("seq_lens", "cu_seqlens_q", "kv_starts"):
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
        ({"seq_lens": torch.tensor([49])}, "seq_lens.* 49.*, but block_tables has room for"),
        ({"seq_lens": torch.tensor([-1])}, r"seq_lens\[0\]=-1"),
        ({"seq_lens": torch.tensor([1 << 62])}, "seq_lens.* 46116860.*, but block_tables"),
        ({"block_tables": torch.tensor([[0, 4, 1]]).int()}, r"block_tables\[0, 1\]=4: the cach"),
        ({"cu_seqlens_q": torch.tensor([0, 3])}, "cu_seqlens_q reaches 3 at row"),
        ({"cu_seqlens_q": torch.tensor([0, -1])}, "cu_seqlens_q reaches -1 at row"),
        ({"cu_seqlens_q": torch.tensor([1, 2])}, "cu_seqlens_q reaches 1 at row 0"),
        # Its last query would be uninitialised memory.
        ({"cu_seqlens_q": torch.tensor([0, 1])}, "cu_seqlens_q reaches 1 at row 1"),
        ({"block_tables": torch.tensor([[0, 1 << 32, 1]])}, r"block_tables\[0, 1\]="),
        ({"mask": torch.ones(1, 1, 1, 40)}, "mask has 1 query rows, but a row has 2 queries"),
    ],
)
def test_attention_refuses_values_out_of_bounds(
    changes: dict[str, Any], message: str, native: Native
) -> None:
    with pytest.raises(ValueError, match=message):
        native.kernels.paged_attention(**small() | changes)


@pytest.mark.parametrize("value", [1.37, 3.0])
def test_bfloat16_is_rounded_once_on_long_rows(value: float, native: Native) -> None:
    # Values do not cancel, so weights rounded to one side show.
    generator = torch.Generator().manual_seed(3)
    tokens, heads, dim = 2048, 2, 64

    def random(*shape: int, spread: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * spread).bfloat16()

    spread = 0.0 if value == 1.37 else 1.0
    keys = random(tokens, heads, dim, spread=0.3)
    values = (random(tokens, heads, dim, spread=spread) + value).bfloat16()
    query = random(1, 8, dim)
    output = native.kernels.paged_attention(
        query,
        keys.view(-1, 16, heads, dim),
        values.view(-1, 16, heads, dim),
        torch.arange(tokens // 16, dtype=torch.int32)[None],
        torch.tensor([tokens], dtype=torch.int32),
    )

    def plain(dtype: torch.dtype) -> Tensor:
        q, k, v = (tensor.to(dtype) for tensor in (query, keys, values))
        k, v = (tensor.repeat_interleave(4, dim=1).transpose(0, 1) for tensor in (k, v))
        weights = (q.transpose(0, 1) @ k.mT * dim**-0.5).softmax(-1)
        return (weights @ v).transpose(0, 1).double()

    exact = plain(torch.float64)
    rounded = (output.double(), plain(torch.bfloat16))
    error, of_plain = ((each - exact).square().mean() ** 0.5 for each in rounded)
    assert error <= 1.5 * of_plain + 1e-6

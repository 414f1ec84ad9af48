"""The Triton attention kernels in Triton's CPU interpreter: tiny shapes, every option."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.kernel_cases import (
    CASES,
    NAN,
    Call,
    Case,
    assert_as_exact_as_plain_torch,
    attend,
    in_blocks,
    make_call,
    strided_caches,
    with_mask_of,
)

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels are interpreted only under TRITON_INTERPRET=1", allow_module_level=True)

from kvpager.kernels.gpu import config, external
from kvpager.kernels.gpu.config import Target
from tests.support.triton_attention import (
    FLOATS,
    KV,
    TRITON,
    by_reference,
    by_triton,
    in_pieces,
    kernels,
)

# The interpreter needs 10 ms for a tile of one program: longer rows are for GPUs.
SHORT = [name for name, case in CASES.items() if sum(length for _, length in case.rows) <= 140]


pytestmark = pytest.mark.usefixtures("small_tiles")


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", SHORT)
def test_attention_is_as_exact_as_plain_torch(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    call = make_call(case, dtype)
    output = attend(case, call, in_blocks(case, call, 16, dtype), kernels=TRITON)
    assert_as_exact_as_plain_torch(case, call, output, dtype)


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize(
    ("name", "block_size"), [(name, (3, 32)[index % 2]) for index, name in enumerate(SHORT)]
)
def test_rows_split_into_pieces_and_blocks_of_any_size(name: str, block_size: int) -> None:
    case = CASES[name]
    call = make_call(case, torch.float32)
    blocks = in_blocks(case, call, block_size, torch.float32)
    output = attend(case, call, blocks, kernels=kernels(in_pieces))
    assert_as_exact_as_plain_torch(case, call, output, torch.float32)


@pytest.mark.parametrize("name", ["decode", "ragged_mix_of_prefill_and_decode"])
@pytest.mark.parametrize("kernel", [TRITON, kernels(in_pieces)])
def test_the_result_is_written_into_out(name: str, kernel: Any) -> None:
    case = CASES[name]
    call = make_call(case, torch.float32)
    blocks = in_blocks(case, call, 16, torch.float32)
    out = torch.full((sum(count for count, _ in case.rows), 4, 16), NAN)
    assert attend(case, call, blocks, kernels=kernel, out=out) is not None
    assert torch.equal(out, attend(case, call, blocks, kernels=kernel))


QUANTISED = (
    "decode",
    "chunked_prefill_over_a_cached_prefix",
    "narrow_values",
    "sinks_softcap_window",
    "float_mask_per_head",
    "bool_mask",
    "empty_row",
    "kv_starts",
)
# Of scores and weights in the dtype of the maths; weights of quantised values are bfloat16.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 1e-2}


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kv_cache_dtype", KV)
@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_caches_are_read_as_the_reference_reads_them(
    name: str, kv_cache_dtype: Any, dtype: torch.dtype
) -> None:
    case = CASES[name]
    call = make_call(case, dtype)
    blocks = in_blocks(case, call, 16, dtype, kv_cache_dtype=kv_cache_dtype)
    output = attend(case, call, blocks, kernels=TRITON)
    exact = attend(case, in_double(call), blocks, kernels=kernels(by_reference))
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), exact, rtol=0, atol=TOLERANCE[dtype])


def in_double(call: Call) -> Call:
    mask = call.mask
    if mask is not None and mask.dtype != torch.bool:
        # The lowest number of the mask's dtype hides a token.
        mask = mask.double().masked_fill(mask == torch.finfo(mask.dtype).min, -torch.inf)
    sinks = None if call.sinks is None else call.sinks.double()
    return replace(call, queries=[query.double() for query in call.queries], sinks=sinks, mask=mask)


@pytest.mark.parametrize("native", [False, True])
def test_every_fp8_number_is_read_right(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "converts", lambda target, dtype: native)
    numbers = torch.arange(256, dtype=torch.uint8)
    numbers[(numbers & 0x7F) == 0x7F] = 0  # NaN
    numbers = numbers.view(torch.float8_e4m3fn)
    # A query that sees one token returns the token's value.
    cache = numbers.view(8, 1, 1, 32)
    scales = torch.ones(8, 1, 1)
    output = by_triton(
        torch.zeros(8, 1, 32),
        cache,
        cache,
        torch.arange(8, dtype=torch.int32)[:, None],
        torch.ones(8, dtype=torch.int32),
        scales=(scales, scales),
    )
    assert torch.equal(output.flatten(), numbers.float())


def test_values_of_tiny_scale_keep_their_digits_in_fp16() -> None:
    stored = torch.full((1, 4, 1, 16), 100, dtype=torch.int8)
    scale = torch.full((1, 4, 1), 1e-7)
    output = by_triton(
        torch.zeros(1, 1, 16, dtype=torch.float16), stored, stored, torch.zeros(1, 1).int(),
        torch.tensor([4]), scales=(scale, scale),
    )  # fmt: skip
    torch.testing.assert_close(output.float(), torch.full((1, 1, 16), 1e-5), rtol=1e-2, atol=0)


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize(("query_heads", "kv_heads"), [(3, 1), (10, 2), (7, 1), (20, 1)])
@pytest.mark.parametrize("heads_max", [64, 3])
def test_any_number_of_query_heads_shares_a_kv_head(
    query_heads: int, kv_heads: int, heads_max: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "GROUP_MAX", heads_max)
    case = Case(
        ((1, 5), (9, 21)), query_heads=query_heads, kv_heads=kv_heads, mask="float", mask_heads=True
    )
    call = make_call(case, torch.float32)
    output = attend(case, call, in_blocks(case, call, 16, torch.float32), kernels=TRITON)
    assert_as_exact_as_plain_torch(case, call, output, torch.float32)


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("dims", [(8, 8), (80, 80), (96, 32), (192, 128), (256, 256)])
def test_head_dims_need_not_be_powers_of_two(dims: tuple[int, int]) -> None:
    case = Case(((2, 15), (1, 33)), key_dim=dims[0], value_dim=dims[1])
    call = make_call(case, torch.float32)
    output = attend(case, call, in_blocks(case, call, 16, torch.float32), kernels=TRITON)
    assert_as_exact_as_plain_torch(case, call, output, torch.float32)


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 47, 48, 49])
@pytest.mark.parametrize("paged_attention", [by_triton, in_pieces])
def test_rows_of_awkward_lengths(length: int, paged_attention: Any) -> None:
    case = Case(((1, length), (1, 30)), sinks=True)
    call = make_call(case, torch.float32)
    blocks = in_blocks(case, call, 16, torch.float32)
    output = attend(case, call, blocks, kernels=kernels(paged_attention))
    assert_as_exact_as_plain_torch(case, call, output, torch.float32)


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("window", [None, 44])
@pytest.mark.parametrize("block_size", [16, 32])
def test_tiles_that_some_queries_see_in_part_are_masked(
    window: int | None, block_size: int
) -> None:
    # Queries at 80 to 119, in tiles that begin and end inside tiles of kv tokens.
    case = Case(((40, 120),), kv_heads=1, query_heads=2, window=window)
    call = make_call(case, torch.float32)
    output = attend(case, call, in_blocks(case, call, block_size, torch.float32), kernels=TRITON)
    assert_as_exact_as_plain_torch(case, call, output, torch.float32)


def test_queries_and_masks_may_be_views() -> None:
    case = Case(((3, 21), (3, 34)), mask="bool")
    call = make_call(case, torch.float32)
    blocks = in_blocks(case, call, 16, torch.float32)
    expected = attend(case, call, blocks, kernels=TRITON)
    assert call.mask is not None
    wide = torch.full((6, 4, 40), NAN)
    wide[:, :, 8:24] = torch.cat(call.queries)
    mask = call.mask.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    starts = torch.tensor([0, 9, 3, 9, 6, 9])[::2]
    tables = blocks.block_tables.t().contiguous().t().long()
    lens = torch.stack((blocks.seq_lens, blocks.seq_lens), 1)[:, 0].long()
    for query in (wide[:, :, 8:24], wide[:, :, 8:24].transpose(0, 1).contiguous().transpose(0, 1)):
        output = by_triton(query, *blocks.caches, tables, lens, starts, mask=mask)
        assert torch.equal(output, expected)


# The lowest number of float64 is -inf in float32, of which NumPy warns.
@pytest.mark.mostly_slow(quick=1)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_mask_may_have_a_wider_dtype_than_the_queries(dtype: torch.dtype) -> None:
    case = CASES["float_mask_per_head"]
    call = with_mask_of(torch.float64, make_call(case, dtype))
    output = attend(case, call, in_blocks(case, call, 16, dtype), kernels=TRITON)
    assert_as_exact_as_plain_torch(case, call, output, dtype)


def test_no_queries_give_an_empty_result() -> None:
    caches = strided_caches(2, 4, 2, 8, 8, torch.float32)
    none = torch.zeros(0, dtype=torch.int32)
    for rows, starts in ((0, None), (2, torch.zeros(3).int())):
        lens = torch.zeros(rows, dtype=torch.int32)
        output = by_triton(torch.empty(0, 4, 8), *caches, none.new_zeros(rows, 1), lens, starts)
        assert output.shape == (0, 4, 8)


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float64, 8), (torch.float32, 520)])
def test_the_reference_computes_calls_that_triton_does_not_support(
    dtype: torch.dtype, dim: int
) -> None:
    case = Case(((1, 5), (1, 9)), key_dim=dim, value_dim=dim)
    call = make_call(case, dtype)
    output = attend(case, call, in_blocks(case, call, 4, dtype), kernels=TRITON)
    assert_as_exact_as_plain_torch(case, call, output, dtype)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"seq_lens": torch.tensor([5, 1])},
            "seq_lens reaches 5 tokens, but block_tables has room",
        ),
        ({"seq_lens": torch.tensor([-1, 1])}, r"seq_lens\[0\]=-1"),
        ({"mask": torch.zeros(1, 1, 0, 1)}, "mask has 0 query rows, but a row has 1 queries"),
    ],
)
def test_values_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    key_cache, value_cache = strided_caches(4, 4, 2, 8, 8, torch.float32)
    arguments = {
        "query": torch.zeros(2, 4, 8),
        "key_cache": key_cache,
        "value_cache": value_cache,
        "block_tables": torch.zeros(2, 1, dtype=torch.int32),
        "seq_lens": torch.ones(2, dtype=torch.int32),
    }
    with pytest.raises(ValueError, match=message):
        by_triton(**{**arguments, **changes})


def flash_attn_by_reference(
    query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float, causal: bool, block_table: Tensor,
) -> Tensor:  # fmt: skip
    """Compute what flash_attn_varlen_func documents, plus 1 to mark the caller."""
    lens = cu_seqlens_k.diff()
    assert max_seqlen_q == int(cu_seqlens_q.diff().max())
    assert max_seqlen_k == block_table.shape[1] * key.shape[1]
    return 1 + by_reference(
        query,
        key,
        value,
        block_table,
        lens,
        cu_seqlens_q,
        softmax_scale=softmax_scale,
        causal=causal,
    )


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(flash_attn_varlen_func=flash_attn_by_reference)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    external._backend.cache_clear()
    monkeypatch.setattr(external, "FLASH_ATTENTION_PAGE", 16)
    monkeypatch.setattr(external, "LONG_PREFILL", 5)


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.usefixtures("flash_attn")
@pytest.mark.parametrize(
    ("case", "block_size", "asked"),
    [
        (Case(((5, 20), (1, 9)), key_dim=64, value_dim=64), 16, True),
        (Case(((5, 20), (1, 9)), key_dim=64, value_dim=64, causal=False), 16, True),
        (Case(((4, 20), (1, 9)), key_dim=64, value_dim=64), 16, False),
        (Case(((1, 20), (1, 9)), key_dim=64, value_dim=64), 16, False),
        (Case(((5, 20),), key_dim=64, value_dim=64), 8, False),
        (Case(((5, 20),), key_dim=64, value_dim=32), 16, False),
        (Case(((5, 20),), key_dim=80, value_dim=80), 16, False),
        (Case(((5, 20),), key_dim=64, value_dim=64, window=4), 16, False),
        (Case(((5, 20),), key_dim=64, value_dim=64, softcap=4.0), 16, False),
        (Case(((5, 20),), key_dim=64, value_dim=64, sinks=True), 16, False),
        (Case(((5, 20),), key_dim=64, value_dim=64, mask="bool"), 16, False),
        (Case(((5, 20),), key_dim=64, value_dim=64, kv_starts=(3,)), 16, False),
    ],
)
def test_an_external_backend_gets_long_plain_prefills_only(
    case: Case, block_size: int, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = make_call(case, torch.float16)
    blocks = in_blocks(case, call, block_size, torch.float16)
    output = torch.empty(sum(count for count, _ in case.rows), 4, case.value_dim).half()
    attend(case, call, blocks, kernels=TRITON, out=output)
    monkeypatch.setenv("KVPAGER_GPU_ATTENTION", "triton")
    expected = attend(case, call, blocks, kernels=TRITON)
    torch.testing.assert_close(output - (1 if asked else 0), expected, rtol=0, atol=4e-3)


def test_triton_runs_without_the_chosen_external_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPAGER_GPU_ATTENTION", "flashinfer")
    external._backend.cache_clear()
    case = Case(((5, 20), (1, 9)), key_dim=64, value_dim=64)
    call = make_call(case, torch.float16)
    output = attend(case, call, in_blocks(case, call, 16, torch.float16), kernels=TRITON)
    assert_as_exact_as_plain_torch(case, call, output, torch.float16)


def test_an_unknown_external_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPAGER_GPU_ATTENTION", "xformers")
    with pytest.raises(ValueError, match="KVPAGER_GPU_ATTENTION='xformers': expected one of"):
        external.chosen()


@pytest.mark.parametrize("capability", [config.AMD, 80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("head_dim", [16, 64, 128, 256, 512])
@pytest.mark.parametrize("element_bytes", [1, 2, 4])
def test_every_gpu_has_tiles_for_every_head_dim(
    capability: int, head_dim: int, element_bytes: int
) -> None:
    for group in (1, 5, 64):
        small, large = config.tiles_for(Target(capability, 100), element_bytes, head_dim, group)
        assert small.lines >= max(16, group)
        assert large.lines >= small.lines
        for tile in (small, large):
            stage = 2 * tile.tokens * max(16, head_dim) * element_bytes
            assert stage * max(1, tile.stages - 1) <= 99 << 10 or capability in (80, 90, 100)

"""Attention kernels against an oracle: dense float64 attention, written out row by row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kvpager.kernels import backends, reference
from kvpager.ops import (
    append_kv,
    gather_kv,
    paged_attention,
)
from tests.support.kernel_arguments import append_arguments, attention_arguments, gather_arguments
from tests.support.kernel_cases import (
    CASES,
    NAN,
    REFERENCE,
    Call,
    Case,
    Kernels,
    assert_as_exact_as_plain_torch,
    attend,
    in_blocks,
    make_call,
    paged,
    slots_of,
    strided_caches,
    tables_for,
    with_mask_of,
)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_attention_through_blocks_is_dense_attention(
    name: str, block_size: int, implementation: Kernels
) -> None:
    case = CASES[name]
    call = make_call(case, torch.float32)
    output = paged(case, call, block_size, torch.float32, kernels=implementation)
    assert_as_exact_as_plain_torch(case, call, output, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_attention_is_exact_in_every_dtype(
    name: str, dtype: torch.dtype, implementation: Kernels
) -> None:
    case = CASES[name]
    call = make_call(case, dtype)
    output = paged(case, call, 16, dtype, kernels=implementation)
    assert_as_exact_as_plain_torch(case, call, output, dtype)


@pytest.mark.parametrize("name", CASES)
def test_how_the_work_is_tiled_does_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "TILE_SCORES", 1)  # 16 queries at a time
    monkeypatch.setattr(reference, "TILE_TOKENS_PER_ROW", 32)
    case = CASES[name]
    call = make_call(case, torch.float32)
    output = paged(case, call, 8, torch.float32, kernels=REFERENCE)
    assert_as_exact_as_plain_torch(case, call, output, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_gpu_attention_is_as_exact_as_plain_torch(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    call = make_call(case, dtype)
    output = paged(case, call, 16, dtype, "cuda")
    assert_as_exact_as_plain_torch(case, call, output, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_gpu_attention_agrees_with_the_cpu_reference(name: str) -> None:
    case = CASES[name]
    call = make_call(case, torch.float32)
    expected = paged(case, call, 16, torch.float32, kernels=REFERENCE)
    output = paged(case, call, 16, torch.float32, "cuda")
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_many_rows_agree_with_the_same_rows_alone(implementation: Kernels) -> None:
    case = Case(tuple((1 + row % 3, 3 + 29 * row % 200) for row in range(40)))
    call = make_call(case, torch.float32)
    output = paged(case, call, 16, torch.float32, kernels=implementation)
    together = output.split([count for count, _ in case.rows])
    for row in (0, 7, 39):
        alone = replace(case, rows=(case.rows[row],))
        one = Call([call.queries[row]], [call.keys[row]], [call.values[row]], None, None)
        output = paged(alone, one, 16, torch.float32, kernels=implementation)
        torch.testing.assert_close(output, together[row])


def test_one_row_of_100000_tokens_beside_a_row_of_one(implementation: Kernels) -> None:
    case = Case(((3, 100_000), (1, 1)), query_heads=2, kv_heads=1, key_dim=32, value_dim=32)
    call = make_call(case, torch.float32)
    tables, blocks = tables_for([100_000, 1], 16)
    caches = strided_caches(blocks, 16, 1, 32, 32, torch.float32)
    for row, count in enumerate((100_000, 1)):
        slots = slots_of(tables[row], torch.arange(count), 16)
        implementation.append_kv(call.keys[row], call.values[row], *caches, slots)
    output = implementation.paged_attention(
        torch.cat(call.queries),
        *caches,
        tables,
        torch.tensor([100_000, 1], dtype=torch.int32),
        torch.tensor([0, 3, 4], dtype=torch.int32),
    )
    key, value = call.keys[0][:, 0].double(), call.values[0][:, 0].double()
    scores = torch.einsum("qhd,nd->qhn", call.queries[0].double(), key) / 32**0.5
    later = torch.arange(100_000) > torch.arange(99_997, 100_000)[:, None, None]
    expected = scores.masked_fill(later, -torch.inf).softmax(-1) @ value
    # Outputs are about 0.005, averages of many values.
    torch.testing.assert_close(output[:3].double(), expected, rtol=1e-3, atol=1e-6)
    assert torch.equal(output[3], call.values[1][0].expand(2, 32))


def test_queries_may_be_a_view_of_a_larger_projection(implementation: Kernels) -> None:
    case = CASES["ragged_mix_of_prefill_and_decode"]
    call = make_call(case, torch.float32)
    blocks = in_blocks(case, call, 16, torch.float32)
    expected = attend(case, call, blocks, kernels=implementation)
    queries = torch.cat(call.queries)
    wide = torch.full((len(queries), 7, 20), NAN)
    wide[:, 2:6, 1:17] = queries
    for view in (wide[:, 2:6, 1:17], queries.transpose(0, 1).contiguous().transpose(0, 1)):
        strided = replace(call, queries=[view])
        torch.testing.assert_close(attend(case, strided, blocks, kernels=implementation), expected)


def test_entries_past_a_rows_last_block_are_ignored(implementation: Kernels) -> None:
    case = Case(((1, 40), (2, 8), (1, 0)))
    call = make_call(case, torch.float32)
    blocks = in_blocks(case, call, 8, torch.float32)
    expected = attend(case, call, blocks, kernels=implementation)
    blocks.block_tables[0, 5:], blocks.block_tables[1, 1:], blocks.block_tables[2] = (
        -77,
        1 << 30,
        999,
    )
    assert torch.equal(attend(case, call, blocks, kernels=implementation), expected)
    gathered = implementation.gather_kv(blocks.caches[0], blocks.block_tables, blocks.seq_lens, 12)
    assert torch.equal(gathered[1, 4:], call.keys[1])
    assert gathered[2].eq(0).all()


def test_lengths_below_zero_are_refused_before_anything_is_read(implementation: Kernels) -> None:
    arguments = {**attention_arguments(), "seq_lens": torch.tensor([1, -3])}
    with pytest.raises(ValueError, match="seq_lens"):
        implementation.paged_attention(**arguments)
    cache, tables = arguments["key_cache"], arguments["block_tables"]
    with pytest.raises(ValueError, match="seq_lens"):
        implementation.gather_kv(cache, tables, arguments["seq_lens"], 2)


def test_queries_that_may_see_nothing_give_zero(implementation: Kernels) -> None:
    case = Case(((4, 2), (2, 5)), kv_starts=(0, 5), sinks=True)
    call = make_call(case, torch.float32)
    output = paged(case, call, 4, torch.float32, kernels=implementation)
    assert torch.equal(output[[0, 1, 4, 5]], torch.zeros(4, 4, 16))
    assert output[2:4].abs().sum() > 0


def test_a_mask_without_any_true_gives_zero(implementation: Kernels) -> None:
    case = Case(((2, 9),))
    call = make_call(case, torch.float32)
    call.mask = torch.zeros(1, 1, 2, 9, dtype=torch.bool)
    output = paged(case, call, 4, torch.float32, kernels=implementation)
    assert torch.equal(output, torch.zeros(2, 4, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask_dtype", [torch.float64, torch.float32])
def test_a_mask_may_have_a_wider_dtype_than_the_queries(
    mask_dtype: torch.dtype, dtype: torch.dtype, implementation: Kernels
) -> None:
    case = CASES["float_mask_per_head"]
    call = with_mask_of(mask_dtype, make_call(case, dtype))
    output = paged(case, call, 16, dtype, kernels=implementation)
    assert_as_exact_as_plain_torch(case, call, output, dtype)


def test_freed_blocks_in_the_middle_of_a_table_are_ignored(implementation: Kernels) -> None:
    case = Case(((1, 12),))
    call = make_call(case, torch.float32)
    key_cache, value_cache = strided_caches(4, 4, 2, 16, 16, torch.float32)
    append_kv(call.keys[0], call.values[0], key_cache, value_cache, torch.arange(12))
    lens = torch.tensor([12])
    key_cache[1], value_cache[1] = NAN, NAN
    output = implementation.paged_attention(
        call.queries[0], key_cache, value_cache, torch.tensor([[0, -1, 2]]).int(), lens
    )
    call.keys[0] = torch.cat((call.keys[0][:4], call.keys[0][8:]))
    call.values[0] = torch.cat((call.values[0][:4], call.values[0][8:]))
    assert_as_exact_as_plain_torch(Case(((1, 8),)), call, output, torch.float32)


def test_no_queries_give_an_empty_result(implementation: Kernels) -> None:
    key_cache, value_cache = strided_caches(2, 4, 2, 8, 8, torch.float32)
    none = torch.zeros(0, dtype=torch.int32)
    tables = none.view(0, 1)
    output = implementation.paged_attention(
        torch.empty(0, 4, 8), key_cache, value_cache, tables, none
    )
    assert output.shape == (0, 4, 8)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": torch.zeros(2, 3, 8)}, ValueError, "3 query heads are no multiple of 2"),
        ({"query": torch.zeros(2, 4, 6)}, ValueError, "head_dim 6, but key_cache has 8"),
        ({"query": torch.zeros(3, 4, 8)}, ValueError, "3 tokens for 2 rows; pass cu_seqlens_q"),
        ({"query": torch.zeros(2, 32)}, ValueError, r"query.shape=\[2, 32\]: expected"),
        (
            {"query": torch.zeros(2, 4, 8).half()},
            TypeError,
            "query.dtype=torch.float16: must equal key_ca",
        ),
        ({"query": torch.zeros(2, 8, 4).mT}, ValueError, r"query has strides .* query.contiguous"),
        (
            {"query": torch.zeros(2, 4, 8).int()},
            TypeError,
            "query.dtype=torch.int32: expected a floati",
        ),
        (
            {"key_cache": torch.zeros(4, 4, 8, 2).mT},
            ValueError,
            r"key_cache has strides \[64, 16, 1, 2\], but its last dimension has to be contiguous",
        ),
        ({"value_cache": torch.zeros(4, 4, 8, 2).mT}, ValueError, "pass value_cache.contiguous"),
        (
            {"value_cache": torch.zeros(4, 4, 2, 8).half()},
            TypeError,
            "value_cache.dtype=torch.float16: must equal",
        ),
        (
            {"seq_lens": torch.ones(2)},
            TypeError,
            "seq_lens.dtype=torch.float32: expected torch.int32",
        ),
        ({"seq_lens": torch.ones(3).int()}, ValueError, r"seq_lens.shape=\[3\]"),
        (
            {"seq_lens": torch.full((2,), 5)},
            ValueError,
            r"seq_lens.* 5.*, but block_tables has room",
        ),
        ({"cu_seqlens_q": torch.ones(2).int()}, ValueError, r"expected \[rows \+ 1\] = \[3\]"),
        ({"window": 0}, ValueError, "window=0: expected at least 1 token"),
        ({"window": "3"}, TypeError, "window='3': expected a whole number of tokens, or None"),
        ({"window": 2.5}, TypeError, "window=2.5: expected a whole number"),
        ({"window": True}, TypeError, "window=True: expected a whole number"),
        ({"window": [3]}, TypeError, r"window=\[3\]: expected a whole number"),
        ({"causal": "no"}, TypeError, "causal='no': expected True or False"),
        ({"softmax_scale": NAN}, ValueError, "softmax_scale=nan: expected a finite 32-bit number"),
        (
            {"softmax_scale": 1e39},
            ValueError,
            r"softmax_scale=1e\+39: expected a finite 32-bit number",
        ),
        ({"softcap": 1e-50}, ValueError, "softcap=1e-50: expected more than 0"),
        ({"softcap": float("inf")}, ValueError, "softcap=inf: expected more than 0"),
        ({"window": 1 << 63}, ValueError, "window=9223372036854775808: expected at least 1"),
        ({"query": None}, TypeError, "query: expected a torch.Tensor, got NoneType"),
        ({"seq_lens": None}, TypeError, "seq_lens: expected a torch.Tensor, got NoneType"),
        ({"softcap": -1}, ValueError, "softcap=-1: expected more than 0"),
        ({"softcap": NAN}, ValueError, "softcap=nan: expected more than 0"),
        ({"softcap": "x"}, TypeError, "softcap='x': expected a number, or None for no cap"),
        (
            {"softmax_scale": "x"},
            TypeError,
            r"softmax_scale='x': expected a number, or None for head_dim \*\* -0.5",
        ),
        ({"softmax_scale": 1j}, TypeError, "softmax_scale=1j: expected a number"),
        (
            {"softmax_scale": torch.ones(())},
            TypeError,
            r"softmax_scale=tensor\(1.\): expected a number",
        ),
        ({"softcap": 0.0}, ValueError, "softcap=0.0: expected more than 0"),
        ({"sinks": torch.zeros(2)}, ValueError, r"sinks.shape=\[2\]: expected"),
        (
            {"mask": torch.zeros(3, 1, 1, 1)},
            ValueError,
            r"pass \[1 or 2, 1 or 4, max queries, kv\]",
        ),
        (
            {"mask": torch.zeros(1, 1, 1, 1).int()},
            TypeError,
            "mask.dtype=torch.int32: expected torch.bool",
        ),
        ({"mask": torch.zeros(1, 1, 0, 1)}, ValueError, "mask has 0 query rows, but a row has 1"),
        (
            {"mask": torch.zeros(1, 1, 1, 0)},
            ValueError,
            "mask has 0 columns, so it hides everything; pass at least one",
        ),
        ({"kv_starts": torch.zeros(1).int()}, ValueError, r"kv_starts.shape=\[1\]"),
        (
            {"seq_lens": torch.ones(2, device="meta").int()},
            ValueError,
            "seq_lens.device=meta: expected",
        ),
    ],
)
def test_attention_refuses_mismatched_arguments(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    paged_attention(**attention_arguments())  # a passing check must not hide a later failing one
    for _ in range(2):
        with pytest.raises(error, match=message):
            paged_attention(**{**attention_arguments(), **changes})


def test_an_invalid_option_equal_to_a_valid_one_is_refused() -> None:
    paged_attention(**attention_arguments(), window=3)
    with pytest.raises(TypeError, match=r"window=3.0: expected a whole number"):
        paged_attention(**attention_arguments(), window=3.0)


@pytest.mark.parametrize(
    ("operation", "arguments", "name"),
    [
        *((paged_attention, attention_arguments, name) for name in attention_arguments()),
        *(
            (paged_attention, attention_arguments, name)
            for name in ("cu_seqlens_q", "kv_starts", "sinks", "mask")
        ),
        *((append_kv, append_arguments, name) for name in append_arguments()),
        *((gather_kv, gather_arguments, name) for name in ("cache", "block_tables", "seq_lens")),
    ],
)
@pytest.mark.parametrize(
    ("wrong", "kind"), [(np.ones(2, np.int32), "numpy.ndarray"), ([1, 1], "list"), (3, "int")]
)
def test_an_argument_that_is_no_tensor_is_reported(
    operation: Any, arguments: Any, name: str, wrong: Any, kind: str
) -> None:
    with pytest.raises(
        TypeError, match=rf"^{name}: expected a torch.Tensor, got {kind}. Use torch.from_"
    ):
        operation(**{**arguments(), name: wrong})


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([1, 1, 2], "cu_seqlens_q reaches 1 at row 0"),
        ([0, 2, 1], "cu_seqlens_q reaches 1 at row 2"),
        ([0, -1, 2], "cu_seqlens_q reaches -1 at row 1"),
        ([0, 1, 3], "cu_seqlens_q reaches 3 at row 2; it has to rise from 0 to the 2 tokens"),
        ([0, 1, 1], "cu_seqlens_q reaches 1 at row 2"),
    ],
)
def test_reference_refuses_cu_seqlens_q_not_rising_to_the_tokens(
    starts: list[int], message: str
) -> None:
    arguments = attention_arguments() | {"cu_seqlens_q": torch.tensor(starts)}
    with pytest.raises(ValueError, match=message):
        REFERENCE.paged_attention(**arguments)


def test_a_registered_kernel_is_selected_on_its_device_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backends, "_registered", {})
    monkeypatch.setattr(backends, "_provided", {"cpu", "cuda"})

    def faster(*arguments: Any) -> None:
        del arguments

    backends.register("copy_blocks", "cpu", faster, "measured faster")
    assert backends.select("copy_blocks", torch.device("cpu")) is faster
    assert backends.select("copy_blocks", torch.device("cuda", 0)) is reference.copy_blocks
    assert backends.select("gather_kv", torch.device("cpu")) is reference.gather_kv
    assert backends.active()["cpu"]["copy_blocks"].reason == "measured faster"
    assert backends.active()["cpu"]["gather_kv"].backend == "reference"


def test_an_operation_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="operation='sort': expected one of"):
        backends.register("sort", "cpu", print, "a misspelling")
    with pytest.raises(ValueError, match="operation='sort'"):
        backends.select("sort", torch.device("cpu"))

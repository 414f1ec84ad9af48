"""Kernels against an oracle: dense float64 attention, written out query by query."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpager.kernels import backends, reference
from kvpager.kernels.append_kv import append_kv
from kvpager.kernels.copy_blocks import copy_blocks
from kvpager.kernels.gather_kv import gather_kv
from kvpager.kernels.paged_attention import paged_attention

NAN = float("nan")


def strided_caches(
    blocks: int, block_size: int, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Two caches inside one block-first tensor full of NaN, with other bytes before and after."""
    key_run, value_run = block_size * heads * key_dim, block_size * heads * value_dim
    storage = torch.full((blocks, 8 + key_run + value_run + 8), NAN, dtype=dtype)
    key = storage[:, 8 : 8 + key_run].view(blocks, block_size, heads, key_dim)
    value = storage[:, 8 + key_run : -8].view(blocks, block_size, heads, value_dim)
    return key, value


def tables_for(kv_lens: list[int], block_size: int, seed: int = 0) -> tuple[Tensor, int]:
    """Shuffled block tables, -1 where a row has no block, one column wider; and the blocks."""
    counts = [-(-length // block_size) for length in kv_lens]
    blocks = sum(counts) + 2
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed)).int()
    tables = torch.full((len(kv_lens), max(counts, default=0) + 1), -1, dtype=torch.int32)
    taken = 0
    for row, count in enumerate(counts):
        tables[row, :count] = order[taken : taken + count]
        taken += count
    return tables, blocks


def slots_of(table: Tensor, positions: Tensor, block_size: int) -> Tensor:
    return table[positions // block_size].long() * block_size + positions % block_size


@dataclass(frozen=True)
class Case:
    """What one attention call looks like; `rows` are (queries, kv tokens) of each row."""

    rows: tuple[tuple[int, int], ...]
    query_heads: int = 4
    kv_heads: int = 2
    key_dim: int = 16
    value_dim: int = 16
    causal: bool = True
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    mask: str | None = None  # bool, float or left_padded
    mask_rows: bool = True
    mask_heads: bool = False
    mask_short: int = 0  # kv tokens before the mask's first column
    kv_starts: tuple[int, ...] | None = None


CASES = {
    "decode": Case(((1, 5), (1, 33), (1, 64))),
    "decode_of_one_row": Case(((1, 40),)),
    "decode_of_a_first_token": Case(((1, 1), (1, 1))),
    "prefill": Case(((19, 19), (19, 19))),
    "chunked_prefill_over_a_cached_prefix": Case(((7, 50), (9, 70), (16, 17))),
    "ragged_mix_of_prefill_and_decode": Case(((1, 60), (23, 23), (0, 9), (5, 41), (1, 1))),
    "multi_head": Case(((3, 21), (1, 34)), query_heads=4, kv_heads=4),
    "multi_query": Case(((3, 21), (1, 34)), query_heads=4, kv_heads=1),
    "narrow_values": Case(((3, 21), (1, 34)), key_dim=24, value_dim=8),
    "own_scale": Case(((3, 21), (1, 34)), scale=0.37),
    "window": Case(((1, 70), (9, 45), (4, 4)), window=7),
    "window_wide_and_many_queries": Case(((90, 130), (12, 131)), window=44),
    "window_of_one": Case(((3, 21), (1, 34)), window=1),
    "window_beyond_the_row": Case(((3, 21), (1, 34)), window=1000),
    "softcap": Case(((3, 21), (1, 34)), softcap=0.8, scale=1.0),
    "sinks": Case(((3, 21), (1, 34)), sinks=True),
    "sinks_softcap_window": Case(((3, 21), (1, 34)), sinks=True, softcap=2.0, window=5),
    "non_causal": Case(((3, 21), (5, 34)), causal=False),
    "non_causal_window": Case(((3, 21), (5, 34)), causal=False, window=6),
    "more_queries_than_tokens": Case(((6, 4), (3, 30)), sinks=True),
    "more_queries_than_tokens_non_causal": Case(((6, 4), (3, 30)), causal=False),
    "empty_row": Case(((1, 0), (1, 12)), sinks=True),
    "bool_mask": Case(((3, 21), (1, 34)), mask="bool"),
    "bool_mask_per_head": Case(((3, 21), (3, 34)), mask="bool", mask_heads=True),
    "bool_mask_of_all_rows": Case(((3, 34), (3, 34)), mask="bool", mask_rows=False),
    "bool_mask_alone": Case(((3, 21), (3, 34)), mask="bool", causal=False),
    "float_mask": Case(((3, 21), (2, 34)), mask="float", causal=False),
    "float_mask_per_head": Case(((3, 21), (2, 34)), mask="float", mask_heads=True, sinks=True),
    "float_mask_of_all": Case(((2, 34), (2, 34)), mask="float", mask_rows=False, softcap=3.0),
    "short_mask": Case(((3, 21), (2, 34)), mask="float", mask_short=11),
    "left_padded_prefill": Case(((12, 12), (12, 12)), mask="left_padded", causal=False),
    "left_padded_decode": Case(((1, 30), (1, 30)), mask="left_padded", causal=False),
    "kv_starts": Case(((3, 21), (1, 34)), kv_starts=(4, 33)),
    "kv_starts_hide_a_row": Case(((2, 21), (1, 34)), kv_starts=(20, 40)),
    "longer_than_one_tile": Case(((1, 2600), (3, 1030), (1, 12))),
    "long_with_windows_far_apart": Case(((1, 2600), (2, 90), (1, 4)), window=20),
    "long_with_mask": Case(((2, 1500), (1, 1100)), mask="float", sinks=True),
    "long_prefill": Case(((40, 1200), (30, 30)), query_heads=2, kv_heads=1),
}


@dataclass
class Call:
    """The tensors of a case: dense per row for the oracle, all in `dtype`."""

    queries: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    sinks: Tensor | None
    mask: Tensor | None


def make_call(case: Case, dtype: torch.dtype) -> Call:
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return Call(
        [normal(queries, case.query_heads, case.key_dim) for queries, _ in case.rows],
        [normal(length, case.kv_heads, case.key_dim) for _, length in case.rows],
        [normal(length, case.kv_heads, case.value_dim) for _, length in case.rows],
        normal(case.query_heads) if case.sinks else None,
        make_mask(case, dtype, generator),
    )


def make_mask(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor | None:
    if case.mask is None:
        return None
    longest = max(queries for queries, _ in case.rows)
    width = max(length for _, length in case.rows) - case.mask_short
    shape = (
        len(case.rows) if case.mask_rows else 1,
        case.query_heads if case.mask_heads else 1,
        longest,
        width,
    )
    if case.mask == "left_padded":
        padding = torch.arange(shape[0]) * 4
        look = torch.ones(longest, width, dtype=torch.bool).tril(width - longest)
        real = torch.arange(width) >= padding[:, None]
        return look & real[:, None, None, :]
    allowed = torch.rand(shape, generator=generator) < 0.7
    allowed[0, 0, 0] = False  # a query that may see nothing
    allowed[:, :, :, width // 2] = False  # a token that nobody may see
    if case.mask == "bool":
        return allowed
    bias = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    # Both ways of writing "may not look".
    hidden = torch.where(torch.rand(shape, generator=generator) < 0.5, -torch.inf, 0.0).to(dtype)
    hidden[hidden == 0] = torch.finfo(dtype).min
    return torch.where(allowed, bias, hidden)


def seen_by(case: Case, mask: Tensor | None, row: int, query: int, head: int) -> Tensor:
    """Which of the row's kv tokens one query head may look at: bool [kv], token by token."""
    queries, length = case.rows[row]
    position = length - queries + query
    seen = torch.zeros(length, dtype=torch.bool)
    if position < 0 and case.causal:
        return seen
    for token in range(length):
        looks = token <= position or not case.causal
        if case.window is not None:
            looks = looks and token > position - case.window
        if case.kv_starts is not None:
            looks = looks and token >= case.kv_starts[row]
        seen[token] = looks
    if mask is not None:
        bias = mask_line(mask, row, head, queries - query, length)
        seen &= bias if bias.dtype == torch.bool else bias > torch.finfo(bias.dtype).min
    return seen


def mask_line(mask: Tensor, row: int, head: int, from_last: int, length: int) -> Tensor:
    """The mask of one query over its row's kv tokens: right-aligned, hidden where it ends."""
    line = mask[row % mask.shape[0], head % mask.shape[1], mask.shape[2] - from_last]
    hidden: Any = False if mask.dtype == torch.bool else -torch.inf
    before = torch.full((max(0, length - len(line)),), hidden, dtype=mask.dtype)
    return torch.cat((before, line))[len(before) + len(line) - length :]


def dense(case: Case, call: Call, dtype: torch.dtype) -> Tensor:
    """The oracle, computed in `dtype`: packed [tokens, query_heads, value_dim]."""
    outputs = []
    scale = case.key_dim**-0.5 if case.scale is None else case.scale
    for row, (queries, length) in enumerate(case.rows):
        output = torch.zeros(queries, case.query_heads, case.value_dim, dtype=dtype)
        for head in range(case.query_heads):
            kv_head = head // (case.query_heads // case.kv_heads)
            for query in range(queries):
                seen = seen_by(case, call.mask, row, query, head)
                if not seen.any():
                    continue
                key = call.keys[row][seen, kv_head].to(dtype)
                scores = key @ call.queries[row][query, head].to(dtype) * scale
                if case.softcap is not None:
                    scores = case.softcap * torch.tanh(scores / case.softcap)
                if call.mask is not None and call.mask.dtype != torch.bool:
                    scores = scores + mask_line(call.mask, row, head, queries - query, length)[seen]
                if call.sinks is not None:
                    scores = torch.cat((scores, call.sinks[head : head + 1].to(dtype)))
                weights = torch.softmax(scores.to(dtype), 0)[: len(key)]
                output[query, head] = weights @ call.values[row][seen, kv_head].to(dtype)
        outputs.append(output)
    return torch.cat(outputs)


def paged(
    case: Case,
    call: Call,
    block_size: int,
    dtype: torch.dtype,
    device: str = "cpu",
    function: Any = paged_attention,
) -> Tensor:
    """The same through block tables, with NaN in every slot that no query may see."""
    kv_lens = [length for _, length in case.rows]
    tables, blocks = tables_for(kv_lens, block_size)
    caches = strided_caches(blocks, block_size, case.kv_heads, case.key_dim, case.value_dim, dtype)
    for row, (queries, length) in enumerate(case.rows):
        seen = torch.zeros(length, dtype=torch.bool)
        for query in range(queries):
            # Heads differ only through the mask.
            for head in range(case.query_heads if case.mask_heads else 1):
                seen |= seen_by(case, call.mask, row, query, head)
        tokens = seen.nonzero().squeeze(1)
        slots = slots_of(tables[row], tokens, block_size)
        append_kv(call.keys[row][tokens], call.values[row][tokens], *caches, slots)
    counts = [queries for queries, _ in case.rows]
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    decode = all(count == 1 for count in counts)

    def put(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    return function(
        torch.cat(call.queries).to(device),
        *(put(cache) if device != "cpu" else cache for cache in caches),
        tables.to(device),
        torch.tensor(kv_lens, dtype=torch.int32, device=device),
        None if decode else starts.to(device),
        scale=case.scale,
        causal=case.causal,
        window=case.window,
        softcap=case.softcap,
        sinks=put(call.sinks),
        mask=put(call.mask),
        kv_starts=None if case.kv_starts is None else torch.tensor(case.kv_starts, device=device),
    ).cpu()


def assert_as_exact_as_plain_torch(
    case: Case, call: Call, output: Tensor, dtype: torch.dtype
) -> None:
    """At most twice the error that plain torch attention in `dtype` makes, plus rounding."""
    exact = dense(case, call, torch.float64)
    plain_error = (dense(case, call, dtype).double() - exact).abs().max().item()
    largest = max(exact.abs().max().item(), 1.0)
    bound = 2 * plain_error + 4 * torch.finfo(dtype).eps * largest
    assert output.dtype == dtype
    assert output.shape == exact.shape
    error = (output.double() - exact).abs().max().item()
    assert error <= bound


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_attention_through_blocks_is_dense_attention(name: str, block_size: int) -> None:
    case = CASES[name]
    call = make_call(case, torch.float32)
    output = paged(case, call, block_size, torch.float32)
    assert_as_exact_as_plain_torch(case, call, output, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_attention_is_exact_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    call = make_call(case, dtype)
    assert_as_exact_as_plain_torch(case, call, paged(case, call, 16, dtype), dtype)


@pytest.mark.parametrize("name", CASES)
def test_how_the_work_is_tiled_does_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "TILE_SCORES", 1)  # 16 queries at a time
    monkeypatch.setattr(reference, "TILE_TOKENS_PER_ROW", 32)
    case = CASES[name]
    call = make_call(case, torch.float32)
    output = paged(case, call, 8, torch.float32, function=reference.paged_attention)
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
    expected = paged(case, call, 16, torch.float32, function=reference.paged_attention)
    output = paged(case, call, 16, torch.float32, "cuda")
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_many_rows_agree_with_the_same_rows_alone() -> None:
    case = Case(tuple((1 + row % 3, 3 + 29 * row % 200) for row in range(40)))
    call = make_call(case, torch.float32)
    together = paged(case, call, 16, torch.float32).split([count for count, _ in case.rows])
    for row in (0, 7, 39):
        alone = replace(case, rows=(case.rows[row],))
        one = Call([call.queries[row]], [call.keys[row]], [call.values[row]], None, None)
        torch.testing.assert_close(paged(alone, one, 16, torch.float32), together[row])


def test_queries_that_may_see_nothing_give_zero() -> None:
    case = Case(((4, 2), (2, 5)), kv_starts=(0, 5), sinks=True)
    output = paged(case, make_call(case, torch.float32), 4, torch.float32)
    assert torch.equal(output[[0, 1, 4, 5]], torch.zeros(4, 4, 16))
    assert output[2:4].abs().sum() > 0


def test_a_mask_without_any_true_gives_zero() -> None:
    case = Case(((2, 9),))
    call = make_call(case, torch.float32)
    call.mask = torch.zeros(1, 1, 2, 9, dtype=torch.bool)
    assert torch.equal(paged(case, call, 4, torch.float32), torch.zeros(2, 4, 16))


def test_blocks_given_back_in_the_middle_of_a_table_are_not_seen() -> None:
    case = Case(((1, 12),))
    call = make_call(case, torch.float32)
    key_cache, value_cache = strided_caches(4, 4, 2, 16, 16, torch.float32)
    append_kv(call.keys[0], call.values[0], key_cache, value_cache, torch.arange(12))
    lens = torch.tensor([12])
    key_cache[1], value_cache[1] = NAN, NAN
    output = paged_attention(
        call.queries[0], key_cache, value_cache, torch.tensor([[0, -1, 2]]).int(), lens
    )
    call.keys[0] = torch.cat((call.keys[0][:4], call.keys[0][8:]))
    call.values[0] = torch.cat((call.values[0][:4], call.values[0][8:]))
    assert_as_exact_as_plain_torch(Case(((1, 8),)), call, output, torch.float32)


def test_no_queries_give_an_empty_result() -> None:
    key_cache, value_cache = strided_caches(2, 4, 2, 8, 8, torch.float32)
    none = torch.zeros(0, dtype=torch.int32)
    output = paged_attention(torch.empty(0, 4, 8), key_cache, value_cache, none.view(0, 1), none)
    assert output.shape == (0, 4, 8)


def attention_arguments() -> dict[str, Any]:
    key_cache, value_cache = strided_caches(4, 4, 2, 8, 8, torch.float32)
    return {
        "query": torch.zeros(2, 4, 8),
        "key_cache": key_cache,
        "value_cache": value_cache,
        "block_tables": torch.zeros(2, 1, dtype=torch.int32),
        "kv_lens": torch.ones(2, dtype=torch.int32),
    }


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": torch.zeros(2, 3, 8)}, ValueError, "3 query heads are no multiple of 2"),
        ({"query": torch.zeros(2, 4, 6)}, ValueError, "head_dim 6, but key_cache has 8"),
        ({"query": torch.zeros(3, 4, 8)}, ValueError, "3 tokens for 2 rows; pass query_starts"),
        ({"query": torch.zeros(2, 32)}, ValueError, r"query has shape \[2, 32\]; pass"),
        ({"query": torch.zeros(2, 4, 8).half()}, TypeError, "query is torch.float16, but key_ca"),
        ({"kv_lens": torch.ones(2)}, TypeError, "kv_lens is torch.float32; pass torch.int32"),
        ({"kv_lens": torch.ones(3).int()}, ValueError, r"kv_lens has shape \[3\]"),
        ({"kv_lens": torch.full((2,), 5)}, ValueError, "kv_lens reaches 5 tokens, but block_t"),
        ({"query_starts": torch.ones(2).int()}, ValueError, r"pass \[rows \+ 1\] = \[3\]"),
        ({"window": 0}, ValueError, "window is 0; pass at least 1 token"),
        ({"softcap": 0.0}, ValueError, "softcap is 0.0; pass more than 0"),
        ({"sinks": torch.zeros(2)}, ValueError, r"sinks has shape \[2\]; pass"),
        (
            {"mask": torch.zeros(3, 1, 1, 1)},
            ValueError,
            r"pass \[1 or 2, 1 or 4, max queries, kv\]",
        ),
        (
            {"mask": torch.zeros(1, 1, 1, 1).int()},
            TypeError,
            "mask is torch.int32; pass torch.bool",
        ),
        ({"mask": torch.zeros(1, 1, 0, 1)}, ValueError, "mask has 0 query rows, but a row has 1"),
        ({"kv_starts": torch.zeros(1).int()}, ValueError, r"kv_starts has shape \[1\]"),
        ({"kv_lens": torch.ones(2, device="meta").int()}, ValueError, "kv_lens is on meta, but"),
    ],
)
def test_attention_refuses_what_does_not_fit(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        paged_attention(**{**attention_arguments(), **changes})


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_appended_tokens_gather_in_order(block_size: int) -> None:
    check_round_trip([3, 17, 1, 0], block_size, length=17, seed=1)


def check_round_trip(
    kv_lens: list[int], block_size: int, length: int, seed: int, device: str = "cpu"
) -> None:
    """Write every row's tokens in one shuffled call, then read the last `length` of each."""
    tables, blocks = tables_for(kv_lens, block_size, seed)
    generator = torch.Generator().manual_seed(seed)
    keys = [torch.randn(count, 2, 3, generator=generator) for count in kv_lens]
    values = [torch.randn(count, 2, 5, generator=generator) for count in kv_lens]
    slots = torch.cat(
        [
            slots_of(tables[row], torch.arange(count), block_size)
            for row, count in enumerate(kv_lens)
        ]
    )
    order = torch.randperm(len(slots), generator=generator)
    caches = tuple(
        cache.to(device) for cache in strided_caches(blocks, block_size, 2, 3, 5, torch.float32)
    )
    append_kv(
        torch.cat(keys)[order].to(device),
        torch.cat(values)[order].to(device),
        caches[0],
        caches[1],
        slots[order].to(device),
    )
    lens = torch.tensor(kv_lens, dtype=torch.int32, device=device)
    for cache, rows in zip(caches, (keys, values), strict=True):
        gathered = gather_kv(cache, tables.to(device), lens, length).cpu()
        for row, tokens in enumerate(rows):
            padding = torch.zeros(max(0, length - len(tokens)), *tokens.shape[1:])
            expected = torch.cat((padding, tokens[max(0, len(tokens) - length) :]))
            assert torch.equal(gathered[row], expected)


def test_any_history_of_appends_gathers_bit_by_bit() -> None:
    # Imported here because the GPU machine has no hypothesis.
    hypothesis = pytest.importorskip("hypothesis")
    st = pytest.importorskip("hypothesis.strategies")

    @hypothesis.given(
        st.lists(st.integers(0, 40), min_size=1, max_size=5),
        st.sampled_from([1, 2, 8, 16]),
        st.integers(0, 50),
        st.integers(0, 99),
    )
    def round_trip(kv_lens: list[int], block_size: int, length: int, seed: int) -> None:
        check_round_trip(kv_lens, block_size, length, seed)

    round_trip()


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [1, 16])
def test_gpu_appended_tokens_gather_in_order(block_size: int) -> None:
    check_round_trip([3, 17, 1, 0], block_size, length=17, seed=1, device="cuda")


@pytest.mark.parametrize("skipped", [[1], [0, 1, 2], []])
def test_a_negative_slot_skips_its_token(skipped: list[int]) -> None:
    key_cache, value_cache = strided_caches(2, 4, 1, 2, 2, torch.float32)
    slots = torch.tensor([6, 0, 3])
    slots[skipped] = -1
    key = torch.arange(6.0).view(3, 1, 2)
    append_kv(key, -key, key_cache, value_cache, slots)
    for token, slot in enumerate([6, 0, 3]):
        found = key_cache[slot // 4, slot % 4]
        if token in skipped:
            assert found.isnan().all()
        else:
            assert torch.equal(found, key[token])
            assert torch.equal(value_cache[slot // 4, slot % 4], -key[token])
    assert int(key_cache.isnan().all(-1).sum()) == 8 - (3 - len(skipped))


def test_append_takes_strided_keys_and_leaves_other_bytes_alone() -> None:
    key_cache, value_cache = strided_caches(2, 4, 3, 2, 2, torch.float32)
    key = torch.randn(3, 2, 4).permute(2, 0, 1)  # [4 tokens, 3 heads, 2]
    append_kv(key, key * 2, key_cache, value_cache, torch.arange(4, 8))
    assert torch.equal(key_cache[1], key)
    assert torch.equal(value_cache[1], key * 2)
    assert key_cache[0].isnan().all()


def test_no_gradient_flows_through_the_cache() -> None:
    key_cache, value_cache = strided_caches(1, 4, 1, 2, 2, torch.float32)
    key = torch.ones(4, 1, 2, requires_grad=True)
    append_kv(key, key, key_cache, value_cache, torch.arange(4))
    assert not key_cache.requires_grad


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"key": torch.zeros(3, 1, 4)}, ValueError, r"key has shape \[3, 1, 4\]; pass \[tokens"),
        ({"value": torch.zeros(2, 1, 2)}, ValueError, r"value has shape \[2, 1, 2\]; pass"),
        ({"slots": torch.zeros(2).long()}, ValueError, r"slots has shape \[2\]; pass"),
        ({"slots": torch.zeros(3)}, TypeError, "slots is torch.float32; pass torch.int32"),
        ({"key": torch.zeros(3, 1, 2).double()}, TypeError, "key is torch.float64, but key_cache"),
    ],
)
def test_append_refuses_what_does_not_fit(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    key_cache, value_cache = strided_caches(2, 4, 1, 2, 2, torch.float32)
    token = torch.zeros(3, 1, 2)
    arguments = {"key": token, "value": token, "slots": torch.arange(3), **changes}
    with pytest.raises(error, match=message):
        append_kv(**arguments, key_cache=key_cache, value_cache=value_cache)


def test_gather_refuses_a_negative_length() -> None:
    cache, _ = strided_caches(2, 4, 1, 2, 2, torch.float32)
    with pytest.raises(ValueError, match="length is -1; pass 0 or more tokens"):
        gather_kv(cache, torch.zeros(1, 1).int(), torch.ones(1).int(), -1)


def test_gather_zeroes_tokens_whose_block_was_given_back() -> None:
    cache, _ = strided_caches(3, 2, 1, 1, 1, torch.float32)
    cache.copy_(torch.arange(1.0, 7.0).view(3, 2, 1, 1))
    cache[1] = NAN
    gathered = gather_kv(cache, torch.tensor([[0, -1, 2]]).int(), torch.tensor([5]), 6)
    assert gathered.flatten().tolist() == [0, 1, 2, 0, 0, 5]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_block_copies_read_everything_before_they_write(device: str, dtype: torch.dtype) -> None:
    storage = torch.arange(24.0, device=device).view(6, 2, 2)
    before = storage.clone()
    copies = torch.tensor([[0, 1], [1, 2], [-1, 3], [2, 0], [4, -1]], dtype=dtype, device=device)
    copy_blocks(storage, copies)
    assert torch.equal(storage[[1, 2, 0, 3, 4, 5]], before[[0, 1, 2, 3, 4, 5]])


def test_block_copies_may_be_none_at_all() -> None:
    storage = torch.arange(4.0).view(2, 2)
    copy_blocks(storage, torch.empty(0, 2, dtype=torch.int32))
    copy_blocks(storage, torch.full((3, 2), -1))
    assert storage.flatten().tolist() == [0, 1, 2, 3]


def test_block_copies_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"copies has shape \[2, 3\]; pass \[pairs, 2\]"):
        copy_blocks(torch.zeros(2, 2), torch.zeros(2, 3).int())


def test_a_registered_kernel_is_selected_on_its_device_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backends, "_registered", {})

    def faster(*arguments: Any) -> None:
        del arguments

    backends.register("copy_blocks", "cpu", faster, "measured faster")
    assert backends.select("copy_blocks", torch.device("cpu")) is faster
    assert backends.select("copy_blocks", torch.device("cuda", 0)) is reference.copy_blocks
    assert backends.select("gather_kv", torch.device("cpu")) is reference.gather_kv
    assert backends.active()["cpu"]["copy_blocks"].reason == "measured faster"
    assert backends.active()["cpu"]["gather_kv"].backend == "reference"


def test_an_operation_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="operation 'sort' does not exist; choose from"):
        backends.register("sort", "cpu", print, "a misspelling")
    with pytest.raises(ValueError, match="operation 'sort' does not exist"):
        backends.select("sort", torch.device("cpu"))

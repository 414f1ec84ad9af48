"""What the kernel tests share: cases of attention, and an oracle for them.

The oracle is dense attention in float64, written out row by row and head by head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvpager.kernels import reference
from kvpager.ops import AttentionArgs, append_kv, copy_blocks, gather_kv, paged_attention
from kvpager.storage.block_storage import BlockStorage
from kvpager.storage.layout import KVCacheDtype

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


def tables_for(seq_lens: list[int], block_size: int, seed: int = 0) -> tuple[Tensor, int]:
    """Return shuffled block tables, one column wider than needed, and the number of blocks."""
    counts = [-(-length // block_size) for length in seq_lens]
    blocks = sum(counts) + 2
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed)).int()
    tables = torch.full((len(seq_lens), max(counts, default=0) + 1), -1, dtype=torch.int32)
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
    softmax_scale: float | None = None
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
    "own_softmax_scale": Case(((3, 21), (1, 34)), softmax_scale=0.37),
    "window": Case(((1, 70), (9, 45), (4, 4)), window=7),
    "window_wide_and_many_queries": Case(((90, 130), (12, 131)), window=44),
    "window_of_one": Case(((3, 21), (1, 34)), window=1),
    "window_beyond_the_row": Case(((3, 21), (1, 34)), window=1000),
    "softcap": Case(((3, 21), (1, 34)), softcap=0.8, softmax_scale=1.0),
    "sinks": Case(((3, 21), (1, 34)), sinks=True),
    "softcap_far_above_the_scores": Case(((3, 21), (1, 34)), softcap=5000.0, softmax_scale=1.0),
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
    "head_dim_80": Case(((3, 21), (1, 34)), key_dim=80, value_dim=80),
    "head_dim_96": Case(((3, 21), (1, 34)), key_dim=96, value_dim=96, window=9),
    "head_dim_192_of_keys": Case(((3, 21), (1, 34)), key_dim=192, value_dim=128),
    "head_dim_256": Case(((3, 21), (1, 34)), key_dim=256, value_dim=256),
    "odd_head_dims": Case(((3, 21), (1, 34)), key_dim=7, value_dim=13),
    "groups_of_three": Case(((3, 21), (1, 34)), query_heads=6, kv_heads=2),
    "groups_of_five": Case(((1, 21), (1, 34)), query_heads=5, kv_heads=1, sinks=True),
    "groups_of_seven": Case(((3, 21), (1, 34)), query_heads=14, kv_heads=2, softcap=2.0),
    "only_empty_rows": Case(((1, 0), (2, 0), (1, 0)), sinks=True),
    "rows_without_queries": Case(((0, 20), (0, 0), (2, 5))),
    "about_one_block": Case(tuple((1, n) for n in (15, 16, 17, 31, 32, 33, 63, 64, 65))),
    "prefill_of_about_one_block": Case(tuple((n, n) for n in (15, 16, 17))),
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
    allowed[0, 0, 0] = False  # a query that sees no token
    allowed[:, :, :, width // 2] = False  # a token that no query sees
    if case.mask == "bool":
        return allowed
    bias = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    # Both ways to mask a token.
    hidden = torch.where(torch.rand(shape, generator=generator) < 0.5, -torch.inf, 0.0).to(dtype)
    hidden[hidden == 0] = torch.finfo(dtype).min
    return torch.where(allowed, bias, hidden)


def with_mask_of(dtype: torch.dtype, call: Call) -> Call:
    """Return the call with its float mask in `dtype`, masked with that dtype's lowest number."""
    assert call.mask is not None
    lowest = call.mask == torch.finfo(call.mask.dtype).min
    mask = call.mask.to(dtype).masked_fill(lowest, torch.finfo(dtype).min)
    return replace(call, mask=mask)


def seen_by(case: Case, mask: Tensor | None, row: int, head: int) -> Tensor:
    """Return the visibility of a row's kv tokens to each query of a head: bool [queries, kv]."""
    queries, length = case.rows[row]
    token = torch.arange(length)
    position = torch.arange(length - queries, length)[:, None]
    seen = torch.ones(queries, length, dtype=torch.bool)
    if case.causal:
        seen &= token <= position
    if case.window is not None:
        seen &= token > position - case.window
    if case.kv_starts is not None:
        seen &= token >= case.kv_starts[row]
    if mask is not None:
        bias = mask_of(case, mask, row, head)
        seen &= bias if bias.dtype == torch.bool else bias > torch.finfo(bias.dtype).min
    return seen


def mask_of(case: Case, mask: Tensor, row: int, head: int) -> Tensor:
    """A head's mask over its row, right-aligned and hidden where it ends: [queries, kv]."""
    queries, length = case.rows[row]
    lines = mask[row % mask.shape[0], head % mask.shape[1], mask.shape[2] - queries :]
    hidden: Any = False if mask.dtype == torch.bool else -torch.inf
    missing = max(0, length - lines.shape[1])
    lines = torch.nn.functional.pad(lines, (missing, 0), value=hidden)
    return lines[:, lines.shape[1] - length :]


def dense(case: Case, call: Call, dtype: torch.dtype) -> Tensor:
    """The oracle, computed in `dtype`: packed [tokens, query_heads, value_dim]."""
    scale = case.key_dim**-0.5 if case.softmax_scale is None else case.softmax_scale
    outputs = []
    for row, (queries, _) in enumerate(case.rows):
        output = torch.zeros(queries, case.query_heads, case.value_dim, dtype=dtype)
        for head in range(case.query_heads):
            kv_head = head // (case.query_heads // case.kv_heads)
            seen = seen_by(case, call.mask, row, head)
            scores = call.queries[row][:, head].to(dtype) @ call.keys[row][:, kv_head].to(dtype).T
            scores = scores * scale
            if case.softcap is not None:
                scores = case.softcap * torch.tanh(scores / case.softcap)
            if call.mask is not None and call.mask.dtype != torch.bool:
                scores = (scores + mask_of(case, call.mask, row, head)).to(dtype)
            scores = scores.masked_fill(~seen, -torch.inf)
            if call.sinks is not None:
                sink = call.sinks[head].to(dtype).expand(queries, 1)
                scores = torch.cat((scores, sink), 1)
            weights = torch.softmax(scores, 1)[:, : seen.shape[1]]
            # A query without tokens returns zeros, and hidden values may be NaN.
            weights = weights.masked_fill(~seen, 0)
            value = call.values[row][:, kv_head].to(dtype)
            output[:, head] = weights @ value.masked_fill(~seen.any(0)[:, None], 0)
        outputs.append(output)
    return torch.cat(outputs)


@dataclass(frozen=True)
class Kernels:
    """One implementation of every operation."""

    append_kv: Any
    gather_kv: Any
    paged_attention: Any
    copy_blocks: Any


@dataclass(frozen=True)
class Unpacked:
    """A backend's attention, called with the arguments of `paged_attention`."""

    kernel: Any

    def __call__(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        *rows: Any,
        sinks: Tensor | None = None,
        scales: tuple[Tensor, Tensor] | None = None,
        out: Tensor | None = None,
        **options: Any,
    ) -> Any:
        args = AttentionArgs(*rows, **options)
        return self.kernel(query, key_cache, value_cache, args, sinks, scales, out)


# The entry points run the kernels registered for the device.
ENTRY = Kernels(append_kv, gather_kv, paged_attention, copy_blocks)
REFERENCE = Kernels(
    reference.append_kv,
    reference.gather_kv,
    Unpacked(reference.paged_attention),
    reference.copy_blocks,
)
IMPLEMENTATIONS = {"entry": ENTRY, "reference": REFERENCE}


@dataclass
class Paged:
    """A call's keys and values in the blocks of a layer."""

    caches: tuple[Tensor, Tensor]
    scales: tuple[Tensor, Tensor] | None
    block_tables: Tensor
    seq_lens: Tensor

    def stored(self, row: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values stored for a row, in float64: [kv, kv_heads, dim] each."""
        block_size, length = self.caches[0].shape[1], int(self.seq_lens[row])
        slots = slots_of(self.block_tables[row], torch.arange(length), block_size)
        key, value = (
            cache[slots // block_size, slots % block_size].double()
            * (1 if self.scales is None else self._scale(which, slots))
            for which, cache in enumerate(self.caches)
        )
        return key, value

    def _scale(self, which: int, slots: Tensor) -> Tensor:
        assert self.scales is not None
        block_size = self.caches[0].shape[1]
        return self.scales[which][slots // block_size, slots % block_size].double()[..., None]


def seen_tokens(case: Case, mask: Tensor | None, row: int) -> Tensor:
    """The tokens of a row that some query may look at."""
    # Heads differ only through the mask.
    heads = range(case.query_heads if case.mask_heads else 1)
    seen = torch.stack([seen_by(case, mask, row, head) for head in heads])
    return seen.any(0).any(0).nonzero().squeeze(1)


def in_blocks(
    case: Case,
    call: Call,
    block_size: int,
    dtype: torch.dtype,
    kernels: Kernels = ENTRY,
    kv_cache_dtype: KVCacheDtype | None = None,
) -> Paged:
    """Keys and values in shuffled blocks, with NaN in every slot that no query may see."""
    seq_lens = [length for _, length in case.rows]
    tables, blocks = tables_for(seq_lens, block_size)
    sizes = (case.kv_heads, case.key_dim, case.value_dim)
    scales = None
    if kv_cache_dtype is None:
        caches = strided_caches(blocks, block_size, *sizes, dtype)
    else:
        storage = BlockStorage(
            blocks, block_size, [sizes], dtype=dtype, kv_cache_dtype=kv_cache_dtype
        )
        storage.tier().fill_(255)  # NaN in float32, so in scales, and in float8_e4m3fn
        caches, scales = storage.layer(0), storage.scales(0)
    for row in range(len(case.rows)):
        tokens = seen_tokens(case, call.mask, row)
        slots = slots_of(tables[row], tokens, block_size)
        key, value = call.keys[row][tokens], call.values[row][tokens]
        kernels.append_kv(key, value, *caches, slots, scales=scales)
    return Paged(caches, scales, tables, torch.tensor(seq_lens, dtype=torch.int32))


def attend(
    case: Case,
    call: Call,
    blocks: Paged,
    device: str = "cpu",
    kernels: Kernels = ENTRY,
    out: Tensor | None = None,
) -> Tensor:
    """The call's queries over blocks that are filled, computed on `device`."""
    counts = [queries for queries, _ in case.rows]
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    decode = all(count == 1 for count in counts)

    def put(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    output: Tensor = kernels.paged_attention(
        put(torch.cat(call.queries)),
        *map(put, blocks.caches),
        put(blocks.block_tables),
        put(blocks.seq_lens),
        None if decode else put(starts),
        softmax_scale=case.softmax_scale,
        causal=case.causal,
        window=case.window,
        softcap=case.softcap,
        sinks=put(call.sinks),
        mask=put(call.mask),
        kv_starts=None if case.kv_starts is None else torch.tensor(case.kv_starts, device=device),
        scales=None if blocks.scales is None else tuple(map(put, blocks.scales)),
        out=out,
    )
    return output.cpu()


def paged(
    case: Case,
    call: Call,
    block_size: int,
    dtype: torch.dtype,
    device: str = "cpu",
    kernels: Kernels = ENTRY,
) -> Tensor:
    """The call through block tables."""
    return attend(case, call, in_blocks(case, call, block_size, dtype), device, kernels)


def assert_as_exact_as_plain_torch(
    case: Case, call: Call, output: Tensor, dtype: torch.dtype
) -> None:
    """At most twice the error that plain torch attention in `dtype` makes, plus rounding."""
    exact = dense(case, call, torch.float64)
    plain_error = (dense(case, call, dtype).double() - exact).abs().max().item()
    largest = max(exact.abs().max().item(), 1.0)
    # In float64 the oracle itself rounds no less: sums over head_dim grow like a random walk.
    rounding = 4 * max(1, case.key_dim / 16) ** 0.5 * torch.finfo(dtype).eps
    bound = 2 * plain_error + rounding * largest
    assert output.dtype == dtype
    assert output.shape == exact.shape
    error = (output.double() - exact).abs().max().item()
    assert error <= bound

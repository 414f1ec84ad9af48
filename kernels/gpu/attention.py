"""Paged attention on GPUs: launches the Triton kernels of `attention_kernels.py`.

`paged_attention` is the registered kernel, and plans by itself. `attend` takes a plan from
`plan_attention` and never waits for the GPU, so CUDA graphs can capture it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvpager.kernels import reference
from kvpager.kernels.args import short_mask
from kvpager.kernels.attention_args import AttentionArgs
from kvpager.kernels.gpu import config, external
from kvpager.kernels.gpu.attention_kernels import LOG2E, attend_items, merge_parts
from kvpager.kernels.gpu.plans import AttentionPlan, plan_attention

__all__ = ["AttentionPlan", "attend", "paged_attention", "plan_attention"]


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    args: AttentionArgs,
    sinks: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Compute `reference.paged_attention`. O(kv tokens seen * query heads * dims).

    Plans from `args.host_rows`, or else copies tables and lengths to the host. The copy waits for
    the GPU in the first layer of a step only. In a CUDA graph use `attend`. The reference kernel
    runs cases that Triton does not support: float64, head dims over 512, caches with a strided
    last dimension.
    """
    tensors = (query, key_cache, value_cache)
    if not _takes(*tensors):
        return reference.paged_attention(*tensors, args, sinks, scales, out)
    plan = plan_attention(*tensors, args)
    if args.mask is not None and args.mask.shape[2] < plan.longest:
        raise short_mask(args.mask, plan.longest)
    if sinks is None and scales is None:
        by_external = external.attention(*tensors, args, plan)
        if by_external is not None:
            return by_external if out is None else out.copy_(by_external)
    return attend(*tensors, args, plan, sinks, scales, out)


def _takes(query: Tensor, key_cache: Tensor, value_cache: Tensor) -> bool:
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return False
    head_dim = max(key_cache.shape[3], value_cache.shape[3])
    if not 1 <= head_dim <= config.HEAD_DIM_MAX or key_cache.numel() == 0:
        return False
    return key_cache.stride(3) == value_cache.stride(3) == 1


def attend(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    args: AttentionArgs,
    plan: AttentionPlan,
    sinks: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Compute paged attention with a given plan. O(kv tokens seen * query heads * dims).

    Arguments are those of `kvpager.ops.attend`. The plan must be for the `causal` and `window` of
    `args`. This call never waits for the GPU, so a CUDA graph can capture it. Keep the plan as long
    as the graph. Replay the graph while rows only grow. Capture again when `plan_attention` returns
    another plan: `attend` cannot notice it.

    Raises: `ValueError` for a plan of another kind of call.
    """
    _check_plan(plan, query, key_cache, args)
    block_tables, starts = args.block_tables, args.cu_seqlens_q
    call = AttentionCall(
        query if query.stride(2) == 1 else query.contiguous(), key_cache, value_cache,
        block_tables if block_tables.stride(1) == 1 else block_tables.contiguous(),
        args.seq_lens.contiguous(),
        None if plan.work.one_query or starts is None else starts.contiguous(),
        query.shape[2] ** -0.5 if args.softmax_scale is None else args.softmax_scale,
        args.softcap, None if sinks is None else sinks.contiguous(), args.mask,
        None if args.kv_starts is None else args.kv_starts.contiguous(), scales,
    )  # fmt: skip
    shape = (*query.shape[:2], value_cache.shape[3])
    output = query.new_empty(shape) if out is None else out
    if output.numel() == 0:
        return output
    partials = output.new_empty((plan.work.num_slots, *output.shape[1:]), dtype=torch.float32)
    weights = partials.new_empty(partials.shape[:2])
    with config.on_device(query):
        for launch in launches(plan):
            arguments = item_arguments(call, plan, launch)
            attend_items[launch.grid](output, partials, weights, **arguments)
        if len(plan.work.merged):
            merge_parts[len(plan.work.merged), query.shape[1]](
                output, partials, weights, call.sinks, plan.merged, plan.merge_starts,
                H=query.shape[1], **merge_constants(output.shape[2]),
            )  # fmt: skip
    return output


def _check_plan(plan: AttentionPlan, query: Tensor, key_cache: Tensor, args: AttentionArgs) -> None:
    """Raise `ValueError` for a plan of another kind of call. O(1)."""
    shapes, rows, queries = plan.shapes, len(args.block_tables), len(query)
    fix = "make a plan with plan_attention for these"
    if (rows, queries) != (plan.num_rows, plan.num_queries):
        raise ValueError(
            f"the plan is for {plan.num_rows} rows of {plan.num_queries} queries in all, but the "
            f"call has {rows} and {queries}; {fix} tensors, whose cu_seqlens_q have to end with "
            "the number of queries"
        )
    asked = (key_cache.shape[1], query.shape[1], key_cache.shape[2])
    planned = (shapes.block_size, shapes.query_heads, shapes.kv_heads)
    if asked != planned:
        raise ValueError(
            f"the plan is for block size, query heads and kv heads {planned}, but the call has "
            f"{asked}; {fix} tensors"
        )
    if (args.causal, args.window) != (shapes.causal, shapes.window):
        raise ValueError(
            f"the plan is for causal={shapes.causal} and window={shapes.window}, but the call has "
            f"{args.causal} and {args.window}; {fix} arguments"
        )
    if args.cu_seqlens_q is None and not plan.work.one_query:
        raise ValueError("the plan is for rows of several queries; pass their cu_seqlens_q")


class AttentionCall(NamedTuple):
    """Arguments of `attend` that a launch needs."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor | None
    softmax_scale: float
    softcap: float | None
    sinks: Tensor | None
    mask: Tensor | None
    kv_starts: Tensor | None
    scales: tuple[Tensor, Tensor] | None


class Launch(NamedTuple):
    """Items of a plan that use the same tile."""

    grid: tuple[int]
    first_item: int
    tile: config.Tile
    alone: bool


def launches(plan: AttentionPlan) -> Iterator[Launch]:
    """Yield the launches of a plan: large items first, because they run longest."""
    heads = plan.shapes.kv_heads * plan.splits
    large, every = plan.work.num_large, len(plan.work.items)
    if large:
        yield Launch((heads * large,), 0, plan.large, False)
    if every > large:
        yield Launch((heads * (every - large),), large, plan.small, plan.work.one_query)


def item_arguments(call: AttentionCall, plan: AttentionPlan, launch: Launch) -> dict[str, Any]:
    """Return the arguments of a launch of `attend_items`, without the tensors it writes."""
    query, key_cache, value_cache = call.query, call.key_cache, call.value_cache
    mask, softcap = call.mask, call.softcap
    key_scales, value_scales = call.scales or (None, None)
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    if call.scales is not None and not config.converts(plan.target, key_cache.dtype):
        key_cache, value_cache = key_cache.view(torch.uint8), value_cache.view(torch.uint8)
    scale = call.softmax_scale * LOG2E.value if softcap is None else call.softmax_scale / softcap
    return {
        "query": query, "key_cache": key_cache, "value_cache": value_cache,
        "block_tables": call.block_tables, "seq_lens": call.seq_lens,
        "items": plan.items, "members": plan.members, "slots": plan.slots,
        "cu_seqlens_q": call.cu_seqlens_q, "kv_starts": call.kv_starts,
        "sinks": call.sinks, "mask": mask, "key_scales": key_scales, "value_scales": value_scales,
        "scale": scale, "softcap": None if softcap is None else softcap * LOG2E.value,
        "window": plan.shapes.window, "first_item": launch.first_item,
        "capacity": call.block_tables.shape[1] * key_cache.shape[1],
        "H": query.shape[1], "query_token": query.stride(0), "query_head": query.stride(1),
        "block_tables_row": call.block_tables.stride(0),
        **_strides("key", key_cache), **_strides("value", value_cache),
        **_strides("key_scales", key_scales), **_strides("value_scales", value_scales),
        **_mask_arguments(mask),
        **_constants(plan, launch, query.shape[2], value_cache.shape[3], call.mask),
    }  # fmt: skip


def _strides(name: str, cache: Tensor | None) -> dict[str, int | None]:
    strides = (None, None, None) if cache is None else cache.stride()
    return {f"{name}_{dim}": strides[i] for i, dim in enumerate(("block", "slot", "head"))}


def _mask_arguments(mask: Tensor | None) -> dict[str, int | None]:
    names = ("mask_row", "mask_head", "mask_query", "mask_token", "mask_queries", "mask_width")
    if mask is None:
        return dict.fromkeys(names)
    # A mask with one row or head applies to all.
    row, head = (mask.stride(dim) if mask.shape[dim] > 1 else 0 for dim in (0, 1))
    return dict(zip(names, (row, head, *mask.stride()[2:], *mask.shape[2:]), strict=True))


def _constants(
    plan: AttentionPlan, launch: Launch, key_dim: int, value_dim: int, mask: Tensor | None
) -> dict[str, Any]:
    """Return the compile-time constants and compiler options of a launch of `attend_items`."""
    shapes = plan.shapes
    tile = launch.tile if mask is None else config.masked(launch.tile)
    return {
        "G": shapes.query_heads // shapes.kv_heads, "GROUP": plan.group, "SPLITS": plan.splits,
        "BLOCK_SIZE": shapes.block_size, "DK": key_dim, "DV": value_dim,
        "DK_PAD": config.power_of_two(key_dim), "DV_PAD": config.power_of_two(value_dim),
        "BLOCK_M": tile.lines, "BLOCK_N": tile.tokens,
        "CAUSAL": shapes.causal, "ALONE": launch.alone,
        # Decode is bound by memory, so masking is free and also covers -1 in tables.
        "INTERIOR": not (plan.work.one_query or plan.work.holes),
        # In prefill the branch is free, and each tile compiles one variant less.
        "PARTIAL": plan.work.num_slots > 0 or not plan.work.one_query,
        "LOWEST": None if mask is None or mask.dtype == torch.bool else torch.finfo(mask.dtype).min,
        "num_warps": tile.warps, "num_stages": tile.stages, **config.COMPILER_OPTIONS,
    }  # fmt: skip


def merge_constants(value_dim: int) -> dict[str, int]:
    sizes = {"DV": value_dim, "DV_PAD": config.power_of_two(value_dim), "TILE": config.MERGE_TILE}
    return {**sizes, "num_warps": 4, **config.COMPILER_OPTIONS}

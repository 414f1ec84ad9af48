"""Work plans on the device, shared by all layers of a step and by CUDA graphs."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple
from weakref import ref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvpager.kernels.args import require_lengths
from kvpager.kernels.attention_args import AttentionArgs
from kvpager.kernels.gpu import config
from kvpager.kernels.host_rows import HostRows, Ints, to_device
from kvpager.kernels.work_items import Planner, Tiling, WorkPlan

# Number of cached planners. A model with windows uses two per device.
_PLANNERS_MAX = 16


class Shapes(NamedTuple):
    """The inputs of a plan other than tables and lengths."""

    device: torch.device
    query_heads: int
    kv_heads: int
    head_dim: int  # the larger of keys and values, rounded up to a power of two
    element_bytes: int
    block_size: int
    causal: bool
    window: int | None
    share: bool


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPlan:
    """A `WorkPlan` with its arrays on the device, and its tiles.

    A plan holds for every layer with the same `shapes`, and for later steps while rows only grow
    (see `Planner`). It keeps no reference to the tensors it was made from.
    """

    shapes: Shapes
    target: config.Target
    group: int  # query heads of a kv head per program
    splits: int  # programs per kv head
    small: config.Tile
    large: config.Tile
    work: WorkPlan
    num_rows: int
    num_queries: int  # packed query tokens
    longest: int  # most queries of a row
    items: Tensor
    members: Tensor
    slots: Tensor
    merged: Tensor
    merge_starts: Tensor


def plan_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    args: AttentionArgs,
    *,
    share: bool = True,
) -> AttentionPlan:
    """Return the plan of an attention call for `attend`. O(rows * blocks), O(1) if unchanged.

    Takes the arguments of `kvpager.ops.attend`. Of `query` and the caches it uses shapes, dtypes
    and the device. `share` is an option of `Planner`. Planning needs tables and lengths
    on the host. With `args.host_rows` the first layer of a shape plans, other layers reuse the
    plan, and no call waits for the GPU. Without it, this call waits for the stream, unless the
    tensors are those of the previous call, unmodified by torch operations. If other kernels write
    to the tensors, call `torch.autograd.graph.increment_version`.

    Raises: `ValueError` if `seq_lens` exceeds the tables.
    """
    tensors = (query, key_cache, value_cache)
    shapes = shapes_of(*tensors, args.causal, args.window, share=share)
    if args.host_rows is not None:
        return args.host_rows.plan(shapes, lambda rows: _cache_for(shapes).of_host(rows))
    return _cache_for(shapes).of(args.block_tables, args.seq_lens, args.cu_seqlens_q)


def _cache_for(shapes: Shapes) -> PlanCache:
    with _lock:
        cache = _caches.pop(shapes, None) or PlanCache(shapes)
        _caches[shapes] = cache  # most recent last
        while len(_caches) > _PLANNERS_MAX:
            _caches.popitem(last=False)
    return cache


def shapes_of(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, causal: bool = True,
    window: int | None = None, *, share: bool = True,
) -> Shapes:  # fmt: skip
    """Return the inputs of a call's plan other than tables and lengths. O(1)."""
    return Shapes(
        device=key_cache.device, query_heads=query.shape[1], kv_heads=key_cache.shape[2],
        head_dim=config.power_of_two(max(key_cache.shape[3], value_cache.shape[3])),
        element_bytes=key_cache.element_size(), block_size=key_cache.shape[1], causal=causal,
        window=window, share=share,
    )  # fmt: skip


class PlanCache:
    """The plans of one `Shapes`, for its device or for another `target`."""

    def __init__(self, shapes: Shapes, target: config.Target | None = None) -> None:
        target = target or config.target_of(shapes.device)
        group, splits = config.group_of(shapes.query_heads // shapes.kv_heads)
        small, large = config.tiles_for(target, shapes.element_bytes, shapes.head_dim, group)
        programs = target.multiprocessors * config.PROGRAMS_PER_MULTIPROCESSOR
        tiling = Tiling(
            block_size=shapes.block_size,
            few=small.lines // group,
            many=large.lines // group,
            align=max(small.tokens, large.tokens),
            items=max(1, programs // (shapes.kv_heads * splits)),
        )
        self._made_for = (shapes, target, group, splits, small, large)
        self._shapes = shapes
        self._planner = Planner(tiling, shapes.causal, shapes.window, share=shapes.share)
        self._lock = threading.Lock()
        self._seen: tuple[_Same, ...] = ()
        self._last: AttentionPlan | None = None
        self._uploaded: list[AttentionPlan] = []

    def of(
        self, block_tables: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor | None
    ) -> AttentionPlan:
        """Plan as `plan_attention`. O(rows * blocks), O(1) for the tensors of the last call."""
        tensors = (block_tables, seq_lens, cu_seqlens_q)
        with self._lock:  # keeps the last plan and its tensors together
            if self._last is not None and all(
                same.holds(tensor) for same, tensor in zip(self._seen, tensors, strict=True)
            ):
                return self._last
            seen = tuple(_Same(tensor) for tensor in tensors)
            starts = None if cu_seqlens_q is None else _on_host(cu_seqlens_q)
            self._last = self._make(_on_host(block_tables), _on_host(seq_lens), starts)
            self._seen = seen
            return self._last

    def of_host(self, rows: HostRows) -> AttentionPlan:
        """Plan from arrays. O(rows * blocks). Raises: `ValueError` as `plan_attention`."""
        with self._lock:
            return self._make(rows.block_tables, rows.seq_lens, rows.cu_seqlens_q)

    def _make(
        self, block_tables: NDArray[np.int32], lens: Ints, starts: Ints | None
    ) -> AttentionPlan:
        require_lengths(torch.from_numpy(lens), block_tables.shape[1] * self._shapes.block_size)
        work = self._planner.plan(block_tables, lens, starts)
        if starts is None:
            starts = np.arange(len(lens) + 1, dtype=np.int32)
        sizes = (len(lens), int(starts[-1]), int(np.diff(starts).max(initial=0)))
        return self._upload(work, sizes)

    def _upload(self, work: WorkPlan, sizes: tuple[int, int, int]) -> AttentionPlan:
        for plan in self._uploaded:
            if plan.work is work:
                return plan
        arrays = (work.items.ravel(), work.members, work.slots, work.merged, work.merge_starts)
        # One transfer. Parts are aligned to 16 bytes, so that kernels are compiled once.
        ends = np.cumsum([-(-len(array) // 4) * 4 for array in arrays])
        packed = np.zeros(ends[-1], np.int32)
        for array, end in zip(arrays, ends, strict=True):
            start = end - -(-len(array) // 4) * 4
            packed[start : start + len(array)] = array
        parts = to_device(packed, self._shapes.device).tensor_split(ends[:-1].tolist())
        items, members, slots, merged, merge_starts = parts
        plan = AttentionPlan(
            *self._made_for, work, *sizes, items, members, slots, merged, merge_starts
        )
        self._uploaded = [plan, *self._uploaded[:3]]
        return plan


class _Same:
    """Recognises a tensor seen before with unchanged values."""

    def __init__(self, tensor: Tensor | None) -> None:
        self._tensor = None if tensor is None else ref(tensor)
        # Inference-mode tensors have no version, so a change would go unnoticed: such a plan is
        # never reused.
        unversioned = tensor is not None and tensor.is_inference()
        self._version = -1 if unversioned else 0 if tensor is None else tensor._version

    def holds(self, tensor: Tensor | None) -> bool:
        if tensor is None or self._tensor is None:
            return tensor is None and self._tensor is None
        return self._tensor() is tensor and self._version >= 0 and tensor._version == self._version


_caches: OrderedDict[Shapes, PlanCache] = OrderedDict()
_lock = threading.Lock()


def _on_host(tensor: Tensor) -> NDArray[np.int32]:
    host: NDArray[np.int32] = tensor.detach().cpu().numpy()
    return host

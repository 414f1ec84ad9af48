"""The Triton attention kernels, called as the reference is: directly, by a plan, in pieces."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpager.kernels import reference
from kvpager.ops import AttentionArgs
from tests.support.kernel_cases import ENTRY, Kernels, Unpacked

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels are interpreted only under TRITON_INTERPRET=1", allow_module_level=True)

from kvpager.kernels.gpu import attention, plans
from tests.support import triton_interpreter

triton_interpreter.install()

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
KV: list[Any] = ["int8", "fp8_e4m3"]


def kernels(paged_attention: Any) -> Kernels:
    return replace(ENTRY, paged_attention=paged_attention)


by_reference = Unpacked(reference.paged_attention)
by_triton = Unpacked(attention.paged_attention)
TRITON = kernels(by_triton)


def plan_for(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, *rows: Any, **options: Any
) -> Any:
    """Call `plan_attention` with the arguments of `paged_attention`."""
    own = {"share": options.pop("share")} if "share" in options else {}
    args = AttentionArgs(*rows, **options)
    return attention.plan_attention(query, key_cache, value_cache, args, **own)


def by_plan(plan: Any, *tensors: Any, **options: Any) -> Tensor:
    """Call `attend` with a plan and the arguments of `paged_attention`."""

    def kernel(
        query: Tensor, key_cache: Tensor, value_cache: Tensor, args: Any, *layer: Any
    ) -> Any:
        return attention.attend(query, key_cache, value_cache, args, plan, *layer)

    output: Tensor = Unpacked(kernel)(*tensors, **options)
    return output


def planned(*tensors: Any, **options: Any) -> Tensor:
    """Compute `paged_attention` with an explicit plan."""
    ranges = {name: options[name] for name in ("causal", "window") if name in options}
    return by_plan(plan_for(*tensors, **ranges), *tensors, **options)


def in_pieces(*tensors: Any, **options: Any) -> Tensor:
    """Every row cut into items of 32 kv tokens, so that results are merged."""
    ranges = {name: options[name] for name in ("causal", "window") if name in options}
    query, key_cache, value_cache, *rows = tensors
    shapes = plans.shapes_of(query, key_cache, value_cache, **ranges, share=False)
    cache = plans.PlanCache(shapes)
    tiling = cache._planner._tiling
    cache._planner._tiling = tiling._replace(items=1 << 20, chunk_min=max(tiling.align, 32))
    starts = rows[2] if len(rows) > 2 else options.get("cu_seqlens_q")
    return by_plan(cache.of(rows[0], rows[1], starts), *tensors, **options)

"""Helpers of the tests of native CPU kernels: the kernels of each variant, and small inputs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

from kvpager.kernels.cpu import compiler
from kvpager.kernels.cpu.attention import PagedAttention
from kvpager.kernels.cpu.copies import AppendKV, CopyBlocks, GatherKV
from kvpager.kernels.cpu.library import Library
from kvpager.kernels.quantisation import quantise
from tests.support.kernel_cases import (
    CASES,
    REFERENCE,
    Kernels,
    Unpacked,
    dense,
    in_blocks,
    make_call,
)

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
VARIANTS = [variant.name for variant in compiler.VARIANTS]
BEST = compiler.variants()[0].name


@dataclass(frozen=True)
class Native:
    """Return the kernels of one variant, without the entry points."""

    library: Library
    kernels: Kernels


@cache
def native_of(variant: str) -> Native:
    built = compiler.ensure(compiler.variant_named(variant))
    library = Library(built.path)
    return Native(
        library,
        Kernels(
            AppendKV(library),
            GatherKV(library),
            Unpacked(PagedAttention(library)),
            CopyBlocks(library),
        ),
    )


def require(variant: str) -> Native:
    if variant not in [able.name for able in compiler.variants()]:
        pytest.skip(f"this CPU cannot run {variant}")
    try:
        return native_of(variant)
    except compiler.BuildError as error:
        pytest.skip(f"no native kernels: {error}")


# Inputs of a case are computed once, because no kernel here writes to them.
call_of = cache(lambda name, dtype: make_call(CASES[name], dtype))
blocks_of = cache(
    lambda name, dtype, block_size, kv_cache_dtype=None: in_blocks(
        CASES[name], call_of(name, dtype), block_size, dtype, REFERENCE, kv_cache_dtype
    )
)
exact_of = cache(lambda name, dtype: dense(CASES[name], call_of(name, dtype), torch.float64))
plain_of = cache(lambda name, dtype: dense(CASES[name], call_of(name, dtype), dtype))


def small(kv_cache_dtype: str | None = None, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Return a row of 40 tokens in three of four blocks of 16, with two queries."""
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
        "seq_lens": torch.tensor([40]).int(),
        "cu_seqlens_q": torch.tensor([0, 2]).int(),
    }
    if kv_cache_dtype:
        quantise_caches(arguments)
    return arguments


def quantise_caches(arguments: dict[str, Any]) -> None:
    key, key_scales = quantise(arguments["key_cache"], torch.int8)
    value, value_scales = quantise(arguments["value_cache"], torch.int8)
    arguments |= {"key_cache": key, "value_cache": value, "scales": (key_scales, value_scales)}

"""Specialisations of the kernels of `kernels/gpu/copies.py`."""

from __future__ import annotations

from typing import Any

from kvpager.kernels.gpu.copies import (
    COPY_PAIRS,
    COPY_RUN_BYTES,
    COPY_TILE_BYTES,
    _copy_warps,
    _vectors,
)
from kvpager.kernels.gpu.copies_kernels import append_vectors, copy_runs, gather_vectors, stage_runs
from tests.support.specialisations import Specialisation


def specialisations() -> list[Specialisation]:
    """Llama-like layers in 16 bits and in eight, heads of 80 and 576, and a pool of 2^31 units."""
    layers = [
        ("bf16 D128", "*bf16", "*bf16", 8, 128, 128),
        ("fp16 D80", "*fp16", "*fp16", 32, 80, 80),
        ("fp32 D576/512", "*fp32", "*fp32", 1, 576, 512),
        ("int8 D128", "*bf16", "*i8", 8, 128, 128),
        ("fp8 D128", "*bf16", "*u8", 8, 128, 128),
    ]
    kernels = [
        each
        for name, computed, stored, heads, key_dim, value_dim in layers
        for each in (
            _append_specialisation(name, computed, stored, heads, key_dim, value_dim),
            _gather_specialisation(name, computed, stored, heads, key_dim),
        )
    ]
    return [*kernels, *map(_copy_specialisation, COPY_PAIRS), _stage_specialisation()]


def _append_specialisation(
    name: str, computed: str, stored: str, heads: int, key_dim: int, value_dim: int
) -> Specialisation:
    pointers = {"key": computed, "value": computed, "key_cache": stored, "value_cache": stored}
    strides = ("key_token", "key_head", "value_token", "value_head")
    # With few blocks and many layers, block strides may exceed 2^31 elements.
    apart = ("key_cache_block", "value_cache_block", "key_scales_block", "value_scales_block")
    constants: dict[str, Any] = {"BLOCK_SIZE": 16, "HEADS": heads, "KEY_DIM": key_dim}
    constants |= {"VALUE_DIM": value_dim, "VECTORS": _vectors(max(key_dim, value_dim))}
    scales = {"key_scales": "*fp32", "value_scales": "*fp32"}
    if stored == computed:
        constants |= dict.fromkeys(scales)
        scales = {}
    return Specialisation(
        name=f"append {name}",
        function=append_vectors,
        signature=pointers
        | {"slots": "*i64", "num_vectors": "i32"}
        | scales
        | dict.fromkeys(strides, "i32")
        | dict.fromkeys(apart, "i64"),
        constexprs=constants,
        options={"num_warps": 4},
        divisible=(*pointers, *scales, *strides, *apart),
        max_registers=64,
    )


def _gather_specialisation(
    name: str, computed: str, stored: str, heads: int, dim: int
) -> Specialisation:
    pointers = {"gathered": computed, "cache": stored, "block_tables": "*i32", "seq_lens": "*i32"}
    constants: dict[str, Any] = {"BLOCK_SIZE": 16, "HEADS": heads, "DIM": dim}
    constants["VECTORS"] = _vectors(dim)
    if stored == computed:
        constants["scales"] = None
    else:
        pointers["scales"] = "*fp32"
    return Specialisation(
        name=f"gather {name}",
        function=gather_vectors,
        signature=pointers
        | dict.fromkeys(("length", "num_columns", "block_tables_row"), "i32")
        | {"cache_block": "i64", "scales_block": "i64"},
        constexprs=constants,
        options={"num_warps": 4},
        divisible=(*set(pointers) - {"block_tables", "seq_lens"}, "cache_block", "scales_block"),
        max_registers=48,
    )


def _copy_specialisation(pairs: int) -> Specialisation:
    width = max(COPY_TILE_BYTES, pairs * COPY_RUN_BYTES) // pairs // 4
    return Specialisation(
        name=f"copy {pairs} pairs",
        function=copy_runs,
        signature={"storage": "*i32", "copies": "*i32"}
        | {"num_pairs": "i32", "run": "i32", "block": "i64"},
        constexprs={"PAIRS": pairs, "WIDTH": width, "VECTOR": 4},
        options={"num_warps": _copy_warps(pairs)},
        divisible=("storage",),
        max_registers=64,
    )


def _stage_specialisation() -> Specialisation:
    return Specialisation(
        name="copy staged",
        function=stage_runs,
        signature={"storage": "*i32", "staging": "*i32", "copies": "*i32"}
        | {"first": "i32", "width": "i32", "block": "i64"},
        constexprs={"WRITE": True, "WIDTH": COPY_TILE_BYTES // 4, "VECTOR": 4},
        options={"num_warps": 4},
        divisible=("storage", "staging"),
        max_registers=48,
    )

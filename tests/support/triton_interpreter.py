"""A repair of Triton's CPU interpreter (3.6 to 3.9), for tests only.

The interpreter keeps bfloat16 and float8 numbers as the raw bits they are stored in, and computes
with the bits: sums, products, comparisons, maxima and matrix products of bfloat16 are wrong without
a word, and roundings to the narrow formats lose a carry or cut off. `install` puts float32 in the
way: every operation on such numbers widens them, computes, and rounds once to the nearest, ties to
even, as GPUs do. Bits that are only moved (loads, stores, selects) were right and stay untouched.

A rounding to float8 saturates instead of overflowing, as PTX's cvt.satfinite does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from kvpager.kernels.gpu import config

TORCH_DTYPES = {
    tl.bfloat16: (torch.bfloat16, np.uint16),
    tl.float8e4nv: (torch.float8_e4m3fn, np.uint8),
    tl.float8e5: (torch.float8_e5m2, np.uint8),
}
Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder


def is_raw(handle: Any) -> bool:
    """Return True if the handle holds bits that NumPy has no dtype for."""
    return handle.dtype.scalar in TORCH_DTYPES


def widened(handle: Any) -> Any:
    """Return the numbers as float32; return other handles unchanged."""
    if not is_raw(handle):
        return handle
    dtype, bits = TORCH_DTYPES[handle.dtype.scalar]
    # A copy: what was broadcast is read-only, and torch warns of that.
    raw = torch.from_numpy(np.array(handle.data, dtype=bits, order="C")).view(dtype)
    return Handle(raw.to(torch.float32).numpy(), tl.float32)


def rounded(data: Any, dtype: Any) -> Any:
    """Numbers as a handle of one of `TORCH_DTYPES`."""
    to, bits = TORCH_DTYPES[dtype]
    exact = torch.from_numpy(np.array(data, dtype=np.float32, order="C"))
    if to.itemsize == 1:
        largest = torch.finfo(to).max
        exact = exact.clamp(-largest, largest)
    raw = exact.to(to).view(torch.uint8 if to.itemsize == 1 else torch.int16)
    return Handle(raw.numpy().view(bits), dtype)


def _repaired_cast(cast: Callable[..., Any]) -> Callable[..., Any]:
    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if source.dtype.scalar == to.scalar:
            return source
        exact = widened(source)
        if to.scalar in TORCH_DTYPES:
            return rounded(exact.data.astype(np.float32), to.scalar)
        return exact if to.scalar == tl.float32 and is_raw(source) else cast(self, exact, to)

    return cast_impl


def _repaired_fp_to_fp(convert: Callable[..., Any]) -> Callable[..., Any]:
    def create_fp_to_fp(self: Any, source: Any, to: Any, mode: Any) -> Any:
        narrow = to.scalar in TORCH_DTYPES or is_raw(source)
        # Towards zero is what the interpreter does anyway.
        if not narrow or mode == interpreter._ir.ROUNDING_MODE.RTZ:
            return convert(self, source, to, mode)
        return self.cast_impl(source, to)

    return create_fp_to_fp


def _repaired_maths(compute: Callable[..., Any]) -> Callable[..., Any]:
    """A builder's unary_op, binary_op or ternary_op (handles, then a NumPy function)."""

    def repaired(self: Any, *arguments: Any) -> Any:
        *handles, operation = arguments
        dtype = handles[-1].dtype.scalar
        raw = dtype in TORCH_DTYPES and operation is not np.where
        # Overflows and NaNs are numbers on a GPU, and nothing to warn of.
        with np.errstate(all="ignore"):
            result = compute(self, *(map(widened, handles) if raw else handles), operation)
        if result.data.dtype == bool:
            # Labelled with the type of the operands, a scalar one cannot become a mask.
            return Handle(result.data, tl.int1)
        return rounded(result.data, dtype) if raw else result

    return repaired


def _repaired_wide(compute: Callable[..., Any]) -> Callable[..., Any]:
    """A builder's function whose last handle gives the type of its result (dot, fma)."""

    def repaired(self: Any, *arguments: Any) -> Any:
        handles = [argument for argument in arguments if isinstance(argument, Handle)]
        if not any(map(is_raw, handles)):
            return compute(self, *arguments)
        dtype = handles[-1].dtype.scalar
        exact = (widened(each) if isinstance(each, Handle) else each for each in arguments)
        result = compute(self, *exact)
        return rounded(result.data, dtype) if dtype in TORCH_DTYPES else result

    return repaired


def _repaired_fold(fold: Callable[..., Any]) -> Callable[..., Any]:
    """`apply_impl` of reductions and scans: a tuple of tensors to one or several."""

    def apply_impl(self: Any, tensors: tuple[Any, ...]) -> Any:
        if not any(is_raw(tensor.handle) for tensor in tensors):
            return fold(self, tensors)
        results = fold(self, tuple(_like(tensor, widened(tensor.handle)) for tensor in tensors))
        several = isinstance(results, list | tuple)
        narrow = [
            _like(result, rounded(result.handle.data, tensor.handle.dtype.scalar))
            if is_raw(tensor.handle) and result.handle.dtype.scalar == tl.float32
            else result
            for result, tensor in zip(results if several else [results], tensors, strict=False)
        ]
        return narrow if several else narrow[0]

    return apply_impl


def _like(tensor: Any, handle: Any) -> Any:
    """A tensor of `handle` that is a scalar where `tensor` is one."""
    dtype = handle.dtype.scalar
    is_block = tensor.type.is_block()
    return tl.core.tensor(handle, tl.block_type(dtype, tensor.shape) if is_block else dtype)


def _repaired_scalars(patch: Callable[..., Any]) -> Callable[..., Any]:
    """Up to 3.6, a scalar tensor as a bound of range() is what NumPy 2.4 no longer converts."""

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patch_tensor


def _checked_run(run: Callable[..., None]) -> Callable[..., None]:
    """Refuse launches without our compiler options, which the interpreter ignores."""

    def run_checked(self: Any, *arguments: Any, **options: Any) -> None:
        missing = config.COMPILER_OPTIONS.items() - options.items()
        is_ours = self.fn.__module__.startswith("kvpager.")
        assert not (is_ours and missing), f"{self.__name__} is launched without {dict(missing)}"
        run(self, *arguments, **options)

    return run_checked


def install() -> None:
    """Repair the interpreter of this process once; do nothing if Triton compiles."""
    if getattr(Builder, "repaired", False):
        return
    Builder.repaired = True
    Builder.cast_impl = _repaired_cast(Builder.cast_impl)
    Builder.create_fp_to_fp = _repaired_fp_to_fp(Builder.create_fp_to_fp)
    for name in ("unary_op", "binary_op", "ternary_op"):
        setattr(Builder, name, _repaired_maths(getattr(Builder, name)))
    for name in ("create_dot", "create_fma"):
        setattr(Builder, name, _repaired_wide(getattr(Builder, name)))
    interpreter._patch_lang_tensor = _repaired_scalars(interpreter._patch_lang_tensor)
    for folds in (interpreter.ReduceOps, interpreter.ScanOps):
        folds.apply_impl = _repaired_fold(folds.apply_impl)
    interpreter.InterpretedFunction.run = _checked_run(interpreter.InterpretedFunction.run)

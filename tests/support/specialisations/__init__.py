"""Specialisations of the Triton kernels, to compile and check them without a GPU.

Triton compiles a kernel again for every combination of argument types, compile-time constants and
options that it is launched with. Each module of this package has a function

    def specialisations() -> list[Specialisation]

that names the combinations that matter in practice (and takes the compute capability, 90 for
sm_90, where they depend on it). `tests/kernels/gpu/test_compile.py` compiles them for several
architectures, no GPU needed, and bounds registers, spills and shared memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

# Triton promises vector loads only for arguments that it knows to be multiples of this.
DIVISOR = 16


class Specialisation(NamedTuple):
    """One specialisation of a kernel."""

    name: str
    """Purpose of the specialisation; unique within its module."""
    function: Any
    """The `triton.jit` function."""
    signature: Mapping[str, str]
    """Argument -> Triton type ("*bf16", "i32", "i64", "fp32", ..) of non-constants."""
    constexprs: Mapping[str, Any]
    """Argument -> value, for the `tl.constexpr` arguments, and for those that are None."""
    options: Mapping[str, int] = {}
    """`num_warps`, `num_stages`; every kernel also gets `config.COMPILER_OPTIONS`."""
    divisible: tuple[str, ...] = ()
    """Arguments that are multiples of `DIVISOR`: aligned pointers, and strides."""
    max_registers: int = 255
    """Most registers per thread: with more, fewer programs fit on a multiprocessor."""

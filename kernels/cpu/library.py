"""The native CPU kernels as Python functions that take packed arguments.

Arguments are one struct of 8-byte fields (`abi.h`), packed by one call. Setting forty ctypes fields
one by one would take a tenth of a decode step of 60 us.
"""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kvpager.kernels.cpu import cache

# The values of `Type` in abi.h.
_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool)
TYPES = {dtype: number for number, dtype in enumerate(_TYPES)}

# Functions of the library: its properties; its kernels, and the structs of abi.h and copies.h that
# they take: q is a pointer or int64, d a double, `Integers` two fields.
_FACTS = ("lanes", "bf16_dots", "matrix_units", "threaded")
_KERNELS = {
    "paged_attention": "=7q 6q 2q 3q 6q 4q 2q 3q 3q 3q 2q 4q 3q 2d q 16x",
    "append_kv": "=2q 2q 2q 2q 3q 5q 2q 2q 2q 2q 2q 2q 3q q",
    "gather_kv": "=4q 2q 4q 4q 4q 3q 3q q q",
    "copy_blocks": "=q 2q 5q q",
}

_Numbers = ctypes.c_int64 * 3


class Problem(NamedTuple):
    """An error of a native kernel: a code, and up to three numbers that locate it."""

    code: int
    numbers: tuple[int, int, int]


class Library:
    """Functions of a built variant. Thread-safe; calls release the interpreter lock."""

    def __init__(self, path: Path) -> None:
        """Load a library that `compiler.py` built. Raises: `OSError` if loading fails."""
        # torch is imported above, so that both use its OpenMP runtime.
        loaded = cache.load(path)
        try:
            found = {name: getattr(loaded, f"kvpager_{name}") for name in (*_FACTS, *_KERNELS)}
        except AttributeError as error:
            raise OSError(f"{path} lacks a function of the kernels: {error}") from None
        self.lanes: int = found["lanes"]()
        self.bf16_dots = bool(found["bf16_dots"]())
        self.matrix_units = bool(found["matrix_units"]())
        self.threaded = bool(found["threaded"]())
        self._functions = {}
        for name, layout in _KERNELS.items():
            found[name].argtypes = [ctypes.c_char_p]
            self._functions[name] = found[name], struct.Struct(layout.replace(" ", "")).pack

    def call(self, name: str, *fields: float) -> Problem | None:
        """Run kernel `name` with packed `fields`; return its problem, or None. O(1) overhead.

        Appends the address of the problem's numbers to the fields. Raises: `MemoryError`.
        """
        numbers, (function, pack) = _Numbers(), self._functions[name]
        code = function(pack(*fields, ctypes.addressof(numbers)))
        if code == 0:
            return None
        if code == 100:
            raise MemoryError(f"{name}: no memory for its scratch space")
        return Problem(code, (numbers[0], numbers[1], numbers[2]))


class Kernel:
    """An operation of one library."""

    def __init__(self, library: Library) -> None:
        self._library = library


def address(tensor: Tensor | None) -> int:
    """Return the address of a tensor's first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def int32_rows(block_tables: Tensor) -> Tensor:
    """Return block tables as int32 with contiguous rows. Clamped values stay out of bounds."""
    if block_tables.dtype != torch.int32:
        block_tables = block_tables.clamp(-1, torch.iinfo(torch.int32).max).to(torch.int32)
    return block_tables if block_tables.stride(1) == 1 else block_tables.contiguous()


def integers(tensor: Tensor | None) -> tuple[int, int]:
    """Return the two fields of `Integers`: the address, and True for int64 elements."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.dtype == torch.int64)

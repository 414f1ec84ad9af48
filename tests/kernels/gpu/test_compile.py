"""Kernels compiled for GPUs that are not here: registers, spills, shared memory, access patterns.

By default a few specialisations of each kernel: all kernels for one architecture, attention for
three. For all specialisations:

    KVPAGER_COMPILE=sm_80,sm_90,sm_100,gfx942 python -m pytest tests/kernels/gpu/test_compile.py
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest

from tests.support.triton_compile import SHARED_BYTES_MAX, Needs, compile_elsewhere

pytest.importorskip("triton")

FOLDER = Path(__file__).resolve().parents[3] / "kernels" / "gpu"
MODULES = ["allocator", "attention", "copies"]
ASKED_FOR = [name for name in os.environ.get("KVPAGER_COMPILE", "").split(",") if name]
# Attention alone has tiles of its own per GPU.
BY_DEFAULT = [("sm_90", module) for module in MODULES] + [
    (architecture, "attention") for architecture in ("sm_80", "sm_100")
]
COMPILED = [(name, module) for name in ASKED_FOR for module in MODULES] or BY_DEFAULT


@functools.cache
def compiled(architecture: str, module: str) -> list[Needs]:
    name = f"tests.support.specialisations.{module}"
    return compile_elsewhere(architecture, name, some=not ASKED_FOR)


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "module"), COMPILED)
def test_kernels_fit_their_architecture(architecture: str, module: str) -> None:
    found = compiled(architecture, module)
    too_big = [
        each
        for each in found
        if each.spilled_bytes > 0
        or each.registers > each.max_registers
        or each.shared_bytes > SHARED_BYTES_MAX[architecture]
    ]
    assert found
    assert not too_big, [each._replace(accesses=[]) for each in too_big]


def test_all_modules_with_kernels_are_compiled() -> None:
    ideas = {
        path.stem.removesuffix("_kernels")
        for path in FOLDER.glob("*.py")
        if "@triton.jit" in path.read_text(encoding="utf-8")
    }
    assert ideas == set(MODULES)


@pytest.mark.slow
def test_names_of_specialisations_are_unique() -> None:
    for module in ("allocator", "copies"):
        names = [each.name for each in compiled("sm_90", module)]
        assert len(names) == len(set(names))
        assert len(names) > 3


def test_copies_load_16_bytes_at_a_time() -> None:
    for each in compiled("sm_90", "copies"):
        wide = {access.split(".")[0] for access in each.accesses if access.endswith("v4.b32")}
        assert wide == {"ld", "st"}, each.name


def test_copied_blocks_are_all_read_before_any_is_written() -> None:
    """The barrier protects a block that is source and destination; the interpreter has none."""
    copies = [each for each in compiled("sm_90", "copies") if each.name.endswith("pairs")]
    assert copies
    for each in copies:
        kinds = [access.split(".")[0] for access in each.accesses]
        first_store = kinds.index("st")
        last_load = len(kinds) - 1 - kinds[::-1].index("ld")
        assert "bar" in kinds[last_load:first_store], each.name


def test_the_allocator_counts_in_relaxed_atomics() -> None:
    """There are no fences: launches give all the order that is needed."""
    for each in compiled("sm_90", "allocator"):
        atomics = [access for access in each.accesses if access.startswith(("atom", "red"))]
        assert atomics, each.name
        assert all(".gpu.relaxed.add" in access for access in atomics), each.name

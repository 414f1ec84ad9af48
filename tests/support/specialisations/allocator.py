"""Specialisations of the kernels of `kernels/gpu/allocator.py`."""

from __future__ import annotations

from typing import Any

from kvpager.kernels.gpu.allocator import (
    COLUMNS,
    LANES,
    LANES_ALONE_MAX,
    LANES_MIN,
    _warps,
    drop_rows,
    settle_rows,
    share_rows,
    step_rows,
)
from tests.support.specialisations import Specialisation

_TENSORS = ("seq_lens", "block_tables", "ref_counts")


def specialisations() -> list[Specialisation]:
    """Return a small batch, the largest of one program, one of many programs, fork and release."""
    lanes = ((LANES_MIN, True), (LANES_ALONE_MAX, True), (LANES, False))
    steps = [_step_specialisation(count, alone) for count, alone in lanes]
    settle = ("slots", "rows", *_TENSORS, "failures")
    share = ("sources", "targets", *_TENSORS, "failures")
    drop = ("rows", *_TENSORS, "free", "num_free")
    return [
        *steps,
        _specialisation("settle", settle_rows, settle, {"LANES": LANES}),
        _specialisation("fork", share_rows, share, {"COLUMNS": COLUMNS}),
        _specialisation("release", drop_rows, drop, {"COLUMNS": COLUMNS}),
    ]


def _step_specialisation(lanes: int, alone: bool) -> Specialisation:
    pointers = ("slots", "copies", "rows", *_TENSORS, "free", "num_free")
    return _specialisation(
        f"step {lanes} lanes" + (" alone" if alone else ""),
        step_rows,
        (*pointers, "failures"),
        {"LANES": lanes, "ALONE": alone},
    )


def _specialisation(
    name: str,
    function: Any,
    pointers: tuple[str, ...],
    constants: dict[str, Any],
) -> Specialisation:
    sizes = ("num_lanes", "num_columns") if "LANES" in constants else ("num_columns",)
    signature = dict.fromkeys(pointers, "*i32") | dict.fromkeys(sizes, "i32")
    if "slots" in pointers:
        signature["slots"] = "*i64"
    return Specialisation(
        name=name,
        function=function,
        signature=signature,
        constexprs={"BLOCK_SIZE": 16, **constants},
        options={"num_warps": _warps(constants.get("LANES", COLUMNS))},
        divisible=tuple(name for name in pointers if name not in ("rows", "sources", "targets")),
        max_registers=48,
    )

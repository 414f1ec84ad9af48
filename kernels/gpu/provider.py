"""Registers the Triton kernels for GPUs, or the reference kernels with the reason why."""

from __future__ import annotations

from importlib.util import find_spec

from kvpager.kernels import backends

DEVICE_TYPE = "cuda"  # also AMD GPUs in torch


def register() -> None:
    """Register every operation of this folder. O(1), but imports Triton."""
    if find_spec("triton") is None:
        why = "triton is not installed: pip install 'kvpager[triton]'"
        backends.register_reference(backends.REFERENCE, DEVICE_TYPE, why)
        return
    # Imported late: decorating the kernels needs Triton.
    from kvpager.kernels.gpu import allocator, attention, copies, external

    backends.register("append_kv", DEVICE_TYPE, copies.append_kv, "Triton; K and V in one launch")
    backends.register("copy_blocks", DEVICE_TYPE, copies.copy_blocks, "Triton; one launch")
    backends.register("gather_kv", DEVICE_TYPE, copies.gather_kv, "Triton; one launch")
    try:
        reason = f"Triton; work items that share prefixes ({external.chosen()})"
    except ValueError as error:  # calls raise it too; `kvpager env` must not fail
        reason = str(error)
    backends.register("paged_attention", DEVICE_TYPE, attention.paged_attention, reason)
    for operation in ("step_alloc", "fork_rows", "release_rows"):
        backends.register(operation, DEVICE_TYPE, getattr(allocator, operation), "Triton")

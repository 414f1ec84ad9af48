"""The registry of kernels: the function that runs an operation on a device type.

    append_kv(...)  ──▶  select("append_kv", device)  ──▶  the function registered for that device
                                                      └─▶  or the reference kernel, `reference.py`

The first call on a device type imports its provider. The provider registers its kernels, or the
reference kernels with the reason why. `active` shows the outcome, for `kvpager env`. The registry
looks at the device type alone: a kernel calls the reference for arguments it does not support.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from kvpager._text import listed
from kvpager.kernels import reference, reference_alloc

Kernel = Callable[..., Any]

REFERENCE: dict[str, Kernel] = {
    "append_kv": reference.append_kv,
    "copy_blocks": reference.copy_blocks,
    "gather_kv": reference.gather_kv,
    "paged_attention": reference.paged_attention,
    "step_alloc": reference_alloc.step_alloc,
    "fork_rows": reference_alloc.fork_rows,
    "release_rows": reference_alloc.release_rows,
}

# Device type -> a module with `register() -> None`.
_PROVIDERS = {"cpu": "kvpager.kernels.cpu.provider", "cuda": "kvpager.kernels.gpu.provider"}


class Active(NamedTuple):
    """The `backend` (a module below `kvpager.kernels`) that runs an operation, and the reason."""

    backend: str
    reason: str


_registered: dict[tuple[str, str], tuple[Kernel, str]] = {}
_provided: set[str] = set()
_lock = threading.RLock()


def register(operation: str, device_type: str, function: Kernel, reason: str) -> None:
    """Let `function` run `operation` on every device of `device_type` from now on. O(1).

    `function` has the signature of its reference (`reference.py`, `reference_alloc.py`) and gets
    checked arguments. A later registration replaces an earlier one.

    Raises: `ValueError` for an unknown operation.
    """
    _require_operation(operation)
    _registered[operation, device_type] = (function, reason)


def register_reference(operations: Iterable[str], device_type: str, reason: str) -> None:
    """Let the reference kernels run `operations` on `device_type`, because of `reason`."""
    for operation in operations:
        register(operation, device_type, REFERENCE[operation], reason)


def select(operation: str, device: torch.device) -> Kernel:
    """Return the function that runs `operation` on `device`: registered, or the reference. O(1).

    The first call for a device type loads its kernels, and may build them.
    """
    entry = _registered.get((operation, device.type))
    if entry is not None:
        return entry[0]
    _require_operation(operation)
    _provide(device.type)
    entry = _registered.get((operation, device.type))
    return entry[0] if entry is not None else REFERENCE[operation]


def active() -> dict[str, dict[str, Active]]:
    """Return the backends in use: device type -> operation -> (backend, reason). O(registered).

    Loads the kernels of every device type that has any.
    """
    for device_type in _PROVIDERS:
        _provide(device_type)
    devices = set(_PROVIDERS) | {device_type for _, device_type in _registered}
    return {
        device_type: {operation: _active(operation, device_type) for operation in REFERENCE}
        for device_type in sorted(devices)
    }


def _provide(device_type: str) -> None:
    """Let the device type's provider register its kernels, once."""
    with _lock:
        if device_type in _provided:
            return
        if device_type in _PROVIDERS:
            importlib.import_module(_PROVIDERS[device_type]).register()
        # Last, so that another thread waits for the kernels instead of missing them.
        _provided.add(device_type)


def _active(operation: str, device_type: str) -> Active:
    unregistered = (REFERENCE[operation], "no faster kernel is available")
    function, reason = _registered.get((operation, device_type), unregistered)
    module = getattr(function, "__module__", type(function).__module__)
    return Active(module.removeprefix("kvpager.kernels."), reason)


def _require_operation(operation: str) -> None:
    if operation not in REFERENCE:
        raise ValueError(f"operation={operation!r}: expected one of {listed(REFERENCE)}")

"""Which function runs an operation on a device type.

    append_kv(...)  ──▶  select("append_kv", device)  ──▶  the function registered for that device
                                                      └─▶  or the plain torch twin, `reference.py`

A faster kernel joins with one `register` call and says why it was chosen (or, registering the
twin itself, why it was not); `active` shows the outcome, for `kvpager env`. The registry decides
by device type alone: a kernel that cannot take a certain argument calls the twin itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from kvpager.kernels import reference

Kernel = Callable[..., Any]

_REFERENCE: dict[str, Kernel] = {
    "append_kv": reference.append_kv,
    "copy_blocks": reference.copy_blocks,
    "gather_kv": reference.gather_kv,
    "paged_attention": reference.paged_attention,
}


class Active(NamedTuple):
    """The `backend` (the module, below `kvpager.kernels`) that runs an operation, and why."""

    backend: str
    reason: str


_registered: dict[tuple[str, str], tuple[Kernel, str]] = {}


def register(operation: str, device_type: str, function: Kernel, reason: str) -> None:
    """Let `function` run `operation` on every device of `device_type` from now on. O(1).

    `function` has the signature of its twin in `reference.py` and gets checked arguments. A later
    registration replaces an earlier one. `ValueError` for an operation that does not exist.
    """
    _require_operation(operation)
    _registered[operation, device_type] = (function, reason)


def select(operation: str, device: torch.device) -> Kernel:
    """The function that runs `operation` on `device`: the registered one or the twin. O(1)."""
    entry = _registered.get((operation, device.type))
    if entry is not None:
        return entry[0]
    _require_operation(operation)
    return _REFERENCE[operation]


def active() -> dict[str, dict[str, Active]]:
    """What runs where: device type -> operation -> (backend, reason). O(registered)."""
    devices = {"cpu", "cuda"} | {device_type for _, device_type in _registered}
    return {
        device_type: {operation: _active(operation, device_type) for operation in _REFERENCE}
        for device_type in sorted(devices)
    }


def _active(operation: str, device_type: str) -> Active:
    unregistered = (_REFERENCE[operation], "this release has no faster kernel")
    function, reason = _registered.get((operation, device_type), unregistered)
    return Active(function.__module__.removeprefix("kvpager.kernels."), reason)


def _require_operation(operation: str) -> None:
    if operation not in _REFERENCE:
        raise ValueError(f"operation {operation!r} does not exist; choose from {list(_REFERENCE)}")

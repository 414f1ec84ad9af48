"""`kvpager env`: versions, devices and kernels, for a bug report."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import kvpager

# The supported versions: first and last, both included. None: any version.
SUPPORTED: dict[str, tuple[str, str] | None] = {
    "python": ("3.11", "3.13"),
    "torch": ("2.11", "2.14"),
    "transformers": ("5.17", "5.24"),
    "triton": ("3.6", "3.9"),
    "numpy": None,
}
NEEDED = {"python", "torch", "numpy"}


def collect() -> dict[str, Any]:
    """Return everything that `kvpager env` shows, as plain data. Imports torch."""
    return {
        "kvpager": kvpager.__version__,
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "gpus": _gpus(),
        "versions": {name: _version(name) for name in SUPPORTED},
        "kernels": _kernels(),
    }


def _version(name: str) -> dict[str, Any]:
    found = installed(name)
    bounds = SUPPORTED[name]
    return {
        "version": found,
        "supported": f"{bounds[0]} - {bounds[1]}" if bounds else "any",
        "inside": is_inside(found, bounds) if found else None,
    }


def installed(name: str) -> str | None:
    """Return the installed version of a package or of Python; None if not installed. O(1)."""
    if name == "python":
        return platform.python_version()
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def is_inside(found: str, bounds: tuple[str, str] | None) -> bool:
    """Return True if `found` lies within the bounds, by major and minor version.

    >>> is_inside("2.13.0+cpu", ("2.11", "2.13"))
    True
    """
    return bounds is None or _minor(bounds[0]) <= _minor(found) <= _minor(bounds[1])


def _minor(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def _gpus() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in found]


def _kernels() -> dict[str, dict[str, dict[str, str]]]:
    """Return backend and reason by device type and operation."""
    from kvpager.kernels import backends

    return {
        device: {name: dict(entry._asdict()) for name, entry in operations.items()}
        for device, operations in backends.active().items()
    }


# -------------------------------------------------------------------- printing


def show(found: dict[str, Any]) -> None:
    """Print what `collect` found."""
    console = Console(highlight=False)
    console.print(f"[bold]kvpager {found['kvpager']}[/]")
    console.print(f"{found['platform']}, {found['cpus']} CPUs", soft_wrap=True, markup=False)
    gpus = found["gpus"] or ["none that torch can use"]
    console.print("GPUs: " + "; ".join(gpus), soft_wrap=True, markup=False)
    console.print(_version_table(found["versions"]))
    console.print(_kernel_table(found))


def _version_table(versions: dict[str, dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("package", "version", "supported", ""):
        table.add_column(name)
    for name, entry in versions.items():
        if entry["version"] is None:
            style, remark = ("red", "needed") if name in NEEDED else ("dim", "optional")
        elif entry["inside"]:
            style, remark = "green", "ok"
        else:
            style, remark = "yellow", "untested with this version"
        table.add_row(
            name, entry["version"] or "not installed", entry["supported"], Text(remark, style)
        )
    return table


def _kernel_table(found: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("device", "operation", "kernel", "why"):
        table.add_column(name, overflow="fold")
    for device, operations in found["kernels"].items():
        said = ""
        absent = device == "cuda" and not found["gpus"]
        for number, (operation, entry) in enumerate(operations.items()):
            label = f"{device} (none here)" if absent else device
            table.add_row(
                "" if number else label,
                operation,
                entry["backend"],
                Text("" if entry["reason"] == said else entry["reason"]),
                style="dim" if absent else "",
                end_section=number == len(operations) - 1,
            )
            said = entry["reason"]
    return table

"""Free memory of a device or the host."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_MEMINFO, _OWN_GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")
# Limit, usage, and the part of the usage that the system drops when memory is short.
_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),  # version 2 of control groups
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_bytes(device: torch.device) -> int:
    """Return the bytes that a program can allocate on `device` without swapping. O(1).

    On a GPU, unused memory in torch's allocator counts as free. On the host, container limits
    apply.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    available = host_bytes() // 4  # if the system does not report it
    if _MEMINFO.is_file():
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    return min([available, *_left_in_groups()])


def host_bytes() -> int:
    """Return the total bytes of host memory. O(1)."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _left_in_groups() -> list[int]:
    """Return the bytes left within each memory limit of this process's control groups."""
    left = []
    try:
        groups = [line.split(":", 2) for line in _OWN_GROUPS.read_text().splitlines()]
    except OSError:
        return []
    for _, controllers, path in groups:
        kind = "memory" if "memory" in controllers.split(",") else controllers
        if kind not in _FILES:
            continue
        # In a container the path may be that of the host. Then the root is this process's group.
        folder = _GROUPS / kind / path.strip("/")
        for each in (folder, *folder.parents):
            if each == _GROUPS.parent:
                break
            found = _left_in(each, *_FILES[kind])
            if found is not None:
                left.append(found)
    return left


def _left_in(folder: Path, limit: str, use: str, dropped: str) -> int | None:
    try:
        bound, used = (folder / limit).read_text().strip(), int((folder / use).read_text())
        lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(int(bound) - used + int(dict(lines).get(dropped, 0)), 0)
    except (OSError, ValueError):  # no such file, or no limit ("max")
        return None

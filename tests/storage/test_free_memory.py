"""Free memory of the host, within the limits of a container."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvpager.storage import free_memory


def control_groups(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("own", "files", "left"),
    [
        ("0::/", {"memory.max": "max", "memory.current": "5", "memory.stat": ""}, None),
        (
            "0::/a/b",
            {
                "memory.max": "1000",
                "memory.current": "400",
                "memory.stat": "anon 7\ninactive_file 100\n",
                "a/memory.max": "900",
                "a/memory.current": "300",
                "a/memory.stat": "anon 7\n",
                "a/b/memory.max": "max",
            },
            600,
        ),
        (
            "3:cpu:/x\n2:memory:/x",
            {
                "memory/x/memory.limit_in_bytes": "1000",
                "memory/x/memory.usage_in_bytes": "400",
                "memory/x/memory.stat": "total_inactive_file 50",
            },
            650,
        ),
        (
            "0::/elsewhere",
            {"memory.max": "10", "memory.current": "50", "memory.stat": ""},
            0,
        ),
    ],
    ids=["no limit", "version 2, nested", "version 1", "in a container, over its limit"],
)
def test_free_memory_respects_the_limit_of_a_container(
    own: str,
    files: dict[str, str],
    left: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    control_groups(tmp_path / "group", files)
    (tmp_path / "own").write_text(own + "\n")
    (tmp_path / "meminfo").write_text("MemTotal: 90 kB\nMemAvailable: 40 kB\n")
    monkeypatch.setattr(free_memory, "_GROUPS", tmp_path / "group")
    monkeypatch.setattr(free_memory, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(free_memory, "_MEMINFO", tmp_path / "meminfo")
    expected = 40 * 1024 if left is None else left
    assert free_memory.free_bytes(torch.device("cpu")) == expected

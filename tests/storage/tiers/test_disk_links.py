"""A directory that others may write: its links do not lead a disk store to other files."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvpager.storage.tiers.disk import DiskStore
from kvpager.storage.tiers.layout import BlockLayout

LAYOUT = BlockLayout("links", 4096)


def opened(folder: Path) -> DiskStore:
    return DiskStore(folder, "1MiB", layout=LAYOUT)


def plant(link: Path, victim: Path) -> None:
    victim.write_text("a file of the owner")
    link.unlink(missing_ok=True)
    link.symlink_to(victim)


@pytest.mark.parametrize("name", ["lock", "slots", "segment-00000"])
def test_a_link_in_a_store_is_refused(tmp_path: Path, name: str) -> None:
    folder, victim, key = tmp_path / "kv", tmp_path / "victim", b"k" * 32
    store = opened(folder)
    store.save([key], [memoryview(bytes(4096))], float("inf"))
    store.close()
    plant(folder / name, victim)
    with pytest.raises(OSError, match=f"symbolic links.*{name}"):
        opened(folder)
    assert victim.read_text() == "a file of the owner"


def test_a_link_in_a_new_directory_is_refused(tmp_path: Path) -> None:
    folder, victim = tmp_path / "kv", tmp_path / "victim"
    folder.mkdir()
    plant(folder / "kvpager-disk.json.tmp", victim)
    with pytest.raises(OSError, match="symbolic links"):
        opened(folder)
    assert victim.read_text() == "a file of the owner"


def test_a_directory_may_be_a_link_itself(tmp_path: Path) -> None:
    (tmp_path / "kv").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "kv")
    opened(tmp_path / "link").close()
    assert (tmp_path / "kv" / "slots").exists()

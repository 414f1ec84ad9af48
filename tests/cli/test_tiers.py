"""The commands `kvpager tiers`: what they print, delete and refuse."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("xxhash")

from typer.testing import CliRunner

from kvpager.cli.app import app
from kvpager.storage.tiers import frame
from kvpager.storage.tiers.disk import DiskStore
from kvpager.storage.tiers.layout import BlockLayout
from kvpager.storage.tiers.seals import Mac, Seal
from kvpager.testing.store_calls import key_of, save
from tests.support.valkey_servers import valkey

LAYOUT = BlockLayout("of a test", 4096)
SECRET = bytes(range(32))


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["tiers", *arguments], prog_name="kvpager")


def figures(*arguments: str) -> Any:
    return json.loads(call(*arguments, "--json", "-").stdout)


def opened(folder: Path, seal: Seal | None = None) -> DiskStore:
    return DiskStore(folder, "1MiB", layout=LAYOUT, seal=seal, admit="always")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with blocks 0 to 9."""
    store = opened(tmp_path / "kv")
    save(store, [key_of(number) for number in range(10)])
    store.close()
    return tmp_path / "kv"


def damage(folder: Path, slot: int) -> None:
    with (folder / "segment-00000").open("r+b") as segment:
        segment.seek((slot * 2 + 1) * 4096)
        segment.write(b"other bytes")


def test_ls_shows_keys_up_to_the_limit(folder: Path) -> None:
    result = call("ls", str(folder), "--limit", "3")
    keys = {key_of(number).hex() for number in range(10)}
    lines = result.stdout.splitlines()
    assert len({line.split()[0] for line in lines[:3]} & keys) == 3
    assert lines[3:] == ["10 blocks in all"]


def test_ls_and_stats_look_into_a_store_in_use(folder: Path) -> None:
    store = opened(folder)
    try:
        assert figures("ls", f"disk:{folder}")["blocks"] == 10
        found = figures("stats", f"disk:{folder}?capacity=1MiB")
    finally:
        store.close()
    assert (found["blocks"], found["bytes"]) == (10, 40960)
    assert (found["layout"], found["seal"]) == ("of a test", "Digest")


def test_ls_changes_no_file_and_needs_no_right_to_write(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = list[int]()
    real = os.open

    def noting(path: Any, flag: int, *rest: Any, **more: Any) -> int:
        flags.append(flag)
        return real(path, flag, *rest, **more)

    monkeypatch.setattr(os, "open", noting)
    for file in folder.iterdir():
        file.chmod(0o400)
    assert figures("ls", str(folder))["blocks"] == 10
    assert not any(flag & (os.O_RDWR | os.O_WRONLY | os.O_CREAT) for flag in flags)


def test_verify_refuses_a_store_in_use(folder: Path) -> None:
    store = opened(folder)
    try:
        result = call("verify", str(folder))
    finally:
        store.close()
    assert result.exit_code == 1
    assert "another disk store uses the directory" in result.stderr


def test_verify_finds_and_drops_damaged_blocks(folder: Path) -> None:
    assert call("verify", str(folder)).stdout == "10 blocks: all whole\n"
    damage(folder, 0)
    damage(folder, 5)
    result = call("verify", str(folder))
    assert result.exit_code == 1
    assert result.stdout == "10 blocks: 2 damaged (bytes), dropped\n"
    assert call("verify", str(folder)).stdout == "8 blocks: all whole\n"


def test_verify_keeps_capacity_and_order_of_eviction(folder: Path) -> None:
    before = [file.stat().st_size for file in sorted(folder.iterdir())]
    assert figures("verify", str(folder))["faults"] == {}
    assert [file.stat().st_size for file in sorted(folder.iterdir())] == before
    store = opened(folder)
    assert store.stats().num_blocks == 10
    room = store.stats().capacity or 0
    save(store, [key_of(number) for number in range(100, 100 + room - 9)])
    left = [store.find([key_of(number)]) for number in range(10)]
    store.close()
    assert left == [1] * 9 + [0]  # of a prompt, the last block leaves first


def test_gc_deletes_blocks_over_the_age_alone(folder: Path) -> None:
    assert figures("gc", str(folder), "--older-than", "1h") == {"blocks": 10, "deleted": 0}
    assert figures("gc", str(folder), "--older-than", "0s") == {"blocks": 10, "deleted": 10}
    assert call("ls", str(folder)).stdout == "0 blocks in all\n"


def test_a_sealed_store_is_verified_with_its_secret(tmp_path: Path) -> None:
    pytest.importorskip("blake3")
    store = opened(tmp_path / "kv", Mac(SECRET))
    save(store, [key_of(0)])
    store.close()
    for name, secret in (("right", SECRET), ("wrong", SECRET[::-1])):
        (tmp_path / name).write_bytes(secret)
    place = str(tmp_path / "kv")
    without = call("verify", place)
    assert without.exit_code == 2
    assert "--secret-file: blocks are sealed by Mac" in without.stderr
    wrong = call("verify", place, "--secret-file", str(tmp_path / "wrong"))
    assert wrong.exit_code == 2
    assert "another secret" in wrong.stderr
    right = call("verify", place, "--secret-file", str(tmp_path / "right"))
    assert right.stdout == "1 block: all whole\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ls", "/nowhere/at/all"], "place='/nowhere/at/all': no disk store is there"),
        (["stats", "s3:bucket"], "place=s3:...: expected a directory, or a URL"),
        (["verify", "valkey://localhost:none"], "expected a port from 1 to 65535"),
        (["gc", "/tmp", "--older-than", "lots"], "--older-than=lots: expected a number with"),
    ],
)
def test_a_bad_argument_is_named(arguments: list[str], message: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_the_blocks_of_a_server_are_listed_verified_and_deleted(tmp_path: Path) -> None:
    pytest.importorskip("redis")
    from kvpager.integrations.valkey import ValkeyStore

    server = valkey(tmp_path)
    try:
        store = ValkeyStore(server.url, LAYOUT)
        save(store, [key_of(number) for number in range(5)])
        store.close()
        server.ask(b"SET", b"of another program", b"stays")
        assert figures("ls", server.url)["blocks"] == 5
        assert figures("stats", server.url)["bytes"] == 5 * 4096
        assert call("verify", server.url).stdout == "5 blocks: all whole\n"
        server.ask(b"SETRANGE", b"kvp1:" + key_of(2), b"2000", b"other bytes")
        server.ask(b"SET", b"kvp1:" + key_of(3), os.urandom(500))
        assert figures("verify", server.url)["faults"] == {"bytes": 1, "head": 1}
        assert figures("gc", server.url, "--older-than", "1d") == {"blocks": 3, "deleted": 0}
        assert figures("gc", server.url, "--older-than", "0s")["blocks"] == 3
        assert b"of another program" in server.names()
    finally:
        server.stop()


def test_verify_keeps_blocks_of_another_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("redis")
    from kvpager.integrations.valkey import ValkeyStore

    server = valkey(tmp_path)
    try:
        for number in range(2):
            with monkeypatch.context() as later:
                later.setattr(frame, "_VERSION", 1 + number)
                store = ValkeyStore(server.url, LAYOUT)
                save(store, [key_of(number)])
                store.close()
        result = call("verify", server.url)
        assert result.exit_code == 1
        assert result.stdout == "2 blocks: 1 of another version, kept\n"
        assert figures("ls", server.url)["blocks"] == 2
    finally:
        server.stop()


def test_a_server_that_does_not_answer_fails_the_command() -> None:
    pytest.importorskip("redis")
    result = call("stats", "valkey://127.0.0.1:1")
    assert result.exit_code == 1
    assert "valkey://127.0.0.1:1" in result.stderr

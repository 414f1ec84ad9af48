"""Stores by URL: what opens, and what is refused with which words."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest

from kvpager.storage.tiers import urls
from kvpager.storage.tiers.disk import DiskStore
from kvpager.storage.tiers.host import HostStore
from kvpager.storage.tiers.layout import BlockLayout
from kvpager.storage.tiers.protocol import BlockStore
from kvpager.storage.tiers.seals import Digest, Seal
from kvpager.storage.tiers.urls import open_store, open_stores
from kvpager.testing.store_calls import key_of, load, save

LAYOUT = BlockLayout("urls", 4096)


def roundtrip(store: BlockStore) -> bool:
    save(store, [key_of(0)])
    return load(store, [key_of(0)])[0] == [0]


def opened_by_a_package(url: str, *, layout: BlockLayout, seal: Seal | None) -> BlockStore:
    """Stand for the factory of another package."""
    return HostStore(url.rpartition("/")[2], layout=layout)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a package with stores called "mine" and "disk"."""
    points = EntryPoints(
        EntryPoint(name, f"{__name__}:opened_by_a_package", urls.GROUP) for name in ("mine", "disk")
    )
    monkeypatch.setattr(urls, "entry_points", lambda group: points.select(group=group))


# ---------------------------------------------------------------- what opens


def test_host_takes_a_size() -> None:
    store = open_store("host:1MiB", layout=LAYOUT)
    assert isinstance(store, HostStore)
    assert store.stats().capacity == 256
    assert roundtrip(store)


@pytest.mark.parametrize("slashes", ["", "//"])
def test_disk_takes_a_path_and_options(tmp_path: Path, slashes: str) -> None:
    path = tmp_path / "a cache"
    url = f"disk:{slashes}{tmp_path}/a%20cache?capacity=1MiB&admit=always&ttl_s=3600"
    store = open_store(url, layout=LAYOUT, seal=Digest())
    try:
        assert isinstance(store, DiskStore)
        assert path.is_dir()
        assert roundtrip(store)
    finally:
        store.close()


def test_disk_expands_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    open_store("disk:~/cache?capacity=1MiB", layout=LAYOUT).close()
    assert (tmp_path / "cache").is_dir()


@pytest.mark.parametrize("scheme", ["valkey", "valkeys", "redis", "rediss"])
def test_a_server_that_is_not_there_is_named_without_its_password(scheme: str) -> None:
    pytest.importorskip("redis")
    with pytest.raises(ConnectionError) as error:
        open_store(f"{scheme}://me:hunter2@127.0.0.1:1?ttl_s=60&timeout_s=5&db=1", layout=LAYOUT)
    assert "127.0.0.1:1" in str(error.value)
    assert "hunter2" not in str(error.value)


@pytest.mark.usefixtures("packages")
def test_a_package_adds_a_scheme() -> None:
    assert roundtrip(open_store("mine://somewhere/1MiB", layout=LAYOUT))


@pytest.mark.usefixtures("packages")
def test_a_package_cannot_take_over_a_scheme(tmp_path: Path) -> None:
    store = open_store(f"disk:{tmp_path}/cache?capacity=1MiB", layout=LAYOUT)
    assert isinstance(store, DiskStore)
    store.close()


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("lots", "url='lots': expected a store's URL, such as \"host:32GiB\""),
        ("", "url='': expected a store's URL"),
        ("s3://bucket", "no store is called 's3'. Use one of host, disk, valkey"),
        ("HOST:1MiB", "no store is called 'HOST'"),
        ("host:", "expected a size after the colon"),
        ("host:lots", "capacity='lots': expected a size"),
        ("host:1KiB", "capacity='1KiB': room for no block. Expected at least 4.0 KiB"),
        ("disk:", "expected a path"),
        ("disk:?capacity=1MiB", "expected a path"),
        ("disk://cache/kv?capacity=1MiB", "expected a path"),
        ("disk:/nowhere/%00?capacity=1MiB", "expected a path"),
        ("disk:/nowhere/\ud800?capacity=1MiB", "expected a path"),
        ("disk:/nowhere", "add the size of the store"),
        ("disk:/nowhere?capacity=lots", "capacity='lots': expected a size"),
        ("disk:/nowhere?size=1MiB", "unknown option 'size'. Use capacity, admit, ttl_s"),
        ("disk:/nowhere?capacity=1MiB&capacity=2MiB", "the option capacity comes twice"),
        ("disk:/nowhere?capacity=1MiB&ttl_s=soon", "ttl_s='soon': expected a number of seconds"),
        ("disk:/nowhere?capacity=1MiB&admit=never", "admit='never': expected one of"),
    ],
)
def test_a_bad_url_is_refused_in_words_that_help(url: str, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        open_store(url, layout=LAYOUT)
    assert message in str(error.value)
    assert not Path("/nowhere").exists()


@pytest.mark.parametrize("url", [None, 3, b"host:1MiB", ["host:1MiB"]])
def test_what_is_no_text_is_refused(url: Any) -> None:
    with pytest.raises(TypeError, match=r"url=.*: expected a URL such as"):
        open_store(url, layout=LAYOUT)


@pytest.mark.parametrize("url", ["s3://me:hunter2@host/", "//me:hunter2@host", "s3:?key=hunter2"])
def test_no_message_shows_a_password(url: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        open_store(url, layout=LAYOUT)
    assert "hunter2" not in str(error.value)


def test_a_missing_client_is_told_by_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.startswith("kvpager.integrations.valkey") or name.partition(".")[0] == "redis":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'kvpager\[valkey\]'"):
        open_store("valkey://localhost", layout=LAYOUT)


# ---------------------------------------------------------------- several tiers


def test_urls_and_stores_become_tiers_in_order(tmp_path: Path) -> None:
    own = HostStore("1MiB", layout=LAYOUT)
    stores = open_stores([own, f"disk:{tmp_path}/cache?capacity=1MiB"], layout=LAYOUT)
    assert stores[0] is own
    assert [store.name for store in stores] == ["host", "disk"]
    stores[1].close()


@pytest.mark.parametrize("tiers", ["host:1MiB", HostStore("1MiB", layout=LAYOUT)])
def test_one_tier_needs_no_list(tiers: str | BlockStore) -> None:
    [store] = open_stores(tiers, layout=LAYOUT)
    assert roundtrip(store)


def test_tiers_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="tiers='lots': expected a store's URL"):
        open_stores("lots", layout=LAYOUT)
    for tiers in (3, {"host:1MiB"}, [3], [None]):
        with pytest.raises(TypeError, match=r"tiers=.*: expected"):
            open_stores(tiers, layout=LAYOUT)  # type: ignore[arg-type]


def test_a_store_of_another_layout_is_refused() -> None:
    other = HostStore("1MiB", layout=BlockLayout("other", 8192))
    with pytest.raises(ValueError, match="'host' has blocks of 8192 bytes, expected 4096"):
        open_stores([other], layout=LAYOUT)


def test_if_one_tier_fails_the_opened_ones_are_closed(tmp_path: Path) -> None:
    disk, own = f"disk:{tmp_path}/cache?capacity=1MiB", HostStore("1MiB", layout=LAYOUT)
    with pytest.raises(ValueError, match="tiers='lots'"):
        open_stores([own, disk, "lots"], layout=LAYOUT)
    assert roundtrip(own), "it was not opened here"
    open_store(disk, layout=LAYOUT).close()  # the directory is not in use any more

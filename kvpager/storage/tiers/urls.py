"""Stores by URL: `host:32GiB`, `disk:/path?capacity=200GiB`, `valkey://cache:6379`, `nixl:/path`.

Another package adds a scheme with an entry point, a `StoreFactory`:

    [project.entry-points."kvpager.tiers"]
    mine = "my_package:open_store"
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Protocol
from urllib.parse import unquote

from kvpager import _validate as arguments
from kvpager.blocks.cached import NUM_STORES_MAX
from kvpager.storage.tiers.disk import DiskStore
from kvpager.storage.tiers.disk.inspector import DiskInspector
from kvpager.storage.tiers.host import HostStore
from kvpager.storage.tiers.inspection import Inspector
from kvpager.storage.tiers.layout import BlockLayout
from kvpager.storage.tiers.protocol import BlockStore
from kvpager.storage.tiers.seals import Seal

GROUP = "kvpager.tiers"
HOST = "host"  # among tiers: the host memory of `host_memory=`
_PRIVATE = (HOST, "nixl")  # stores that end with their process
_EXAMPLES = '"host:32GiB", "disk:/path?capacity=200GiB" or "valkey://host:6379"'


class StoreFactory(Protocol):
    """Opens the store of a URL whose scheme is the name of the entry point."""

    def __call__(self, url: str, *, layout: BlockLayout, seal: Seal | None) -> BlockStore:
        """Return the store. Raises: `ValueError` for a bad URL, `OSError` for a store out of reach.

        `seal` protects blocks that leave the process, `Digest()` if None.
        """
        ...


def open_store(url: str, *, layout: BlockLayout, seal: Seal | None = None) -> BlockStore:
    """Open the store of `url` for blocks of `layout`.

    `host:32GiB` is a `HostStore`. `disk:/path?capacity=200GiB` is a `DiskStore`, with the options
    `admit` and `ttl_s`. `valkey://host:6379`, `redis://`, `unix://`, and with TLS `valkeys://`,
    `rediss://`, are a `ValkeyStore`, with the options `ttl_s`, `timeout_s` and redis-py's.
    `nixl:/path?capacity=200GiB&backend=POSIX` is a `NixlStore`; other options are the backend's.

    `seal`: `Digest()` unless given. Other schemes are entry points of the group `kvpager.tiers`.
    Raises: `ValueError`, `TypeError` for a bad URL; `ModuleNotFoundError` for a missing extra.
    Errors of the store's constructor pass through.
    """
    return _open("url", url, layout, seal)


def open_stores(
    tiers: str | BlockStore | Sequence[str | BlockStore],
    *,
    layout: BlockLayout,
    seal: Seal | None = None,
    host: BlockStore | None = None,
) -> list[BlockStore]:
    """Return the stores of `tiers`, in order: URLs are opened, stores are taken as they are.

    `host` is the first, whether or not `tiers` begins with "host". If one cannot be opened, those
    that this call opened are closed. Raises: as `open_store`, and `ValueError` for a store of
    blocks of another size.
    """
    stores, opened = list[BlockStore](), list[BlockStore]()
    try:
        for tier in checked_tiers(tiers, with_host=host is not None):
            if host is not None and tier == HOST:
                stores.append(_taken(host, layout))
            elif isinstance(tier, str):
                opened.append(_open("tiers", tier, layout, seal))
                stores.append(opened[-1])
            else:
                stores.append(_taken(tier, layout))
    except BaseException:
        for store in opened:
            store.close()
        raise
    return stores


def checked_tiers(
    tiers: str | BlockStore | Sequence[str | BlockStore], *, with_host: bool = False
) -> tuple[str | BlockStore, ...]:
    """Return `tiers` one by one, after checks that open none. O(tiers).

    `with_host`: there is host memory for cached blocks. Then "host" is the first, unless there are
    no tiers. Raises: `ValueError`, `TypeError` for an unknown scheme, another type or more than 7
    tiers.
    """
    listed: Any = [tiers] if isinstance(tiers, str) or _is_store(tiers) else tiers
    if not isinstance(listed, Sequence):
        raise TypeError(f"tiers={arguments.shown(tiers)}: expected URLs or stores")
    if listed and with_host:
        listed = listed if listed[0] == HOST else [HOST, *listed]
    if len(listed) > NUM_STORES_MAX:
        raise ValueError(f"tiers: expected at most {NUM_STORES_MAX}, got {len(listed)}")
    for number, tier in enumerate(listed):
        if isinstance(tier, str) and tier == HOST:
            _check_host(number, with_host)
        elif isinstance(tier, str):
            _factory("tiers", tier)
        elif not _is_store(tier):
            raise TypeError(f"tiers={arguments.shown(tier)}: expected a URL or a BlockStore")
    return tuple(listed)


def _check_host(number: int, with_host: bool) -> None:
    if not with_host:
        raise ValueError(
            'tiers: "host" is the memory of host_memory=, which is not set. Set it to a size.'
        )
    if number:
        raise ValueError('tiers: "host" is the first of them. Name it first, or leave it out.')


def are_private(tiers: Sequence[str | BlockStore]) -> bool:
    """Return True if none of these `checked_tiers` serves other processes. O(tiers)."""
    return all(
        tier.partition(":")[0] in _PRIVATE
        if isinstance(tier, str)
        else getattr(tier, "is_private", False)
        for tier in tiers
    )


def open_inspector(place: str, secret: bytes | None = None) -> Inspector:
    """Open a store to look at it: a directory, `disk:/path`, or the URL of a server.

    `secret`: that of the seal, if it has one. Raises: `ValueError` for another place; `OSError` for
    one that cannot be read.
    """
    scheme, colon, path = place.partition(":")
    if not colon or scheme == "disk" or os.path.exists(place):
        path = path.partition("?")[0] if colon and scheme == "disk" else place
        return DiskInspector(os.path.expanduser(path), secret)
    if _FACTORIES.get(scheme) is not _open_valkey:
        raise ValueError(
            f"place={scheme}:...: expected a directory, or a URL such as valkey://host:6379"
        )
    inspector: Inspector = _valkey().ValkeyInspector(place, secret)
    return inspector


def _is_store(value: object) -> bool:
    return all(callable(getattr(value, name, None)) for name in ("find", "load", "save"))


def _taken(store: BlockStore, layout: BlockLayout) -> BlockStore:
    if store.block_bytes != layout.block_bytes:
        raise ValueError(
            f"tiers: the store {store.name!r} has blocks of {store.block_bytes} bytes, expected "
            f"{layout.block_bytes}. Open it with the layout of this cache."
        )
    return store


def _open(argument: str, url: str, layout: BlockLayout, seal: Seal | None) -> BlockStore:
    if not isinstance(url, str):
        raise TypeError(f"{argument}={arguments.shown(url)}: expected a URL such as {_EXAMPLES}")
    return _factory(argument, url)(url, layout=layout, seal=seal)


def _factory(argument: str, url: str) -> StoreFactory:
    scheme, colon, _ = url.partition(":")
    if not colon:
        raise ValueError(f"{argument}={_shown(url)}: expected a store's URL, such as {_EXAMPLES}")
    if scheme in _FACTORIES:
        return _FACTORIES[scheme]
    # A package cannot take over a scheme of kvpager.
    found = entry_points(group=GROUP)
    if scheme in found.names:
        factory: StoreFactory = found[scheme].load()
        return factory
    known = ", ".join([*_FACTORIES, *sorted(found.names)])
    raise ValueError(f"{argument}={_shown(url)}: no store is called {scheme!r}. Use one of {known}")


def _open_host(url: str, *, layout: BlockLayout, seal: Seal | None) -> BlockStore:
    capacity = url.partition(":")[2]
    if not capacity:
        raise ValueError(f"url={url!r}: expected a size after the colon, such as host:32GiB")
    return HostStore(capacity, layout=layout)


def _open_disk(url: str, *, layout: BlockLayout, seal: Seal | None) -> BlockStore:
    path, query = _path(url)
    options = _sized(url, query, {"capacity": str, "admit": str, "ttl_s": float})
    return DiskStore(path, layout=layout, seal=seal, **options)


def _open_nixl(url: str, *, layout: BlockLayout, seal: Seal | None) -> BlockStore:
    path, query = _path(url)
    names = [each.partition("=")[0] for each in query.split("&")]  # some are the backend's own
    given = _sized(url, query, dict.fromkeys(["capacity", "backend", *filter(None, names)], str))
    ours = {name: given.pop(name) for name in ("capacity", "backend") if name in given}
    # By name: a store below knows no integration above it.
    nixl = import_module("kvpager.integrations.nixl")
    store: BlockStore = nixl.NixlStore(path, layout=layout, seal=seal, options=given, **ours)
    return store


def _path(url: str) -> tuple[str, str]:
    """Return the path of a URL without a host, and its options."""
    scheme, _, rest = url.partition(":")
    place, _, query = rest.partition("?")
    host, slashes, path = place.removeprefix("//").partition("/")
    path = unquote(slashes + path if place.startswith("//") else place)
    if not path or (place.startswith("//") and host) or not _is_path(path):
        raise ValueError(f"url={_shown(url)}: expected a path, such as {scheme}:/var/cache/kv")
    return os.path.expanduser(path), query


def _is_path(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _sized(url: str, query: str, kinds: dict[str, Callable[[str], Any]]) -> dict[str, Any]:
    """Read `name=value&..`, with a capacity. Raises: `ValueError`."""
    options = _options(url, query, kinds)
    if "capacity" not in options:
        raise ValueError(f"url={_shown(url)}: add the size of the store, such as ?capacity=200GiB")
    return options


def _open_valkey(url: str, *, layout: BlockLayout, seal: Seal | None) -> BlockStore:
    address, _, query = url.partition("?")
    kinds: dict[str, Callable[[str], Any]] = {"ttl_s": int, "timeout_s": float}
    ours, theirs = list[str](), list[str]()
    for each in filter(None, query.split("&")):
        (ours if each.partition("=")[0] in kinds else theirs).append(each)
    options = _options(address, "&".join(ours), kinds)
    url = f"{address}?{'&'.join(theirs)}" if theirs else address
    store: BlockStore = _valkey().ValkeyStore(url, layout, seal=seal, **options)
    return store


def _valkey() -> Any:
    try:
        # By name: a store below knows no integration above it.
        return import_module("kvpager.integrations.valkey")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "redis":
            raise
        raise ModuleNotFoundError(
            "redis is not installed. Run: pip install 'kvpager[valkey]'", name="redis"
        ) from None


_FACTORIES: dict[str, StoreFactory] = {"host": _open_host, "disk": _open_disk}
_FACTORIES |= dict.fromkeys(("valkey", "valkeys", "redis", "rediss", "unix"), _open_valkey)
_FACTORIES["nixl"] = _open_nixl


def _options(url: str, query: str, kinds: dict[str, Callable[[str], Any]]) -> dict[str, Any]:
    """Read `name=value&..`. Raises: `ValueError` for another name, or a name that comes twice."""
    options: dict[str, Any] = {}
    for part in query.split("&") if query else ():
        name, _, text = part.partition("=")
        if name not in kinds:
            raise ValueError(f"url={_shown(url)}: unknown option {name!r}. Use {', '.join(kinds)}")
        if name in options:
            raise ValueError(f"url={_shown(url)}: the option {name} comes twice")
        try:
            options[name] = kinds[name](unquote(text))
        except ValueError:
            raise ValueError(
                f"url={_shown(url)}: {name}={text!r}: expected a number of seconds"
            ) from None
    return options


def bare_url(url: str) -> str:
    """Return a URL without the parts that may hold a password. O(length)."""
    return re.sub(r"//.*@", "//...@", url.partition("?")[0])


def _shown(url: str) -> str:
    return repr(bare_url(url))

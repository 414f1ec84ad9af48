"""Passwords, users with few rights, and TLS: what a server does not allow is said at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvpager.integrations.valkey import ValkeyStore
from kvpager.storage.tiers.protocol import Loaded, Saved
from kvpager.storage.tiers.seals import Mac
from tests.support.certificates import write_certificate
from tests.support.valkey_blocks import LAYOUT, blocks, keys, load, open_store, save
from tests.support.valkey_servers import Server, redis_with_tls, valkey

HIT, MISS, BAD = Loaded.HIT, Loaded.MISS, Loaded.BAD
USERS = """
user default on >top-secret ~* +@all
user writer on >writes ~kvp1:* +exists +mget +set +del
user reader on >reads %R~kvp1:* +exists +mget
user blind on >sees ~other:* +exists +mget
"""


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with passwords."""
    folder = tmp_path_factory.mktemp("guarded")
    users = folder / "users.acl"
    users.write_text(USERS)
    server = valkey(folder, "--aclfile", str(users))
    yield server
    server.stop()


def url_for(server: Server, login: str, scheme: str = "valkey") -> str:
    return f"{scheme}://{login}@127.0.0.1:{server.port}"


@pytest.mark.parametrize("login", [":top-secret", "default:top-secret", "writer:writes"])
def test_a_right_password_opens_the_store(guarded: Server, login: str) -> None:
    names, content = keys(2, seed=len(login)), blocks(2)
    store = open_store(url_for(guarded, login))
    assert save(store, names, content) == [Saved.SAVED] * 2
    assert load(store, names) == ([HIT] * 2, content)
    store.drop(names)
    assert load(store, names)[0] == [MISS] * 2


@pytest.mark.parametrize("login", [":wrong", "writer:wrong", "nobody:writes", "reader:writes"])
def test_a_wrong_password_is_refused_and_not_shown(guarded: Server, login: str) -> None:
    with pytest.raises(PermissionError, match="Check user and password") as caught:
        open_store(url_for(guarded, login))
    assert login.partition(":")[2] not in str(caught.value)


def test_a_missing_password_is_refused(guarded: Server) -> None:
    with pytest.raises(PermissionError, match=r"^url=valkey://127.0.0.1"):
        open_store(guarded.url)


def test_a_user_without_the_right_to_read_is_refused(guarded: Server) -> None:
    with pytest.raises(PermissionError, match=r"NOPERM.* Grant \+exists \+mget ~kvp1:\*"):
        open_store(url_for(guarded, "blind:sees"))


def test_a_reader_loads_and_can_poison_nothing(guarded: Server) -> None:
    names, content = keys(3, seed=7), blocks(3)
    writer = open_store(url_for(guarded, "writer:writes"))
    reader = open_store(url_for(guarded, "reader:reads"))
    save(writer, names[:2], content[:2])
    assert save(reader, names, blocks(3, seed=1)) == [Saved.KNOWN, Saved.KNOWN, Saved.REFUSED]
    assert save(reader, names[2:], content[2:]) == [Saved.REFUSED]
    assert not reader.drop(names)
    assert load(reader, names) == ([HIT, HIT, MISS], [*content[:2], memoryview(bytes(1000))])
    assert not reader.bypassed


def test_a_reader_asks_for_a_bad_block_once(guarded: Server) -> None:
    names, content = keys(3, seed=8), blocks(3)
    save(open_store(url_for(guarded, "writer:writes")), names, content)
    reader = open_store(
        url_for(guarded, "reader:reads"), seal=Mac(b"another secret, of 32 bytes too.")
    )
    assert reader.find(names) == 3
    assert load(reader, names)[0] == [BAD] * 3
    assert reader.find(names) == 0, "it cannot delete them, but it knows them"
    assert load(reader, names)[0] == [MISS] * 3
    assert reader.stats().bad == 3


def test_a_reader_that_meets_bad_blocks_goes_on(guarded: Server) -> None:
    names, content = keys(5, seed=9), blocks(5)
    writer = open_store(
        url_for(guarded, "writer:writes"), seal=Mac(b"another secret, of 32 bytes too.")
    )
    save(writer, names[:4], content[:4])
    save(open_store(url_for(guarded, "writer:writes")), names[4:], content[4:])
    reader = open_store(url_for(guarded, "reader:reads"))
    for name in names[:4]:
        assert load(reader, [name])[0] == [BAD]
    assert not reader.bypassed
    assert load(reader, names) == ([MISS] * 4 + [HIT], [memoryview(bytes(1000))] * 4 + content[4:])


def test_numbered_databases_are_apart(server: Server) -> None:
    names, content = keys(1), blocks(1)
    save(open_store(f"{server.url}/3"), names, content)
    assert open_store(server.url).find(names) == 0
    assert open_store(f"{server.unix_url}?db=3").find(names) == 1


# ------------------------------------------------------------- TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_certificate(tmp_path_factory.mktemp("certificate"), "127.0.0.1")


@pytest.fixture(scope="module")
def encrypted(
    tmp_path_factory: pytest.TempPathFactory, certificate: tuple[Path, Path]
) -> Iterator[Server]:
    """A server under TLS, with passwords."""
    folder = tmp_path_factory.mktemp("encrypted")
    users = folder / "users.acl"
    users.write_text(USERS)
    file, key = map(str, certificate)
    options = ["--tls-cert-file", file, "--tls-key-file", key, "--tls-ca-cert-file", file]
    server = redis_with_tls(folder, [*options, "--tls-auth-clients", "no", "--aclfile", str(users)])
    yield server
    server.stop()


def tls_url(server: Server, certificate: tuple[Path, Path], login: str) -> str:
    return url_for(server, login, "valkeys") + f"?ssl_ca_certs={certificate[0]}"


def test_blocks_travel_under_tls(encrypted: Server, certificate: tuple[Path, Path]) -> None:
    size = 300_000  # many records
    layout = type(LAYOUT)("under TLS", size)
    names, content = keys(5), blocks(5, size)
    store = open_store(tls_url(encrypted, certificate, "writer:writes"), layout)
    assert save(store, names[:4], content[:4]) == [Saved.SAVED] * 4
    assert store.find(names) == 4
    outcomes, into = load(store, names)
    assert outcomes == [HIT] * 4 + [MISS]
    assert into[:4] == content[:4]
    reader = open_store(tls_url(encrypted, certificate, "reader:reads"), layout)
    assert save(reader, names[4:], content[4:]) == [Saved.REFUSED]
    assert load(reader, names[:1]) == ([HIT], content[:1])
    with pytest.raises(PermissionError):
        open_store(tls_url(encrypted, certificate, "writer:wrong"))


def test_an_unknown_certificate_is_refused(encrypted: Server) -> None:
    with pytest.raises(ConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
        open_store(url_for(encrypted, ":top-secret", "rediss"))


def test_a_certificate_of_another_host_is_refused(
    encrypted: Server, tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    url = tls_url(encrypted, certificate, ":top-secret").replace("127.0.0.1", "localhost")
    with pytest.raises(ConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
        open_store(url)


def test_a_plain_port_is_refused_where_tls_is_asked(server: Server) -> None:
    url = server.url.replace("valkey://", "rediss://")
    # Such a port says nothing: it waits for the end of a line.
    with pytest.raises(ConnectionError, match=r"cannot connect: .*Check host, port and TLS"):
        open_store(url, timeout_s=0.3)


def test_a_tls_port_is_refused_where_none_is_asked(encrypted: Server) -> None:
    with pytest.raises(ConnectionError, match=r"^url=valkey://127.0.0.1"):
        ValkeyStore(url_for(encrypted, ":top-secret"), LAYOUT, timeout_s=60)

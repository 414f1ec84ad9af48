"""URLs are read strictly, and no message shows a password."""

from __future__ import annotations

import pytest

from kvpager.integrations.valkey import ValkeyStore
from kvpager.integrations.valkey.address import Address
from tests.support.servers import free_port
from tests.support.valkey_blocks import LAYOUT


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("valkey://cache", "valkey://cache"),
        ("valkey://cache:6380/2", "valkey://cache:6380/2"),
        ("redis://user:secret@cache", "redis://cache"),
        ("valkeys://:se%23cret@cache?ssl_ca_certs=/ca.pem", "valkeys://cache"),
        ("rediss://cache?ssl_check_hostname=no&ssl_cert_reqs=none", "rediss://cache"),
        ("unix:///run/valkey.sock?db=3", "unix:///run/valkey.sock"),
        ("unix://user:secret@/run/valkey.sock", "unix:///run/valkey.sock"),
        ("valkey://[::1]:6379?username=a&password=secret", "valkey://[::1]:6379"),
    ],
)
def test_good_urls_are_read_and_shown_without_passwords(url: str, shown: str) -> None:
    assert str(Address(url)) == shown


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("cache:6379", "unknown scheme. Use valkey, valkeys"),
        ("http://cache", "unknown scheme. Use valkey, valkeys"),
        ("valkey://", "expected a host, such as valkey://localhost:6379"),
        ("valkey://:secret@", "expected a host"),
        ("valkey://cache:port", "valkey://cache:port: expected a port from 1 to 65535"),
        ("valkey://cache:99999", "expected a port from 1 to 65535"),
        ("valkey://cache:0", "expected a port from 1 to 65535"),
        ("valkey://cache/data", "expected the number of a database after the host"),
        ("valkey://:sec#ret@cache", "# and ? in a password are written as %23 and %3F"),
        ("valkey://:sec?ret@cache", "expected a port"),
        ("valkey://user:sec/ret@cache", "expected a port"),
        ("valkey://user:12/sec@cache", "expected the number of a database"),
        ("valkey://cache?password=sec@ret&other=1", "unknown option. Use"),
        ("valkey://user:12?sec@cache", "unknown option. Use"),
        ("valkey://cache?ssl_ca_certs=/ca.pem", "ssl_ca_certs needs TLS. Use valkeys://"),
        ("valkey://cache?lifetime=3", "unknown option 'lifetime'. Use client_name, db"),
        ("valkeys://cache?socket_timeout=3", "unknown option 'socket_timeout'"),
        ("valkey://cache?db=first", "Invalid value for 'db'"),
        ("unix://run/valkey.sock", "expected an absolute path, such as unix:///run/valkey.sock"),
        ("unix://", "expected an absolute path"),
    ],
)
def test_bad_urls_are_refused_with_the_reason(url: str, error: str) -> None:
    with pytest.raises(ValueError, match=r"^url=") as caught:
        Address(url)
    assert error in str(caught.value)
    assert "sec" not in str(caught.value)


def test_a_url_is_a_string() -> None:
    with pytest.raises(TypeError, match="url: expected a str, got bytes"):
        Address(b"valkey://cache")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "where",
    ["valkey://:secret@127.0.0.1:{port}", "unix:///no/such.sock", "valkey://local..host"],
)
def test_a_server_that_is_not_there_is_named(where: str) -> None:
    url = where.format(port=free_port())
    with pytest.raises(ConnectionError, match=r"^url=.*: cannot connect: .*Check host") as caught:
        ValkeyStore(url, LAYOUT)
    assert "secret" not in str(caught.value)

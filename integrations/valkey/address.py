"""The URL of a server, read strictly, and connections to it."""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import parse_qs, urlsplit

import redis
import redis.connection
from redis.exceptions import AuthenticationError, RedisError

from kvpager import _validate as arguments
from kvpager.integrations.valkey.sockets import seconds_left
from kvpager.integrations.valkey.wire import Wire

_SCHEMES = {
    "valkey": "redis",
    "valkeys": "rediss",
    "redis": "redis",
    "rediss": "rediss",
    "unix": "unix",
}
_TIMEOUTS = ("socket_timeout", "socket_connect_timeout")
_OPTIONS = {"db", "username", "password", "client_name"}
_TLS_OPTIONS = {
    "ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile", "ssl_password", "ssl_cert_reqs",
    "ssl_check_hostname", "ssl_ciphers", "ssl_min_version",
}  # fmt: skip


class Address:
    """A server and how to log in to it. Its text shows no password."""

    def __init__(self, url: str) -> None:
        """Read a URL, such as `valkey://cache:6379` or `unix:///run/valkey.sock`.

        `valkeys://` and `rediss://` mean TLS. Options after `?` are redis-py's, such as
        `ssl_ca_certs`. Raises: `TypeError`, `ValueError` for a bad URL.
        """
        if not isinstance(url, str):
            raise TypeError(f"url: expected a str, got {type(url).__name__}")
        scheme, _, rest = url.partition("://")
        # Until the URL is understood, any part of it may be a password.
        self._shown = f"{scheme}://..." if {*"@?#"} & {*url} else url
        if scheme not in _SCHEMES:
            raise self._bad(f"unknown scheme. Use {', '.join(_SCHEMES)}")
        url = f"{_SCHEMES[scheme]}://{rest}"
        self._check(url)
        self._shown = f"{scheme}://{rest.partition('?')[0].rpartition('@')[2]}"
        try:
            options = redis.connection.parse_url(url)
        except ValueError as error:
            raise self._bad(str(error)) from None
        self._class = options.pop("connection_class", redis.connection.Connection)
        self._options: dict[str, Any] = options

    def __str__(self) -> str:
        """Return the URL without user, password and options."""
        return self._shown

    def connect(self, deadline: float) -> Wire:
        """Connect and log in. Raises: `RedisError`, `OSError`, such as `TimeoutError`."""

        def log_in(connection: Any) -> None:
            connection._sock.settimeout(seconds_left(deadline))
            connection.on_connect()

        seconds = seconds_left(deadline)
        connection = self._class(
            **self._options,
            protocol=2,  # a server sends nothing unasked
            socket_timeout=seconds,
            socket_connect_timeout=seconds,
            redis_connect_func=log_in,
        )
        connection.connect()
        return Wire(connection)

    def first_connection(self, timeout_s: float) -> Wire:
        """Connect, with errors that say what to do.

        Raises: `ConnectionError` if there is no such server; `PermissionError` if it refuses the
        password.
        """
        try:
            return self.connect(time.monotonic() + timeout_s)
        except AuthenticationError as error:
            raise PermissionError(
                f"url={self}: the server refuses the login: {error}. Check user and password."
            ) from None
        except (OSError, RedisError, UnicodeError) as error:  # a host name that is none
            raise ConnectionError(
                f"url={self}: cannot connect: {error}. Check host, port and TLS, and that the "
                "server runs."
            ) from None

    def client(self, timeout_s: float) -> redis.Redis:
        """Return redis-py's client of the server; it connects when it is used."""
        options = self._options | dict.fromkeys(_TIMEOUTS, timeout_s)
        pool = redis.ConnectionPool(self._class, protocol=2, **options)
        return redis.Redis(connection_pool=pool)

    def _check(self, url: str) -> None:
        if "#" in url:
            raise self._bad("# and ? in a password are written as %23 and %3F")
        parts = urlsplit(url)
        try:
            port_is_good = parts.port != 0
        except ValueError:
            port_is_good = False
        if parts.scheme == "unix":
            if parts.netloc.rpartition("@")[2] or not parts.path:
                raise self._bad("expected an absolute path, such as unix:///run/valkey.sock")
        elif not port_is_good:
            raise self._bad("expected a port from 1 to 65535")
        elif not parts.hostname:
            raise self._bad("expected a host, such as valkey://localhost:6379")
        elif parts.path.strip("/") and not parts.path.strip("/").isdecimal():
            raise self._bad("expected the number of a database after the host")
        secure = parts.scheme == "rediss"
        for name in parse_qs(parts.query, keep_blank_values=True):
            if name in _TLS_OPTIONS and not secure:
                raise self._bad(f"{name} needs TLS. Use valkeys://")
            if name not in _OPTIONS | _TLS_OPTIONS:
                known = sorted(_OPTIONS | _TLS_OPTIONS if secure else _OPTIONS)
                named = "" if "@" in parts.query else f" {arguments.shown(name)}"
                raise self._bad(f"unknown option{named}. Use {', '.join(known)}")

    def _bad(self, why: str) -> ValueError:
        return ValueError(f"url={self}: {why}.")

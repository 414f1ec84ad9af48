"""Views of the metrics of a running engine, in the text format of Prometheus.

Only addresses of this machine are asked. Nothing is trusted: an answer has at most 1 MiB, and a
line that is no metric of kvpager is skipped.
"""

from __future__ import annotations

import http.client
import ipaddress
import math
import re
import time
from urllib.parse import urlsplit

from kvpager.top.view import TierRow, View

_BYTES_MAX = 1 << 20
_TIMEOUT_S = 5.0
_METRIC = r'_(\w+?)(?:_total)?(?:\{\w+="([^"]*)"[^}]*\})? (\S+)'  # behind the prefix
Metrics = dict[tuple[str, str], float]  # by name and label


class Scraper:
    """Asks an engine for its metrics. `prefix` is that of `EngineMetrics`."""

    def __init__(self, url: str, prefix: str = "kvpager") -> None:
        """Check the address. Raises: `ValueError` unless it is http on this machine."""
        parts = urlsplit(url)
        host = parts.hostname or ""
        if parts.scheme != "http" or not _is_loopback(host):
            raise ValueError(
                f"SOURCE={url}: expected http://127.0.0.1:PORT/metrics. For an engine elsewhere, "
                "forward its port."
            )
        self._host, self._port = host, parts.port or 80
        self._path, self._prefix = parts.path or "/metrics", prefix
        self._metric = re.compile(re.escape(prefix) + _METRIC)
        self._last: tuple[float, Metrics] | None = None

    def view(self) -> View:
        """Ask, and return the current moment. O(metrics).

        Raises: `OSError` without an answer; `ValueError` for an answer without kvpager's metrics.
        """
        metrics, now = self._metrics(self._ask()), time.monotonic()
        before, self._last = self._last, (now, metrics)
        rates = {}
        if before is not None and now > before[0]:
            for name in ("computed_tokens", "steps"):
                more = metrics[name, ""] - before[1].get((name, ""), 0.0)
                rates[name.removeprefix("computed_")] = max(more, 0.0) / (now - before[0])
        return _view(metrics, rates, f"engine at {self._host}:{self._port}")

    def _ask(self) -> str:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=_TIMEOUT_S)
        try:
            connection.request("GET", self._path)
            answer = connection.getresponse()
            if answer.status != 200:
                raise OSError(f"{self._host}:{self._port}{self._path}: HTTP {answer.status}")
            return answer.read(_BYTES_MAX).decode(errors="replace")
        except http.client.HTTPException as error:
            raise OSError(f"{self._host}:{self._port}: {error!r}") from None
        finally:
            connection.close()

    def _metrics(self, text: str) -> Metrics:
        found: Metrics = {}
        for line in text.splitlines():
            match = self._metric.fullmatch(line)
            if match is None or not line.isprintable():
                continue
            try:
                value = float(match[3])
            except ValueError:
                continue
            if math.isfinite(value):
                found[match[1], match[2] or ""] = value
        if ("steps", "") not in found or ("computed_tokens", "") not in found:
            raise ValueError(f"no metrics of an engine begin with {self._prefix}_.")
        return found


def _view(metrics: Metrics, rates: dict[str, float], title: str) -> View:
    def of(name: str, label: str = "") -> int:
        return int(metrics.get((name, label), 0))

    tiers = [label for name, label in metrics if name == "tier_blocks"]
    return View(
        title=title,
        blocks={state: of("blocks", state) for state in ("held", "cached", "kept", "free")},
        tokens=of("tokens"),
        requests={
            "queued": of("requests", "waiting"),
            "running": of("requests", "running"),
            "preempted": of("requests", "preempted"),
        },
        rates=rates,
        totals={
            "prompt tokens": of("prefix_query_tokens"),
            "found cached": of("prefix_hit_tokens"),
            "evicted": of("blocks_evicted"),
            "copied": of("blocks_copied"),
        },
        tiers=tuple(TierRow(name, of("tier_blocks", name), None, None) for name in tiers),
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

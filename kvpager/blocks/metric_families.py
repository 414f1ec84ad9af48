"""Metric families for `prometheus_client`, which is imported when the first one is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Labelled = Mapping[tuple[str], float] | Mapping[tuple[str, str], float]  # by labels


class Families:
    """Makes families whose names begin with one prefix."""

    def __init__(self, prefix: str) -> None:
        """Take the prefix. Raises: `ValueError` if it can begin no name."""
        if not prefix.isidentifier():
            raise ValueError(f"prefix={prefix!r}: expected letters, digits and underscores")
        self._prefix = prefix

    def gauge(self, name: str, text: str, values: float | Labelled, *labels: str) -> Any:
        """Return a gauge: a value, or one for each combination of `labels`. O(values)."""
        from prometheus_client.core import GaugeMetricFamily

        return self._filled(GaugeMetricFamily, name, text, values, labels)

    def counter(self, name: str, text: str, values: float | Labelled, *labels: str) -> Any:
        """Return a counter, whose name ends in `_total`. O(values)."""
        from prometheus_client.core import CounterMetricFamily

        return self._filled(CounterMetricFamily, name, text, values, labels)

    def _filled(
        self, kind: Any, name: str, text: str, values: float | Labelled, labels: tuple[str, ...]
    ) -> Any:
        family = kind(f"{self._prefix}_{name}", text, labels=labels)
        for key, value in (values if isinstance(values, Mapping) else {(): values}).items():
            family.add_metric(key, value)
        return family

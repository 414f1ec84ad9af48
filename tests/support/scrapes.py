"""Metrics as a Prometheus server reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def scrape(collector: Any) -> Callable[..., float | None]:
    """Return a function that reads a sample by name and labels, from the text of a registry."""
    prometheus = pytest.importorskip("prometheus_client")
    parser = pytest.importorskip("prometheus_client.parser")
    registry = prometheus.CollectorRegistry()
    registry.register(collector)

    def read(name: str, **labels: str) -> float | None:
        text = prometheus.generate_latest(registry).decode()
        samples = [s for f in parser.text_string_to_metric_families(text) for s in f.samples]
        found = [s.value for s in samples if (s.name, s.labels) == (name, labels)]
        assert len(found) <= 1, f"{name} {labels}: several samples"
        return found[0] if found else None

    return read

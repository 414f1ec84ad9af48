"""Calls of the system that fail: a disk that is full, or has errors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any
from unittest import mock

CALLS = ("pwrite", "pwritev", "preadv", "posix_fallocate", "fdatasync", "fsync", "ftruncate")


@contextmanager
def failing_calls(first: int, error: int, *, number: int = 1) -> Iterator[count[int]]:
    """Let `number` calls fail with `error`, from call `first` on. Yields the counter of calls."""
    calls = count()

    def failing(real: Any) -> Any:
        def call(*arguments: Any) -> Any:
            if first <= next(calls) < first + number:
                raise OSError(error, os.strerror(error))
            return real(*arguments)

        return call

    with ExitStack() as patches:
        for name in CALLS:
            patches.enter_context(mock.patch(f"os.{name}", failing(getattr(os, name))))
        yield calls

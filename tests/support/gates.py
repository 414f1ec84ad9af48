"""Forward passes that wait: tests that need a request to be under way do not race its end."""

from __future__ import annotations

import threading
from typing import Any


class Gate:
    """Holds forward passes of a model until they are let through; open after a `with` block."""

    def __init__(self, model: Any) -> None:
        self._passes = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)
        self._hook = model.register_forward_pre_hook(self._wait)
        self.is_open = False

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *error: object) -> None:
        self.open()

    def _wait(self, module: Any, inputs: Any) -> None:
        self.entered.release()
        if not self.is_open:
            self._passes.acquire()

    def let(self, count: int) -> None:
        """Let `count` forward passes through, after each has begun."""
        for _ in range(count):
            self.entered.acquire()
            self._passes.release()

    def open(self) -> None:
        """Hold nothing any more."""
        self.is_open = True
        self._passes.release(1000)
        self._hook.remove()

    def open_after(self, monkeypatch: Any, owner: Any, name: str) -> None:
        """Open the gate as soon as the method `name` of `owner` was called."""
        method = getattr(owner, name)

        def then_open(*arguments: Any) -> Any:
            result = method(*arguments)
            self.open()
            return result

        monkeypatch.setattr(owner, name, then_open)

"""Interruptions at every moment: where Python looks for signals, one of them is due.

CPython runs handlers, and raises asynchronous exceptions, after a call and at a jump backwards.
`Moments` counts these places as a trace function sees them, and interrupts at one of them.
"""

from __future__ import annotations

import dis
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import kvpager

# The instructions after which CPython looks for what is pending; it does so at the first one, too.
_LOOKS = {"CALL", "CALL_FUNCTION_EX", "CALL_KW", "JUMP_BACKWARD", "RESUME"}
_ROOT = str(Path(kvpager.__file__).parent.parent)


class Interrupt(BaseException):
    """Comes from outside, at any moment."""


def by_signal(frame: FrameType) -> None:
    """Call the handler of Ctrl-C as Python does."""
    handler: Any = signal.getsignal(signal.SIGINT)
    handler(signal.SIGINT, frame)


def by_force(frame: FrameType) -> None:
    """Raise what no handler can defer, as `PyThreadState_SetAsyncExc` does."""
    raise Interrupt


class Moments:
    """Calls `interrupt` at moment `number` of what is run within, counted from 1."""

    def __init__(self, number: int, interrupt: Callable[[FrameType], None]) -> None:
        self.left = number
        self.interrupt = interrupt
        self._last: dict[FrameType, int] = {}
        self._names: dict[CodeType, list[str]] = {}

    def __enter__(self) -> Moments:
        # Python 3.12 traces instructions if some frame asked for them before settrace is called.
        sys._getframe().f_trace_opcodes = True
        sys.settrace(self._begin)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)
        self._last.clear()

    @property
    def was_hit(self) -> bool:
        """True if there were as many moments."""
        return self.left <= 0

    def _begin(self, frame: FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(_ROOT) or "/tests/" in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        self._last[frame] = 0
        return self._step

    def _step(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "opcode":
            code = frame.f_code
            names = self._names.get(code)
            if names is None:
                names = self._names[code] = [dis.opname[byte] for byte in code.co_code]
            last, self._last[frame] = self._last[frame], frame.f_lasti
            if (not last or names[last] in _LOOKS) and _are_alike(code, last, frame.f_lasti):
                self.left -= 1
                if not self.left:
                    self.interrupt(frame)
        return self._step


def _are_alike(code: CodeType, one: int, other: int) -> bool:
    """True if an exception at either instruction has the same handler.

    Python raises at the instruction that looks, a trace function at the next one.
    """
    if not code.co_exceptiontable:
        return True
    table = dis._parse_exception_table(code)  # type: ignore[attr-defined]
    first, second = (
        [entry.target for entry in table if entry.start <= at < entry.end] for at in (one, other)
    )
    return first == second

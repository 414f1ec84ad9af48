"""Interruptions at every moment: where Python looks for signals, one of them is due.

CPython runs handlers, and raises asynchronous exceptions, after a call and at a jump backwards.
`Moments` counts these places as a trace function sees them, and interrupts at one of them.
"""

from __future__ import annotations

import contextlib
import dis
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import kvpager

# The instructions after which CPython looks for what is pending; it does so at the first one, too.
_LOOKS = {"CALL", "CALL_FUNCTION_EX", "CALL_KW", "RESUME"}
# It looks in the middle of this one. From Python 3.12 on, such a jump may lie outside the `try` or
# `with` block whose loop it repeats; then no handler of that block sees the exception.
_JUMP = "JUMP_BACKWARD"
_ROOT = Path(kvpager.__file__).parent.parent
_FOLDERS = tuple(f"{_ROOT / name}{os.sep}" for name in ("kvpager", "kernels", "integrations"))


class Interrupt(BaseException):
    """Comes from outside, at any moment."""


def by_signal(frame: FrameType, number: int = signal.SIGINT) -> None:
    """Call the handler of a signal, Ctrl-C unless another one is given, as Python does."""
    handler: Any = signal.getsignal(number)
    handler(number, frame)


def by_force(frame: FrameType) -> None:
    """Raise what no handler can defer, as `PyThreadState_SetAsyncExc` does."""
    raise Interrupt


class Moments:
    """Calls `interrupt` at moment `number` of what is run within, counted from 1.

    Other threads have no moments: they run no handlers.
    """

    def __init__(self, number: int, interrupt: Callable[[FrameType], None]) -> None:
        self.left = number
        self.interrupt = interrupt
        self._last: dict[FrameType, int] = {}
        self._names: dict[CodeType, list[str]] = {}
        self._thread = threading.get_ident()

    def __enter__(self) -> Moments:
        if sys.version_info >= (3, 12):
            _watch_instructions(self._look)
        else:
            sys.settrace(self._begin)
        return self

    def __exit__(self, *_: object) -> None:
        if sys.version_info >= (3, 12):
            _watch_instructions(None)
        else:
            sys.settrace(None)
        self._last.clear()

    @property
    def was_hit(self) -> bool:
        """True if there were as many moments."""
        return self.left <= 0

    def _begin(self, frame: FrameType, event: str, argument: object) -> Any:
        if not _is_ours(frame.f_code):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._step

    def _step(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "opcode":
            self._look(frame)
        return self._step

    def _look(self, frame: FrameType) -> None:
        """Interrupt before the next instruction of `frame` if this is the moment."""
        if threading.get_ident() != self._thread:
            return
        code = frame.f_code
        names = self._names.get(code)
        if names is None:
            names = self._names[code] = [dis.opname[byte] for byte in code.co_code]
        last, self._last[frame] = self._last.get(frame, 0), frame.f_lasti
        looked = (not last or names[last] in _LOOKS) and _are_alike(code, last, frame.f_lasti)
        if looked or names[frame.f_lasti] == _JUMP:
            self.left -= 1
            if not self.left:
                self.interrupt(frame)


def _is_ours(code: CodeType) -> bool:
    """True for code of the library itself."""
    return code.co_filename.startswith(_FOLDERS)


if sys.version_info >= (3, 12):
    # Python 3.13.0 leaves out many instructions if a trace function asks for them.
    _monitoring = sys.monitoring
    _TOOL = _monitoring.PROFILER_ID
    _watched: set[CodeType] = set()

    def _watch_instructions(look: Callable[[FrameType], None] | None) -> None:
        """Call `look` before each instruction of the library; None: no more."""
        if look is None:
            _monitoring.set_events(_TOOL, 0)
            _monitoring.register_callback(_TOOL, _monitoring.events.INSTRUCTION, None)
            _monitoring.free_tool_id(_TOOL)
            return

        def start(code: CodeType, offset: int) -> object:
            if _is_ours(code):
                _monitoring.set_local_events(_TOOL, code, _monitoring.events.INSTRUCTION)
            return _monitoring.DISABLE

        def instruction(code: CodeType, offset: int) -> object:
            frame = sys._getframe(1)
            look(frame)
            return None

        _monitoring.use_tool_id(_TOOL, "moments")
        _monitoring.restart_events()
        _monitoring.register_callback(_TOOL, _monitoring.events.PY_START, start)
        _monitoring.register_callback(_TOOL, _monitoring.events.INSTRUCTION, instruction)
        _monitoring.set_events(_TOOL, _monitoring.events.PY_START)


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


@contextlib.contextmanager
def handler(number: int, function: Callable[..., object]) -> Iterator[None]:
    """Handle a signal by `function` within a `with` block."""
    before = signal.signal(number, function)
    try:
        yield
    finally:
        signal.signal(number, before)

"""Reads an untrusted recording line by line, in bounded memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from kvpager.recording import textfile
from kvpager.recording.format import End, Header, Step, parse_header, parse_line


class Recording:
    """A recording that is read once: iterate over its steps.

    A run that crashed leaves a last line that is cut, or no end. Such a line is dropped with a
    warning. Any other bad line raises `ValueError`, which names the file and the line.

    Attributes:
        path: the file, which may be gzipped.
        header: the first line.
        is_complete: True after the last step of a run that was closed.
    """

    def __init__(self, path: str | Path, wait: Callable[[], bool] | None = None) -> None:
        """Read the header. O(1).

        `wait` is called at the end of a recording that is still being written. It waits for further
        lines, and returns False to stop reading.
        Raises: `OSError` if the file cannot be read; `ValueError` if it is no recording.
        """
        self.path = Path(path)
        self.is_complete = False
        self._lines = textfile.lines(self.path, wait)
        first = next(self._lines, b"")
        try:
            self.header: Header = parse_header(first)
        except ValueError as error:
            raise self._bad(1, error) from None

    def __iter__(self) -> Iterator[Step]:
        """Yield the steps. O(recording). Raises: `ValueError` for a bad line."""
        next_step, t = 0, 0.0
        for line, text in enumerate(self._lines, 2):
            if self.is_complete:
                raise self._bad(line, "the recording has ended before")
            try:
                parsed = parse_line(text, line)
            except ValueError as error:
                if text.endswith(b"\n"):
                    raise self._bad(line, error) from None
                warnings.warn(f"{self.path}: line {line} is cut, and ignored", stacklevel=2)
                return
            if isinstance(parsed, End):
                if parsed.closed != next_step:
                    raise self._bad(line, f"closed={parsed.closed}, after {next_step} steps")
                self.is_complete = True
                continue
            if parsed.step != next_step:
                raise self._bad(line, f"step={parsed.step}: expected {next_step}")
            if parsed.t < t:
                raise self._bad(line, f"t={parsed.t}: the step before has t={t}")
            next_step, t = parsed.step + 1, parsed.t
            yield parsed

    def _bad(self, line: int, why: object) -> ValueError:
        return ValueError(f"{self.path}: line {line}: {why}")

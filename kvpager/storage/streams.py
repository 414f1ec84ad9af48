"""Order the work of several GPU streams that use the same blocks.

Work on one stream runs in order, work on two streams does not. The lock of a pool orders threads,
not streams. One thread may free a block, publish a prefix or grow the storage while its stream
still uses the block. Then another thread uses the block on its own stream.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from kvpager.plans import Int32


def current_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Return the current stream of `device`; None if the device has no streams. O(1)."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def is_capturing() -> bool:
    """Return True if the current stream records a CUDA graph. O(1)."""
    return torch.cuda.is_current_stream_capturing()


def keep_for(tensor: Tensor, stream: torch.cuda.Stream) -> None:
    """Keep the tensor's memory from being reused before `stream` is done with it. O(1)."""
    tensor.record_stream(stream)


def copy_across(source: Tensor, destination: Tensor, copies: Int32) -> torch.cuda.Event | None:
    """Copy blocks for pairs (source, destination) [n, 2] from one device to another.

    Waits for copies to the host. A copy to a GPU may still read host memory afterwards: then this
    returns the event of its end. Work queued on the GPU later runs after the copy.
    """
    if source.device.type == destination.device.type == "cpu":
        _copy_on_host(source, destination, copies)
        return None
    for start, target, count in _runs(copies):
        destination[target : target + count].copy_(source[start : start + count], non_blocking=True)
    reading, writing = current_stream(source.device), current_stream(destination.device)
    if reading is not None and destination.device.type == "cpu":
        reading.synchronize()
    if writing is None or source.device.type != "cpu":
        return None
    event: torch.cuda.Event = writing.record_event()
    return event


def _copy_on_host(source: Tensor, destination: Tensor, copies: Int32) -> None:
    """Copy blocks in one call per run of destinations. It does not hold the interpreter's lock."""
    copies = copies[np.argsort(copies[:, 1])]
    read, written = (tensor.view(torch.uint8).numpy() for tensor in (source, destination))
    breaks = np.flatnonzero(np.diff(copies[:, 1]) != 1) + 1
    for run in np.split(copies, breaks) if len(copies) else ():
        target = int(run[0, 1])
        # "raise", the default, would copy the blocks twice.
        np.take(read, run[:, 0], axis=0, out=written[target : target + len(run)], mode="clip")


def _runs(copies: Int32) -> Iterator[tuple[int, int, int]]:
    """Yield the pairs as runs of consecutive blocks (source, destination, number of blocks)."""
    breaks = np.flatnonzero(np.any(np.diff(copies, axis=0) != 1, axis=1)) + 1
    starts = [0, *breaks.tolist()]
    for start, end in zip(starts, [*starts[1:], len(copies)], strict=True):
        yield int(copies[start, 0]), int(copies[start, 1]), end - start


class StreamOrder:
    """Orders the streams that use the tensor of one storage.

    On a CPU or with one stream, the usual case, there is nothing to do. With several streams, the
    next stream that uses the tensor waits for the work queued on the others.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._streams: tuple[torch.cuda.Stream, ...] = ()
        self._lock = threading.Lock()
        # Called for every layer of every step, so skip all work without streams.
        self._has_streams = current_stream(tensor.device) is not None
        self.enter()

    def enter(self) -> None:
        """Let the current stream wait for the other streams that used the tensor. O(streams)."""
        if not self._has_streams:
            return
        stream = current_stream(self._tensor.device)
        if stream is None or self._streams == (stream,):
            return
        # A graph must not wait for work outside of it: its owner orders the replays.
        if is_capturing():
            return
        with self._lock:
            if stream not in self._streams:
                self._streams = (*self._streams, stream)
                keep_for(self._tensor, stream)
            for other in self._streams:
                if other != stream:
                    stream.wait_stream(other)

    def replace(self, tensor: Tensor) -> None:
        """Let all streams use `tensor`, filled by the current stream. O(streams).

        Call `enter` before the current stream reads the old tensor.
        """
        stream = current_stream(tensor.device)
        with self._lock:
            self._tensor = tensor
            for other in self._streams:
                keep_for(tensor, other)
                if stream is not None and other != stream:
                    other.wait_stream(stream)


class HostReads:
    """Copies to a GPU that still read host memory, which must not be written until they end."""

    def __init__(self) -> None:
        self._events: list[torch.cuda.Event] = []

    def note(self, event: torch.cuda.Event) -> None:
        """Remember a copy that ends with `event`. O(unfinished copies)."""
        self._events = [each for each in self._events if not each.query()] + [event]

    def wait(self) -> None:
        """Wait until all copies have ended. O(1) if there are none."""
        for event in self._events:
            event.synchronize()
        self._events = []

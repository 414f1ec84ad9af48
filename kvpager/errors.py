"""The errors of kvpager.

    KVPagerError
    ├── OutOfBlocks          a tier has too few blocks; nothing changed
    │   └── OutOfQuota       a namespace would exceed its quota; nothing changed
    ├── StaleSequence        the handle was freed, or belongs to another manager
    ├── SequenceSwapped      the sequence is in host memory; swap it back first
    ├── QueueFull            the request queue is full; retry later
    ├── EngineClosed         the engine is closed
    ├── RequestCancelled     a request was cancelled, its stream dropped, or its engine closed
    ├── RequestExpired       the deadline of a request passed
    ├── RequestFailed        a request could not be computed; see its `__cause__`
    ├── BrokenInvariant      `check()` found inconsistent state: a bug, never an operating error
    └── BadInput             a command got invalid input

Invalid arguments raise `ValueError` or `TypeError`. The message names the argument and what is
expected, such as `count=0: expected at least 1`.
A transformers release newer than every tested one gives an `UntestedReleaseWarning`.
"""

from __future__ import annotations

from typing import Any


class KVPagerError(Exception):
    """Base of all errors raised by kvpager."""


class OutOfBlocks(KVPagerError):
    """A tier has too few blocks for an operation. Nothing changed.

    Attributes: `need`, `free`, `evictable` and `total`, in blocks; `tier` and `advice`. `missing`
    is how many more blocks must be freed: pass it to `BlockManager.victims` as `need`.
    """

    def __init__(
        self,
        need: int,
        free: int,
        evictable: int,
        total: int,
        tier: str = "device",
        advice: str = "free a sequence or raise num_blocks",
        missing: int | None = None,
        message: str | None = None,
    ) -> None:
        in_blocks = (
            f"need {need} {tier} block{'s' if need != 1 else ''}, {free} free, "
            f"{evictable} evictable of {total}; {advice}"
        )
        super().__init__(in_blocks if message is None else message)
        self.need = need
        self.free = free
        self.evictable = evictable
        self.total = total
        self.tier = tier
        self.advice = advice
        self.missing = max(need - free - evictable, 0) if missing is None else missing

    def __reduce__(self) -> tuple[type[OutOfBlocks], tuple[object, ...]]:
        # By default an exception is rebuilt from its message alone.
        made_from = (self.need, self.free, self.evictable, self.total, self.tier, self.advice)
        return type(self), (*made_from, self.missing, str(self))


class OutOfQuota(OutOfBlocks):
    """A namespace would exceed its quota. Nothing changed.

    Attributes: `namespace`, and the attributes of `OutOfBlocks`.
    """

    def __init__(self, namespace: str | None, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.namespace = namespace

    def __reduce__(self) -> tuple[type[OutOfQuota], tuple[object, ...]]:
        _, made_from = super().__reduce__()
        return type(self), (self.namespace, *made_from)


class StaleSequence(KVPagerError):
    """A sequence handle was used after `free`, or with another manager."""


class SequenceSwapped(KVPagerError):
    """The operation needs the sequence on the device, but it is on the host."""


class QueueFull(KVPagerError):
    """The request queue is full: the scheduler takes no more waiting requests. Nothing changed.

    Attributes: `num_waiting`, `max_queue_size`.
    """

    def __init__(self, num_waiting: int, max_queue_size: int) -> None:
        super().__init__(
            f"request queue is full (max_queue_size={max_queue_size}). "
            "Retry later or raise max_queue_size."
        )
        self.num_waiting = num_waiting
        self.max_queue_size = max_queue_size

    def __reduce__(self) -> tuple[type[QueueFull], tuple[int, int]]:
        return type(self), (self.num_waiting, self.max_queue_size)


class BrokenInvariant(KVPagerError):
    """The manager's state is inconsistent. The message names the broken invariant."""


def require(holds: bool, invariant: str) -> None:
    """Raise `BrokenInvariant` with the message `invariant` unless it `holds`. O(1)."""
    if not holds:
        raise BrokenInvariant(invariant)


class EngineClosed(KVPagerError):
    """The engine is closed."""


class RequestCancelled(KVPagerError):
    """The request was cancelled, its stream was dropped, or its engine was closed first.

    `Stream.result` and iteration also raise it after the caller's own `Stream.cancel`.
    """


class RequestExpired(KVPagerError):
    """The request's deadline passed before it finished."""


class RequestFailed(KVPagerError):
    """The request could not be computed. `__cause__` is the error."""


class UntestedReleaseWarning(UserWarning):
    """The installed transformers is newer than every tested release."""


class BadInput(KVPagerError):
    """A command got an input that its user can correct. The message is one line."""

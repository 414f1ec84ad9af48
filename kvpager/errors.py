"""Every error kvpager raises on purpose.

    KVPagerError
    ├── OutOfBlocks          a tier has too few blocks left; nothing has changed
    │   └── OutOfQuota       a namespace may not have the blocks, whatever the tier has left
    ├── StaleSequence        the handle was freed, or belongs to another manager
    ├── SequenceSwapped      the sequence is in host memory; swap it back first
    ├── QueueFull            as many requests wait as may; submit it again later
    ├── EngineClosed         the engine takes no requests any more
    ├── RequestCancelled     a request ended early: cancelled, its stream dropped, its engine closed
    ├── RequestExpired       a request was not done by its deadline
    ├── RequestFailed        a request could not be computed; why is its `__cause__`
    ├── BrokenInvariant      `check()` found the books wrong: a bug, never an operating condition
    └── BadInput             a command was given something that its user can correct

Bad arguments raise `ValueError` or `TypeError` with the value, the bound and what to do.
A transformers that is newer than every tested release gives an `UntestedReleaseWarning`.
"""

from __future__ import annotations

from typing import Any


class KVPagerError(Exception):
    """Base of all errors raised by kvpager."""


class OutOfBlocks(KVPagerError):
    """A tier cannot give the blocks an operation needs. Nothing has changed.

    Attributes: `need`, `free`, `evictable` and `total`, in blocks; `tier` and `advice`; `missing`,
    how many blocks more would have to be freed, such as `BlockManager.victims` is asked for.
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
        # Exceptions are rebuilt from their message, which is not what this one is made from.
        made_from = (self.need, self.free, self.evictable, self.total, self.tier, self.advice)
        return type(self), (*made_from, self.missing, str(self))


class OutOfQuota(OutOfBlocks):
    """A namespace would pass the ceiling of its quota. Nothing has changed.

    Attributes: `namespace`, and those of `OutOfBlocks`.
    """

    def __init__(self, namespace: str | None, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.namespace = namespace

    def __reduce__(self) -> tuple[type[OutOfQuota], tuple[object, ...]]:
        _, made_from = super().__reduce__()
        return type(self), (self.namespace, *made_from)


class StaleSequence(KVPagerError):
    """A sequence handle was used after `free`, or with a manager that did not make it."""


class SequenceSwapped(KVPagerError):
    """The operation needs a sequence on the device, and this one is on the host."""


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
    """The manager's books contradict themselves. The message names the broken law."""


class EngineClosed(KVPagerError):
    """The engine takes no requests any more."""


class RequestCancelled(KVPagerError):
    """The request was cancelled, by its owner or because the engine was closed."""


class RequestExpired(KVPagerError):
    """The request's deadline passed before it was done."""


class RequestFailed(KVPagerError):
    """The request could not be computed; the error it met is the cause (`__cause__`)."""


class UntestedReleaseWarning(UserWarning):
    """The installed transformers is newer than every release that kvpager was tested with."""


class BadInput(KVPagerError):
    """A command was given an input that its user can correct. The text is one line."""

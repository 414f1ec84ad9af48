"""Requests, as a caller hands them in, and what a scheduler knows of those that live.

A request begins as one row. Each time a row's logits choose, it goes on once, several times or not
at all, so a request may have several rows; each is a *sample* with a number of its own:

    number      0      1      2        lengths: tokens that have room in the pool
    lengths    33     34      -        computed: leading tokens whose KV is written
    pending   871      9      -        the token chosen last, which has no room yet
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
from numpy.typing import NDArray

from kvpager import _validate as arguments
from kvpager.blocks.ragged import Ragged
from kvpager.blocks.sequences import Sequence
from kvpager.errors import BrokenInvariant
from kvpager.plans import Reason

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]

NOBODY = -1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """A prompt to be continued, and how.

    Args:
        name: whatever the caller calls it; no two live requests have the same.
        prompt: token ids, at least one.
        max_new_tokens: no row gets more; what a request may ever need goes by it.
        num_samples: how many rows it may have at a time, at the most (parallel sampling, beams).
        together: its rows are always in the same step, as beams need.
        namespace: only prefixes of the same namespace and adapter are reused.
        adapter: which fine-tuned weights compute it.
        tenant: whom the order `"fair"` charges for it.
        priority: lower goes first, under the order `"priority"`.
        deadline: when to end it, on the scheduler's clock, running or not.
    """

    name: Hashable
    prompt: Int32
    max_new_tokens: int
    num_samples: int = 1
    together: bool = False
    namespace: str | None = None
    adapter: str | None = None
    tenant: str | None = None
    priority: int = 0
    deadline: float | None = None


class State(Enum):
    """Where a live request is."""

    WAITING = auto()  # not begun
    RUNNING = auto()  # on the device
    SWAPPED = auto()  # preempted; its blocks are on the host
    DROPPED = auto()  # preempted; its blocks were given back


class Live:
    """A request from `submit` to its end."""

    __slots__ = (
        "arrival",
        "ending",
        "generation",
        "is_ready",
        "leader",
        "prompt",
        "request",
        "samples",
        "shared",
        "state",
        "submitted",
    )

    def __init__(
        self, request: Request, prompt: Int32, arrival: int, submitted: float, generation: int = 0
    ) -> None:
        self.request = request
        self.prompt = prompt
        self.arrival = arrival
        self.generation = generation  # of the prefixes it may share
        self.submitted = submitted
        self.state = State.WAITING
        self.samples: list[int] = []
        self.is_ready = False  # all rows have all their tokens computed: they may decode
        self.ending: Reason | None = None  # what it ends with when the step it is in is over
        self.leader: Live | None = None  # who computes the beginning of its prompt
        self.shared = 0  # so many tokens of it

    @property
    def name(self) -> Hashable:
        """What the caller calls it."""
        return self.request.name

    @property
    def identity(self) -> tuple[str | None, str | None]:
        """Return whose prefixes it may share."""
        # A caller's NULs are doubled: no adapter's name ends like one with a generation.
        adapter = self.request.adapter and self.request.adapter.replace("\0", "\0\0")
        if self.generation:
            adapter = f"{adapter or ''}\0{self.generation}"
        return self.request.namespace, adapter


class Samples:
    """The rows of all live requests, by number: a structure of arrays.

    A number is given again only after the plan that told of its end was followed by another.
    """

    def __init__(self) -> None:
        self.lengths: Int32 = np.zeros(0, np.int32)
        self.computed: Int32 = np.zeros(0, np.int32)
        self.pending: Int32 = np.zeros(0, np.int32)
        self.generated: Int32 = np.zeros(0, np.int32)
        self.limits: Int32 = np.zeros(0, np.int32)
        self.behind: Int32 = np.zeros(0, np.int32)  # who computes what it begins with, or NOBODY
        self.history = Ragged(0)  # tokens generated, the pending one last
        self.handles: list[Sequence | None] = []
        self.owners: list[Live | None] = []
        self._free: list[int] = []
        self._ended: list[int] = []
        self._reported: list[int] = []

    # ---------------------------------------------------------------- samples come and go

    def add(self, live: Live) -> int:
        """A new sample, the first of `live`. O(1)."""
        number = self._take(live)
        self.lengths[number] = self.computed[number] = self.generated[number] = 0
        self.limits[number] = live.request.max_new_tokens
        self.behind[number] = NOBODY
        live.samples.append(number)
        return number

    def fork(self, parent: int, handle: Sequence) -> int:
        """A sample that has had the same life as `parent`, whose owner lists it behind.

        O(tokens generated).
        """
        live = self.owner(parent)
        number = self._take(live)
        for column in (self.lengths, self.computed, self.generated, self.limits, self.behind):
            column[number] = column[parent]
        count = int(self.generated[parent])
        self.history.reserve_row(number, count)
        self.history.row(number)[:count] = self.history.row(parent)[:count]
        self.handles[number] = handle
        return number

    def _take(self, live: Live) -> int:
        if not self._free:
            self._grow(max(8, len(self.owners)))
        number = self._free.pop()
        self.owners[number] = live
        return number

    def _grow(self, more: int) -> None:
        count = len(self.owners)
        for name in ("lengths", "computed", "pending", "generated", "limits", "behind"):
            setattr(self, name, np.concatenate([getattr(self, name), np.zeros(more, np.int32)]))
        self.history.add_rows(more)
        self.handles.extend([None] * more)
        self.owners.extend([None] * more)
        self._free.extend(range(count + more - 1, count - 1, -1))

    def take_back(self, live: Live) -> None:
        """Undo `add`: nobody has heard of the number. O(1)."""
        number = live.samples.pop()
        self.owners[number] = None
        self._free.append(number)

    def drop(self, number: int) -> None:
        """End a sample. Amortised O(1)."""
        self.history.release(number)
        self.owners[number] = self.handles[number] = None
        self._ended.append(number)

    def recycle(self) -> None:
        """Numbers whose end was told may be given again. O(numbers)."""
        self._free.extend(self._reported)
        self._reported.clear()

    def report(self) -> Int32:
        """Those that ended since the last call. O(numbers)."""
        ended = np.array(self._ended, np.int32)
        self._reported.extend(self._ended)
        self._ended.clear()
        return ended

    @property
    def has_ended(self) -> bool:
        """Whether `report` has any to tell of."""
        return bool(self._ended)

    # ---------------------------------------------------------------- tokens

    def extend(self, numbers: Int32, tokens: Int32) -> None:
        """Each of these samples goes on with a token. O(numbers)."""
        index = numbers.astype(np.intp)
        counts = self.generated[index]
        self.history.reserve(index, counts + 1)
        self.history.data[self.history.starts[index] + counts] = tokens
        self.generated[index] = counts + 1
        self.pending[index] = tokens

    def owner(self, number: int) -> Live:
        """Whose sample it is."""
        live = self.owners[number]
        assert live is not None, f"sample {number} is not live"
        return live

    def handle(self, number: int) -> Sequence:
        """The manager's handle; there is one unless the request waits or was dropped."""
        handle = self.handles[number]
        assert handle is not None, f"sample {number} has no sequence"
        return handle

    def num_known(self, number: int) -> int:
        """Tokens to be computed before the sample can go on: all but the pending one. O(1)."""
        generated = int(self.generated[number])
        return len(self.owner(number).prompt) + max(generated - 1, 0)

    def tokens(self, number: int, start: int, stop: int) -> Int32:
        """The ids of tokens `start` to `stop`, the prompt's first. O(tokens)."""
        prompt = self.owner(number).prompt
        if stop <= len(prompt):
            return prompt[start:stop]
        late = self.history.row(number)[max(start - len(prompt), 0) : stop - len(prompt)]
        return np.concatenate([prompt[start:], late])

    def num_common(self, one: int, other: int) -> int:
        """How many leading known tokens two samples of a request have in common. O(tokens)."""
        num_prompt = len(self.owner(one).prompt)
        count = min(self.num_known(one), self.num_known(other)) - num_prompt
        mine, theirs = self.history.row(one)[:count], self.history.row(other)[:count]
        differs = (mine != theirs).nonzero()[0]
        return num_prompt + (int(differs[0]) if len(differs) else count)

    def check(self, lives: Iterable[Live]) -> None:
        """Raise `BrokenInvariant` unless each number is one live request's, or free. O(n)."""
        mine = [(number, live) for live in lives for number in live.samples]
        away = [*self._free, *self._ended, *self._reported]
        if sorted([number for number, _ in mine] + away) != list(range(len(self.owners))):
            raise BrokenInvariant("samples: a number is used twice, or lost")
        if any(self.owners[number] is not live for number, live in mine):
            raise BrokenInvariant("samples: a number is listed by another than its owner")
        if any(self.owners[number] or self.handles[number] for number in away):
            raise BrokenInvariant("samples: one that ended has an owner or blocks")


def read_prompt(request: Request) -> Int32:
    """Return a copy of the prompt's ids, once all of the request is found right. O(tokens).

    Raises: `TypeError`, `ValueError`.
    """
    if not isinstance(request, Request):
        raise TypeError(f"expected a Request, got {type(request).__name__}")
    hash(request.name)
    prompt = arguments.token_ids(request.prompt).copy()
    if not len(prompt):
        raise ValueError(f"request {request.name!r}: the prompt is empty; give at least one token")
    arguments.count("max_new_tokens", request.max_new_tokens, at_least=1)
    arguments.count("num_samples", request.num_samples, at_least=1)
    for name in ("namespace", "adapter", "tenant"):
        arguments.label(name, getattr(request, name))
    arguments.flag("together", request.together)
    most = arguments.PRIORITY_MAX
    arguments.count("priority", request.priority, at_least=-most, at_most=most)
    if request.deadline is not None:  # on the scheduler's clock, which may begin anywhere
        far = float(2**53)
        arguments.number("deadline", request.deadline, at_least=-far, at_most=far)
    return prompt


def blocks_needed(request: Request, num_prompt: int, block_size: int) -> int:
    """The most blocks a request can come to hold when nothing but its prompt is shared. O(1)."""
    shared = num_prompt // block_size
    # The last token is chosen, and nothing is computed with it.
    longest = -(-(num_prompt + request.max_new_tokens - 1) // block_size)
    return shared + request.num_samples * (longest - shared)

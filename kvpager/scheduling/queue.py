"""Scheduling policies, which decide who is served first: `fifo`, `priority` and `fair`.

A policy ranks all live requests, and keeps the waiting ones. The lowest rank goes first; when
there is no room, the highest leaves. Under each policy every request comes to be the first at last,
whatever is submitted after it: that, and that the first is never preempted, is why nothing starves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator
from heapq import heapify, heappop, heapreplace

from kvpager import _validate as arguments
from kvpager._validate import SECONDS_MAX
from kvpager.errors import BrokenInvariant
from kvpager.scheduling.request import RequestState, Status

Rank = tuple[float, int]


class SchedulingPolicy(ABC):
    """Ranks all live requests, and keeps the waiting ones in queues.

    Attributes:
        num_waiting: how many requests wait.
    """

    def __init__(self) -> None:
        self._queues: dict[str | None, list[tuple[Rank, RequestState]]] = {}
        self.num_waiting = 0

    @abstractmethod
    def rank(self, state: RequestState) -> Rank:
        """Return the rank: the lowest is served first, and no two requests have the same. O(1)."""

    def enter(self, state: RequestState) -> None:  # noqa: B027
        """Take note of a request that was submitted. O(1)."""

    def leave(self, state: RequestState) -> None:  # noqa: B027
        """Take note of a request that ended. O(1)."""

    def charge(self, state: RequestState, prompt: int, decoded: int) -> None:  # noqa: B027
        """Charge a request for the tokens that a step computes for it. O(1)."""

    def queue_of(self, state: RequestState) -> str | None:
        """Return the queue to wait in. Within one queue, ranks never change places. O(1)."""
        return None

    def place(self, state: RequestState) -> Rank:
        """Return the place in its queue. O(1)."""
        return self.rank(state)

    # ---------------------------------------------------------------- waiting

    def push(self, state: RequestState) -> None:
        """Let a request wait. O(waiting) memory moved, a few microseconds for 10,000."""
        insort(self._queues.setdefault(self.queue_of(state), []), (self.place(state), state))
        self.num_waiting += 1

    def remove(self, state: RequestState) -> None:
        """Take a request out of its queue. O(waiting)."""
        name = self.queue_of(state)
        queue = self._queues[name]
        place = self.place(state)
        del queue[bisect_left(queue, place, key=lambda entry: entry[0])]
        if not queue:
            del self._queues[name]
        self.num_waiting -= 1

    def check(self) -> None:
        """Raise `BrokenInvariant` unless the queues are in order. O(waiting)."""
        queues = self._queues.values()
        if sum(map(len, queues)) != self.num_waiting or not all(queues):
            raise BrokenInvariant(
                f"policy: num_waiting is {self.num_waiting}, but the queues differ"
            )
        for queue in queues:
            places = [self.place(state) for _, state in queue]
            if places != sorted(places) or any(
                state.status is not Status.WAITING for _, state in queue
            ):
                raise BrokenInvariant(
                    "policy: a queue is out of order, or holds a request that does not wait"
                )

    def waiting(self) -> Iterator[RequestState]:
        """Yield the waiting requests by rank. O(queues), then O(log queues) each.

        Meanwhile the one that was yielded may be removed, and the ranks in its queue may change.
        """
        passed = Counter[str | None]()
        heads = [
            (self.rank(queue[0][1]), number, name)
            for number, (name, queue) in enumerate(self._queues.items())
        ]
        heapify(heads)
        while heads:
            _, number, name = heads[0]
            at = passed[name]
            state = self._queues[name][at][1]
            yield state
            queue = self._queues.get(name, [])
            if at < len(queue) and queue[at][1] is state:
                at = passed[name] = at + 1
            if at < len(queue):
                heapreplace(heads, (self.rank(queue[at][1]), number, name))
            else:
                heappop(heads)


class Fifo(SchedulingPolicy):
    """By arrival."""

    def rank(self, state: RequestState) -> Rank:  # noqa: D102
        return 0.0, state.arrival


class Priority(SchedulingPolicy):
    """Lower priority numbers first; `ageing` seconds of waiting are worth one.

    All grow old equally fast, so ranks stand still: priority + when submitted / ageing.
    """

    def __init__(self, ageing: float = 30.0) -> None:
        super().__init__()
        self.ageing = arguments.number("ageing", ageing, at_least=1e-6, at_most=SECONDS_MAX)

    def rank(self, state: RequestState) -> Rank:  # noqa: D102
        return state.request.priority + state.submitted / self.ageing, state.arrival


class Fair(SchedulingPolicy):
    """The tenant with the least service first, as in VTC (Sheng et al., 2024).

    Service is tokens computed, those decoded counting for `decode_weight`; what is computed again
    after a preemption is not charged. A tenant who was away begins with the least service of those
    who are not, so that nobody collects credit. `ageing` tokens of service are forgiven for each
    second of waiting: otherwise ever new tenants could keep an old one waiting for good.
    """

    def __init__(self, decode_weight: float = 2.0, ageing: float = 10.0) -> None:
        super().__init__()
        self.decode_weight = arguments.number(
            "decode_weight", decode_weight, at_least=0, at_most=1e6
        )
        self.ageing = arguments.number("ageing", ageing, at_least=0, at_most=1e9)
        self.service: dict[str | None, float] = {}
        self._active = Counter[str | None]()
        self._last = 0.0  # the service of who left last, when nobody is active

    def rank(self, state: RequestState) -> Rank:  # noqa: D102
        return self.service[state.request.tenant] + state.submitted * self.ageing, state.arrival

    def queue_of(self, state: RequestState) -> str | None:  # noqa: D102
        return state.request.tenant

    def place(self, state: RequestState) -> Rank:  # noqa: D102
        return 0.0, state.arrival

    def enter(self, state: RequestState) -> None:  # noqa: D102
        tenant = state.request.tenant
        if not self._active[tenant]:
            self.service[tenant] = max(self.service.get(tenant, 0.0), self._least())
        self._active[tenant] += 1

    def leave(self, state: RequestState) -> None:  # noqa: D102
        tenant = state.request.tenant
        self._active[tenant] -= 1
        if not self._active[tenant]:
            del self._active[tenant]
            self._last = max(self._last, self.service[tenant])
            self._forget()

    def _least(self) -> float:
        active = [self.service[tenant] for tenant, count in self._active.items() if count]
        return min(active, default=self._last)

    def _forget(self) -> None:
        """Leave out who would be lifted in any case: tenants may be many."""
        if len(self.service) > 2 * len(self._active) + 64:
            least = self._least()
            self.service = {
                tenant: service
                for tenant, service in self.service.items()
                if self._active[tenant] or service > least
            }

    def charge(self, state: RequestState, prompt: int, decoded: int) -> None:  # noqa: D102
        self.service[state.request.tenant] += prompt + self.decode_weight * decoded


POLICIES: dict[str, type[Fifo] | type[Priority] | type[Fair]] = {
    "fifo": Fifo,
    "priority": Priority,
    "fair": Fair,
}


def make_policy(policy: str | SchedulingPolicy) -> SchedulingPolicy:
    """Return the policy of this name, or the given one.

    Raises: `ValueError` for an unknown name or a policy that a scheduler uses; `TypeError`.
    """
    if isinstance(policy, SchedulingPolicy):
        if policy.num_waiting:
            raise ValueError(
                "policy: another scheduler uses it. Give each scheduler its own policy."
            )
        return policy
    if not isinstance(policy, str):
        raise TypeError(f"policy={policy!r}: expected a name or a SchedulingPolicy.")
    if policy not in POLICIES:
        raise ValueError(
            f"policy={policy!r}: expected one of {', '.join(POLICIES)}, or a SchedulingPolicy."
        )
    return POLICIES[policy]()

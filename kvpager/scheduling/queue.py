"""Scheduling policies: `fifo`, `priority` and `fair`.

A policy ranks all live requests, and keeps the waiting ones. The request with the lowest rank is
served first; the request with the highest rank is preempted first.

No request starves. Under each policy every request eventually ranks first, whatever is submitted
after it, and the first request is never preempted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator
from heapq import heapify, heappop, heapreplace

from kvpager import _validate as arguments
from kvpager._text import listed
from kvpager._validate import SECONDS_MAX
from kvpager.errors import require
from kvpager.scheduling.request import Request, RequestState, Status

Rank = tuple[float, int]

# Fields of a request that only some policies use -> the built-in policy that does, the default.
_USED_BY: dict[str, tuple[str, object]] = {"tenant": ("fair", None), "priority": ("priority", 0)}


class SchedulingPolicy(ABC):
    """Ranks all live requests, and keeps the waiting ones in queues.

    Attributes:
        num_waiting: how many requests wait.
        ranks_by: which of a request's fields `tenant` and `priority` matter. A request with
            another one is refused.
    """

    ranks_by: frozenset[str] = frozenset(_USED_BY)

    def __init__(self) -> None:
        self._queues: dict[str | None, list[tuple[Rank, RequestState]]] = {}
        self.num_waiting = 0

    @abstractmethod
    def rank(self, state: RequestState) -> Rank:
        """Return the rank of a request. The lowest is served first; ranks are unique. O(1)."""

    def refuse_ignored(self, request: Request) -> None:
        """Raise `ValueError` for a field of `request` that changes nothing. O(1)."""
        for name in _USED_BY.keys() - self.ranks_by:
            value, (policy, default) = getattr(request, name), _USED_BY[name]
            if value != default:
                raise ValueError(
                    f"{name}={value!r}: the scheduling policy ignores it. Leave it out, or make "
                    f'the scheduler or engine with policy="{policy}".'
                )

    def enter(self, state: RequestState) -> None:  # noqa: B027
        """Record that a request was submitted. O(1)."""

    def leave(self, state: RequestState) -> None:  # noqa: B027
        """Record that a request ended. O(1)."""

    def charge(self, state: RequestState, prompt: int, decoded: int) -> None:  # noqa: B027
        """Charge a request for `prompt` and `decoded` tokens of a step. O(1)."""

    def queue_of(self, state: RequestState) -> str | None:
        """Return the queue of a request. Within a queue the order never changes. O(1)."""
        return None

    def place(self, state: RequestState) -> Rank:
        """Return the sort key of a request within its queue. O(1)."""
        return self.rank(state)

    # ---------------------------------------------------------------- waiting

    def push(self, state: RequestState) -> None:
        """Add a waiting request. O(waiting) memory moved: microseconds for 10,000 requests."""
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
        queues, count = self._queues.values(), self.num_waiting
        is_right = sum(map(len, queues)) == count and all(queues)
        require(is_right, f"policy: num_waiting is {count}, but the queues differ")
        for queue in queues:
            places = [self.place(state) for _, state in queue]
            require(places == sorted(places), "policy: a queue is out of order")
            is_right = all(state.status is Status.WAITING for _, state in queue)
            require(is_right, "policy: a queue holds a request that is not waiting")

    def waiting(self) -> Iterator[RequestState]:
        """Yield the waiting requests by rank. O(queues), then O(log queues) each.

        The caller may remove the yielded request, and the ranks of its queue may change meanwhile.
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
    """Ranks requests by arrival."""

    ranks_by = frozenset()

    def rank(self, state: RequestState) -> Rank:  # noqa: D102
        return 0.0, state.arrival


class Priority(SchedulingPolicy):
    """Ranks requests by priority, lower first. Ties go by arrival.

    `ageing` seconds of waiting lower a priority by one, so no request starves. All requests age
    equally, so the rank is constant: priority + time of submission / ageing.

    Raises: `TypeError`, `ValueError` for an `ageing` below 1e-6.
    """

    ranks_by = frozenset({"priority"})

    def __init__(self, ageing: float = 30.0) -> None:
        super().__init__()
        self.ageing = arguments.number("ageing", ageing, at_least=1e-6, at_most=SECONDS_MAX)

    def rank(self, state: RequestState) -> Rank:  # noqa: D102
        return state.request.priority + state.submitted / self.ageing, state.arrival


class Fair(SchedulingPolicy):
    """Serves the tenant with the least service first, as in VTC (Sheng et al., 2024).

    Service counts prompt tokens once and decoded tokens `decode_weight` times. Recomputed tokens
    are free. A tenant that returns starts with the least service of the active tenants, so idle
    tenants collect no credit. Each second of waiting forgives `ageing` tokens of service;
    otherwise a stream of new tenants could starve an old one.

    Raises: `TypeError`, `ValueError` for arguments below 0.
    """

    ranks_by = frozenset({"tenant"})

    def __init__(self, decode_weight: float = 2.0, ageing: float = 10.0) -> None:
        super().__init__()
        number = arguments.number
        self.decode_weight = number("decode_weight", decode_weight, at_least=0, at_most=1e6)
        self.ageing = number("ageing", ageing, at_least=0, at_most=1e9)
        self.service: dict[str | None, float] = {}
        self._active = Counter[str | None]()
        self._last = 0.0  # the most service of any tenant that became idle

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
        """Drop idle tenants that would start with the least service anyway. O(tenants)."""
        if len(self.service) > 2 * len(self._active) + 64:
            least = self._least()
            self.service = {
                tenant: service
                for tenant, service in self.service.items()
                if self._active[tenant] or service > least
            }

    def charge(self, state: RequestState, prompt: int, decoded: int) -> None:  # noqa: D102
        self.service[state.request.tenant] += prompt + self.decode_weight * decoded


POLICIES: dict[str, type[Fifo | Priority | Fair]]
POLICIES = {"fifo": Fifo, "priority": Priority, "fair": Fair}


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
            f"policy={policy!r}: expected one of {listed(POLICIES)}, or a SchedulingPolicy."
        )
    return POLICIES[policy]()

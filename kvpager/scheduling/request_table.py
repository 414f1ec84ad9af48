"""The live requests by place: waiting, running or preempted; and the requests that ended."""

from __future__ import annotations

from collections.abc import Hashable
from heapq import heapify, heappop, heappush

from kvpager.blocks.sequences import SequenceHandle
from kvpager.errors import require
from kvpager.plans import Int32, Reason
from kvpager.scheduling.queue import SchedulingPolicy
from kvpager.scheduling.request import Request, RequestState, Status
from kvpager.scheduling.sequence_state import SequenceState


class RequestTable:
    """The requests of one scheduler. It knows no blocks: callers free them first."""

    def __init__(self, policy: SchedulingPolicy, max_num_seqs: int) -> None:
        self.policy = policy  # ranks the live requests, and keeps the waiting ones
        self.sequences = SequenceState()  # of all requests
        self.live: dict[Hashable, RequestState] = {}  # by id, in order of arrival
        self.running: list[RequestState] = []  # in the order in which they started or resumed
        self.preempted: list[RequestState] = []  # swapped or dropped; they will resume
        self.num_seqs_reserved = 0  # the sum of `n` over the running requests
        self.max_num_seqs = max_num_seqs
        self.cache_version = 0  # of the cached prefixes that new requests may share
        self.version = 0  # changes whenever the set of decoding sequences may have changed
        self._deadlines: list[tuple[float, int, RequestState]] = []  # a heap; may hold ended ones
        self._ended: dict[Hashable, Reason] = {}  # not reported yet
        self._num_submitted = 0

    # ---------------------------------------------------------------- reading

    def is_known(self, request_id: Hashable) -> bool:
        """Return True if a request with this id is live or its end is not reported yet. O(1)."""
        return request_id in self.live or request_id in self._ended

    def has_room_for(self, state: RequestState) -> bool:
        """Return True if all `n` sequences of a request may run now. O(1)."""
        return self.num_seqs_reserved + state.request.n <= self.max_num_seqs

    @property
    def has_ended(self) -> bool:
        """True if requests or sequences ended since the last plan. O(1)."""
        return bool(self._ended or self.sequences.ended)

    def count_seqs(self) -> int:
        """Return the number of sequences of the running requests. O(running)."""
        return sum(len(state.seq_ids) for state in self.running)

    # ---------------------------------------------------------------- add and end

    def add(self, request: Request, prompt: Int32, now: float) -> None:
        """Add a waiting request. O(waiting) memory moved."""
        state = RequestState(request, prompt, self._num_submitted, now, self.cache_version)
        self._num_submitted += 1
        self.live[request.request_id] = state
        self.policy.enter(state)
        self.policy.push(state)
        if request.deadline is not None:
            heappush(self._deadlines, (request.deadline, state.arrival, state))

    def end(self, state: RequestState, reason: Reason) -> None:
        """Remove a request whose blocks were freed. O(sequences + waiting)."""
        for seq_id in state.seq_ids:
            self.sequences.drop(seq_id)
        state.seq_ids.clear()
        if state.status is Status.WAITING:
            self.policy.remove(state)
        elif state.status is Status.RUNNING:
            self._leave(state)
        else:
            self.preempted.remove(state)
        self.policy.leave(state)
        del self.live[state.request_id]
        if len(self._deadlines) > 2 * len(self.live) + 64:  # most are of ended requests
            self._deadlines = [entry for entry in self._deadlines if self.is_live(entry[2])]
            heapify(self._deadlines)
        self._ended[state.request_id] = reason

    def take_expired(self, now: float) -> list[RequestState]:
        """Return the live requests whose deadline has passed. O(log requests) each."""
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now:
            state = heappop(self._deadlines)[2]
            if self.is_live(state):
                expired.append(state)
        return expired

    def is_live(self, state: RequestState) -> bool:
        """Return True unless the request has ended. O(1)."""
        return self.live.get(state.request_id) is state

    @property
    def unreported(self) -> list[tuple[Hashable, Reason]]:
        """The requests that ended since the last `take_ended`. O(requests)."""
        return [*self._ended.items()]

    def take_ended(self) -> list[tuple[Hashable, Reason]]:
        """Return the requests that ended since the last call, each with its reason. O(1)."""
        ended, self._ended = self._ended, {}
        return [*ended.items()]

    # ---------------------------------------------------------------- change of place

    def begin(self, state: RequestState) -> None:
        """Give a waiting request its first sequence. O(1).

        A waiting or dropped request holds nothing computed, so it may share current prefixes.
        """
        state.cache_version = self.cache_version
        if state.status is Status.WAITING:
            state.seq_ids.append(self.sequences.add(state))

    def undo_begin(self, state: RequestState) -> None:
        """Undo `begin` of a waiting request that found no blocks. O(1)."""
        if state.status is Status.WAITING:
            self.sequences.undo_add(state.seq_ids.pop())

    def enter(self, state: RequestState) -> None:
        """Make a request running, after its blocks were allocated or swapped in. O(waiting)."""
        if state.status is Status.WAITING:
            self.policy.remove(state)
        else:
            self.preempted.remove(state)
        state.status = Status.RUNNING
        self.running.append(state)
        self.num_seqs_reserved += state.request.n
        self.version += 1

    def preempt(self, state: RequestState, status: Status) -> None:
        """Record that a running request was swapped or dropped, or a swapped one dropped.

        O(running).
        """
        if state.status is Status.RUNNING:
            self._leave(state)
            self.preempted.append(state)
        state.status = status
        if status is Status.DROPPED:
            state.is_ready = False

    def _leave(self, state: RequestState) -> None:
        self.running.remove(state)
        self.num_seqs_reserved -= state.request.n
        self.version += 1

    def let_decode(self, state: RequestState) -> None:
        """Mark a request as ready if the prefill of all its sequences is done. O(sequences)."""
        mine, sequences = state.seq_ids, self.sequences
        state.is_ready = bool((sequences.computed[mine] == sequences.lengths[mine]).all())
        self.version += 1

    def new_cache_version(self) -> None:
        """Make waiting and new requests ignore every prefix cached so far. O(requests)."""
        self.cache_version += 1
        for state in self.live.values():
            if state.status is Status.WAITING:
                state.cache_version = self.cache_version

    # ---------------------------------------------------------------- sequences of a request

    def fork(self, parent: int, handles: list[SequenceHandle]) -> list[int]:
        """Add a sequence per handle after `parent`; return their ids. O(tokens)."""
        state = self.sequences.owner(parent)
        children = [self.sequences.fork(parent, handle) for handle in handles]
        at = state.seq_ids.index(parent) + 1
        state.seq_ids[at:at] = children
        self.version += 1
        return children

    def end_sequence(self, seq_id: int) -> None:
        """Remove one of several sequences, after its blocks were freed. O(sequences)."""
        self.sequences.owner(seq_id).seq_ids.remove(seq_id)
        self.sequences.drop(seq_id)
        self.version += 1

    # ---------------------------------------------------------------- invariants

    def check(self) -> None:
        """Recount the requests and their sequences. O(requests + sequences).

        Raises: `BrokenInvariant`, which names the broken invariant.
        """
        self.policy.check()
        running, preempted = (Status.RUNNING,), (Status.SWAPPED, Status.DROPPED)
        for states, allowed in ((self.running, running), (self.preempted, preempted)):
            for state in states:
                require(state.status in allowed, f"{_shown(state)}, but in another list")
        listed = self.policy.num_waiting + len(self.running) + len(self.preempted)
        num_live = len(self.live)
        require(listed == num_live, f"scheduler: {num_live} requests live, but lists hold {listed}")
        reserved = sum(state.request.n for state in self.running)
        require(
            reserved == self.num_seqs_reserved and reserved <= self.max_num_seqs,
            f"scheduler: num_seqs_reserved is {self.num_seqs_reserved} of at most "
            f"{self.max_num_seqs}, but running requests reserve {reserved}",
        )
        for state in self.live.values():
            self._check_state(state)
        self.sequences.check(self.live.values())

    def _check_state(self, state: RequestState) -> None:
        status, seq_ids, n = state.status, state.seq_ids, state.request.n
        what = _shown(state)
        require((status is Status.WAITING) == (not seq_ids), f"{what} with sequences {seq_ids}")
        require(len(seq_ids) <= n, f"{what} with {len(seq_ids)} sequences, but n={n}")
        has_blocks = status in (Status.RUNNING, Status.SWAPPED)
        handles = [self.sequences.handles[seq_id] for seq_id in seq_ids]
        is_right = all((handle is not None) == has_blocks for handle in handles)
        require(is_right, f"{what}, contrary to its blocks")


def _shown(state: RequestState) -> str:
    return f"scheduler: {state.request_id!r} is {state.status.name}"

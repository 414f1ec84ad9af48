"""A miniature language model that executes step plans: see `tests.support.serving_simulation`."""

from __future__ import annotations

from zlib import crc32

import numpy as np

from kvpager.blocks.protocol import CacheManager
from kvpager.plans import Int32, Int64, StepPlan
from kvpager.scheduling.request import Request
from kvpager.testing.memory import TokenMemory

VOCABULARY = 97
_MIX = 0x9E3779B97F4A7C15 - 2**64  # the golden ratio's fraction, as a signed number
_MASK = 2**63 - 1
Choice = tuple[int, int]  # row of the request, token


class SchedulerError(AssertionError):
    """An error of the scheduler."""


def values(salt: int, tokens: list[int]) -> Int64:
    """Return the values of tokens, int64 [tokens], by `salt`, token and position. O(tokens)."""
    positions = np.arange(1, len(tokens) + 1, dtype=np.int64)
    mixed = (np.array(tokens, np.int64) + 1) * np.int64(_MIX) + positions * np.int64(
        0x5851F42D4C957F
    )
    mixed ^= mixed >> 29
    return (mixed + np.int64(salt)) * np.int64(_MIX | 1)


def salt_of(request: Request) -> int:
    """Return a number that separates the values of namespaces and LoRAs. O(1)."""
    return crc32(repr((request.namespace, request.lora)).encode())


def has_beams(request: Request) -> bool:
    """Return True if the request's samples are beams: if its prompt's length is even. O(1)."""
    return request.n > 1 and len(request.prompt) % 2 == 0


def choose(request: Request, is_first: bool, seen: list[int]) -> list[Choice]:
    """Return the next tokens of a request's rows, which depend on the values that each row read.

    A beam continues several times, once or not at all. Other rows are independent: the first row is
    split into `n` samples, and some samples stop early.
    """
    if has_beams(request):
        number = sum(seen) * 31 % _MASK
        if number % 23 == 0:
            return []
        width = request.n
        parents = sorted((number >> (3 * at)) % len(seen) for at in range(width))
        return [(row, _token(seen[row], at)) for at, row in enumerate(parents)]
    if is_first:
        [own] = seen
        return [(0, _token(own, at)) for at in range(request.n)]
    return [(row, _token(own, 0)) for row, own in enumerate(seen) if own % 29]


def _token(seen: int, at: int) -> int:
    return (seen // 7 + at * 13) % VOCABULARY


def digest(read: Int64) -> int:
    """Return a number that depends on all values that a row read. O(values)."""
    return int(np.bitwise_xor.reduce(read * np.int64(3)) & np.int64(_MASK))


def reference(request: Request) -> list[list[int]]:
    """Return the expected new tokens of each sample, computed from the request alone."""
    salt, prompt = salt_of(request), request.prompt.tolist()
    rows, done = [list[int]()], []
    is_first = True
    while rows:
        seen = [digest(values(salt, prompt + row)) for row in rows]
        chosen = choose(request, is_first, seen)
        named = {row for row, _ in chosen}
        done += [row for at, row in enumerate(rows) if at not in named]
        rows = [[*rows[row], token] for row, token in chosen]
        done += [row for row in rows if len(row) == request.max_new_tokens]
        rows = [row for row in rows if len(row) < request.max_new_tokens]
        is_first = False
    return done


class SampleState:
    """The request, new tokens and end of a sample."""

    def __init__(self, request: Request, new: list[int]) -> None:
        self.request = request
        self.new = new
        self.has_ended = False

    @property
    def tokens(self) -> list[int]:
        """All tokens; the last one may not be computed yet."""
        return [*self.request.prompt.tolist(), *self.new]


class Model:
    """A model that executes step plans: its memory, and the expected values of every sample."""

    def __init__(self, manager: CacheManager) -> None:
        self.size = manager.block_size
        self.windows = manager.windows
        self.memory = TokenMemory(manager.num_blocks, self.size, manager.num_host_blocks)
        self.rows: dict[int, SampleState] = {}
        self.requests: dict[str, Request] = {}
        self.outputs: dict[str, list[list[int]]] = {}
        self.stopped: set[str] = set()
        self.has_begun: set[str] = set()

    def begin(self, request: Request) -> None:
        """Record that a request was submitted."""
        self.requests[str(request.request_id)] = request
        self.outputs[str(request.request_id)] = []

    def end(self, name: str) -> None:
        """Record that a request ended. None of its samples may be live."""
        if any(row.request.request_id == name for row in self.rows.values()):
            raise SchedulerError(f"{name} ended before all its samples were freed")
        del self.requests[name], self.outputs[name]
        self.has_begun.discard(name)
        self.stopped.discard(name)

    def forget(self, freed: Int32) -> None:
        """Record that samples ended."""
        for number in freed.tolist():
            if self.rows.pop(number, None) is None:
                raise SchedulerError(f"sample {number} was freed twice, or never existed")
        unreported = [number for number, row in self.rows.items() if row.has_ended]
        if unreported:
            raise SchedulerError(f"samples {unreported} ended, but no plan freed them")

    # ---------------------------------------------------------------- a step

    def apply(self, plan: StepPlan) -> None:
        """Apply the swaps, then the copies."""
        for swap in plan.swaps:
            self.memory.apply(swap)
        if len(np.unique(plan.copies[:, 1])) != len(plan.copies):
            raise SchedulerError(f"two copies into one block: {plan.copies.tolist()}")
        self.memory.copy(plan.copies)

    def fail_step(self, plan: StepPlan, upto: int) -> None:
        """Run a step up to stage `upto` (1 swaps, 2 copies, 3 writes) and leave it there."""
        self._check_rows(plan)
        if upto >= 1:
            for swap in plan.swaps:
                self.memory.apply(swap)
        if upto >= 2:
            self.memory.copy(plan.copies)
        if upto >= 3:
            for group in plan.groups:
                self.memory.write(group.slot_mapping, [-7] * len(group.slot_mapping))

    def step(self, plan: StepPlan) -> tuple[Int64, Int32]:
        """Compute a step. Return the continued rows and their next tokens."""
        self._check_rows(plan)
        self.apply(plan)
        # Check earlier values before any row of this step writes.
        for row in plan.num_computed.nonzero()[0].tolist():
            self._read(plan, row, int(plan.num_computed[row]))
        self._write(plan)
        seen = [self._read(plan, row, int(plan.seq_lens[row])) for row in range(len(plan))]
        chosen: list[Choice] = []
        for name in dict.fromkeys(map(str, plan.request_ids)):
            mine = [row for row in self._rows_of(plan, name) if plan.needs_logits[row]]
            if not mine:
                continue
            request = self.requests[name]
            is_first = name not in self.has_begun
            self.has_begun.add(name)
            choice = choose(request, is_first, [seen[row] for row in mine])
            chosen += [(mine[row], token) for row, token in choice]
        chosen.sort(key=lambda one: one[0])
        parents = np.array([row for row, _ in chosen], np.int64)
        return parents, np.array([token for _, token in chosen], np.int32)

    def _rows_of(self, plan: StepPlan, name: str) -> list[int]:
        return [row for row, other in enumerate(plan.request_ids) if other == name]

    def _check_rows(self, plan: StepPlan) -> None:
        """Check that each row is a sample of its request, and that all its samples take part."""
        if len(set(plan.seq_ids.tolist())) != len(plan):
            raise SchedulerError(f"a sample is in the step twice: {plan.seq_ids.tolist()}")
        slots = np.concatenate([group.slot_mapping for group in plan.groups])
        if len(np.unique(slots)) != len(slots) or slots.min() < 0:
            raise SchedulerError(f"a slot is written twice, or is negative: {slots.tolist()}")
        for number, name in zip(plan.seq_ids.tolist(), map(str, plan.request_ids), strict=True):
            if number not in self.rows:
                if name in self.has_begun or name not in self.requests:
                    raise SchedulerError(f"{name}: sample {number} was never created")
                self.rows[number] = SampleState(self.requests[name], [])
            if self.rows[number].request.request_id != name:
                raise SchedulerError(f"sample {number} is not one of {name}")
        for name in dict.fromkeys(map(str, plan.request_ids)):
            mine = [number for number, row in self.rows.items() if row.request.request_id == name]
            chooses = any(plan.needs_logits[self._rows_of(plan, name)])
            if chooses:
                present = [int(plan.seq_ids[row]) for row in self._rows_of(plan, name)]
                if sorted(mine) != sorted(present):
                    raise SchedulerError(f"{name}: {present} of {mine} are in the step")

    def _write(self, plan: StepPlan) -> None:
        at = 0
        for row, number in enumerate(plan.seq_ids.tolist()):
            known = self.rows[number].tokens
            start, count = int(plan.num_computed[row]), int(plan.num_scheduled[row])
            ids = plan.token_ids[at : at + count].tolist()
            if count < 1 or ids != known[start : start + count]:
                raise SchedulerError(f"sample {number}: {ids} at {start}, its tokens are {known}")
            if bool(plan.needs_logits[row]) != (start + count == len(known)):
                raise SchedulerError(
                    f"sample {number}: needs logits at {start + count} of {len(known)}"
                )
            if plan.seq_lens[row] != start + count:
                raise SchedulerError(
                    f"sample {number}: seq_lens is {plan.seq_lens[row]}, expected {start + count}"
                )
            new = values(salt_of(self.rows[number].request), known[: start + count])[start:]
            for group in plan.groups:
                self.memory.write(group.slot_mapping[at : at + count], new.tolist())
            at += count
        if at != len(plan.token_ids) or at != len(plan.slot_mapping):
            raise SchedulerError(
                f"{at} tokens in rows, {len(plan.token_ids)} ids, {len(plan.slot_mapping)} slots"
            )

    def _read(self, plan: StepPlan, row: int, length: int) -> int:
        """Read a row's first `length` tokens as each group of layers does. Return their digest."""
        sample = self.rows[int(plan.seq_ids[row])]
        expected = values(salt_of(sample.request), sample.tokens[:length])
        num_seen = int(plan.num_computed[row]) + 1  # tokens up to the first new one
        for group, window in zip(plan.groups, self.windows, strict=True):
            first = 0 if window is None else max(num_seen - window, 0) // self.size
            table = group.block_tables[row, first : -(-length // self.size)]
            if np.any(table < 0):
                raise SchedulerError(
                    f"sample {plan.seq_ids[row]}: no block for a token in its window: {table}"
                )
            found = self.memory.tiers["device"].take(table, axis=0).ravel()
            found, own = found[: length - first * self.size], expected[first * self.size :]
            if not np.array_equal(found, own):
                place = first * self.size + int((found != own).argmax())
                raise SchedulerError(
                    f"{sample.request.request_id}: token {place} of {length} reads back wrong"
                )
        return digest(expected)

    def complete(self, plan: StepPlan, parents: Int64, tokens: Int32, numbers: Int32) -> None:
        """Record that the scheduler completed a step with samples `numbers`."""
        if len(numbers) != len(parents):
            raise SchedulerError(f"{len(parents)} continuations, {len(numbers)} samples")
        before = {row: self.rows[number] for row, number in enumerate(plan.seq_ids.tolist())}
        named = set(parents.tolist())
        for row in plan.needs_logits.nonzero()[0].tolist():
            if row not in named:
                self._end(before[row], before[row].new)
        past = {row: one.new for row, one in before.items()}
        for row, token, number in zip(
            parents.tolist(), tokens.tolist(), numbers.tolist(), strict=True
        ):
            parent = before[row]
            name, new = str(parent.request.request_id), [*past[row], token]
            if name in self.stopped or len(new) == parent.request.max_new_tokens:
                if number >= 0:
                    raise SchedulerError(f"{name}: sample {number} should have ended with {new}")
                self._end(parent, new)
            elif number == plan.seq_ids[row]:
                parent.new = new
            elif number < 0 or number in self.rows:
                raise SchedulerError(
                    f"{name}: a fork of {plan.seq_ids[row]} became sample {number}"
                )
            else:
                self.rows[number] = SampleState(parent.request, new)

    def _end(self, row: SampleState, new: list[int]) -> None:
        row.has_ended = True
        self.outputs[str(row.request.request_id)].append(new)

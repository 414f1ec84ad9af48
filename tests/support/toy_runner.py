"""An engine without a model: tokens follow from what its blocks hold, in microseconds.

The state of a token is a hash of its id and of the state before it, as keys and values depend on
all tokens before. A row's next token is a hash of the states of all its tokens, read through its
block table. So a wrong table, slot, copy or swap gives wrong tokens.

Each rank has states of its own. The sum of the ranks' hashes gives the next token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np

from kvpager import BlockManager, Request, Scheduler, StepPlan
from kvpager.engine.core import EngineCore
from kvpager.engine.request_state import RequestSettings
from kvpager.engine.runner import Draw, Row
from kvpager.engine.stream import Stream
from kvpager.storage.tiers.tiering import Tiering

VOCABULARY = 1000
BLOCK_SIZE = 4
_BEFORE_ALL = 7  # the state of rank 0 before the first token


def _state(before: int, token: int) -> int:
    return crc32(token.to_bytes(4, "little"), before)


def _hash(states: Sequence[int]) -> int:
    return crc32(np.array(states, np.int64).tobytes())


def expected(prompt: Sequence[int], count: int, sample: int = 0, num_ranks: int = 1) -> list[int]:
    """Return the correct tokens of sample number `sample` of a request."""
    shards, tokens = [[_BEFORE_ALL + rank] for rank in range(num_ranks)], list[int]()
    for place in range(len(prompt) + count):
        if place >= len(prompt):
            first = sample if not tokens else 0
            hashes = sum(_hash(states[1:]) for states in shards)
            tokens.append((hashes + first) % VOCABULARY)
        token = prompt[place] if place < len(prompt) else tokens[-1]
        for states in shards:
            states.append(_state(states[-1], token))
    return tokens


class ToyRunner:
    """A `kvpager.engine.runner.Runner` over two arrays of blocks."""

    device_type = "none"
    block_bytes = 1 << 20

    def __init__(self, manager: BlockManager, rank: int = 0) -> None:
        shape = manager.block_size
        self._before_all = _BEFORE_ALL + rank
        self._device = np.full((manager.num_blocks, shape), -1, np.int64)
        self._host = np.full((manager.num_host_blocks, shape), -1, np.int64)
        self._hooks: list[Callable[[Any, Any], Any]] = []
        self.forks: list[tuple[int, int]] = []
        self.freed: list[int] = []
        self.prompts: dict[int, list[int]] = {}

    def register_forward_pre_hook(self, hook: Callable[[Any, Any], Any]) -> _Hook:
        """Call `hook` before each step with rows, like a module of torch."""
        self._hooks.append(hook)
        return _Hook(self._hooks, hook)

    def fork(self, parent: int, child: int) -> None:
        self.forks.append((parent, child))

    def run(self, plan: StepPlan, prompts: Mapping[int, list[int]]) -> list[int]:
        """Return the hash of each row that needs logits."""
        tiers = {"device": self._device, "host": self._host}
        for swap in plan.swaps:
            tiers[swap.destination][swap.copies[:, 1]] = tiers[swap.source][swap.copies[:, 0]]
        self._device[plan.copies[:, 1]] = self._device[plan.copies[:, 0]]
        self.freed += plan.freed.tolist()
        self.prompts.update(prompts)
        if len(plan):
            for hook in list(self._hooks):
                hook(self, ())
        first, hashes = 0, []
        for row, count in enumerate(plan.num_scheduled.tolist()):
            states = self._compute(plan, row, slice(first, first + count))
            first += count
            if plan.needs_logits[row]:
                hashes.append(_hash(states))
        return hashes

    def _compute(self, plan: StepPlan, row: int, tokens: slice) -> list[int]:
        """Write the states of a row's new tokens; return those of all its tokens."""
        slots = self._device.reshape(-1)
        table = plan.block_tables[row]
        start, length = int(plan.num_computed[row]), int(plan.seq_lens[row])
        places = np.arange(length)
        seen = table[places // BLOCK_SIZE] * BLOCK_SIZE + places % BLOCK_SIZE
        state = int(slots[seen[start - 1]]) if start else self._before_all
        for token, slot in zip(
            plan.token_ids[tokens].tolist(), plan.slot_mapping[tokens], strict=True
        ):
            slots[slot] = state = _state(state, token)
        states: list[int] = slots[seen].tolist()
        assert min(states) >= 0, "an unwritten slot is read"
        return states


class _Hook(NamedTuple):
    hooks: list[Any]
    hook: Any

    def remove(self) -> None:
        if self.hook in self.hooks:
            self.hooks.remove(self.hook)


class ToySampler:
    """A `kvpager.engine.runner.Sampler`. Token i of a row is the row's hash plus i.

    The `sampling` of a row is None, or a function of the row's ids that may raise.
    """

    def choose(self, logits: list[int], rows: Sequence[Row]) -> list[Draw]:
        return list(map(self._draw, logits, rows))

    def _draw(self, number: int, row: Row) -> Draw:
        try:
            if row.sampling is not None:
                row.sampling(row.ids())
        except BaseException as error:  # SystemExit as well
            return Draw([], None, error)
        tokens = [(number + sample) % VOCABULARY for sample in range(row.times)]
        return Draw(tokens, [-float(token) for token in tokens] if row.with_logprobs else None)


class ToyEngine(EngineCore):
    """An engine over a toy runner."""

    runner: ToyRunner

    def __init__(
        self,
        num_blocks: int = 64,
        num_host_blocks: int = 0,
        *,
        num_events: int = 0,
        sampler: Any = None,
        core: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        manager = BlockManager(num_blocks, BLOCK_SIZE, num_host_blocks, num_events=num_events)
        scheduler = Scheduler(manager, **options)
        runner = self._make_runner(manager)
        tiering = self._make_tiering(scheduler, runner)
        super().__init__(
            scheduler, runner, sampler or ToySampler(), tiering=tiering, **(core or {})
        )
        self._num_requests = 0

    def _make_runner(self, manager: BlockManager) -> ToyRunner:
        return ToyRunner(manager)

    def _make_tiering(self, scheduler: Scheduler, runner: ToyRunner) -> Tiering | None:
        """Return the tiering of an engine with tiers."""
        return None

    def ask(
        self,
        prompt: list[int],
        new: int = 8,
        *,
        n: int = 1,
        request_id: str | None = None,
        settings: RequestSettings | None = None,
        **options: Any,
    ) -> Stream:
        """Queue a request for `new` tokens."""
        self._num_requests += 1
        request = Request(
            request_id=request_id or f"request-{self._num_requests}",
            prompt=np.array(prompt, np.int32),
            max_new_tokens=new,
            n=n,
            **options,
        )
        return self.submit(request, settings or RequestSettings())

    def check_idle(self) -> None:
        """Assert that no request holds blocks, after one more request has ended."""
        self.ask([5], 1).result(60)  # its plan reports earlier ends
        while self.stats().scheduler.num_running:
            pass
        pool = self.stats().pool
        assert (pool.num_held, pool.num_sequences) == (0, 0)
        with self._lock:
            self.scheduler.check()

"""How a request leaves the device before its end, and how it comes back.

By **swap**: its blocks move to the host and back, as they are. By **recompute**: they are given
back, and its known tokens are computed again; what the prefix index still has by then is not. The
unit is a request with all its rows, because rows that share blocks free them together only.

What each would cost is estimated by `PreemptionCosts`, a stated model: no measurement is made.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvpager import _validate as arguments
from kvpager.blocks.manager import BlockManager
from kvpager.blocks.sequences import Sequence
from kvpager.errors import OutOfBlocks
from kvpager.plans import Plan
from kvpager.scheduling.request import NOBODY, Live, Samples, State

Int32 = NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreemptionCosts:
    """What it takes to move a block, and to compute a token again.

        swap       2 * blocks * seconds_per_block
        recompute  tokens * seconds_per_token + tokens * longest * seconds_per_token_squared

    `blocks` are the different ones that the request holds on the device, `tokens` those computed in
    them (shared ones once), `longest` its longest row. It is swapped where that is cheaper and the
    host has room. All of it is taken as lost by recompute, though some may still be cached when
    the request returns.

    Args:
        seconds_per_token: to compute one token of a prompt, without attention.
        seconds_per_token_squared: the attention of one token to one other.
        seconds_per_block: to move one block over the link, one way.

    The defaults are guesses for eight billion parameters in 16 bits on a data-centre GPU: 20,000
    tokens of a prompt a second, and 2 MiB blocks over 25 GB/s. Measure your own; a link that is
    too slow (`seconds_per_block=math.inf`) never swaps.
    """

    seconds_per_token: float = 5e-5
    seconds_per_token_squared: float = 1e-9
    seconds_per_block: float = 8.4e-5

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value != np.inf:
                arguments.seconds(field.name, value)

    def swap_s(self, blocks: int) -> float:
        """Seconds to move so many blocks out and in again. O(1)."""
        return 2 * blocks * self.seconds_per_block if blocks else 0.0

    def recompute_s(self, tokens: int, longest: int) -> float:
        """Seconds to compute so many tokens again, the longest row having `longest`. O(1)."""
        if not tokens:
            return 0.0
        attention = tokens * longest * self.seconds_per_token_squared
        return tokens * self.seconds_per_token + attention


class Preemption:
    """Takes requests off the device and puts them back.

    `num_swapped` and `num_dropped` count the choices made, requests and not rows.
    """

    def __init__(
        self, manager: BlockManager, samples: Samples, costs: PreemptionCosts, *, by_ids: bool
    ) -> None:
        self.manager = manager
        self.samples = samples
        self.costs = costs
        self.by_ids = by_ids  # the manager is told token ids, so that prefixes can be reused
        self.num_swapped = self.num_dropped = 0

    # ---------------------------------------------------------------- away

    def preempt(self, live: Live) -> Plan | None:
        """Take a running request off the device, the cheaper way. O(blocks).

        Returns the blocks to move; None where they were given back. What is computed was committed
        when it was.
        """
        if self._is_swap_cheaper(live):
            try:
                plan = self.manager.swap(self.handles(live), "host")
            except OutOfBlocks:
                pass  # the host is full
            else:
                live.state = State.SWAPPED
                self.num_swapped += 1
                return plan
        self.drop(live)
        self.num_dropped += 1
        return None

    def _is_swap_cheaper(self, live: Live) -> bool:
        manager, samples = self.manager, self.samples
        if not manager.num_host_blocks:
            return False
        tables = manager.block_tables(self.handles(live))
        num_blocks = len(np.unique(tables[tables >= 0]))
        computed = samples.computed[live.samples]
        tokens = min(int(computed.sum()), num_blocks * manager.block_size)
        return self.costs.swap_s(num_blocks) < self.costs.recompute_s(tokens, int(computed.max()))

    def drop(self, live: Live) -> None:
        """Give back all it holds, on the device and on the host; its samples live on. O(blocks)."""
        self.manager.free(self.handles(live))
        for number in live.samples:
            self.samples.handles[number] = None
            self.samples.computed[number] = self.samples.lengths[number] = 0
            self.samples.behind[number] = NOBODY
        live.is_ready = False
        live.state = State.DROPPED

    def holds_device_blocks(self, live: Live) -> bool:
        """Whether a swapped request still has blocks on the device. O(blocks)."""
        return bool((self.manager.block_tables(self.handles(live)) >= 0).any())

    def handles(self, live: Live) -> list[Sequence]:
        """The sequences of a request that has any. O(rows)."""
        return [self.samples.handle(number) for number in live.samples]

    # ---------------------------------------------------------------- and back

    def swap_in(self, live: Live, spare: int) -> Plan:
        """Bring a swapped request back; leave `spare` blocks. O(blocks). Raises `OutOfBlocks`."""
        plan = self.manager.swap(self.handles(live), "device", spare=spare)
        live.state = State.RUNNING
        return plan

    def begin(self, live: Live, spare: int) -> Int32:
        """Give a waiting or dropped request room for all its known tokens; leave `spare` blocks.

        Its rows share the blocks that all their tokens are equal in: each is forked off the earlier
        one that it has most in common with, at the last block boundary, and so computes nothing
        that the other one does. Returns the blocks to copy first. O(rows^2 * tokens).
        Raises `OutOfBlocks`; then nothing has changed, but for cached blocks that were evicted.
        """
        branches = [self._branch(live, at) for at in range(1, len(live.samples))]
        try:
            made = self._make(live, spare, branches, by_index=self.by_ids)
        except OutOfBlocks:
            if not branches or not self.by_ids:
                raise
            # What the index has of one row may take a block more than sharing with another does.
            made = self._make(live, spare, branches, by_index=False)
        samples = self.samples
        for number, handle in zip(live.samples, made, strict=True):
            samples.handles[number] = handle
            samples.lengths[number] = samples.num_known(number)
            samples.computed[number] = handle.num_cached_tokens
        for number, branch in zip(live.samples[1:], branches, strict=True):
            if samples.computed[number] == branch.start > 0:
                samples.behind[number] = live.samples[branch.parent]
        live.state = State.RUNNING
        return np.concatenate([handle.copies for handle in made])

    def _make(
        self, live: Live, spare: int, branches: list[_Branch], *, by_index: bool
    ) -> list[Sequence]:
        more = sum(branch.num_blocks for branch in branches)
        made = [self._allocate(live.samples[0], spare + more)]
        try:
            for number, branch in zip(live.samples[1:], branches, strict=True):
                if not branch.start or (by_index and self._is_cached(number, branch.start)):
                    made.append(self._allocate(number, 0))
                else:
                    made.append(self._fork(number, made[branch.parent], branch.start))
        except OutOfBlocks:
            self.manager.free(made)
            raise
        return made

    def _branch(self, live: Live, at: int) -> _Branch:
        samples, size = self.samples, self.manager.block_size
        number = live.samples[at]
        common = [samples.num_common(number, other) for other in live.samples[:at]]
        parent = int(np.argmax(common))
        start = common[parent] // size * size
        return _Branch(parent, start, -(-samples.num_known(number) // size) - start // size)

    def _is_cached(self, number: int, start: int) -> bool:
        """Whether the index has more of this row than what lies before `start`."""
        namespace, adapter = self.samples.owner(number).identity
        ids = self.samples.tokens(number, 0, self.samples.num_known(number) - 1)
        cached = self.manager.cached_tokens(ids, namespace=namespace, adapter=adapter)
        return cached > start

    def _allocate(self, number: int, spare: int) -> Sequence:
        namespace, adapter = self.samples.owner(number).identity
        length = self.samples.num_known(number)
        prompt = self.samples.tokens(number, 0, length) if self.by_ids else length
        return self.manager.allocate(prompt, namespace=namespace, adapter=adapter, spare=spare)

    def _fork(self, number: int, parent: Sequence, start: int) -> Sequence:
        """A row that has the blocks of `parent` up to token `start`, and room for the others."""
        stop = self.samples.num_known(number)
        child = self.manager.fork(parent)
        try:
            self.manager.truncate(child, start)
            if start < stop:
                ids = self.samples.tokens(number, start, stop)
                self.manager.append(child, ids if self.by_ids else stop - start)
        except OutOfBlocks:
            self.manager.free(child)
            raise
        child.num_cached_tokens = start  # whoever it was forked off computes them
        return child

    def end(self, numbers: Iterable[int]) -> None:
        """Give back what these samples hold, if anything. O(blocks)."""
        handles = [self.samples.handles[number] for number in numbers]
        held = [handle for handle in handles if handle is not None]
        if held:
            self.manager.free(held)


class _Branch(NamedTuple):
    """Where a row parts from an earlier one of its request, at a block boundary."""

    parent: int  # which row
    start: int  # the first token of its own
    num_blocks: int  # of its own

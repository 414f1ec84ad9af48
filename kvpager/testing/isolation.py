"""Probes of the isolation of namespaces: look up a prompt under its own namespace and others.

Each probe is a pair. A committed prompt is hit under its own namespace while it is cached, and
misses under every other namespace. The prompts of a namespace begin with a unique token, so a
foreign hit can only come from that namespace.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from kvpager.errors import OutOfBlocks
from kvpager.testing.histories import Violation, property_of
from kvpager.testing.memory import Content, TokenMemory
from kvpager.testing.setups import NAMESPACES, Setup, make_block_manager

_KEPT_MAX = 6
_COMMITTED_MAX = 60


@dataclass(frozen=True)
class IsolationReport:
    """The results of the probes.

    `own_hits` of `own_probes` found their prompt; the others were evicted. `foreign_hits` of
    `foreign_probes` must be 0. `failure` describes the first failure; "" if there is none.
    """

    seed: int
    policy: str | None
    own_probes: int
    own_hits: int
    foreign_probes: int
    foreign_hits: int
    failure: str = ""

    @property
    def ok(self) -> bool:
        """True if each namespace hit its own prompts and no namespace hit another's."""
        return not self.failure


def isolation(
    seed: int,
    operations: int,
    policy: str | None = None,
    *,
    make_manager: Callable[[Setup], Any] | None = None,
) -> IsolationReport:
    """Probe a manager under several namespaces. O(operations).

    Args:
        seed: determines sizes, prompts and order.
        operations: the number of prompts to commit or probe.
        policy: name of the eviction policy; None for the manager's default.
        make_manager: makes the manager from a `Setup`; `BlockManager` by default.
    """
    random = Random(seed)
    block_size = random.choice((1, 2, 4, 8))
    num_blocks = random.choice((12, 24, 60, 200))
    setup = Setup(
        num_blocks=num_blocks,
        num_host_blocks=0,
        block_size=block_size,
        alphabet=2,
        longest=min(6, num_blocks // 2) * block_size,
        num_sequences_max=_KEPT_MAX,
        namespaces=NAMESPACES[: random.randint(2, len(NAMESPACES))],
        eviction=policy,
        check_every=100,
    )
    probe = _Probe(random, setup, (make_manager or make_block_manager)(setup))
    failure = ""
    try:
        for _ in range(operations):
            probe.step()
        probe.manager.check()
    except Exception as error:
        message = error.message if isinstance(error, Violation) else repr(error)
        failure = f"{property_of(error)}: {message}"
    count = probe.counts
    return IsolationReport(
        seed,
        policy,
        count["own"],
        count["own hits"],
        count["foreign"],
        count["foreign hits"],
        failure,
    )


class _Probe:
    def __init__(self, random: Random, setup: Setup, manager: Any) -> None:
        self.random = random
        self.setup = setup
        self.manager = manager
        self.memory = TokenMemory(setup.num_blocks, setup.block_size)
        self.counts: Counter[str] = Counter()
        self.kept: list[Any] = []  # live sequences, to fill the pool
        # (owner, prompt) -> evicted blocks when it was committed
        self.committed: dict[tuple[int, tuple[int, ...]], int] = {}

    def step(self) -> None:
        """Commit a new prompt, or probe a committed one."""
        if self.committed and self.random.random() < 0.6:
            self.probe(*self.random.choice(list(self.committed)))
        else:
            owner = self.random.randrange(len(self.setup.namespaces))
            length = self.random.randint(1, self.setup.longest)
            body = self.random.choices(range(self.setup.alphabet), k=length)
            self.commit(owner, (1000 + owner, *body))

    def commit(self, owner: int, prompt: tuple[int, ...]) -> None:
        """Write and commit a prompt of `owner`, then free it at once or later."""
        while len(self.kept) > self.random.randint(0, _KEPT_MAX):
            self.manager.free(self.kept.pop(self.random.randrange(len(self.kept))))
        handle = self.allocate(self.setup.namespaces[owner], prompt)
        self.write_and_read(handle, self.setup.namespaces[owner], prompt)
        self.manager.commit(handle)
        self.kept.append(handle)
        self.committed.pop((owner, prompt), None)
        self.committed[owner, prompt] = self.manager.stats().total_evicted
        if len(self.committed) > _COMMITTED_MAX:
            del self.committed[next(iter(self.committed))]

    def probe(self, owner: int, prompt: tuple[int, ...]) -> None:
        """Look up a committed prompt under its own namespace and another, in any order."""
        others = [at for at in range(len(self.setup.namespaces)) if at != owner]
        pair = [owner, self.random.choice(others)]
        self.random.shuffle(pair)
        for asker in pair:
            evicted = self.manager.stats().total_evicted
            handle = self.allocate(self.setup.namespaces[asker], prompt)
            hit = handle.num_cached_tokens
            message = self.describe(owner, asker, prompt, hit)
            self.count("own" if asker == owner else "foreign", hit)
            if asker != owner and hit:
                raise Violation("namespaces isolated", message)
            size = self.setup.block_size
            is_cached = asker == owner and evicted == self.committed[owner, prompt]
            if is_cached and hit < (len(prompt) - 1) // size * size:
                raise Violation("a committed prefix is reused", message)
            self.write_and_read(handle, self.setup.namespaces[asker], prompt)
            self.manager.free(handle)

    def count(self, whose: str, hit: int) -> None:
        self.counts[whose] += 1
        self.counts[f"{whose} hits"] += hit > 0

    def describe(self, owner: int, asker: int, prompt: tuple[int, ...], hit: int) -> str:
        names = self.setup.namespaces
        return f"{names[asker]!r} hits {hit} tokens of {prompt}, committed by {names[owner]!r}"

    def allocate(self, namespace: str | None, prompt: tuple[int, ...]) -> Any:
        """Begin a sequence; if the pool is full, free kept sequences first."""
        while True:
            try:
                return self.manager.allocate(list(prompt), namespace=namespace)
            except OutOfBlocks:
                if not self.kept:
                    raise
                self.manager.free(self.kept.pop(0))

    def write_and_read(self, handle: Any, namespace: str | None, prompt: tuple[int, ...]) -> None:
        """Write the tokens that were not cached, then read all tokens."""
        values = Content(namespace, prompt).values
        table = self.manager.block_tables(handle)[0]
        self.memory.copy(handle.copies)
        self.memory.write_at(table, handle.num_cached_tokens, values[handle.num_cached_tokens :])
        wrong = self.memory.mismatch(table, values)
        if wrong is not None:
            raise Violation("reads back", f"token {wrong} of {prompt} under {namespace!r}")

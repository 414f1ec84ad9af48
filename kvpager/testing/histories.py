"""Histories of operations: drawn at random, replayed, and shrunk when they fail.

An operation is a function and a description of its arguments. From the description random
arguments are drawn here and Hypothesis strategies made in `kvpager.testing.strategies`. Arguments
are plain ints, lists and strings; sequences are named by a number, taken modulo those that live,
so that any part of a history is a history too. That is what makes shrinking simple.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol, TypeVar

from kvpager.errors import BrokenInvariant

Call = tuple[str, tuple[Any, ...]]
History = list[Call]
Run = TypeVar("Run", bound=Callable[..., None])


class Scale(Protocol):
    """How large the drawn arguments are."""

    @property
    def alphabet(self) -> int:
        """How many different token ids there are; few make prefixes collide."""

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""

    @property
    def num_live(self) -> int:
        """Sequences that live, about."""


class Kind(Protocol):
    """What an argument may be."""

    def draw(self, random: Random, scale: Scale) -> Any:
        """One at random."""


@dataclass(frozen=True)
class Number:
    """0 to `most`: a count, or a place, modulo those there are."""

    most: int = 255

    def draw(self, random: Random, scale: Scale) -> int:
        """One at random. O(1)."""
        return int(random.random() * (self.most + 1))


@dataclass(frozen=True)
class Pick:
    """One of the sequences that live, counted from the newest, modulo how many there are.

    From the newest, because a history then means much the same when its front is left out.
    """

    def draw(self, random: Random, scale: Scale) -> int:
        """One at random. O(1)."""
        return int(random.random() * max(scale.num_live, 1))


@dataclass(frozen=True)
class Choice:
    """One of a few values."""

    options: tuple[Any, ...]

    def draw(self, random: Random, scale: Scale) -> Any:
        """One at random. O(1)."""
        return random.choice(self.options)


@dataclass(frozen=True)
class Tokens:
    """Token ids, up to `longest`, or up to the scale's where that is None."""

    longest: int | None = None

    def draw(self, random: Random, scale: Scale) -> list[int]:
        """Some at random. O(tokens)."""
        longest = scale.longest if self.longest is None else self.longest
        count = int(random.random() * (longest + 1))
        return random.choices(range(scale.alphabet), k=count)


@dataclass(frozen=True)
class Many:
    """A list of `least` to `most` of another kind."""

    kind: Kind
    least: int = 1
    most: int = 4

    def draw(self, random: Random, scale: Scale) -> list[Any]:
        """Some at random. O(items)."""
        count = self.least + int(random.random() * (self.most + 1 - self.least))
        return [self.kind.draw(random, scale) for _ in range(count)]


@dataclass(frozen=True)
class Operation:
    """One thing a history may do: `run(world, *arguments)`.

    `needs`: what the manager (or adapter) must offer; without it the operation is never drawn.
    """

    name: str
    weight: float
    needs: tuple[str, ...]
    arguments: dict[str, Kind]
    run: Callable[..., None]

    def draw(self, random: Random, scale: Scale) -> tuple[Any, ...]:
        """Arguments at random. O(arguments)."""
        return tuple([kind.draw(random, scale) for kind in self.arguments.values()])


Table = dict[str, Operation]


def operation(
    table: Table, weight: float = 1.0, *, needs: tuple[str, ...] = (), **arguments: Kind
) -> Callable[[Run], Run]:
    """Decorator: enter a function into `table` as an operation of its own name."""

    def enter(run: Run) -> Run:
        table[run.__name__] = Operation(run.__name__, weight, needs, arguments, run)
        return run

    return enter


def offered(table: Table, subject: object) -> Table:
    """The operations whose needs `subject` has. O(operations)."""
    return {name: one for name, one in table.items() if all(hasattr(subject, n) for n in one.needs)}


class Violation(AssertionError):
    """A law that was broken, and how."""

    def __init__(self, law: str, message: str) -> None:
        super().__init__(f"{law}: {message}")
        self.law = law
        self.message = message


class Ended(Exception):
    """The history cannot go on, for a reason that is not what is being looked at."""


class World(Protocol):
    """What a history happens to: a manager, and what is known about it."""

    def apply(self, operation: Operation, arguments: tuple[Any, ...]) -> None:
        """Do one operation and check what it touched."""

    def finish(self) -> None:
        """Check what must hold at the end."""


@dataclass(frozen=True)
class Failure:
    """What broke at which operation of a history."""

    law: str
    message: str
    at: int


def law_of(error: Exception) -> str:
    """The name of the law that an exception says is broken. O(1)."""
    if isinstance(error, Violation):
        return error.law
    return "check" if isinstance(error, BrokenInvariant) else type(error).__name__


def replay(history: History, table: Table, world: World) -> Failure | None:
    """Run a history; what broke first, if anything did. Operations not offered are left out."""
    at = 0
    try:
        for at, (name, arguments) in enumerate(history):  # noqa: B007
            if name in table:
                world.apply(table[name], arguments)
        world.finish()
    except Ended:
        return None
    except Exception as error:
        message = error.message if isinstance(error, Violation) else repr(error)
        return Failure(law_of(error), message, at)
    return None


def describe(history: History, table: Table) -> list[str]:
    """A history as lines to read: `append(pick=0, tokens=[1])`. O(history)."""
    lines = []
    for name, arguments in history:
        named = zip(table[name].arguments, arguments, strict=True)
        lines.append(f"{name}({', '.join(f'{key}={value!r}' for key, value in named)})")
    return lines


# -------------------------------------------------------------------- shrinking


def shrink(
    history: History, fails: Callable[[History], object], *, operations_max: int = 300_000
) -> History:
    """A short history that still fails: drop operations, then make arguments simpler.

    Delta debugging (Zeller and Hildebrandt, 2002). Deterministic: the effort is bounded by the
    number of operations replayed, not by time. What it returns has been seen to fail.
    """
    search = _Search(fails, operations_max)
    size = 0
    while len(history) != size and not search.exhausted:
        size = len(history)
        history = search.drop(history)
        history = search.simplify(history)
    return history


class _Search:
    def __init__(self, fails: Callable[[History], object], operations_max: int) -> None:
        self.fails = fails
        self.left = operations_max

    @property
    def exhausted(self) -> bool:
        return self.left <= 0

    def still_fails(self, history: History) -> bool:
        self.left -= len(history)
        return not self.exhausted and bool(self.fails(history))

    def drop(self, history: History) -> History:
        """Leave out runs of operations, long ones first, from the end to the front."""
        run = max(len(history) // 2, 1)
        while run:
            end = len(history)
            while end > 0:
                shorter = history[: max(end - run, 0)] + history[end:]
                if self.still_fails(shorter):
                    history = shorter
                end -= run
            run //= 2
        return history

    def simplify(self, history: History) -> History:
        """Make arguments simpler, one at a time, as long as that helps."""
        for at in range(len(history)):
            for place in range(len(history[at][1])):
                history = self._simplify_one(history, at, place)
        return history

    def _simplify_one(self, history: History, at: int, place: int) -> History:
        progress = True
        while progress and not self.exhausted:
            progress = False
            name, arguments = history[at]
            for value in simpler(arguments[place]):
                changed = (*arguments[:place], value, *arguments[place + 1 :])
                candidate = [*history[:at], (name, changed), *history[at + 1 :]]
                if self.still_fails(candidate):
                    history, progress = candidate, True
                    break
        return history


def simpler(value: Any) -> Iterator[Any]:
    """Simpler values than this one, the simplest first: smaller numbers, shorter lists.

    >>> list(simpler(9))
    [0, 1, 2, 3, 4, 8]
    >>> list(simpler([1, 0]))
    [[0], [1], [0, 0]]
    """
    if isinstance(value, list):
        if len(value) > 3:
            yield value[: len(value) // 2]
        for at in range(len(value)):
            yield value[:at] + value[at + 1 :]
        for at, item in enumerate(value):
            for easier in simpler(item):
                yield [*value[:at], easier, *value[at + 1 :]]
    elif isinstance(value, bool):
        if value:
            yield False
    elif isinstance(value, int):
        near = {0, 1, 2, 3, value // 2, value - 1}
        yield from sorted(number for number in near if 0 <= number < value)

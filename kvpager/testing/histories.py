"""Histories of operations: drawn at random, replayed, and shrunk when they fail.

An operation is a function and a description of its arguments: ints, lists and strings. This module
draws random arguments from it; `kvpager.testing.strategies` makes Hypothesis strategies from it. A
number modulo the live sequences selects a sequence. Any part of a history is therefore a valid
history, which makes shrinking simple.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol, TypeVar

from kvpager.errors import BrokenInvariant

Call = tuple[str, tuple[Any, ...]]
History = list[Call]
Run = TypeVar("Run", bound=Callable[..., None])


@dataclass
class Scale:
    """The sizes of drawn arguments.

    `alphabet`: the number of different token ids; few ids make prefixes collide. `longest`: tokens
    of the longest prompt. `num_live`: the approximate number of live sequences.
    """

    alphabet: int
    longest: int
    num_live: int = 6  # small pools have room for about six sequences


class NoSequence(Exception):
    """No live sequence is of the kind that an operation needs."""


class Kind:
    """A kind of argument: what a history holds, and what the operation gets for it."""

    def draw(self, random: Random, scale: Scale) -> Any:
        """Draw a value for a history. O(1), or O(items)."""
        raise NotImplementedError

    def find(self, harness: Any, value: Any) -> Any:
        """Return the operation's argument for a value of a history. Raises `NoSequence`."""
        return value


@dataclass(frozen=True)
class Number(Kind):
    """An int from 0 to `most`: a count, or a position modulo the number of positions."""

    most: int = 255

    def draw(self, random: Random, scale: Scale) -> int:  # noqa: D102
        return int(random.random() * (self.most + 1))


@dataclass(frozen=True)
class Pick(Kind):
    """The number of a live sequence, from the newest on, modulo the number of live sequences.

    A history that loses its first operations then still picks mostly the same sequences. The
    operation gets a sequence of the first kind in `among` that exists; without kinds, the number.
    """

    among: tuple[str, ...] = ()

    def draw(self, random: Random, scale: Scale) -> int:  # noqa: D102
        return int(random.random() * max(scale.num_live, 1))

    def find(self, harness: Any, value: int) -> Any:  # noqa: D102
        if not self.among:
            return value
        for kind in self.among:
            if (row := harness.pick(value, kind)) is not None:
                return row
        raise NoSequence


@dataclass(frozen=True)
class Choice(Kind):
    """One of a few values."""

    options: tuple[Any, ...]

    def draw(self, random: Random, scale: Scale) -> Any:  # noqa: D102
        return random.choice(self.options)


@dataclass(frozen=True)
class Tokens(Kind):
    """A list of at most `longest` token ids; None takes the scale's `longest`."""

    longest: int | None = None

    def draw(self, random: Random, scale: Scale) -> list[int]:  # noqa: D102
        longest = scale.longest if self.longest is None else self.longest
        count = int(random.random() * (longest + 1))
        return random.choices(range(scale.alphabet), k=count)


@dataclass(frozen=True)
class Many(Kind):
    """A list of `least` to `most` values of another kind. Sequences that are found are distinct."""

    kind: Kind
    least: int = 1
    most: int = 4

    def draw(self, random: Random, scale: Scale) -> list[Any]:  # noqa: D102
        count = self.least + int(random.random() * (self.most + 1 - self.least))
        return [self.kind.draw(random, scale) for _ in range(count)]

    def find(self, harness: Any, value: list[Any]) -> list[Any]:  # noqa: D102
        if not isinstance(self.kind, Pick):
            return value
        return list(dict.fromkeys(self.kind.find(harness, one) for one in value))


@dataclass(frozen=True)
class Operation:
    """An operation of a history: `function(harness, *arguments)`.

    `needs`: members that the manager or adapter must have. Without them it is never drawn.
    """

    name: str
    weight: float
    needs: tuple[str, ...]
    arguments: dict[str, Kind]
    function: Callable[..., None]

    def draw(self, random: Random, scale: Scale) -> tuple[Any, ...]:
        """Draw arguments. O(arguments)."""
        return tuple([kind.draw(random, scale) for kind in self.arguments.values()])

    def run(self, harness: Any, arguments: tuple[Any, ...]) -> None:
        """Run the operation, unless an argument picks a sequence and there is none."""
        kinds = self.arguments.values()
        with suppress(NoSequence):
            found = [kind.find(harness, one) for kind, one in zip(kinds, arguments, strict=True)]
            self.function(harness, *found)


Table = dict[str, Operation]


def operation(
    table: Table, weight: float, *, needs: tuple[str, ...] = (), **arguments: Kind
) -> Callable[[Run], Run]:
    """Return a decorator that adds a function to `table` as the operation of its name."""

    def enter(run: Run) -> Run:
        table[run.__name__] = Operation(run.__name__, weight, needs, arguments, run)
        return run

    return enter


def supported(table: Table, subject: object) -> Table:
    """Return the operations for which `subject` has all members. O(operations)."""
    return {name: one for name, one in table.items() if all(hasattr(subject, n) for n in one.needs)}


class Violation(AssertionError):
    """A violated property, and a description of what happened."""

    def __init__(self, property: str, message: str) -> None:
        super().__init__(f"{property}: {message}")
        self.property = property
        self.message = message


class Ended(Exception):
    """The history cannot continue, though no property under test is violated."""


class Harness(Protocol):
    """A manager under test, and the expected state."""

    def apply(self, operation: Operation, arguments: tuple[Any, ...]) -> None:
        """Run one operation and check what it touched."""

    def finish(self) -> None:
        """Check the final state."""


@dataclass(frozen=True)
class Failure:
    """A violated property, and the index of the operation that violated it."""

    property: str
    message: str
    at: int


def failure_of(error: Exception, at: int) -> Failure:
    """Return the failure that an exception of operation `at` reports. O(1)."""
    if isinstance(error, Violation):
        return Failure(error.property, error.message, at)
    is_check = isinstance(error, BrokenInvariant)
    return Failure("check" if is_check else type(error).__name__, repr(error), at)


def replay(history: History, table: Table, harness: Harness) -> Failure | None:
    """Run a history and return its first failure, or None. Unknown operations are skipped."""
    at = 0
    try:
        for at, (name, arguments) in enumerate(history):  # noqa: B007
            if name in table:
                harness.apply(table[name], arguments)
        harness.finish()
    except Ended:
        return None
    except Exception as error:
        return failure_of(error, at)
    return None


def describe(history: History, table: Table) -> list[str]:
    """Return a history as lines: `append(pick=0, tokens=[1])`. O(history)."""
    lines = []
    for name, arguments in history:
        named = zip(table[name].arguments, arguments, strict=True)
        lines.append(f"{name}({', '.join(f'{key}={value!r}' for key, value in named)})")
    return lines


# -------------------------------------------------------------------- shrinking


def shrink(
    history: History, fails: Callable[[History], object], *, operations_max: int = 300_000
) -> History:
    """Return a short history that still fails: drop operations, then simplify arguments.

    Delta debugging (Zeller and Hildebrandt, 2002). Deterministic: `operations_max` bounds the
    replayed operations, and there is no time limit. The returned history has failed in a replay.
    """
    left = operations_max

    def still_fails(candidate: History) -> bool:
        nonlocal left
        left -= len(candidate)
        return left > 0 and bool(fails(candidate))

    size = 0
    while len(history) != size and left > 0:
        size = len(history)
        history = _simplified(_shortened(history, still_fails), still_fails)
    return history


def _shortened(history: History, fails: Callable[[History], bool]) -> History:
    """Remove runs of operations, long runs first, from the end to the front."""
    run = max(len(history) // 2, 1)
    while run:
        end = len(history)
        while end > 0:
            shorter = history[: max(end - run, 0)] + history[end:]
            if fails(shorter):
                history = shorter
            end -= run
        run //= 2
    return history


def _simplified(history: History, fails: Callable[[History], bool]) -> History:
    """Simplify one argument at a time, while the history still fails."""
    for at in range(len(history)):
        for place in range(len(history[at][1])):
            while found := next(filter(fails, _with_simpler(history, at, place)), None):
                history = found
    return history


def _with_simpler(history: History, at: int, place: int) -> Iterator[History]:
    """Yield the history with simpler values of an argument of operation `at`."""
    name, arguments = history[at]
    for value in simpler(arguments[place]):
        changed = (*arguments[:place], value, *arguments[place + 1 :])
        yield [*history[:at], (name, changed), *history[at + 1 :]]


def simpler(value: Any) -> Iterator[Any]:
    """Yield simpler values, the simplest first: smaller numbers, shorter lists.

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

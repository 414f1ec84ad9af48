"""Hypothesis strategies and state machines of operations.

Prompts are a few blocks long, of a tiny alphabet, so that prefixes collide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from hypothesis.strategies import SearchStrategy

from kvpager.testing.histories import (
    Choice,
    Harness,
    Kind,
    Many,
    Number,
    Operation,
    Pick,
    Table,
    Tokens,
)

_PICK_MAX = 31


def strategy(kind: Kind, *, alphabet: int = 3, longest: int = 18) -> SearchStrategy[Any]:
    """Return the strategy of an argument of an `Operation`.

    >>> strategy(Number(3))
    integers(min_value=0, max_value=3)
    """
    if isinstance(kind, Number):
        return st.integers(0, kind.most)
    if isinstance(kind, Pick):
        return st.integers(0, _PICK_MAX)
    if isinstance(kind, Choice):
        return st.sampled_from(kind.options)
    if isinstance(kind, Tokens):
        most = longest if kind.longest is None else kind.longest
        return st.lists(st.integers(0, alphabet - 1), max_size=most)
    if isinstance(kind, Many):
        one = strategy(kind.kind, alphabet=alphabet, longest=longest)
        return st.lists(one, min_size=kind.least, max_size=kind.most)
    raise TypeError(f"kind={kind!r}: expected Number, Pick, Choice, Tokens or Many")


def machine_of(
    name: str, table: Table, make_harness: Callable[..., Harness], **drawn: SearchStrategy[Any]
) -> type[RuleBasedStateMachine]:
    """Return a state machine class with a rule for each operation of `table`.

    A run begins with `make_harness`, called with values of the strategies in `drawn`. It ends with
    `finish` of that harness. The machine's `TestCase` is a unittest class. O(operations).
    """

    class Machine(RuleBasedStateMachine):
        harness: Harness

        def teardown(self) -> None:
            """Finish the harness, if the machine has started."""
            if hasattr(self, "harness"):
                self.harness.finish()

    def start(machine: Any, **drawn: Any) -> None:
        machine.harness = make_harness(**drawn)

    begin: Any = initialize  # its overloads accept no dictionary
    rules = {operation.name: _rule_of(operation) for operation in table.values()}
    return type(name, (Machine,), {"start": begin(**drawn)(start), **rules})


def _rule_of(operation: Operation) -> Callable[..., Any]:
    def run(machine: Any, **arguments: Any) -> None:
        machine.harness.apply(operation, tuple(arguments[name] for name in operation.arguments))

    run.__name__ = operation.name
    strategies: Any = {name: strategy(kind) for name, kind in operation.arguments.items()}
    decorate: Any = rule  # as above
    decorated: Callable[..., Any] = decorate(**strategies)(run)
    return decorated

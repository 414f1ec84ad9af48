"""A Hypothesis state machine for the whole interface of a kvpager manager.

<<<<<<<< HEAD:kvpager/testing/state_machine.py
    from kvpager.testing.state_machine import PagedMemory

    TestPagedMemory = PagedMemory.TestCase

========
>>>>>>>> dc82587 (Move to the tests what tests this project alone):tests/support/manager_machine.py
Its rules are the simulator's operations, so a new operation becomes a new rule.
"""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine

from kvpager.testing.histories import Table, supported
from kvpager.testing.manager_harness import ManagerHarness
from kvpager.testing.operations_more import OPERATIONS
from kvpager.testing.setups import MakeManager, Setup, eviction_policies, make_block_manager
from kvpager.testing.strategies import machine_of


def setups(block_size: int = 4) -> st.SearchStrategy[Setup]:
    """Return a strategy of small pools, in which prefixes collide, checked after every step."""
    return st.builds(
        Setup,
        num_blocks=st.integers(1, 14),
        num_host_blocks=st.integers(0, 6),
        block_size=st.just(block_size),
        alphabet=st.just(3),
        longest=st.just(4 * block_size + 2),
        num_sequences_max=st.just(40),
        namespaces=st.just((None, "acme")),
        eviction=st.sampled_from(eviction_policies()),
        check_every=st.just(1),
        null_block=st.just(False),
        fences=st.booleans(),
        quotas=st.booleans(),
    )


def manager_machine(
    make_manager: MakeManager = make_block_manager,
    *,
    table: Table = OPERATIONS,
    block_size: int = 4,
) -> type[RuleBasedStateMachine]:
    """Return a state machine class for the managers that `make_manager` makes from a `Setup`.

    After every step the machine reads all sequences back and checks the state. At the end it frees
    all sequences.
    """

    def make_harness(setup: Setup) -> ManagerHarness:
        return ManagerHarness(setup, make_manager(setup))

    smallest = Setup(
        num_blocks=1,
        num_host_blocks=1,
        block_size=block_size,
        alphabet=1,
        longest=1,
        num_sequences_max=1,
        namespaces=(None,),
        eviction="lru",
        check_every=1,
    )
    table = supported(table, make_manager(smallest))
    return machine_of("PagedMemory", table, make_harness, setup=setups(block_size))


PagedMemory = manager_machine()

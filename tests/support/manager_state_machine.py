"""A Hypothesis state machine for the whole interface of a kvpager manager.

Its rules are the simulator's operations, so a new operation becomes a new rule.
"""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine

from kvpager.blocks.policies import POLICIES
from kvpager.testing.histories import supported
from kvpager.testing.manager_harness import ManagerHarness
from kvpager.testing.setups import MakeManager, Setup, make_block_manager
from kvpager.testing.simulator import OPERATIONS
from kvpager.testing.strategies import machine_of

# Small pools, in which prefixes collide, checked after every step.
SETUPS = st.builds(
    Setup,
    num_blocks=st.integers(1, 14),
    num_host_blocks=st.integers(0, 6),
    block_size=st.just(4),
    alphabet=st.just(3),
    longest=st.just(18),
    num_sequences_max=st.just(40),
    namespaces=st.just((None, "acme")),
    eviction=st.sampled_from(sorted(POLICIES)),
    check_every=st.just(1),
    null_block=st.just(False),
    fences=st.booleans(),
    quotas=st.booleans(),
)


def manager_machine(
    make_manager: MakeManager = make_block_manager,
) -> type[RuleBasedStateMachine]:
    """Return a state machine class for the managers that `make_manager` makes from a `Setup`.

    After every step the machine reads all sequences back and checks the state. At the end it frees
    all sequences.
    """

    def make_harness(setup: Setup) -> ManagerHarness:
        return ManagerHarness(setup, make_manager(setup))

    smallest = Setup(1, 1, 4, 1, 1, 1, namespaces=(None,), eviction="lru", check_every=1)
    table = supported(OPERATIONS, make_manager(smallest))
    return machine_of("PagedMemory", table, make_harness, setup=SETUPS)


PagedMemory = manager_machine()

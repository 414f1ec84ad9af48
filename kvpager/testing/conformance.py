"""A pytest suite that checks the properties of any paged block manager.

    from kvpager.testing.conformance import ManagerConformance

    class TestPeer(ManagerConformance):
        def make(self, num_blocks, block_size):
            return PeerAdapter(num_blocks, block_size)

`ManagerAdapter` lists the methods of an adapter, and `BlockManagerAdapter` is an example. The suite
needs pytest and Hypothesis; `kvpager.testing.results` needs neither and returns data.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from kvpager.testing.adapter_harness import AdapterHarness
from kvpager.testing.adapters import BlockManagerAdapter
from kvpager.testing.histories import supported
from kvpager.testing.properties import PROPERTIES, ManagerAdapter
from kvpager.testing.results import MakeAdapter, PropertyResult, check_properties
from kvpager.testing.rules import RULES
from kvpager.testing.strategies import machine_of

__all__ = [
    "PROPERTIES",
    "BlockManagerAdapter",
    "ManagerAdapter",
    "ManagerConformance",
    "PropertyResult",
    "check_properties",
    "conformance_machine",
]


def conformance_machine(
    make_adapter: MakeAdapter, *, block_size: int = 4, pools: tuple[int, int] = (1, 14)
) -> type[RuleBasedStateMachine]:
    """Return a state machine class that checks all properties of `make_adapter`'s managers.

    `pools`: minimum and maximum blocks of a manager. Each step costs O(blocks + tokens).
    """

    def make_harness(num_blocks: int) -> AdapterHarness:
        return AdapterHarness(make_adapter(num_blocks, block_size))

    table = supported(RULES, make_adapter(pools[1], block_size))
    return machine_of("Conformance", table, make_harness, num_blocks=st.integers(*pools))


class ManagerConformance:
    """A mixin for pytest classes: define `make`, and each property becomes a test.

    Attributes:
        block_size: token slots of a block.
        pools: minimum and maximum blocks of a manager.
        histories: random histories for each property.
        examples: examples that Hypothesis generates for the state machine.
    """

    block_size = 4
    pools = (1, 14)
    histories = 100
    examples = 60

    def make(self, num_blocks: int, block_size: int) -> ManagerAdapter:
        """Return an adapter of a new manager."""
        raise NotImplementedError("define make(self, num_blocks, block_size) -> ManagerAdapter")

    @pytest.mark.parametrize("name", PROPERTIES)
    def test_property(self, name: str) -> None:
        """Check one property."""
        [result] = check_properties(
            self.make,
            properties=[name],
            block_size=self.block_size,
            pools=self.pools,
            histories=self.histories,
        )
        if result.verdict == "unsupported":
            pytest.skip(f"the adapter lacks the method that {name} needs")
        if result.verdict == "violated":
            pytest.fail(f"{result.meaning}\n{result}", pytrace=False)

    def test_any_history(self) -> None:
        """Check all properties in histories that Hypothesis generates."""
        machine = conformance_machine(self.make, block_size=self.block_size, pools=self.pools)
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=self.examples,
                stateful_step_count=30,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )

"""The suite passes correct managers, and names the property that a broken manager violates."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from kvpager.blocks.manager import BlockManager
from kvpager.errors import StaleSequence
from kvpager.plans import AppendPlan
from kvpager.testing.conformance import (
    PROPERTIES,
    BlockManagerAdapter,
    ManagerConformance,
    check_properties,
    conformance_machine,
)
from kvpager.testing.histories import Violation
from kvpager.testing.properties import ManagerAdapter
from tests.support.naive_manager import NaiveManager, NaiveSequence


@pytest.mark.slow
class TestNaiveManager(ManagerConformance):
    def make(self, num_blocks: int, block_size: int) -> ManagerAdapter:
        return BlockManagerAdapter(NaiveManager(num_blocks, block_size, num_host_blocks=6))


class TestBlockManager(ManagerConformance):
    histories = 15
    examples = 10

    def make(self, num_blocks: int, block_size: int) -> ManagerAdapter:
        return BlockManagerAdapter(BlockManager(num_blocks, block_size, num_host_blocks=6))


@pytest.mark.slow
class TestBlockManagerAtLength(TestBlockManager):
    histories = ManagerConformance.histories
    examples = ManagerConformance.examples


@pytest.mark.slow
class TestSmallestBlocks(ManagerConformance):
    block_size = 1
    histories = 40
    examples = 20

    def make(self, num_blocks: int, block_size: int) -> ManagerAdapter:
        return BlockManagerAdapter(BlockManager(num_blocks, block_size))


# ------------------------------------------------------------------ managers with one bug each


class LosesABlock(NaiveManager):
    """Loses the first block of each freed sequence."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.lost: list[int] = []

    def free(self, sequences: Any) -> None:
        super().free(sequences)
        self.lost += [block for block in sequences.blocks[:1] if not self.holders(block)]

    def free_blocks(self) -> list[int]:
        return [block for block in super().free_blocks() if block not in self.lost]


class WritesShared(NaiveManager):
    def own_tail(self, sequence: NaiveSequence) -> list[tuple[int, int]]:
        return []


class PublishesEarly(NaiveManager):
    def append(self, *args: Any, **kwargs: Any) -> AppendPlan:
        step = super().append(*args, **kwargs)
        [sequence] = self.named(args[0])
        sequence.num_committed = len(sequence)
        self.publish(sequence)
        return step


class HandsOutTwice(NaiveManager):
    def take(self, sequence: NaiveSequence) -> int:
        if self.live and self.live[0].blocks and self.live[0] is not sequence:
            sequence.blocks.append(self.live[0].blocks[0])
            return sequence.blocks[-1]
        return super().take(sequence)


class FreesTwice(NaiveManager):
    def free(self, sequences: Any) -> None:
        with suppress(StaleSequence):
            super().free(sequences)


class ChangesWhenRefused(NaiveManager):
    def append(self, *args: Any, **kwargs: Any) -> AppendPlan:
        try:
            return super().append(*args, **kwargs)
        except Exception:
            self.named(args[0])[0].blocks += self.free_blocks()[:1]
            raise


class AcceptsFreedHandles(NaiveManager):
    def named(self, sequences: Any) -> list[NaiveSequence]:
        return [sequences] if isinstance(sequences, NaiveSequence) else list(sequences)


class MixesNamespaces(NaiveManager):
    def match(self, namespace: str | None, tokens: Any) -> Any:
        return super().match(None, tokens)


class RefusesTooMuch(NaiveManager):
    def require(self, need: int, keep: Iterable[int] = ()) -> None:
        super().require(need + 1 if need else 0, keep)


class WrongError(NaiveManager):
    def require(self, need: int, keep: Iterable[int] = ()) -> None:
        try:
            super().require(need, keep)
        except Exception:
            raise IndexError("list index out of range") from None


class OmitsCopies(NaiveManager):
    def append(self, *args: Any, **kwargs: Any) -> AppendPlan:
        step = super().append(*args, **kwargs)
        return AppendPlan(step.slots, step.copies[:0])


class ForksIntoNewBlocks(NaiveManager):
    def fork(self, *args: Any, **kwargs: Any) -> Any:
        child: Any = super().fork(*args, **kwargs)
        if child.blocks and self.free_blocks() and len(child) % self.block_size == 1:
            child.blocks.pop()
            self.take(child)
        return child


class FailsItsCheck(NaiveManager):
    def check(self) -> None:
        assert not self.cached, "blocks are cached"


BROKEN = {
    LosesABlock: "blocks_add_up",
    WritesShared: "shared_not_written",
    PublishesEarly: "nothing_before_commit",
    HandsOutTwice: "handed_out_once",
    FreesTwice: "double_free_refused",
    ChangesWhenRefused: "refusal_changes_nothing",
    AcceptsFreedHandles: "stale_handle_refused",
    MixesNamespaces: "namespaces_isolated",
    RefusesTooMuch: "served_when_it_fits",
    WrongError: "full_pool_refused",
    OmitsCopies: "reads_back",
    ForksIntoNewBlocks: "fork_takes_no_block",
    FailsItsCheck: "check_passes",
}


def adapter_of(broken: type[NaiveManager]) -> Any:
    return lambda num_blocks, block_size: BlockManagerAdapter(broken(num_blocks, block_size, 6))


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_each_bug_violates_its_property(broken: type[NaiveManager]) -> None:
    [result] = check_properties(adapter_of(broken), properties=[BROKEN[broken]])
    assert result.verdict == "violated"
    assert 1 <= len(result.history) <= 6
    assert result.message


def test_every_property_has_a_manager_that_violates_it() -> None:
    assert set(BROKEN.values()) == set(PROPERTIES)


def test_a_result_prints_the_history_that_violates_it() -> None:
    [result] = check_properties(adapter_of(WritesShared), properties=["shared_not_written"])
    assert str(result).startswith("shared_not_written: violated: block ")
    assert any(line.startswith("append(pick=0, tokens=[") for line in result.history)


def test_results_are_the_same_for_the_same_seed() -> None:
    one, other = (
        check_properties(adapter_of(WritesShared), properties=["reads_back"], seed=3)
        for _ in range(2)
    )
    assert one == other


def test_the_state_machine_detects_a_bug() -> None:
    machine = conformance_machine(adapter_of(WritesShared))
    few = settings(phases=[Phase.generate], derandomize=True, max_examples=1_000)
    with pytest.raises(Violation, match=r"shared_not_written|reads_back|handed_out_once"):
        run_state_machine_as_test(machine, settings=few)


# ------------------------------------------------------------------ optional methods


class RequiredOnly:
    """An adapter with the required members only."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        full = BlockManagerAdapter(NaiveManager(num_blocks, block_size))
        for name in ("num_blocks", "block_size", "out_of_blocks", "allocate", "append", "free"):
            setattr(self, name, getattr(full, name))
        for name in ("num_cached_tokens", "block_table", "num_free_blocks"):
            setattr(self, name, getattr(full, name))


def test_an_unsupported_property_is_not_checked() -> None:
    make: Any = RequiredOnly
    verdicts = {result.name: result.verdict for result in check_properties(make, histories=5)}
    absent = {name for name, verdict in verdicts.items() if verdict == "unsupported"}
    assert absent == {
        "nothing_before_commit",
        "namespaces_isolated",
        "fork_takes_no_block",
        "check_passes",
    }
    assert set(verdicts.values()) == {"holds", "unsupported"}

"""The simulator, the state machine and the mutants detect bugs."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

import kvpager
from kvpager.blocks.manager import BlockManager
from kvpager.plans import AppendPlan
from kvpager.testing.histories import Failure, Violation, replay, shrink, simpler
from kvpager.testing.manager_harness import ManagerHarness
from kvpager.testing.memory import Content, HostBorrower, TokenMemory
from kvpager.testing.mutant_list import MUTANTS
from kvpager.testing.mutants import Mutant, kill, mutated_source, table
from kvpager.testing.setups import Setup, make_block_manager
from kvpager.testing.simulator import OPERATIONS, Report, run, simulate
from tests.support.manager_state_machine import manager_machine
from tests.support.naive_manager import NaiveManager

GENERATE = settings(phases=[Phase.generate], derandomize=True, max_examples=500)


class OmitsCopies(BlockManager):
    def append(self, *args: Any, **kwargs: Any) -> AppendPlan:
        step = super().append(*args, **kwargs)
        return AppendPlan(step.slots, step.copies[:0])


def without_copies(setup: Setup) -> BlockManager:
    # Without fences: an omitted copy would never complete, and its blocks would stay held.
    sizes = (setup.num_blocks, setup.block_size, setup.num_host_blocks)
    return OmitsCopies(*sizes, null_block=setup.null_block, eviction=setup.eviction)


def naive(setup: Setup) -> NaiveManager:
    return NaiveManager(setup.num_blocks, setup.block_size, setup.num_host_blocks)


# ------------------------------------------------------------------ memory


def test_a_value_depends_on_all_tokens_before_it() -> None:
    one, other = Content("acme", [1, 2, 3]), Content("acme", [0, 2, 3])
    assert one.values[2] != other.values[2]
    assert len({Content(name, [7]).values[0] for name in (None, "", "a", "a\0")}) == 4


def test_memory_reads_back_written_and_copied_tokens() -> None:
    memory = TokenMemory(4, 2, 1)
    values = Content(None, [5, 6, 7]).values
    memory.write_at([3, 0], 0, values)
    memory.copy(np.array([[0, 1]]))
    assert memory.read([3, 1], 3) == values
    assert memory.mismatch([3, 2], values) == 2
    assert memory.mismatch([3], values) == 2
    memory.copy([(3, 0)], "device", "host")
    memory.copy([(0, 2)], "host", "device")
    assert memory.mismatch([2, 1], values) is None
    assert memory.mismatch([-1, 1], values, start=2) is None


def test_a_borrower_notices_writes_to_its_blocks() -> None:
    memory = TokenMemory(1, 2, 3)
    borrower = HostBorrower(memory)
    borrower.borrow(np.array([0, 2], np.int32))
    borrower.num_busy = 1
    assert borrower.give_back(2) == []
    assert borrower.give_back(1) == [0]
    memory.copy([(0, 0), (0, 1)], "device", "host")
    borrower.check()
    memory.copy([(0, 2)], "device", "host")
    with pytest.raises(Violation, match="a copy wrote to host block 2"):
        borrower.check()
    with pytest.raises(Violation, match="lent twice"):
        borrower.borrow(np.array([2], np.int32))


# ------------------------------------------------------------------ the simulator


@pytest.mark.parametrize("seed", range(6))
def test_no_property_is_violated(seed: int) -> None:
    report = simulate(seed, 1_500)
    assert report.ok, str(report)
    assert report.num_operations == 1_500


@pytest.mark.parametrize("seed", range(3))
def test_the_naive_manager_violates_no_property(seed: int) -> None:
    report = simulate(seed, 200, make_manager=naive)
    assert report.ok, str(report)


def test_a_seed_gives_the_same_run_again() -> None:
    one, other = (simulate(3, 800) for _ in range(2))
    assert replace(one, seconds=0) == replace(other, seconds=0)


def test_a_seed_gives_the_same_run_in_another_process() -> None:
    code = "from kvpager.testing.simulator import simulate; print(simulate(3, 800).counts)"
    root = Path(kvpager.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(simulate(3, 800).counts)


def replay_on(report: Report, make_manager: Any) -> Failure | None:
    harness = ManagerHarness(report.setup, make_manager(report.setup), check_every=1)
    return replay(report.history, OPERATIONS, harness)


@pytest.mark.parametrize("seed", [16, pytest.param(5, marks=pytest.mark.slow)])
def test_a_failing_history_is_shrunk_and_still_fails(seed: int) -> None:
    report = simulate(seed, 3_000, make_manager=without_copies)
    assert report.failure is not None
    assert report.failure.property == "reads back"
    assert len(report.history) <= 4
    assert replay_on(report, without_copies) == report.failure
    assert replay_on(report, make_block_manager) is None  # the property holds for it
    assert str(simulate(seed, 3_000, make_manager=without_copies)) == str(report)


def test_a_failure_is_printed_with_its_seed(capsys: pytest.CaptureFixture[str]) -> None:
    steps: list[int] = []
    summary = run(3_000, 16, progress=steps.append, make_manager=without_copies)
    printed = capsys.readouterr().out
    assert printed.startswith("seed 16: ")
    assert "are enough" in printed
    assert "append(picks=" in printed
    assert len(summary.failures) == 1
    assert sum(steps) == summary.num_operations


@pytest.mark.slow
def test_the_number_of_processes_changes_no_result() -> None:
    alone, shared = run(12_000, 5, processes=1), run(12_000, 5, processes=2)
    assert alone.counts == shared.counts
    assert alone.num_seeds == 3
    assert not shared.failures


@pytest.mark.slow
def test_the_state_machine_detects_a_bug() -> None:
    machine = manager_machine(without_copies)
    with pytest.raises(Exception, match="reads back"):
        run_state_machine_as_test(machine, settings=GENERATE)


# ------------------------------------------------------------------ shrinking


def test_shrinking_keeps_the_operations_that_fail() -> None:
    history = [("noise", (number,)) for number in range(50)]
    history[17], history[33] = ("first", ([4, 9, 4],)), ("second", (8,))

    def fails(candidate: list[tuple[str, tuple[Any, ...]]]) -> bool:
        names = [name for name, _ in candidate]
        wanted = [arguments for name, arguments in candidate if name == "first"]
        return "second" in names and any(9 in tokens for (tokens,) in wanted)

    assert shrink(history, fails) == [("first", ([9],)), ("second", (0,))]


def test_the_simplest_values_have_no_simpler_ones() -> None:
    assert list(simpler(0)) == list(simpler(None)) == list(simpler([])) == []


# ------------------------------------------------------------------ mutants


@pytest.mark.slow
def test_a_mutant_is_killed_and_a_harmless_change_is_not() -> None:
    bug = Mutant("bug", "kvpager.errors", "self.need = need", "self.need = 0")
    harmless = replace(bug, name="harmless", replacement="self.need = need + 0")
    ticks: list[int] = []
    outcomes = kill([bug, harmless], operations=10_000, progress=ticks.append)
    assert [outcome.killed for outcome in outcomes] == [True, False]
    assert ticks == [1, 1]
    assert table(outcomes).splitlines()[0].endswith("SURVIVED")
    assert table(outcomes).endswith("1 of 2 killed")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_applies_to_its_source(mutant: Mutant) -> None:
    assert mutant.replacement in mutated_source(mutant)


@pytest.mark.parametrize("fragment", ["no such line", "self"])
def test_a_fragment_that_does_not_occur_once_is_refused(fragment: str) -> None:
    mutant = Mutant("misfit", "kvpager.blocks.manager", fragment, "")
    with pytest.raises(LookupError, match="'misfit': the fragment occurs"):
        kill([mutant])


# ------------------------------------------------------------------ what the kit needs


def test_the_kit_needs_neither_torch_nor_hypothesis() -> None:
    modules = "memory, mutants, mutant_list, results, simulator"
    code = (
        f"import sys\nfrom kvpager.testing import {modules}\n"
        "print([name for name in ('torch', 'transformers', 'hypothesis', 'pytest')"
        " if name in sys.modules])"
    )
    root = Path(kvpager.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"

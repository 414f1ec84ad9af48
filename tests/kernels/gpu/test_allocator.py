"""The device-side allocator: the reference, and the kernels in Triton's CPU interpreter.

The interpreter runs programs one by one; what they do at the same time is examined by
`test_allocator_races.py`, and on a GPU by `test_gpu.py`.
"""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import torch

from kvpager.errors import BrokenInvariant
from kvpager.kernels import debug, reference_alloc, step_alloc
from kvpager.kernels.device_allocator import DeviceAllocator
from tests.support.allocator_history import History, perform, random_operation

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=["reference", "alone", "programs_of_2"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The reference behind the entry points; the kernels as one program, and as many."""
    return step_alloc if request.param == "reference" else interpreted(request.param, monkeypatch)


def interpreted(how: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("triton")
    if not INTERPRETED:
        pytest.skip("the kernels are interpreted only under TRITON_INTERPRET=1")
    from kvpager.kernels.gpu import allocator
    from tests.support import triton_interpreter

    triton_interpreter.install()
    sizes = {"LANES_MIN": 1, "LANES": 2, "LANES_ALONE_MAX": 64, "COLUMNS": 2}
    if how == "programs_of_2":
        sizes["LANES_ALONE_MAX"] = 0
    for name, size in sizes.items():
        monkeypatch.setattr(allocator, name, size)
    return allocator


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("seed", range(6))
def test_rows_read_back_what_was_written_after_any_history(kernels: Any, seed: int) -> None:
    chance = random.Random(seed)
    # Few blocks for the rows, so that most histories run out of them.
    history = History(kernels, chance.randint(4, 14), chance.choice([1, 2, 4]), 6, 5)
    for _ in range(40):
        perform(history, random_operation(history, chance))
        history.check()
    history.release(list(range(6)))
    history.check()
    assert int(history.allocator.num_free) == len(history.allocator.free)


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("how", ["alone", "programs_of_2"])
@pytest.mark.parametrize("seed", range(4))
def test_kernels_decide_as_the_reference(
    how: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs that run one by one produce exactly the reference outcome."""
    chance = random.Random(seed)
    kernels = interpreted(how, monkeypatch)
    sizes = (chance.randint(7, 10), chance.choice([2, 4]), 7, 4)
    histories = [History(each, *sizes) for each in (reference_alloc, kernels)]
    for _ in range(40):
        operation = random_operation(histories[0], chance)
        for history in histories:
            perform(history, operation)
        for expected, got in zip(*(history.state() for history in histories), strict=True):
            assert torch.equal(expected, got), operation
    assert histories[0].refused > 0
    assert histories[0].copied > 0


def test_a_row_grows_block_by_block(kernels: Any) -> None:
    history = History(kernels, 4, 2, 2, 3)
    slots = [history.step([1])[0] for _ in range(5)]
    assert slots == [0, 1, 2, 3, 4]
    assert history.allocator.block_tables.tolist() == [[-1, -1, -1], [0, 1, 2]]
    history.check()


def test_the_last_holder_keeps_a_shared_block(kernels: Any) -> None:
    history = History(kernels, 8, 4, 4, 2)
    for _ in range(2):
        history.step([0])
    history.fork([(0, 1), (0, 2), (-1, 3)])
    history.step([0, 1, 2])
    history.check()
    assert history.copied == 2
    assert int(history.allocator.num_free) == 5


def test_a_block_shared_with_an_idle_row_is_copied(kernels: Any) -> None:
    history = History(kernels, 8, 4, 2, 2)
    history.step([0])
    history.fork([(0, 1)])
    history.step([1])
    history.check()
    assert history.copied == 1
    # Row 0 is alone with its block again.
    history.step([0])
    assert history.copied == 1


def test_full_blocks_stay_shared(kernels: Any) -> None:
    history = History(kernels, 8, 2, 2, 3)
    history.step([0])
    history.step([0])
    history.fork([(0, 1)])
    history.step([0, 1])
    history.check()
    assert history.copied == 0
    tables = history.allocator.block_tables
    assert tables[0, 0] == tables[1, 0]
    assert tables[0, 1] != tables[1, 1]


def test_a_row_without_a_block_to_grow_into_is_refused(kernels: Any) -> None:
    history = History(kernels, 2, 2, 3, 4)
    slots = history.step([0, 1, 2])
    assert sorted(slots) == [-1, 0, 2]
    history.check()
    assert history.refused == 1
    # The others have room left, and are served while the third is not.
    assert history.step([0, 1, 2])[2] == -1
    history.release([0])
    assert history.step([2]) != [-1]
    history.check()


def test_a_refused_row_keeps_others_from_writing_its_shared_block(kernels: Any) -> None:
    history = History(kernels, 1, 4, 2, 2)
    history.step([0])
    history.fork([(0, 1)])
    assert history.step([0, 1]) == [-1, -1]
    history.check()
    history.release([1])
    assert history.step([0]) == [1]
    history.check()


def test_a_full_table_is_refused_though_blocks_are_left(kernels: Any) -> None:
    history = History(kernels, 9, 2, 2, 2)
    for _ in range(4):
        history.step([0, 1])
    before = history.allocator.block_tables.clone()
    assert history.step([1, 0]) == [-1, -1]
    assert torch.equal(history.allocator.block_tables, before)
    history.check()


def test_a_row_in_use_is_no_target(kernels: Any) -> None:
    history = History(kernels, 9, 2, 3, 2)
    history.step([0, 1])
    history.fork([(0, 1), (0, 2)])
    history.check()
    assert history.refused == 1


def test_unused_rows_fork_and_release_to_nothing(kernels: Any) -> None:
    history = History(kernels, 3, 2, 3, 2)
    history.fork([(0, 1)])
    history.release([0, -1, 2])
    history.release([0])
    history.check()
    assert int(history.allocator.num_free) == 3


def test_calls_without_rows_do_nothing(kernels: Any) -> None:
    history = History(kernels, 3, 2, 3, 2)
    assert history.step([]) == []
    history.fork([])
    history.release([])
    assert history.step([-1, -1]) == [-1, -1]
    history.check()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_row_numbers_may_be_strided_and_of_64_bits(kernels: Any, dtype: torch.dtype) -> None:
    allocator = DeviceAllocator(6, 4, 4, 2)
    rows = torch.tensor([[0, 9], [2, 9], [-1, 9]], dtype=dtype)[:, 0]
    slots, copies = kernels.step_alloc(allocator, rows)
    assert slots.dtype == torch.int64
    assert copies.dtype == torch.int32
    assert slots.tolist() == [0, 4, -1]
    kernels.fork_rows(allocator, rows, rows + 1)
    assert allocator.seq_lens.tolist() == [1, 1, 1, 1]
    kernels.release_rows(allocator, rows)
    allocator.check()
    assert allocator.seq_lens.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ((0, 4, 1, 1), ValueError, "num_blocks=0: expected at least 1"),
        ((4, 3, 1, 1), ValueError, "block_size=3: expected a power of two"),
        ((4, 4, 0, 1), ValueError, "num_rows=0"),
        ((4, 4, 1, 0), ValueError, "max_blocks_per_row=0"),
        ((1 << 29, 4, 1, 1), ValueError, "passes 2147483647"),
        ((4, 4, 1, 1 << 29), ValueError, "max_blocks_per_row 536870912 .* passes"),
        ((4.0, 4, 1, 1), TypeError, "num_blocks=4.0"),
    ],
)
def test_sizes_are_checked(sizes: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DeviceAllocator(*sizes)


def test_arguments_are_checked() -> None:
    allocator = DeviceAllocator(4, 4, 2, 1)
    rows = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"rows.shape="):
        step_alloc.step_alloc(allocator, rows[None])
    with pytest.raises(TypeError, match=r"rows.dtype=torch.float32"):
        step_alloc.step_alloc(allocator, rows.float())
    with pytest.raises(ValueError, match=r"rows.device=meta"):
        step_alloc.release_rows(allocator, rows.to("meta"))
    with pytest.raises(ValueError, match=r"targets.shape="):
        step_alloc.fork_rows(allocator, rows, rows[:1])


def test_debug_mode_checks_row_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debug, "_enabled", True)
    allocator = DeviceAllocator(4, 4, 2, 1)
    with pytest.raises(ValueError, match="rows has row 2; the allocator has rows 0 to 1"):
        step_alloc.step_alloc(allocator, torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="rows has row 1 twice"):
        step_alloc.release_rows(allocator, torch.tensor([1, -1, -1, 1]))
    with pytest.raises(ValueError, match="targets has row 1 twice"):
        step_alloc.fork_rows(allocator, torch.tensor([0, 0]), torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="a source and a target"):
        step_alloc.fork_rows(allocator, torch.tensor([0, 1]), torch.tensor([1, -1]))
    allocator.check()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda a: a.num_free.fill_(9), "num_free is 9 of 4"),
        (lambda a: a.ref_counts[0].fill_(2), "block 0: refcount 2, but 1 tables hold it"),
        (lambda a: a.num_free.sub_(1), "block 1: 0 tables hold it, and it is free 0 times"),
        (lambda a: a.free[0].fill_(1), "block 1: 0 tables hold it, and it is free 2 times"),
        (lambda a: a.block_tables[0, 1].fill_(1), "row 0: a block stands after its 1 tokens"),
        (lambda a: a.block_tables[0, 0].fill_(-1), "row 0: blocks"),
        (lambda a: a.seq_lens[0].fill_(9), "row 0: 9 tokens do not fit 2 blocks"),
    ],
)
def test_check_names_the_broken_invariant(spoil: Any, message: str) -> None:
    allocator = DeviceAllocator(4, 4, 2, 2)
    step_alloc.step_alloc(allocator, torch.tensor([0]))
    allocator.check()
    spoil(allocator)
    with pytest.raises(BrokenInvariant, match=message):
        allocator.check()


def test_repr_says_what_it_is() -> None:
    text = repr(DeviceAllocator(4, 8, 2, 3))
    assert text == "<DeviceAllocator: 4 blocks of 8 slots, 2 rows of 3 blocks on cpu>"

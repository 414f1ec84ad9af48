"""Requests, arguments and managers that a scheduler refuses."""

from __future__ import annotations

from typing import Any

import pytest

from kvpager import BlockManager, Request, Scheduler
from kvpager.errors import QueueFull
from kvpager.plans import Reason
from tests.support.scheduling import (
    BLOCK_SIZE,
    ids,
    make,
    request,
    run,
    step,
)


def test_a_full_queue_refuses_a_request() -> None:
    scheduler = make(max_queue_size=2)
    scheduler.submit(request("a"))
    scheduler.submit(request("b"))
    with pytest.raises(QueueFull, match=r"queue is full \(max_queue_size=2\)") as error:
        scheduler.submit(request("c"))
    assert (error.value.num_waiting, error.value.max_queue_size) == (2, 2)
    step(scheduler)
    scheduler.submit(request("c"))
    assert set(run(scheduler)) == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"length": 60, "new": 6}, "may need 17 blocks, but the pool has 16"),
        ({"length": 8, "new": 30, "n": 2}, "may need 18 blocks"),
        ({"length": 40, "new": 21}, "exceed max_model_len=60"),
        ({"n": 9}, "n=9 is more than max_num_seqs=8"),
        ({"length": 0}, "prompt is empty"),
        ({"new": 0}, "max_new_tokens=0"),
        ({"n": 0}, "n=0"),
        ({"deadline": float("nan")}, "deadline=nan"),
    ],
)
def test_a_request_that_can_never_run_is_refused(bad: dict[str, float], error: str) -> None:
    options = {"max_model_len": 60} if "max_model_len" in error else {}
    scheduler = make(num_blocks=16, max_num_seqs=8, **options)
    with pytest.raises(ValueError, match=error):
        scheduler.submit(request("a", **bad))
    assert not scheduler.has_work
    scheduler.submit(request("a"))


@pytest.mark.parametrize(
    "bad",
    [{"namespace": 1}, {"tenant": 1}, {"priority": 0.5}, {"request_id": []}, {"prompt": [0.5]}],
)
def test_arguments_of_the_wrong_type_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(TypeError):
        make().submit(Request(**{"request_id": "a", "prompt": ids(3), "max_new_tokens": 1, **bad}))


def test_a_request_that_just_fits_is_accepted() -> None:
    scheduler = make(num_blocks=16)
    scheduler.submit(request("a", 8, new=25, n=2))  # 2 + 2 * 6 blocks; the last token needs none
    scheduler.submit(request("b", 60, new=5))
    assert set(run(scheduler)) == {"a", "b"}


def test_the_null_block_does_not_count_as_room() -> None:
    scheduler = Scheduler(BlockManager(4, BLOCK_SIZE, null_block=True))
    with pytest.raises(ValueError, match="the pool has 3"):
        scheduler.submit(request("a", 12, new=2))
    scheduler.submit(request("a", 12, new=1))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"policy": "random"}, "expected one of 'fifo', 'priority', 'fair'"),
        ({"watermark": 1.0}, "watermark"),
        ({"max_batch_tokens": 0}, "max_batch_tokens"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        make(**options)


def test_a_manager_with_fences_is_refused() -> None:
    with pytest.raises(ValueError, match="without fences"):
        Scheduler(BlockManager(4, fences=True))


class Delegating:
    """A manager that is not a `BlockManager`, but forwards every call to one."""

    def __init__(self, manager: BlockManager, lacking: tuple[str, ...] = ()) -> None:
        self._manager, self._lacking = manager, lacking

    def __getattr__(self, name: str) -> Any:
        if name in self._lacking:
            raise AttributeError(name)
        return getattr(self._manager, name)


def test_a_scheduler_works_with_any_cache_manager() -> None:
    manager = BlockManager(8, BLOCK_SIZE, 8)
    scheduler = Scheduler(Delegating(manager), watermark=0.0)  # type: ignore[arg-type]
    for name in "abc":
        scheduler.submit(request(name, 8, new=8))
    assert set(run(scheduler).values()) == {Reason.FINISHED}
    assert scheduler.stats().total_preempted_by_swap > 0
    assert manager.num_held_blocks == 0


def test_a_manager_that_lacks_members_is_refused() -> None:
    lacking = Delegating(BlockManager(8), lacking=("swap", "quotas"))
    with pytest.raises(TypeError, match=r"It lacks quotas, swap\.$"):
        Scheduler(lacking)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"manager=None: .* It lacks block_size, "):
        Scheduler(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected a BlockManager or another CacheManager"):
        Scheduler(BlockManager)  # type: ignore[arg-type]


def test_the_prompt_is_copied() -> None:
    scheduler, prompt = make(), ids(5)
    scheduler.submit(Request(request_id="a", prompt=prompt, max_new_tokens=2))
    prompt[:] = 9
    assert step(scheduler).token_ids.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["max_num_seqs", "max_queue_size", "max_model_len", "watermark"])
def test_a_limit_cannot_be_changed(name: str) -> None:
    scheduler = Scheduler(BlockManager(4, 4), max_queue_size=3, max_model_len=9, watermark=0.5)
    before = getattr(scheduler, name)
    with pytest.raises(AttributeError):
        setattr(scheduler, name, 1)
    assert getattr(scheduler, name) == before

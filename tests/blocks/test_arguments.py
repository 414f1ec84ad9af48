"""What callers may pass: read exactly as it is, or refused with a reason."""

from __future__ import annotations

import array
import enum
from collections import UserList, deque
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch

from kvpager import BlockManager
from kvpager._validate import SECONDS_MAX
from kvpager.blocks.mm_hashes import OVERLAP_MAX, MMHashes
from kvpager.scheduling.queue import Fair, Priority
from kvpager.scheduling.request import Request
from kvpager.scheduling.scheduler import Scheduler
from kvpager.storage.keys import KeyContext, content_keys
from tests.support.manager_state import state_of

PROMPT = [1, 2, 3, 4, 5]
HUGE = 10**5000  # more digits than Python prints


class Color(enum.IntEnum):
    RED = 3


class ReadsOtherwise:
    """An array-like of the caller's whose conversion fails."""

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        raise KeyError("no such array")


def masked(dtype: type = np.int32) -> np.ma.MaskedArray:
    return np.ma.masked_array(np.array(PROMPT, dtype), mask=[0, 0, 1, 0, 0])


def kind(value: object) -> str:
    """A test's name: a huge int has no digits to show."""
    return type(value).__name__


def nested_tensor() -> torch.Tensor:
    rows = [torch.tensor([1]), torch.tensor([2, 3])]
    return torch.nested.nested_tensor(rows, layout=torch.jagged)


ALIKE = {
    "list": PROMPT,
    "tuple": tuple(PROMPT),
    "range": range(1, 6),
    "deque": deque(PROMPT),
    "user list": UserList(PROMPT),
    "array": array.array("h", PROMPT),
    "bytes view": memoryview(bytes(PROMPT)),
    "int enums and ints": [1, 2, Color.RED, np.uint8(4), np.int64(5)],
    "int64": np.array(PROMPT),
    "uint64": np.array(PROMPT, np.uint64),
    "other byte order": np.array(PROMPT, ">i4"),
    "reversed view": np.array(PROMPT[::-1])[::-1],
    "nothing masked": np.ma.masked_array(PROMPT, mask=[0] * 5),
    "tensor": torch.tensor(PROMPT),
    "tensor uint16": torch.tensor(PROMPT, dtype=torch.uint16),
    "list of tensors": list(torch.tensor(PROMPT)),
    "list of arrays": list(map(np.array, PROMPT)),
}
REFUSED: dict[str, Callable[[], object]] = {
    "masked": masked,
    "masked int64": lambda: masked(np.int64),
    "list with a masked item": lambda: [1, np.ma.masked],
    "list of masked arrays": lambda: list(masked().reshape(5, 1)),
    "bool array": lambda: np.array([True, False]),
    "bool among ints": lambda: [1, True, 2],
    "NumPy bool among ints": lambda: [1, np.True_, 2],
    "bool in a user list": lambda: UserList([1, True]),
    "bool tensor among tensors": lambda: [torch.tensor(1), torch.tensor(True)],
    "bool tensor": lambda: torch.tensor([True]),
    "floats": lambda: [1.0, 2.0],
    "a fraction": lambda: [1, 2.5],
    "float array": lambda: np.array([1.0, 2.0]),
    "Fraction": lambda: [Fraction(4, 2)],
    "Decimal": lambda: [Decimal(2)],
    "complex": lambda: [1 + 0j],
    "not a number": lambda: [1, float("nan")],
    "none": lambda: [1, None],
    "objects": lambda: np.array([1, 2], object),
    "structured": lambda: np.zeros(2, [("id", "i4")]),
    "records": lambda: np.rec.array([(1,), (2,)]),
    "time spans": lambda: np.array([1, 2], "m8[s]"),
    "a time span among ints": lambda: [1, np.timedelta64(2, "s")],
    "dates": lambda: np.array([1, 2], "M8[s]"),
    "text": lambda: "12",
    "texts": lambda: ["1", "2"],
    "bytes": lambda: b"12",
    "set": lambda: {1, 2},
    "dict": lambda: {1: 2},
    "64 bits": lambda: [2**31],
    "64 bits below": lambda: np.array([-(2**31) - 1]),
    "unsigned 64 bits": lambda: np.array([2**64 - 1], np.uint64),
    "80 bits": lambda: [1, 2**80],
    "80 bits and below": lambda: [-1, 2**63],
    "huge": lambda: [HUGE],
    "no dimension": lambda: np.array(3),
    "two dimensions": lambda: np.zeros((2, 2), np.int64),
    "several lengths": lambda: [[1], [2, 3]],
    "meta tensor": lambda: torch.zeros(3, dtype=torch.int64, device="meta"),
    "sparse tensor": lambda: torch.tensor([0, 1]).to_sparse(),
    "nested tensor": nested_tensor,
    "bfloat16 tensor": lambda: torch.ones(2, dtype=torch.bfloat16),
    "raises": ReadsOtherwise,
}


@pytest.fixture
def manager() -> BlockManager:
    return BlockManager(8, 4)


@pytest.mark.parametrize("form", ALIKE)
def test_the_same_ids_in_any_form_are_the_same_prompt(manager: BlockManager, form: str) -> None:
    manager.free(manager.allocate(PROMPT), publish=True)
    assert manager.match_prefix(ALIKE[form]) == 4
    assert manager.allocate(ALIKE[form]).num_cached_tokens == 4
    front = manager.allocate([9, 9, 9])
    manager.append(front, ALIKE[form])
    manager.append([front], [ALIKE[form]])
    assert len(front) == 13
    context = KeyContext("layout", "model")
    assert content_keys(ALIKE[form], 4, context) == content_keys(PROMPT, 4, context)


@pytest.mark.parametrize("form", REFUSED)
def test_invalid_token_ids_are_refused_everywhere(manager: BlockManager, form: str) -> None:
    ids = REFUSED[form]()
    manager.free(manager.allocate(PROMPT), publish=True)
    sequence, other = manager.allocate([7, 8]), manager.allocate([7, 9])
    scheduler = Scheduler(BlockManager(8, 4))
    before = state_of(manager)
    for call in (
        lambda: manager.allocate(ids),
        lambda: manager.match_prefix(ids),
        lambda: manager.append(sequence, ids),
        lambda: content_keys(ids, 4, KeyContext("layout", "model")),
        lambda: scheduler.submit(Request(request_id="a", prompt=ids, max_new_tokens=1)),
    ):
        with pytest.raises((TypeError, ValueError), match=r"token id|tokens|prompt"):
            call()
    if form not in ("two dimensions", "no dimension", "several lengths"):
        with pytest.raises((TypeError, ValueError), match="token id"):
            manager.append([sequence, other], [PROMPT, ids])
    after = state_of(manager)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert not scheduler.has_work


def test_rows_under_a_mask_are_refused(manager: BlockManager) -> None:
    sequences = [manager.allocate([7, 8]), manager.allocate([7, 9])]
    rows = np.ma.masked_array([[1, 2], [3, 4]], mask=[[0, 0], [0, 1]])
    for tokens in (rows, list(rows), rows[:, 1]):
        with pytest.raises(ValueError, match="some are masked"):
            manager.append(sequences, tokens)
    assert manager.lengths(sequences).tolist() == [2, 2]


@pytest.mark.parametrize(
    "counts",
    [
        np.ma.masked_array([1, 2], mask=[0, 1]),
        [True, 2],
        [1.0, 2.0],
        [1, -1],
        [1, 2**31],
        [1, HUGE],
        np.array([1, 2], "m8[s]"),
        True,
        1.5,
        -1,
        HUGE,
    ],
    ids=kind,
)
def test_counts_that_are_no_counts_are_refused(manager: BlockManager, counts: object) -> None:
    sequences = [manager.allocate(4), manager.allocate(4)]
    manager.append(sequences, 3, speculative=True)
    for call in (
        lambda: manager.accept(sequences, counts),
        lambda: manager.drop_before(sequences, counts),
        lambda: manager.append(manager.fork(sequences[0]), counts=counts, speculative=True),
    ):
        with pytest.raises((TypeError, ValueError), match=r"counts|start"):
            call()
    assert manager.lengths(sequences).tolist() == [7, 7]


@pytest.mark.parametrize("parents", [[True], [0.0], np.ma.masked_array([0], mask=[1]), [2**80]])
def test_parents_that_are_no_rows_are_refused(parents: object) -> None:
    scheduler = Scheduler(BlockManager(8, 4))
    scheduler.submit(Request(request_id="a", prompt=np.array(PROMPT), max_new_tokens=2))
    plan = scheduler.plan()
    assert plan is not None
    with pytest.raises((TypeError, ValueError), match="parents"):
        scheduler.complete(plan, parents, [1])
    scheduler.complete(plan, [0], [1])


# -------------------------------------------------------------------- numbers

NO_COUNTS = [
    True,
    np.True_,
    1.0,
    1.5,
    "1",
    Fraction(1),
    Decimal(1),
    np.timedelta64(1, "s"),
    None,
    1j,
]
SIZES = ["num_blocks", "block_size", "num_host_blocks", "num_events"]


@pytest.mark.parametrize("value", [*NO_COUNTS, -1, HUGE, -HUGE, 2**31], ids=kind)
@pytest.mark.parametrize("name", SIZES)
def test_a_size_is_a_whole_number_within_bounds(name: str, value: object) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{name}=.*expected"):
        BlockManager(**{"num_blocks": 8, name: value})


@pytest.mark.parametrize("name", ["max_new_tokens", "n"])
@pytest.mark.parametrize("value", [*NO_COUNTS, 0, -1, HUGE], ids=kind)
def test_a_request_without_tokens_or_samples_is_refused(name: str, value: object) -> None:
    scheduler = Scheduler(BlockManager(8, 4))
    request = Request(**{"request_id": "a", "prompt": PROMPT, "max_new_tokens": 1, name: value})
    with pytest.raises((TypeError, ValueError), match=f"{name}=.*expected"):
        scheduler.submit(request)
    assert not scheduler.has_work


@pytest.mark.parametrize(
    "name", ["max_batch_tokens", "max_num_seqs", "max_queue_size", "max_model_len"]
)
@pytest.mark.parametrize("value", [*NO_COUNTS[:-2], 0, -1, HUGE], ids=kind)
def test_a_scheduler_without_room_is_refused(name: str, value: object) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{name}=.*expected"):
        Scheduler(BlockManager(8, 4), **{name: value})


PRIORITIES = [True, 1.0, float("nan"), float("inf"), "1", Fraction(1), 2**31, -(2**31), HUGE]


@pytest.mark.parametrize("priority", PRIORITIES, ids=kind)
def test_a_requests_priority_is_bounded(priority: object) -> None:
    scheduler = Scheduler(BlockManager(8, 4), policy="priority")
    request = Request(request_id="a", prompt=PROMPT, max_new_tokens=1, priority=priority)
    with pytest.raises((TypeError, ValueError), match=r"priority=.*expected"):
        scheduler.submit(request)
    assert not scheduler.has_work


def test_the_furthest_priorities_still_go_by_arrival() -> None:
    scheduler = Scheduler(BlockManager(64, 4), policy="priority", max_num_seqs=1)
    most = 2**31 - 1
    for name, priority in (("last", most), ("b", -most), ("a", -most), ("c", np.int64(0))):
        prompt = np.array(PROMPT)
        scheduler.submit(
            Request(request_id=name, prompt=prompt, max_new_tokens=1, priority=priority)
        )
    assert [first(scheduler) for _ in range(4)] == ["b", "a", "c", "last"]


def first(scheduler: Scheduler) -> object:
    plan = scheduler.plan()
    assert plan is not None
    scheduler.complete(plan, [], [])
    return plan.request_ids[0]


@pytest.mark.parametrize("deadline", [float("nan"), float("inf"), -float("inf"), HUGE, 1e300, "9",
    True, Fraction(1), np.timedelta64(1, "s"), np.datetime64(1, "s")],
    ids=kind)  # fmt: skip
def test_a_deadline_is_a_moment_on_the_clock(deadline: object) -> None:
    scheduler = Scheduler(BlockManager(8, 4))
    request = Request(request_id="a", prompt=PROMPT, max_new_tokens=1, deadline=deadline)
    with pytest.raises((TypeError, ValueError), match=r"deadline=.*expected"):
        scheduler.submit(request)
    assert not scheduler.has_work


DURATIONS = [float("nan"), float("inf"), -1.0, -1e-9, HUGE, 2 * SECONDS_MAX, "9", True, 1j,
    Fraction(1), Decimal(1), np.timedelta64(1, "s")]  # fmt: skip


@pytest.mark.parametrize("ttl_s", DURATIONS, ids=kind)
def test_a_time_to_live_is_bounded(ttl_s: object) -> None:
    manager = BlockManager(8, 4, eviction="priority")
    sequence = manager.allocate(PROMPT)
    manager.commit(sequence)
    with pytest.raises((TypeError, ValueError), match=r"ttl_s=.*expected seconds"):
        manager.pins.retain(sequence, 1, ttl_s=ttl_s)  # type: ignore[arg-type]
    manager.pins.retain(sequence, 1, ttl_s=np.float32(SECONDS_MAX))
    manager.check()


@pytest.mark.parametrize("value", DURATIONS, ids=kind)
def test_what_an_order_weighs_by_is_bounded(value: object) -> None:
    for make, name in ((Priority, "ageing"), (Fair, "ageing"), (Fair, "decode_weight")):
        with pytest.raises((TypeError, ValueError), match=f"{name}=.*expected"):
            make(**{name: value})
    for never in (0, 1e-300):  # a second would be worth more than any priority
        with pytest.raises(ValueError, match=r"ageing=.*expected"):
            Priority(ageing=never)


@pytest.mark.parametrize("watermark", [float("nan"), -0.1, 1.0, "0", True, HUGE],
    ids=kind)  # fmt: skip
def test_a_watermark_is_a_share(watermark: object) -> None:
    with pytest.raises((TypeError, ValueError), match=r"watermark\b.*expected"):
        Scheduler(BlockManager(8, 4), watermark=watermark)  # type: ignore[arg-type]


# -------------------------------------------------------------------- flags and names


@pytest.mark.parametrize("value", ["no", 0, 1, None, np.True_, []], ids=repr)
def test_a_flag_is_true_or_false(value: object) -> None:
    manager = BlockManager(8, 4)
    sequence = manager.allocate(PROMPT)
    for call in (
        lambda: BlockManager(8, 4, null_block=value),
        lambda: BlockManager(8, 4, fences=value),
        lambda: manager.append(sequence, speculative=value),
        lambda: manager.free(sequence, publish=value),
        lambda: Scheduler(manager, prefix_cache=value),
        lambda: Scheduler(manager, chunked=value),
    ):
        with pytest.raises(TypeError, match="expected True or False"):
            call()
    assert len(sequence) == 5


@pytest.mark.parametrize("name", ["namespace", "lora", "tenant"])
@pytest.mark.parametrize(
    ("value", "error"),
    [("", ValueError), (1, TypeError), (b"a", TypeError), ("\ud800", ValueError)],
)
def test_a_request_names_its_tenant_or_none(name: str, value: object, error: type) -> None:
    scheduler = Scheduler(BlockManager(8, 4))
    request = Request(**{"request_id": "a", "prompt": PROMPT, "max_new_tokens": 1, name: value})
    with pytest.raises(error, match=f"{name}="):
        scheduler.submit(request)
    assert not scheduler.has_work


def test_lora_names_stay_distinct_after_the_model_changed() -> None:
    scheduler = Scheduler(BlockManager(64, 4))
    names = []
    for lora in ("x", "x\0001", "x\0", "x\0\0001", "\0001", None):
        for version in (0, 1):
            live = Request(request_id=len(names), prompt=PROMPT, max_new_tokens=1, lora=lora)
            scheduler._table.cache_version = version
            scheduler.submit(live)
            names.append(scheduler._table.live[len(names)].identity)
    assert len(set(names)) == len(names)


# -------------------------------------------------------------------- mm_hashes


def tags(items: list[tuple[int, int, bytes, int]], size: int, first: int, end: int) -> list[object]:
    """Each block's mm_hashes, by their definition."""
    return [
        tuple(
            (start, stop, digest, cut if cut < min(stop, block * size + size) else stop)
            for start, stop, digest, cut in items
            if start < block * size + size and cut > block * size
        )
        or None
        for block in range(first, end)
    ]


@pytest.mark.parametrize("seed", range(40))
def test_every_block_is_tagged_with_the_contents_that_it_overlaps(seed: int) -> None:
    random = np.random.default_rng(seed)
    size, num_blocks, items = int(random.choice([1, 2, 4, 16])), 24, []
    for number in range(int(random.integers(0, 12))):
        start = int(random.integers(0, num_blocks * size - 1))
        stop = int(random.integers(start + 1, num_blocks * size + 1))
        cut = stop if random.integers(2) else int(random.integers(start, stop + 1))
        items.append((start, stop, b"%d" % (number % 3), cut))
    mm_hashes = MMHashes(items)
    for _ in range(8):
        first = int(random.integers(0, num_blocks))
        end = int(random.integers(first, num_blocks + 1))
        found: list[object] = []
        stretches = mm_hashes.stretches(size, first, end)
        for stop, tag in stretches:
            found += [tag] * (stop - first - len(found))
        assert found == tags(sorted(items), size, first, end)
        assert all(one[1] != two[1] for one, two in pairwise(stretches))
    assert mm_hashes.up_to(num_blocks * size) is mm_hashes


def test_contents_without_end_behind_one_token_are_refused(manager: BlockManager) -> None:
    deep = [(at, 4, b"%d" % at) for at in range(4)] * (OVERLAP_MAX // 4)
    manager.allocate(4, mm_hashes=deep)
    with pytest.raises(ValueError, match="more than 64 cover token 3"):
        manager.allocate(4, mm_hashes=[*deep, (3, 4, b"one more")])


def test_a_tag_costs_no_more_with_many_mm_hashes() -> None:
    """Hashes looked at, of a prompt swept once and of blocks looked up one by one."""
    looked = [0]

    class Counted(tuple[int, int, bytes, int]):
        def __iter__(self) -> Iterator[int | bytes]:
            looked[0] += 1
            return super().__iter__()

        def __getitem__(self, at: int) -> int | bytes:  # type: ignore[override]
            looked[0] += 1
            return super().__getitem__(at)

    for number in (100, 1000):
        items = [Counted((4 * at + 1, 4 * at + 3, b"%d" % at, 4 * at + 3)) for at in range(number)]
        mm_hashes = MMHashes(items)
        looked[0] = 0
        assert len(mm_hashes.stretches(4, 0, number)) == number
        assert looked[0] <= 10 * number
        looked[0] = 0
        assert all(mm_hashes.tag(4, block) for block in range(number))
        assert looked[0] <= 10 * number

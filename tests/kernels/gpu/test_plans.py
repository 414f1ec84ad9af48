"""Plans of the Triton attention kernels: shared prefixes, several threads, host rows."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvpager.kernels import work_items as plan_module
from kvpager.ops import HostRows, paged_attention
from tests.support.kernel_cases import (
    Case,
    Paged,
    assert_as_exact_as_plain_torch,
    in_blocks,
    make_call,
    slots_of,
    strided_caches,
)

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels are interpreted only under TRITON_INTERPRET=1", allow_module_level=True)

from kvpager.kernels.gpu import plans
from tests.support.triton_attention import (
    FLOATS,
    by_plan,
    by_reference,
    by_triton,
    in_pieces,
    plan_for,
    planned,
)

pytestmark = pytest.mark.usefixtures("small_tiles")


def forest(dtype: torch.dtype = torch.float32, dims: int = 16) -> Paged:
    """Rows that share prefixes three levels deep, in blocks of 8; NaN in every unused slot."""
    block_size, seq_lens = 8, [57, 60, 41, 42, 25, 9, 0]
    a, b, c = [30, 31, 32], [20, 21], [10, 11]
    rows = [[*a, *b, *c, 1], [*a, *b, *c, 2], [*a, *b, 3], [*a, *b, 4], [*a, 5], [6, 7], []]
    tables = torch.full((len(rows), 9), -1, dtype=torch.int32)
    caches = strided_caches(36, block_size, 2, dims, dims, dtype)
    generator = seeded(5)
    for row, blocks in enumerate(rows):
        tables[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        slots = slots_of(tables[row], torch.arange(seq_lens[row]), block_size)
        for cache in caches:
            fresh = torch.randn(len(slots), 2, dims, generator=generator).to(dtype)
            where = (slots // block_size, slots % block_size)
            old = cache[where]
            cache[where] = torch.where(old.isnan(), fresh, old)
    return Paged(caches, None, tables, torch.tensor(seq_lens))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


SHARED: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 20},
    "window_over_some": {"window": 45},
    "softcap": {"softcap": 1.5, "softmax_scale": 1.0},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, -torch.inf])},
    "strided_sinks": {"sinks": torch.tensor([0.5, 9, -1.0, 9, 2.0, 9, 1.0, 9])[::2]},
    "kv_starts": {"kv_starts": torch.tensor([0, 30, 7, 0, 25, 8, 0])},
    "bool_mask": {"mask": torch.rand(7, 4, 1, 60, generator=seeded(1)) < 0.6},
    "float_mask": {"mask": torch.randn(1, 1, 2, 50, generator=seeded(2))},
    "non_causal": {"causal": False},
}


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("name", SHARED)
def test_prefixes_that_rows_share_are_read_together(name: str, cut: bool) -> None:
    blocks, options = forest(), SHARED[name]
    query = torch.randn(7, 4, 16, generator=seeded(3))
    tensors = (query, *blocks.caches, blocks.block_tables, blocks.seq_lens)
    expected = by_reference(*tensors, **options)
    output = in_pieces(*tensors, **options) if cut else planned(*tensors, **options)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=2e-6)
    assert torch.equal(output[6], torch.zeros(4, 16))
    if not cut:
        rows = {"causal": True, "window": None} | options
        plan = plan_for(*tensors, causal=rows["causal"], window=rows["window"])
        assert plan.work.num_large > 0


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("dtype", FLOATS)
def test_shared_prefixes_are_exact_in_every_dtype(dtype: torch.dtype) -> None:
    blocks = forest(dtype)
    query = torch.randn(7, 4, 16, generator=seeded(3)).to(dtype)
    tensors = (blocks.block_tables, blocks.seq_lens)
    exact = by_reference(
        query.double(), blocks.caches[0].double(), blocks.caches[1].double(), *tensors
    )
    output = by_triton(query, *blocks.caches, *tensors)
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(output.double(), exact, rtol=tolerance, atol=tolerance)


def test_a_plan_serves_the_steps_after_it() -> None:
    blocks = forest()
    query = torch.randn(7, 4, 16, generator=seeded(4))
    plan = plan_for(query, *blocks.caches, blocks.block_tables, blocks.seq_lens)
    tables = blocks.block_tables.clone()
    tables[2, 6] = 9  # row 2 continues in its own block
    for cache in blocks.caches:
        cache[[1, 2, 3, 4, 5, 7, 9]] = cache[30]
    seq_lens = blocks.seq_lens + torch.tensor([2, 1, 9, 3, 1, 4, 0])
    again = plan_for(query, *blocks.caches, tables, seq_lens)
    assert again.work is plan.work
    output = by_plan(plan, query, *blocks.caches, tables, seq_lens)
    expected = by_reference(query, *blocks.caches, tables, seq_lens)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=2e-6)


def test_freed_blocks_in_the_middle_of_a_table_are_ignored() -> None:
    case = Case(((4, 80), (1, 70)))
    call = make_call(case, torch.float32)
    blocks = in_blocks(case, call, 16, torch.float32)
    blocks.block_tables[:, 1:3] = -1
    for queries in (call.queries, [queries[-1:] for queries in call.queries]):
        several = len(queries[0]) > 1
        starts = torch.tensor([0, len(queries[0]), len(queries[0]) + 1]) if several else None
        tensors = (torch.cat(queries), *blocks.caches, blocks.block_tables, blocks.seq_lens, starts)
        expected = by_reference(*tensors)
        output = by_triton(*tensors)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=2e-6)


def test_lengths_beyond_the_tables_of_a_plan_read_no_block() -> None:
    # A CUDA graph checks nothing, so lengths past the table must be clamped.
    case = Case(((1, 20),))
    call = make_call(case, torch.float32)
    blocks = in_blocks(case, call, 16, torch.float32)
    tables = blocks.block_tables[:, :1]
    plan = plan_for(call.queries[0], *blocks.caches, tables, torch.tensor([16]))
    output = by_plan(plan, call.queries[0], *blocks.caches, tables, blocks.seq_lens)
    expected = by_reference(call.queries[0], *blocks.caches, tables, torch.tensor([16]))
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize(
    ("query_heads", "kv_heads", "block_size"), [(8, 2, 4), (4, 4, 4), (4, 1, 4), (4, 2, 2)]
)
def test_a_plan_for_other_heads_or_blocks_is_refused(
    query_heads: int, kv_heads: int, block_size: int
) -> None:
    rows = (torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, dtype=torch.int32))
    planned_for = strided_caches(4, 4, 2, 8, 8, torch.float32)
    plan = plan_for(torch.zeros(2, 4, 8), *planned_for, *rows)
    caches = strided_caches(4, block_size, kv_heads, 8, 8, torch.float32)
    message = (
        r"the plan is for block size, query heads and kv heads \(4, 4, 2\), but the call has "
        rf"\({block_size}, {query_heads}, {kv_heads}\); make a plan with plan_attention"
    )
    with pytest.raises(ValueError, match=message):
        by_plan(plan, torch.zeros(2, query_heads, 8), *caches, *rows)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_plan_for_more_or_fewer_rows_is_refused(rows: int) -> None:
    caches = strided_caches(4, 4, 2, 8, 8, torch.float32)
    tables = torch.zeros(3, 2, dtype=torch.int32)
    lens, query = torch.ones(3, dtype=torch.int32), torch.zeros(3, 4, 8)
    plan = plan_for(query[:2], *caches, tables[:2], lens[:2])
    message = rf"the plan is for 2 rows of 2 queries in all, but the call has {rows} and {rows};"
    with pytest.raises(ValueError, match=message):
        by_plan(plan, query[:rows], *caches, tables[:rows], lens[:rows])


def test_a_plan_for_single_queries_is_refused_for_more() -> None:
    caches = strided_caches(4, 4, 2, 8, 8, torch.float32)
    rows = (torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, dtype=torch.int32))
    plan = plan_for(torch.zeros(2, 4, 8), *caches, *rows)
    with pytest.raises(ValueError, match="of 2 queries in all, but the call has 2 and 3"):
        by_plan(plan, torch.zeros(3, 4, 8), *caches, *rows, torch.tensor([0, 2, 3]))


def test_a_plan_for_several_queries_needs_cu_seqlens_q() -> None:
    case = Case(((2, 9), (1, 5)))
    call = make_call(case, torch.float32)
    blocks = in_blocks(case, call, 4, torch.float32)
    query, starts = torch.cat(call.queries), torch.tensor([0, 2, 3])
    rows = (blocks.block_tables, blocks.seq_lens)
    plan = plan_for(query, *blocks.caches, *rows, starts)
    with pytest.raises(ValueError, match="rows of several queries; pass their cu_seqlens_q"):
        by_plan(plan, query, *blocks.caches, *rows)
    output = by_plan(plan, query, *blocks.caches, *rows, starts)
    assert_as_exact_as_plain_torch(case, call, output, torch.float32)


def test_layers_of_one_step_look_at_the_tables_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Tensor] = []
    on_host = plans._on_host
    monkeypatch.setattr(plans, "_on_host", lambda tensor: looked.append(tensor) or on_host(tensor))
    blocks = forest()
    query = torch.zeros(7, 4, 16)
    first = plan_for(query, *blocks.caches, blocks.block_tables, blocks.seq_lens)
    assert len(looked) == 2
    for _ in range(3):
        layer = plan_for(query, *blocks.caches, blocks.block_tables, blocks.seq_lens)
        assert layer is first
    assert len(looked) == 2
    blocks.block_tables[0, 0] = 35  # row 0 changes
    assert plan_for(query, *blocks.caches, blocks.block_tables, blocks.seq_lens) != first
    assert len(looked) == 4


class WatchedLock:
    """A lock that signals before a thread waits for it."""

    def __init__(self, contended: threading.Event) -> None:
        self._contended = contended
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self._contended.set()
            self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


@dataclass
class Interleaving:
    """Runs two calls: the second gets as far as it can while the first is stopped."""

    monkeypatch: pytest.MonkeyPatch
    moved: threading.Event  # the second call is over, or waits for a lock

    def run(self, place: Any, name: str, first: Any, second: Any) -> tuple[Any, Any]:
        """Return both results; the first call stops where it returns from `place.name`."""
        standing = threading.Event()
        function = getattr(place, name)
        this_thread = threading.current_thread()

        def stand(*arguments: Any) -> Any:
            result = function(*arguments)
            if threading.current_thread() is not this_thread:
                standing.set()
                self.moved.wait()
            return result

        self.monkeypatch.setattr(place, name, stand)
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(first)
            future.add_done_callback(lambda _: standing.set())
            standing.wait()
            try:
                result = second()
            finally:
                self.moved.set()
            return future.result(), result


@pytest.fixture
def interleaving(monkeypatch: pytest.MonkeyPatch) -> Interleaving:
    moved = threading.Event()
    monkeypatch.setattr(plans, "threading", SimpleNamespace(Lock=lambda: WatchedLock(moved)))
    monkeypatch.setattr(plans, "_lock", WatchedLock(moved))
    return Interleaving(monkeypatch, moved)


@pytest.mark.parametrize(
    ("place", "name", "seen_before"),
    [
        (plans._Same, "holds", True),
        (plans, "_on_host", False),
        (plan_module.Planner, "plan", False),
        (plans.PlanCache, "_upload", False),
    ],
)
def test_plans_of_two_threads_never_mix(
    place: Any, name: str, seen_before: bool, interleaving: Interleaving
) -> None:
    blocks = forest()
    query = torch.zeros(7, 4, 16)
    rows = [(blocks.block_tables[cut], blocks.seq_lens[cut]) for cut in (slice(4), slice(1, 6))]
    shapes = plans.shapes_of(query, *blocks.caches)
    expected = [plans.PlanCache(shapes).of(*batch, None) for batch in rows]

    def plan(batch: int) -> Any:
        return plan_for(query, *blocks.caches, *rows[batch])

    plan(0 if seen_before else 1)
    made = interleaving.run(place, name, lambda: plan(0), lambda: plan(1))
    for again in (made, (plan(0), plan(1))):
        for mine, alone in zip(again, expected, strict=True):
            assert torch.equal(mine.items, alone.items)
            assert torch.equal(mine.members, alone.members)
            assert mine.num_rows == alone.num_rows


def test_two_threads_that_begin_together_share_their_plans(interleaving: Interleaving) -> None:
    blocks = forest()
    tensors = (torch.zeros(7, 4, 16), *blocks.caches, blocks.block_tables, blocks.seq_lens)

    def plan() -> Any:
        return plan_for(*tensors)

    first, second = interleaving.run(plans.PlanCache, "__init__", plan, plan)
    assert first is second


def test_inference_tensors_are_read_unless_the_host_has_their_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked_at: list[Tensor] = []
    genuine = plans._on_host
    monkeypatch.setattr(plans, "_on_host", lambda t: looked_at.append(t) or genuine(t))
    with torch.inference_mode():
        blocks = forest()
        tensors = (torch.zeros(7, 4, 16), *blocks.caches, blocks.block_tables, blocks.seq_lens)
        first = plan_for(*tensors)
        blocks.block_tables[0, 0] = 35
        second = plan_for(*tensors)
        assert (first is second, len(looked_at)) == (False, 4)
        rows = HostRows(blocks.block_tables.numpy(), blocks.seq_lens.numpy())
        made = [plan_for(*tensors, host_rows=rows) for _ in range(3)]
    assert made == [second] * 3
    assert len(looked_at) == 4


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("with_starts", [False, True])
def test_a_plan_from_the_host_is_that_of_the_tensors(with_starts: bool) -> None:
    blocks = forest()
    query = torch.randn(7, 4, 16)
    starts = torch.arange(8, dtype=torch.int32) if with_starts else None
    tensors = (query, *blocks.caches, blocks.block_tables, blocks.seq_lens, starts)
    rows = HostRows(
        blocks.block_tables.numpy(),
        blocks.seq_lens.numpy(),
        None if starts is None else starts.numpy(),
    )
    expected = paged_attention(*tensors)
    for kernel in (by_triton, paged_attention):
        output = kernel(*tensors, host_rows=rows)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def test_host_rows_have_one_object_per_number_of_queries() -> None:
    rows = HostRows(np.zeros((3, 2), np.int32), np.full(3, 9))
    assert rows.with_queries(1) is rows
    assert rows.with_queries(4) is rows.with_queries(4)
    assert rows.with_queries(4).cu_seqlens_q.tolist() == [0, 4, 8, 12]
    assert rows.row(1).block_tables.shape == (1, 2)


def test_host_rows_of_another_step_are_refused() -> None:
    blocks = forest()
    tensors = (torch.zeros(7, 4, 16), *blocks.caches, blocks.block_tables, blocks.seq_lens)
    tables, lens = blocks.block_tables.numpy(), blocks.seq_lens.numpy()
    wrong = {
        r"block_tables of shape \(6,": HostRows(tables[1:], lens),
        r"seq_lens of shape \(6,\)": HostRows(tables, lens[1:]),
        r"cu_seqlens_q of shape \(8,\), but the call has None": HostRows(
            tables, lens, np.arange(8)
        ),
    }
    for message, rows in wrong.items():
        with pytest.raises(ValueError, match=message):
            paged_attention(*tensors, host_rows=rows)

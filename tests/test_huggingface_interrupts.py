"""Ctrl-C while a model generates: blocks are given back, and the next call is right."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.models.llama import LlamaConfig  # noqa: E402

import kvpager  # noqa: E402
from kvpager.integrations.huggingface.memory import PagedMemory  # noqa: E402
from kvpager.testing import tiny_llama_path  # noqa: E402
from tests.interrupts import Moments, by_signal  # noqa: E402

# How many moments of an operation, and of a call of `generate`, to interrupt.
NUM_MOMENTS = int(os.environ.get("KVPAGER_INTERRUPTS", "0")) // 20 or 12
NUM_CALLS = int(os.environ.get("KVPAGER_INTERRUPTS", "0")) // 100 or 5

pytestmark = pytest.mark.usefixtures("one_thread")


# -------------------------------------------------------------------- a cache, layer by layer


class Case:
    """A cache of three layers, and what is done to it."""

    def __init__(self, **options: Any) -> None:
        config = LlamaConfig(num_hidden_layers=3, num_attention_heads=2, hidden_size=8)
        self.cache = kvpager.PagedCache(config, block_size=2, **options)
        self.others: list[Any] = []

    @property
    def memory(self) -> PagedMemory:
        return self.cache.memory

    def write(self, count: int, rows: int = 3) -> None:
        for layer in range(3):
            states = torch.full((rows, 2, count, 4), float(layer))
            self.cache.update(states, states, layer)

    def copy(self) -> None:
        self.others.append(copy.deepcopy(self.cache))


def prefill_and_decode(case: Case) -> None:
    case.write(5)
    case.write(1)
    case.write(1)
    case.write(3)


def reorder(case: Case) -> None:
    case.write(5)
    case.cache.reorder_cache(torch.tensor([1, 1, 0]))
    case.write(1)
    case.cache.batch_select_indices(torch.tensor([0, 2]))


def repeat(case: Case) -> None:
    case.write(5, rows=1)
    case.cache.batch_repeat_interleave(3)
    case.write(2)
    case.cache.crop(-3)


def copy_and_reset(case: Case) -> None:
    case.write(5)
    case.copy()
    case.write(1)
    case.copy()
    case.cache.reset()


CASES: list[tuple[Callable[[Case], None], dict[str, Any]]] = [
    (prefill_and_decode, {}),
    (prefill_and_decode, {"memory": 3000, "host_memory": 40_000}),
    (reorder, {}),
    (reorder, {"memory": 3000, "host_memory": 40_000}),
    (repeat, {}),
    (copy_and_reset, {}),
]


@pytest.fixture(autouse=True)
def _quick_collections() -> Iterator[None]:
    """Leave what is there already out of garbage collections, which takes most of their time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def interrupted(count: int, run: Callable[[Moments], object]) -> Iterator[int]:
    """Interrupt `run` at `count` moments of those that it has, and yield after each."""
    moment = Moments(sys.maxsize, by_signal)
    run(moment)
    total = sys.maxsize - moment.left
    for number in random.Random(total).sample(range(1, total), count):
        moment = Moments(number, by_signal)
        with contextlib.suppress(KeyboardInterrupt):
            run(moment)
            assert not moment.was_hit, "the signal was lost"
        del moment
        gc.collect()
        yield number


def check_pools(memory: PagedMemory) -> None:
    """Check that the pools are lawful, and that no sequence holds a block."""
    for pool in [*memory.pools(), *(memory.host.pools() if memory.host else [])]:
        pool.settle()
        pool.manager.check()
        assert pool.manager.num_held_blocks == 0
        sizes = {shelf.storage.num_blocks for shelf in pool._storages}
        assert sizes <= {pool.manager.num_blocks}


@pytest.mark.parametrize(("operation", "options"), CASES)
def test_blocks_of_an_interrupted_cache_are_given_back(operation, options) -> None:
    memories: list[PagedMemory] = []
    pools: list[object] = []

    def run(moment: Moments) -> None:
        case = Case(**options)
        memories[:] = [case.memory]
        with moment:
            operation(case)
        pools[:] = case.memory.pools()  # or they would be gone with the cache

    for _ in interrupted(NUM_MOMENTS, run):
        check_pools(memories[0])


# -------------------------------------------------------------------- generate


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama_path()).eval()


PATCHES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"prefix_cache": True}, {}),
    ({}, {"num_beams": 2}),
    ({"memory": "60KiB", "host_memory": "1MiB"}, {}),
    ({"prefix_cache": True}, {"num_return_sequences": 2, "do_sample": True}),
]


@pytest.mark.parametrize(("options", "settings"), PATCHES)
def test_a_call_after_an_interrupted_one_is_right(model, options, settings) -> None:
    ids = torch.tensor([[0, 5, 9, 14, 20, 21], [3, 6, 9, 14, 20, 22]])
    mask = torch.ones_like(ids)
    mask[0, 0] = 0

    def generate(moment: contextlib.AbstractContextManager[Any]) -> torch.Tensor:
        torch.manual_seed(0)
        with moment:
            return model.generate(
                ids, attention_mask=mask, max_new_tokens=3, pad_token_id=0, **settings
            )

    expected = generate(contextlib.nullcontext())
    with kvpager.patch(model, block_size=4, **options) as paging:
        for _ in interrupted(NUM_CALLS, generate):
            check_pools(paging.memory)
            assert torch.equal(generate(contextlib.nullcontext()), expected)
    assert torch.equal(generate(contextlib.nullcontext()), expected)


# -------------------------------------------------------------------- engines


def test_an_interrupted_engine_serves_the_next_call(model) -> None:
    prompts = [[5, 9, 14, 20, 21, 22, 23], [3, 6, 9]]
    with kvpager.Engine(model, block_size=4, max_running=4) as engine:

        def generate(moment: contextlib.AbstractContextManager[Any]) -> list[list[int]]:
            with moment:
                return [output.tokens for output in engine.generate(prompts, max_new_tokens=3)]

        expected = generate(contextlib.nullcontext())
        for _ in interrupted(NUM_CALLS * 4, generate):
            assert generate(contextlib.nullcontext()) == expected
            scheduler = engine._loop.scheduler
            with engine._loop._lock:
                scheduler.check()
        with engine.pause():  # no step is under way, so cancelled requests have ended
            pass
        engine.generate(prompts, max_new_tokens=3)
        stats = engine.stats()
        assert stats.scheduler.num_running == stats.scheduler.num_waiting == 0
        assert stats.pool.num_held == 0

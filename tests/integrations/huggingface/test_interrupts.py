"""Ctrl-C while a model generates: blocks are freed, and the next call is right."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, GenerationConfig  # noqa: E402
from transformers.generation.configuration_utils import ContinuousBatchingConfig  # noqa: E402
from transformers.models.llama import LlamaConfig  # noqa: E402

import kvpager  # noqa: E402
from kvpager.engine.core import EngineCore  # noqa: E402
from kvpager.integrations.huggingface import engine as engine_module  # noqa: E402
from kvpager.integrations.huggingface.cache.memory import PagedMemory  # noqa: E402
from kvpager.testing import tiny_llama_path  # noqa: E402
from tests.support.interrupts import Moments, by_signal  # noqa: E402
from tests.support.threads import join_all  # noqa: E402

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
        gc.collect()  # a signal inside a finaliser of an earlier run would be lost
        moment = Moments(number, by_signal)
        with contextlib.suppress(KeyboardInterrupt):
            run(moment)
            assert not moment.was_hit, "the signal was lost"
        del moment
        gc.collect()
        yield number


def check_pools(memory: PagedMemory) -> None:
    """Check the invariants of the pools, and that no sequence holds a block."""
    for pool in [*memory.pools(), *(memory.host.pools() if memory.host else [])]:
        pool.settle()
        pool.manager.check()
        assert pool.manager.num_held_blocks == 0
        sizes = {segment.storage.num_blocks for segment in pool._segments}
        assert sizes <= {pool.manager.num_blocks}


@pytest.mark.slow
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


@pytest.mark.slow
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


# -------------------------------------------------------------------- continuous batching

PROMPTS = [[5, 9, 14, 20, 21, 22, 23], [3, 6, 9]]
GREEDY = GenerationConfig(do_sample=False, max_new_tokens=3, eos_token_id=-1)
BATCHING = ContinuousBatchingConfig(use_cuda_graph=False)
PATIENCE = 60.0  # seconds after which a call counts as hanging


@contextlib.contextmanager
def bounded(managers: Iterable[Any]) -> Iterator[None]:
    """Fail what hangs: when patience is up, the sessions of `managers` are cut short."""
    was_cut = threading.Event()

    def cut() -> None:
        was_cut.set()
        for manager in list(managers):
            manager.stop(block=False, hard_stop=True)

    timer = threading.Timer(PATIENCE, cut)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
    assert not was_cut.is_set(), "a call waited for what never came"


def check_sessions(managers: Iterable[Any]) -> None:
    """Check that no session goes on, and that none left a request or a block."""
    for manager in list(managers):
        assert manager.is_running() is False
        assert manager._requests.jobs == {}
        if manager._status.engine is not None:
            assert manager._status.engine.stats().pool.num_held == 0


def check_threads() -> None:
    join_all(lambda thread: thread.name.startswith("kvpager"))


@pytest.mark.slow
@pytest.mark.parametrize("is_kept", [False, True], ids=["dropped", "kept"])
def test_generate_batch_after_an_interrupted_call_is_right(model, is_kept) -> None:
    with kvpager.patch(model, memory="1MiB", block_size=4, prefix_cache=True) as paging:

        def generate(moment: contextlib.AbstractContextManager[Any]) -> list[list[int]]:
            with bounded(paging.managers), moment:
                outputs = model.generate_batch(
                    PROMPTS, GREEDY, BATCHING, persistent_manager=is_kept
                )
            return [output.generated_tokens for output in outputs.values()]

        expected = generate(contextlib.nullcontext())
        for _ in interrupted(NUM_CALLS, generate):
            check_sessions(paging.managers)
            assert generate(contextlib.nullcontext()) == expected
            check_threads()


@pytest.mark.slow
def test_an_interrupted_session_ends_and_the_next_one_is_right(model) -> None:
    with kvpager.patch(model, memory="1MiB", block_size=4) as paging:
        managers: list[Any] = []

        def serve(moment: contextlib.AbstractContextManager[Any]) -> list[list[int] | None]:
            manager = model.init_continuous_batching(GREEDY, BATCHING)
            managers[:] = [manager]
            manager.warmup()
            try:
                with bounded(paging.managers), moment:
                    manager.add_request(PROMPTS[1], request_id="before")
                    manager.add_request(PROMPTS[1], request_id="not at all")
                    manager.cancel_request("not at all")
                    manager.start()
                    with manager.pause():
                        names = manager.add_requests(PROMPTS)
                    outputs = [manager.get_result(name) for name in ["before", *names]]
                    manager.stop()
            finally:
                with bounded(paging.managers):
                    manager.destroy()
            return [None if output is None else output.generated_tokens for output in outputs]

        expected = serve(contextlib.nullcontext())
        assert expected[0] == expected[2]
        for _ in interrupted(NUM_CALLS * 2, serve):
            check_sessions(managers)
            assert serve(contextlib.nullcontext()) == expected
            check_threads()


def test_an_interrupted_add_takes_its_requests_back(model, monkeypatch) -> None:
    with kvpager.patch(model, memory="1MiB", block_size=4) as paging:
        manager = model.init_continuous_batching(GREEDY, BATCHING)
        manager.start()
        engine, submitted = manager.batch_processor, []

        def submit(prompt: list[int], **options: Any) -> Any:
            if len(submitted) == 1:
                raise KeyboardInterrupt
            submitted.append(original(prompt, **options))
            return submitted[0]

        original = engine.submit
        monkeypatch.setattr(engine, "submit", submit)
        with manager.pause(), pytest.raises(KeyboardInterrupt):
            manager.add_requests(PROMPTS)
        with bounded(paging.managers):
            manager.stop()
        assert submitted[0].done
        assert manager.get_result() is None


def test_an_output_survives_an_interrupt_of_its_reader(model) -> None:
    with kvpager.patch(model, memory="1MiB", block_size=4) as paging:
        manager = model.init_continuous_batching(GREEDY, BATCHING)
        manager.start()
        manager.add_request(PROMPTS[0], request_id="mine")
        with bounded(paging.managers):
            manager.stop()
        (output,) = manager.output_router._waiting.values()

        def take(moment: Moments) -> None:
            with moment:
                assert manager.get_result("mine") is output
            manager.output_router.put_back(output)

        total = Moments(sys.maxsize, by_signal)
        take(total)
        for number in range(1, sys.maxsize - total.left):
            with contextlib.suppress(KeyboardInterrupt):
                take(Moments(number, by_signal))
            assert [*manager.output_router._waiting.values()] == [output]


# -------------------------------------------------------------------- engines


def test_an_interrupt_at_the_end_of_construction_ends_the_thread(model, monkeypatch) -> None:
    class Interrupted(EngineCore):
        def __init__(self, *parts: Any, **options: Any) -> None:
            super().__init__(*parts, **options)
            signal.raise_signal(signal.SIGINT)

    before = model.config._attn_implementation
    monkeypatch.setattr(engine_module, "EngineCore", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        kvpager.Engine(model, block_size=4, max_num_seqs=4)
    check_threads()
    assert model.config._attn_implementation == before


def test_a_session_that_cannot_start_leaves_no_thread(model) -> None:
    with kvpager.patch(model, memory="1MiB", block_size=4, prefix_cache=True) as paging:
        paging.quotas["acme"] = "1B"  # less than a block
        manager = model.init_continuous_batching(GREEDY, BATCHING)
        with pytest.raises(ValueError, match="one block takes"):
            manager.start()
        check_threads()
        del paging.quotas["acme"]
        manager.start()
        with bounded(paging.managers):
            manager.stop()


def test_an_interrupted_engine_serves_the_next_call(model) -> None:
    prompts = [[5, 9, 14, 20, 21, 22, 23], [3, 6, 9]]
    with kvpager.Engine(model, block_size=4, max_num_seqs=4) as engine:

        def generate(moment: contextlib.AbstractContextManager[Any]) -> list[list[int]]:
            with moment:
                return [output.token_ids for output in engine.generate(prompts, max_new_tokens=3)]

        expected = generate(contextlib.nullcontext())
        for _ in interrupted(NUM_CALLS * 4, generate):
            assert generate(contextlib.nullcontext()) == expected
            scheduler = engine._core.scheduler
            with engine._core._lock:
                scheduler.check()
        with engine.pause():  # no step is under way, so cancelled requests have ended
            pass
        engine.generate(prompts, max_new_tokens=3)
        stats = engine.stats()
        assert stats.scheduler.num_running == stats.scheduler.num_waiting == 0
        assert stats.pool.num_held == 0

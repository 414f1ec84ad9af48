"""A toy engine on two ranks: this process leads, another one follows.

Each rank has its shard of every block, its own staging, and its own disk store.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import threading
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from kvpager import BlockManager, StepPlan
from kvpager.storage.tiers.disk.segments import PAGE_BYTES, slot_bytes
from kvpager.storage.tiers.disk.store import DiskStore
from kvpager.storage.tiers.follower import TierFollower
from kvpager.storage.tiers.layout import BlockLayout
from tests.support.plan_bytes import decode, encode
from tests.support.threads import wait_for_stores
from tests.support.toy_runner import BLOCK_SIZE, ToyRunner
from tests.support.toy_tiers import BLOCK_BYTES, TieredEngine, ToyStaging

PLAN, LOGITS, REPORT, COMMAND, ANSWER, END = b"P", b"L", b"R", b"C", b"A", b"E"


def disk(folder: Path, rank: int) -> DiskStore:
    return DiskStore(folder / str(rank), "1MiB", layout=_layout(rank), admit="always")


def _layout(rank: int) -> BlockLayout:
    return BlockLayout(f"toy; rank {rank} of 2", BLOCK_BYTES)


# ---------------------------------------------------------------- the follower's process


class Rank:
    """Rank 1: it computes the plans that it is sent, and obeys commands of tests."""

    def __init__(self, connection: Connection, folder: str, num_blocks: int, slots: int) -> None:
        self._folder = Path(folder)
        self._connection, self._sending = connection, threading.Lock()
        self._gate = threading.Event()
        self._gate.set()
        self.store = disk(self._folder, 1)
        self._keys = list[bytes]()
        self._load, self._save = self.store.load, self.store.save
        self.store.load, self.store.save = self._load_at_gate, self._save_noted  # type: ignore[method-assign]
        self.runner = ToyRunner(BlockManager(num_blocks, BLOCK_SIZE), rank=1)
        self.staging = ToyStaging(self.runner, slots)
        self.follower = TierFollower(
            1, self.staging, [self.store], _layout(1), self._report, max_wait_s=60
        )

    def _load_at_gate(self, *arguments: Any) -> Any:
        assert self._gate.wait(60)
        return self._load(*arguments)

    def _save_noted(self, keys: Any, *arguments: Any) -> Any:
        self._keys += keys
        return self._save(keys, *arguments)

    def _report(self, *numbers: int) -> None:
        self.send(REPORT + np.array(numbers, np.int64).tobytes())

    def send(self, message: bytes) -> None:
        with self._sending:
            self._connection.send_bytes(message)

    def compute(self, plan: StepPlan) -> None:
        self.follower.apply(plan.transfers)
        hashes = self.runner.run(plan, {})
        self.send(LOGITS + np.array(hashes, np.int64).tobytes())

    def obey(self, command: str) -> Any:
        return getattr(self, command)()

    def settle(self) -> dict[str, int]:
        """Wait for loads and saves; return what is in staging and in the store."""
        wait_for_stores(self.follower)
        stats = self.store.stats()
        return {
            "used": self.staging.num_slots - self.staging.num_free,
            "blocks": stats.num_blocks or 0,
            "hits": stats.hits,
            "bad": stats.bad,
        }

    def shut(self) -> None:
        self._gate.clear()

    def open(self) -> None:
        self._gate.set()

    def lose(self) -> None:
        self.store.drop(self._keys)

    def lose_some(self) -> None:
        self.store.drop(self._keys[::5])

    def flip(self) -> None:
        each = slot_bytes(BLOCK_BYTES)
        for path in (self._folder / "1").glob("segment-*"):
            file = os.open(path, os.O_RDWR)
            for start in range(PAGE_BYTES, os.fstat(file).st_size, each):
                os.pwrite(file, bytes([os.pread(file, 1, start)[0] ^ 1]), start)
            os.close(file)

    def shorten(self) -> None:
        for path in (self._folder / "1").glob("segment-*"):
            os.truncate(path, PAGE_BYTES)

    def end(self) -> int:
        self._gate.set()
        self.follower.close()
        return self.staging.num_slots - self.staging.num_free


def follow(connection: Connection) -> None:
    """Serve one engine after another."""
    rank: Rank | None = None
    while (message := connection.recv_bytes()) != END:
        kind, data = message[:1], message[1:]
        if kind == PLAN:
            assert rank is not None
            rank.compute(decode(data))
            continue
        command, *arguments = json.loads(data)
        answer = None
        if command == "begin":
            rank = Rank(connection, *arguments)
        else:
            assert rank is not None
            answer = rank.obey(command)
        assert rank is not None
        rank.send(ANSWER + json.dumps(answer).encode())


class FollowerProcess:
    """The leader's end of the connection to another process."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._sending = threading.Lock()
        self._process = context.Process(target=follow, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self.report: Callable[[int, int, int], None] = lambda *_: None
        self._logits: queue.Queue[bytes] = queue.Queue()
        self._answers: queue.Queue[bytes] = queue.Queue()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while True:
            try:
                message = self._connection.recv_bytes()
            except (EOFError, OSError):  # the process ended: nothing may wait for it
                self._logits.put(b"")
                self._answers.put(b"")
                return
            kind, data = message[:1], message[1:]
            if kind == REPORT:
                self.report(*np.frombuffer(data, np.int64).tolist())
            else:
                (self._logits if kind == LOGITS else self._answers).put(data)

    def send(self, message: bytes) -> None:
        with self._sending:
            self._connection.send_bytes(message)

    def hashes(self) -> list[int]:
        hashes: list[int] = np.frombuffer(self._logits.get(timeout=60), np.int64).tolist()
        return hashes

    def tell(self, command: str, *arguments: Any) -> Any:
        """Let the follower obey a command; return its answer."""
        self.send(COMMAND + json.dumps([command, *arguments]).encode())
        return json.loads(self._answers.get(timeout=60))

    def close(self) -> None:
        self.send(END)
        self._process.join(60)
        assert self._process.exitcode == 0


# ---------------------------------------------------------------- the leader


class LeadingRunner(ToyRunner):
    """Rank 0: it sends each plan to the follower, and adds its hashes."""

    def __init__(self, manager: BlockManager, follower: FollowerProcess) -> None:
        super().__init__(manager)
        self._follower = follower

    def run(self, plan: StepPlan, prompts: Mapping[int, list[int]]) -> list[int]:
        self._follower.send(PLAN + encode(plan))
        mine = super().run(plan, prompts)
        return [one + other for one, other in zip(mine, self._follower.hashes(), strict=True)]


class LeadingEngine(TieredEngine):
    """A toy engine over two ranks, each with a disk store in `folder`."""

    def __init__(
        self,
        process: FollowerProcess,
        folder: Path,
        num_blocks: int = 64,
        *,
        slots: int = 64,
        follower_slots: int = 64,
        max_wait_s: float = 60,
        **tiering: Any,
    ) -> None:
        self._process = process
        process.tell("begin", str(folder), num_blocks, follower_slots)
        settings = {"num_followers": 1, "max_wait_s": max_wait_s} | tiering
        super().__init__([disk(folder, 0)], num_blocks, slots=slots, **settings)  # type: ignore[list-item]

    def _make_runner(self, manager: BlockManager) -> ToyRunner:
        return LeadingRunner(manager, self._process)

    def _make_tiering(self, scheduler: Any, runner: ToyRunner) -> Any:
        tiering = super()._make_tiering(scheduler, runner)
        self._process.report = tiering.followers.report
        return tiering

    def settle(self) -> dict[str, int]:
        """Wait until both ranks have saved all idle blocks; return the follower's counts."""
        self.saved()
        self.ask([5], 1).result(60)  # earlier plans were sent
        return self._process.tell("settle")  # type: ignore[no-any-return]

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        used = self._process.tell("end")
        assert (self.staging.num_free, used) == (self.slots, 0)

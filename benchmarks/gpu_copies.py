"""The parts of `gpu.py` that write: appending, copying blocks, the allocator on the device."""

from __future__ import annotations

import itertools
import random
import statistics
from functools import partial

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.gpu_rig import KV_HEADS, Call, Rig, WrongResult, captured, run_all
from kvpager import BlockStorage
from kvpager.kernels.device_allocator import DeviceAllocator
from kvpager.kernels.step_alloc import fork_rows, release_rows, step_alloc
from kvpager.ops import append_kv, copy_blocks

HEAD_DIM, LAYERS = 128, 32


def _storage(rig: Rig, num_blocks: int, block_size: int) -> BlockStorage:
    layers = [(KV_HEADS, HEAD_DIM, HEAD_DIM)] * (2 if rig.dry else LAYERS)
    return BlockStorage(num_blocks, block_size, layers, dtype=torch.bfloat16, device=rig.device)


# -------------------------------------------------------------------- append


def append(rig: Rig) -> None:
    """Measure writing keys and values beside `index_copy_` into flat tensors."""
    counts = (4,) if rig.dry else (1, 64, 256, 4096)
    for tokens, block_size in itertools.product(counts, (16, 64)):
        case = f"{tokens}_block{block_size}"
        if rig.over(f"append {case}"):
            return
        num_blocks = -(-8 * tokens // block_size)
        storage = _storage(rig, num_blocks, block_size)
        num_layers, num_slots = len(storage.layers), num_blocks * block_size
        shape = (num_slots, KV_HEADS, HEAD_DIM)
        flat = torch.zeros(num_layers, 2, *shape, dtype=torch.bfloat16, device=rig.device)
        key, value = torch.randn(2, tokens, *shape[1:], device=rig.device).bfloat16()
        slots = torch.randperm(num_slots, device=rig.device)[:tokens]
        works: dict[str, list[Call]] = {
            "kvpager": [
                partial(append_kv, key, value, *storage.layer(layer), slots)
                for layer in range(num_layers)
            ],
            "index_copy": [
                partial(_index_copies, flat[layer], slots, key, value)
                for layer in range(num_layers)
            ],
        }
        works["kvpager"][0]()
        where = (slots // block_size, slots % block_size)
        caches = storage.layer(0)
        if not torch.equal(caches[0][where], key) or not torch.equal(caches[1][where], value):
            raise WrongResult(f"append {case}: what was written cannot be read back")
        times = rig.measure(works)
        seconds = statistics.median(times["kvpager"])
        rig.row(
            "append",
            case,
            us=seconds * 1e6,
            gbps=4 * key.numel() * key.element_size() / seconds / 1e9,
            vs_index_copy=timing.ratio(times, "index_copy", "kvpager"),
        )


def _index_copies(flat: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
    flat[0].index_copy_(0, slots, key)
    flat[1].index_copy_(0, slots, value)


# -------------------------------------------------------------------- copies


def copies(rig: Rig) -> None:
    """Measure copy-on-write of blocks, all layers, beside one plain copy of as many bytes."""
    for pairs in (2,) if rig.dry else (1, 16, 64, 256, 512):
        case = f"{pairs}_blocks"
        if rig.over(f"copies {case}"):
            return
        storage = _storage(rig, max(4 * pairs, 64), 16)
        tier = storage.tier().normal_()
        order = torch.randperm(len(tier), dtype=torch.int32, device=rig.device)
        turns = [each.view(pairs, 2) for each in order.split(2 * pairs)]
        copy_blocks(tier, turns[0])
        index = turns[0].long()
        if not torch.equal(tier[index[:, 0]], tier[index[:, 1]]):
            raise WrongResult(f"copies {case}: a copy differs from its block")
        halves = [each.chunk(2) for each in tier.split(2 * pairs)]
        works: dict[str, list[Call]] = {
            "kvpager": [partial(copy_blocks, tier, each) for each in turns],
            "copy": [partial(target.copy_, source) for source, target in halves],
        }
        times = rig.measure(works)
        seconds = statistics.median(times["kvpager"])
        moved = 2 * pairs * storage.block_bytes
        rig.row(
            "copies",
            case,
            us=seconds * 1e6,
            gbps=moved / seconds / 1e9,
            of_copy=moved / seconds / rig.copy_bytes_per_second,
            vs_copy=timing.ratio(times, "copy", "kvpager"),
        )


# -------------------------------------------------------------------- the allocator


def allocator_steps(rig: Rig) -> None:
    """Measure a step of the device-side allocator, in a CUDA graph, while rows grow."""
    for rows in (4,) if rig.dry else (1, 64, 256, 1024):
        if rig.over(f"step_alloc b{rows}"):
            return
        columns = 64 if rig.dry else 256
        allocator = DeviceAllocator(rows * columns, 16, rows, columns, device=rig.device)
        lanes = torch.arange(rows, dtype=torch.int32, device=rig.device)
        times = rig.measure({"step": [partial(step_alloc, allocator, lanes)] * 32})
        allocator.check()
        if int(allocator.failures):
            rig.remark(f"step_alloc b{rows}: the rows were full before the measurement ended")
        rig.row("step_alloc", f"b{rows}", us=statistics.median(times["step"]) * 1e6)


class Soak:
    """Random steps, forks and releases, each token stored twice: in its block, and by row.

    Copies must move the tokens in the blocks. The host reads nothing between checks.
    """

    STEPS = (
        27  # per graph; not a multiple of the block size, so that forks share partly filled blocks
    )

    def __init__(self, rig: Rig, rows: int, columns: int, num_blocks: int) -> None:
        self.rig, self.rows, self.block_size = rig, rows, 16
        device = rig.device
        self.allocator = DeviceAllocator(num_blocks, self.block_size, rows, columns, device=device)
        # One extra block, row and column receive the tokens of refused rows.
        self.tokens = torch.zeros(num_blocks + 1, self.block_size, dtype=torch.int32, device=device)
        self.expected = torch.zeros(
            rows + 1, columns * self.block_size + 1, dtype=torch.int32, device=device
        )
        self.clock = torch.zeros((), dtype=torch.int32, device=device)
        self.places = torch.arange(rows, dtype=torch.int32, device=device)
        self.lanes = torch.full((rows,), -1, dtype=torch.int64, device=device)
        self.pairs = torch.full((2, rows), -1, dtype=torch.int64, device=device)
        self.released = torch.full((rows,), -1, dtype=torch.int64, device=device)
        self.random = random.Random(0)
        self.used: set[int] = set()

    def step(self) -> None:
        """Append a token to every row in `lanes`."""
        slots, pairs = step_alloc(self.allocator, self.lanes)
        copy_blocks(self.tokens, pairs)
        self.clock += 1
        number = (self.clock * self.rows + self.places).int()
        refused = slots < 0
        self.tokens.view(-1)[slots.masked_fill(refused, self.tokens.numel() - 1)] = number
        position = self.allocator.seq_lens[self.lanes.clamp(min=0)].long() - 1
        row = self.lanes.masked_fill(refused, self.rows)
        self.expected[row, position.masked_fill(refused, 0)] = number

    def change(self) -> None:
        """Release `released`, then fork `pairs`."""
        release_rows(self.allocator, self.released)
        sources, targets = self.pairs
        fork_rows(self.allocator, sources, targets)
        copied = self.expected[sources.clamp(min=0)]
        self.expected[targets.masked_fill(targets < 0, self.rows)] = copied

    def choose(self) -> None:
        """Choose the rows to release, fork and run next, and send them without waiting."""
        released = [row for row in self.used if self.random.random() < 0.15]
        self.used -= set(released)
        idle = sorted(set(range(self.rows)) - self.used)
        self.random.shuffle(idle)
        forked, begun = idle[: len(idle) // 2], idle[len(idle) // 2 :]
        sources = [self.random.choice(sorted(self.used)) for _ in forked] if self.used else []
        self.used |= set(forked[: len(sources)]) | set(begun[: len(begun) // 2])
        self._send(self.released, released)
        self._send(self.pairs[0], sources)
        self._send(self.pairs[1], forked[: len(sources)])
        self._send(self.lanes, self.random.sample(sorted(self.used), len(self.used)))

    def _send(self, target: Tensor, numbers: list[int]) -> None:
        padded = numbers + [-1] * (self.rows - len(numbers))
        target.copy_(torch.tensor(padded), non_blocking=True)

    def check(self) -> None:
        """Check the allocator's invariants, and that every row reads the tokens written to it."""
        self.allocator.check()
        lens = self.allocator.seq_lens
        table = self.allocator.block_tables.long()
        found = self.tokens[table.clamp(min=0)].flatten(1)
        columns = torch.arange(found.shape[1], device=lens.device)
        wrong = (found != self.expected[: self.rows, : found.shape[1]]) & (columns < lens[:, None])
        if bool(wrong.any()):
            row, column = wrong.nonzero()[0].tolist()
            raise WrongResult(f"row {row} lost its token {column}")


def allocator_soak(rig: Rig) -> None:
    """Check 100,000 captured steps among forks and releases, in a pool that runs out."""
    total = 640 if rig.dry else 100_000
    soak = Soak(rig, 6, 8, 10) if rig.dry else Soak(rig, 256, 64, 2048)
    run, change = _runs(rig, soak)
    done = 0
    for cycle in range(total // Soak.STEPS):
        if cycle % 64 == 0 and rig.over("the rest of the allocator's steps"):
            break
        soak.choose()
        change()
        run()
        done += Soak.STEPS
        if (cycle + 1) % (1 if rig.dry else 128) == 0:
            soak.check()
    soak.check()
    refused = int(soak.allocator.failures)
    release_rows(soak.allocator, torch.arange(soak.rows, device=rig.device))
    soak.check()
    if int(soak.allocator.num_free) != len(soak.allocator.free):
        raise WrongResult("blocks are missing after every row was released")
    rig.row("step_alloc_soak", "checked", steps=done, refused_rows=refused)


def _runs(rig: Rig, soak: Soak) -> tuple[Call, Call]:
    """Return a run of steps and a change of rows, on a GPU as CUDA graphs."""
    steps = [soak.step] * Soak.STEPS
    if rig.device.type != "cuda":
        return partial(run_all, steps), soak.change
    # No row is in use yet, so these calls only compile.
    soak.step()
    soak.change()
    torch.cuda.synchronize(rig.device)
    return captured(steps), captured([soak.change])

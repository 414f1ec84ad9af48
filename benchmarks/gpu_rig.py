"""Tools of the parts of `gpu.py`: the clock, the budget, pools of random blocks, the table."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import timing
from kvpager import BlockStorage
from kvpager.kernels import backends, reference
from kvpager.ops import AttentionArgs, paged_attention

Call = Callable[[], Any]

KV_HEADS = 8
# A pass over all layers reads more than the L2 cache holds, so every layer comes from memory.
ROTATION_BYTES = 512 << 20
LAYERS_MAX = 64
KV_BYTES_MAX = 16 << 30
# A timed run takes about this long, so that the time of events and launches is negligible.
RUN_SECONDS = 0.01
UNITS = {
    "us": "us",
    "gbps": "GB/s",
    "tflops": "TFLOP/s",
    "of_copy": "fraction",
    "steps": "steps",
    "checked": "cases",
    "tokens_per_s": "tokens/s",
    "generate_batch_tokens_per_s": "tokens/s",
    "refused_rows": "rows",
}


class WrongResult(Exception):
    """A kernel differs from its reference, so it is not timed."""


@dataclass
class Rig:
    """The device, the time limits and the figures."""

    device: torch.device
    dry: bool
    deadline: float
    lines: timing.Lines = field(default_factory=timing.Lines)
    rows: dict[str, list[tuple[str, dict[str, Any]]]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    copy_bytes_per_second: float = 0.0
    part_deadline: float = 0.0

    def begin(self, seconds: float) -> None:
        """Begin a part, which has `seconds`, or the rest of the time if that is less."""
        self.part_deadline = min(self.deadline, time.monotonic() + seconds)

    def over(self, what: str) -> bool:
        """Return True, and note that `what` is skipped, if the part has no time left."""
        if time.monotonic() < self.part_deadline:
            return False
        self.remark(f"{what} and the rest of its part: skipped, its time is up")
        return True

    def remark(self, text: str) -> None:
        """Add a remark to the tables, once."""
        if text not in self.remarks:
            self.remarks.append(text)
            timing.note(text)

    def row(self, part: str, case: str, **figures: float | str) -> None:
        """Add the figures of a case: a JSON line for each, and a row of the part's table."""
        for name, value in figures.items():
            if isinstance(value, int | float):
                unit = UNITS.get(name) or UNITS.get(name.rpartition("_")[2], "ratio")
                self.lines.add(f"{part}_{case}_{name}", value, unit)
        self.rows.setdefault(part, []).append((case, figures))

    def room(self) -> int:
        """Return the bytes that a pool may take."""
        if self.device.type != "cuda":
            return 64 << 20
        torch.cuda.empty_cache()
        return min(KV_BYTES_MAX, torch.cuda.mem_get_info(self.device)[0] * 2 // 5)

    # ---------------------------------------------------------------- the clock

    def measure(self, works: dict[str, list[Call]], *, graphs: bool = True) -> timing.Times:
        """Return seconds per call of each work. The works take turns; their calls run in order."""
        runs, counts = {}, {}
        for name, calls in works.items():
            runs[name], counts[name] = self._prepare(name, calls, graphs)
        repeats = 2 if self.dry else 10
        times = timing.turns(runs, repeats, seconds=5, clock=self._clock)
        return {name: [each / counts[name] for each in times[name]] for name in works}

    def _prepare(self, name: str, calls: list[Call], graphs: bool) -> tuple[Call, int]:
        """Return a function that repeats all calls, and the number of calls it makes."""
        if self.device.type != "cuda":
            return partial(run_all, calls), len(calls)
        run_all(calls)  # compiles
        torch.cuda.synchronize(self.device)
        passes = int(RUN_SECONDS / max(self._clock(partial(run_all, calls)), 1e-6))
        calls = calls * min(max(passes, 1), max(1, 256 // len(calls)))
        if graphs:
            try:
                return captured(calls), len(calls)
            except RuntimeError as error:
                torch.cuda.synchronize(self.device)
                self.remark(
                    f"{name}: timed without a CUDA graph, as it cannot be captured: {error}"
                )
        return partial(run_all, calls), len(calls)

    def _clock(self, work: Call) -> float:
        if self.device.type != "cuda":
            return timing.wall_clock(work)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def run_all(calls: list[Call]) -> None:
    """Make the calls in order."""
    for call in calls:
        call()


def captured(calls: list[Call]) -> Call:
    """Return the calls as one CUDA graph. Their kernels must be compiled before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_all(calls)
    replay: Call = graph.replay
    return replay


# -------------------------------------------------------------------- blocks


class Pool:
    """Rows of equal length in shuffled blocks, with as many layers as a rotation needs."""

    def __init__(
        self,
        rig: Rig,
        rows: int,
        length: int,
        *,
        head_dim: int = 128,
        block_size: int = 16,
        group: int = 4,
        kv_cache_dtype: Any = None,
        shared: int = 0,
        layers_max: int = LAYERS_MAX,
    ) -> None:
        """`shared`: tokens that all rows have in common, in whole blocks."""
        columns, common = -(-length // block_size), shared // block_size
        own = columns - common
        num_blocks = common + rows * own
        itemsize = 1 if kv_cache_dtype else 2
        self.kv_bytes = num_blocks * block_size * 2 * KV_HEADS * head_dim * itemsize
        self.num_layers = self.layers_for(self.kv_bytes, rig, layers_max)
        self.rig, self.block_size, self.head_dim = rig, block_size, head_dim
        torch.manual_seed(0)
        self.storage = BlockStorage(
            num_blocks,
            block_size,
            [(KV_HEADS, head_dim, head_dim)] * self.num_layers,
            dtype=torch.bfloat16,
            kv_cache_dtype=kv_cache_dtype,
            device=rig.device,
        )
        blocks = torch.randperm(num_blocks, dtype=torch.int32)
        first = blocks[:common].expand(rows, -1)
        tables = torch.cat((first, blocks[common:].view(rows, own)), 1)
        self.block_tables = tables.to(rig.device)
        self.seq_lens = torch.full((rows,), length, dtype=torch.int32, device=rig.device)
        self.query = torch.randn(rows, KV_HEADS * group, head_dim, device=rig.device).bfloat16()
        self._fill()

    @staticmethod
    def layers_for(kv_bytes: int, rig: Rig, layers_max: int = LAYERS_MAX) -> int:
        """Return the layers of a rotation: enough to exceed the L2 cache, if there is room."""
        wanted = 2 if rig.dry else min(layers_max, -(-ROTATION_BYTES // kv_bytes))
        return max(1, min(wanted, rig.room() // kv_bytes))

    def _fill(self) -> None:
        if self.storage.kv_cache_dtype is None:
            self.storage.tier().normal_()
            return
        for layer in range(self.num_layers):
            for cache in self.storage.layer(layer):
                numbers = torch.randn(cache.shape, device=cache.device)
                if cache.dtype == torch.int8:
                    numbers = numbers.mul_(40).round_().clamp_(-127, 127)
                cache.copy_(numbers.to(cache.dtype))
            for scale in self.storage.scales(layer) or ():
                scale.uniform_(0.02, 0.03)

    def calls(self, *, share: bool = True, cu_seqlens_q: Tensor | None = None) -> list[Call]:
        """Return attention calls for each layer, planned ahead if the kernel has plans."""
        return [self.call(layer, share, cu_seqlens_q) for layer in range(self.num_layers)]

    def call(self, layer: int, share: bool = True, cu_seqlens_q: Tensor | None = None) -> Call:
        """Return an attention call for one layer, planned ahead if the kernel has plans."""
        args = AttentionArgs(self.block_tables, self.seq_lens, cu_seqlens_q)
        return attention_call(self.query, self.storage, layer, args, share=share)

    def check(self, name: str, call: Call, layer: int = 0, rows: int = 2) -> None:
        """Compare a decode with the reference for a few rows. Raises: `WrongResult`."""
        expected = reference.paged_attention(
            self.query[:rows],
            *self.storage.layer(layer),
            AttentionArgs(self.block_tables[:rows], self.seq_lens[:rows]),
            scales=self.storage.scales(layer),
        )
        require_close(name, call()[:rows], expected)


def attention_call(
    query: Tensor, storage: BlockStorage, layer: int, args: AttentionArgs, *, share: bool = True
) -> Call:
    """Return an attention call over block tables, planned ahead if the kernel has plans."""
    caches, scales = storage.layer(layer), storage.scales(layer)
    if not planned(query.device):
        tables = args.block_tables, args.seq_lens, args.cu_seqlens_q
        return partial(paged_attention, query, *caches, *tables, scales=scales)
    from kvpager.kernels.gpu.attention import attend, plan_attention

    plan = plan_attention(query, *caches, args, share=share)
    return partial(attend, query, *caches, args, plan, scales=scales)


def planned(device: torch.device) -> bool:
    """Return True if the device's kernel takes plans."""
    return ".gpu." in backends.select("paged_attention", device).__module__


def require_close(name: str, found: Tensor, expected: Tensor, tolerance: float = 3e-2) -> None:
    """Raise `WrongResult` if the largest error exceeds `tolerance` of the largest element."""
    error = float((found.float() - expected.float()).abs().max() / expected.abs().max())
    if not error <= tolerance:
        raise WrongResult(f"{name}: the error is {error:.2e} of the largest element")

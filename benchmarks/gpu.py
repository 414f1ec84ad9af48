"""What the kernels do on a GPU: bandwidth, TFLOP/s, shared prefixes, copies, the allocator.

    python benchmarks/gpu.py                        # everything, under ten minutes
    python benchmarks/gpu.py --only decode,shared   # some parts
    python benchmarks/gpu.py --dry-run              # tiny shapes on the CPU: does the script work?

JSON lines on stdout; with --out (default: benchmarks/results/) they go to a file as well, and a
Markdown table beside it. Bandwidths are bytes of keys and values that have to be read, compared
with a plain copy (bytes read and written) in the same run. Calls are replayed from CUDA graphs,
over layers that together outrun the L2 cache. FlashInfer and flash-attn are measured beside it
where they are installed. Ratios above 1: kvpager is quicker. Every result is compared with the
plain twin before the clock starts. Needs no network; ends well, with a message, where no GPU is.
"""

from __future__ import annotations

import argparse
import json
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

from benchmarks import gpu_attention, gpu_moves, timing
from benchmarks.gpu_rig import Rig

# What runs, in this order, and for how many seconds at most.
PARTS: dict[str, tuple[Callable[[Rig], None], float]] = {
    "decode": (gpu_attention.decode, 120),
    "shared": (gpu_attention.shared_prefix, 50),
    "soak": (gpu_moves.allocator_soak, 60),
    "step_alloc": (gpu_moves.allocator_steps, 20),
    "prefill": (gpu_attention.prefill, 60),
    "quantised": (gpu_attention.quantised, 60),
    "append": (gpu_moves.append, 30),
    "copies": (gpu_moves.copies, 30),
    "decode_shapes": (gpu_attention.decode_shapes, 90),
}
PEERS = ("flashinfer-python", "flash-attn", "flash-attn-3")
RESULTS = Path(__file__).resolve().parent / "results"


def copy_bandwidth(rig: Rig) -> None:
    """Bytes per second that a plain copy reads and writes."""
    num_bytes = (1 << 20) if rig.dry else min(4 << 30, rig.room())
    source = torch.empty(num_bytes, dtype=torch.uint8, device=rig.device).random_()
    target = torch.empty_like(source)
    times = rig.measure({"copy": [lambda: target.copy_(source)]})
    rig.copy_bytes_per_second = 2 * num_bytes / min(times["copy"])
    rig.row("copy", "bandwidth", gbps=rig.copy_bytes_per_second / 1e9)


def run(rig: Rig, chosen: list[str]) -> bool:
    """The parts, each in its time; whether all went well."""
    rig.begin(30)
    copy_bandwidth(rig)
    fine = True
    for name in timing.progress(chosen, "gpu"):
        part, seconds = PARTS[name]
        rig.begin(seconds)
        try:
            part(rig)
        except Exception as error:  # the other parts' figures are worth having
            fine = False
            rig.remark(f"{name}: FAILED: {error!r}")
            timing.note(traceback.format_exc())
        if rig.device.type == "cuda":
            torch.cuda.empty_cache()
    return fine


# -------------------------------------------------------------------- the files


def markdown(rig: Rig, machine: dict[str, Any]) -> str:
    """Everything as tables."""
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
    if rig.remarks:
        text += ["## Remarks", "", *(f"- {remark.splitlines()[0]}" for remark in rig.remarks), ""]
    return "\n".join(text)


def _cell(figure: float | str | None) -> str:
    if isinstance(figure, float):
        return f"{figure:,.0f}" if abs(figure) >= 100 else f"{figure:.3g}"
    return "-" if figure is None else str(figure)


def write(rig: Rig, machine: dict[str, Any], folder: Path) -> None:
    """The lines and the tables, as files named after the day."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{machine['machine']['date']}-gpu"
    lines = [json.dumps(line) for line in (machine, *rig.lines.kept)]
    stem.with_suffix(".jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(markdown(rig, machine), encoding="utf-8")
    timing.note(f"written: {stem}.jsonl and {stem}.md")


# -------------------------------------------------------------------- the run


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="PART,..", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--seconds", type=float, default=540, help="for all of it (default: 540)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"default: {RESULTS.name}/")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on the CPU")
    options = parser.parse_args()
    options.parts = options.only.split(",") if options.only else list(PARTS)
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"--only {options.only}: choose from {', '.join(PARTS)}")
    return options


def main() -> int:
    options = parse()
    if not options.dry_run and not torch.cuda.is_available():
        print(f"gpu: nothing measured, because torch {torch.__version__} finds no GPU here.")
        return 0
    device = torch.device("cpu" if options.dry_run else "cuda")
    rig = Rig(device, dry=options.dry_run, deadline=time.monotonic() + options.seconds)
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
    # Not inference mode: its tensors have no version, so that plans could not be kept.
    with torch.no_grad():
        fine = run(rig, options.parts)
    folder = options.out or (Path(tempfile.mkdtemp()) if options.dry_run else RESULTS)
    write(rig, machine, folder)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())

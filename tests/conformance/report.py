"""Every architecture in every mode, and the table of `docs/models.md` that comes of it.

    python -m tests.conformance.report              # all, with a process for each CPU
    python -m tests.conformance.report llama t5     # these only; the document stays as it is

Prints a line for each architecture and each difference; ends with 1 if there was a difference.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

from kvpager.integrations.huggingface.cache.layers import PagedLayer, PagedSlidingWindowLayer
from kvpager.integrations.huggingface.cache.memory import PagedMemory
from tests.conformance import comparison as conformance
from tests.conformance.caches import cache_of
from tests.conformance.case import run
from tests.support import tiny_models
from tests.support.cache_name import NAME

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "models.md"
SEPARATOR = " · "  # names have commas
_BEGIN, _END = "<!-- begin: made by `make conformance` -->\n", "<!-- end -->\n"


@dataclass
class Record:
    """What was found about an architecture."""

    name: str
    layers: str = ""
    attention: str = ""
    reads: dict[str, str] = field(default_factory=dict)  # attention set -> how blocks are read
    refused: dict[str, str] = field(default_factory=dict)  # mode -> the error
    identical: int = 0
    num_refused: int = 0
    num_only_paged: int = 0
    differences: list[str] = field(default_factory=list)
    seconds: float = 0.0


def examine(name: str) -> Record:
    """Every mode of an architecture, every way to patch."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    start, record = time.perf_counter(), Record(name)
    _look(record)
    for mode in conformance.ALL_MODES:
        for variant in conformance.variants_of(mode):
            try:
                outcome = conformance.check(name, mode, variant)
            except Exception as error:
                record.differences.append(f"{type(error).__name__}: {error}")
                continue
            if outcome == conformance.IDENTICAL:
                record.identical += 1
            elif outcome == conformance.ONLY_PAGED:
                record.num_only_paged += 1
            else:
                record.num_refused += 1
                if conformance.VARIANTS[variant].attention is None:
                    refusal = str(conformance.unpatched(name, mode, None))
                    record.refused[mode] = " ".join(refusal.split())
    record.seconds = time.perf_counter() - start
    return record


def _look(record: Record) -> None:
    """Record which layers are paged, and how their blocks are read."""
    for attention in (None, "kvpager"):
        if attention is not None and not conformance.offers(record.name, attention):
            record.reads[str(attention)] = "not offered"
            continue
        case = conformance.case_of(record.name, attention)
        with conformance.paged(case, conformance.VARIANTS["in place"]) as patch:
            cache = run(case).get(NAME)
            stats = patch.stats()
        how = {"in place": stats.in_place_reads, "gathered": stats.gathers}
        record.reads[str(attention)] = ", ".join(way for way, count in how.items() if count) or "-"
        if attention is None:
            record.layers = _kinds(cache)
            if "(" in record.layers and patch.memory.paged and not patch.memory.unpaged_layers:
                record.layers = _bound(patch.memory)  # it returned a copy that it made (Whisper)
            decoder = case.model.config.get_text_config(decoder=True)
            record.attention = decoder._attn_implementation


def _kinds(cache: object) -> str:
    layers = getattr(cache_of(cache), "layers", [])
    if not layers:
        return "none: it has no such cache"
    counts = Counter(map(_kind, layers))
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def _bound(memory: PagedMemory) -> str:
    return ", ".join(
        f"{count} {'full' if layers.window is None else 'window'}"
        for layers, count in memory.paged.items()
    )


def _kind(layer: object) -> str:
    if isinstance(layer, PagedSlidingWindowLayer):
        return "window"
    return "full" if isinstance(layer, PagedLayer) else f"({type(layer).__name__})"


# ---------------------------------------------------------------- the document


def rendered(records: list[Record]) -> str:
    """The part of the document that is made from records."""
    return "\n".join(
        [*_summary(records), "", *_modes(), "", *_table(records), "", *_refusals(records)]
    )


def _summary(records: list[Record]) -> Iterator[str]:
    identical = sum(record.identical for record in records)
    refused = sum(record.num_refused for record in records)
    only_paged = sum(record.num_only_paged for record in records)
    different = sum(len(record.differences) for record in records)
    total = identical + refused + only_paged + different
    yield (
        f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, CPU, "
        f"float32: {len(records)} architectures, {len(conformance.ALL_MODES)} modes, "
        f"{total} comparisons: {identical} identical, {refused} refused by transformers, "
        f"{only_paged} done only when paged, {different} different."
    )


def _modes() -> Iterator[str]:
    yield "| group | modes |"
    yield "|---|---|"
    for group, modes in conformance.MODES.items():
        yield f"| {group} | {SEPARATOR.join(modes)} |"


def _table(records: list[Record]) -> Iterator[str]:
    groups = list(conformance.MODES)
    yield "| architecture | layers | attention | read | as `kvpager` | " + " | ".join(groups) + " |"
    yield "|---|---|---|---|---|" + "---|" * len(groups)
    for record in records:
        about = [record.name, record.layers, record.attention, *record.reads.values()]
        cells = [_cell(record, group) for group in groups]
        yield "| " + " | ".join([*about, *cells]) + " |"


def _cell(record: Record, group: str) -> str:
    modes = conformance.MODES[group]
    if any(f"{record.name}, {mode}, " in line for line in record.differences for mode in modes):
        return "differs"
    refused = sum(mode in record.refused for mode in modes)
    return "=" if not refused else "r" if refused == len(modes) else f"= ({refused} r)"


def _refusals(records: list[Record]) -> Iterator[str]:
    yield "| refused by transformers | for |"
    yield "|---|---|"
    for mode in conformance.ALL_MODES:
        names = [record.name for record in records if mode in record.refused]
        others = [record.name for record in records if mode not in record.refused]
        if names:
            yield f"| {mode} | {_listed(names, others)} |"


def _listed(names: list[str], others: list[str]) -> str:
    if len(names) <= len(others):
        return SEPARATOR.join(names)
    return "all but " + SEPARATOR.join(others) if others else "all"


@dataclass(frozen=True)
class Document:
    """What the document says is covered."""

    architectures: list[str]
    modes: dict[str, list[str]]


def read(path: Path) -> Document:
    """The architectures and modes that the document's tables name."""
    _, made, _ = _split(path.read_text(encoding="utf-8"))
    tables = [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines()[2:]]
        for part in made.split("\n\n")
        if part.startswith("|")
    ]
    modes, architectures, _ = tables
    return Document([row[0] for row in architectures], {g: m.split(SEPARATOR) for g, m in modes})


def _split(text: str) -> tuple[str, str, str]:
    before, rest = text.split(_BEGIN)
    made, after = rest.split(_END)
    return before, made, after


def write(path: Path, records: list[Record]) -> None:
    """Renew the made part of the document."""
    before, _, after = _split(path.read_text(encoding="utf-8"))
    made = rendered(records)
    path.write_text(f"{before}{_BEGIN}{made}\n{_END}{after}", encoding="utf-8")


# ---------------------------------------------------------------- the program


def main(arguments: list[str]) -> int:
    """Examine, print, and write the document if nothing was left out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="architecture", help="default: all")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--no-write", action="store_true", help="leave the document as it is")
    chosen = parser.parse_args(arguments)
    unknown = set(chosen.names) - set(tiny_models.ARCHITECTURES)
    if unknown:
        parser.error(f"no such architecture: {', '.join(sorted(unknown))}")
    names = [name for name in chosen.names or tiny_models.ARCHITECTURES if _is_here(name)]
    records = []
    with multiprocessing.get_context("spawn").Pool(chosen.processes) as pool:
        for record in pool.imap(examine, names):
            records.append(record)
            _print(record)
    for line in itertools.islice(_summary(records), 1):
        print(line)
    if set(names) == set(tiny_models.ARCHITECTURES) and not chosen.no_write:
        write(DOCUMENT, records)
        print(f"wrote {DOCUMENT}")
    return int(any(record.differences for record in records))


def _is_here(name: str) -> bool:
    if not tiny_models.is_known(name):
        print(f"{name}: not in transformers {transformers.__version__}")
        return False
    return True


def _print(record: Record) -> None:
    print(
        f"{record.name}: {record.identical} identical, {record.num_refused} refused, "
        f"{record.num_only_paged} only paged, {len(record.differences)} different; "
        f"{record.layers}; {record.seconds:.0f} s",
        flush=True,
    )
    for line in record.differences:
        print(f"    {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

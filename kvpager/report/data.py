"""The data of a page, packed: JSON for figures, and planes of bytes for the maps."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import kvpager
from kvpager.report.cells import packed
from kvpager.report.model import Reserved, Run
from kvpager.report.moments import Moment
from kvpager.report.numbers import numbers
from kvpager.report.reserved import ReservedPool

WAITING_NAMED = 12  # of the sequences that wait for a region


def packed_data(
    run: Run, pool: ReservedPool, reserved: list[Reserved], stride: int, num_lives: int
) -> bytes:
    """Return the data of each `stride`-th shown step, for the script of the page. O(data).

    It is compressed: a length (uint32), JSON of that length, then the planes of both maps.
    """
    kept = sorted({*range(0, len(run.moments), stride), len(run.moments) - 1})
    moments, reserved = [run.moments[i] for i in kept], [reserved[i] for i in kept]
    lives, life = run.lives.chosen(num_lives, run.moments[-1].step)
    noun = "request" if run.header.source in ("engine", "simulate") else "sequence"
    model = {
        **_header(run, noun),
        "reserved": _reserved(run, pool, reserved),
        "paged": {},
        "frames": _frames(run, moments),
        "busiest": _busiest(moments),
        "lives": lives,
        "life": life,
        "traffic": _traffic(run, moments),
        "numbers": numbers(run, pool, reserved, noun),
    }
    text = json.dumps(model, separators=(",", ":")).encode()
    cells = packed([each.cells for each in reserved]) + packed([each.cells for each in moments])
    return zlib.compress(struct.pack("<I", len(text)) + text + cells, 6)


def _header(run: Run, noun: str) -> dict[str, Any]:
    header, grid = run.header, run.grid
    return {
        "version": header.kvpager,
        "writer": kvpager.__version__,
        "source": header.source,
        "mode": header.mode,
        "model": header.model,
        "noun": noun,
        "blockSize": header.block_size,
        "blockBytes": header.block_bytes,
        "numBlocks": grid.num_blocks,
        "grew": any(each.num_blocks != grid.num_blocks for each in run.moments),
        "firstBlock": header.num_reserved,
        "cellBlocks": grid.cell_blocks,
        "numCells": grid.num_cells,
        "scale": grid.scale,
        "numSteps": run.num_steps,
        "complete": run.is_complete,
    }


def _frames(run: Run, moments: Sequence[Moment]) -> dict[str, list[Any]]:
    return {
        "step": [each.step for each in moments],
        "t": [round(each.t, 4) for each in moments],
        "cells": [-(-each.num_blocks // run.grid.cell_blocks) for each in moments],
        "held": [each.counts.held for each in moments],
        "cached": [each.counts.cached + each.counts.kept for each in moments],
        "free": [each.counts.free for each in moments],
        "host": [each.counts.host for each in moments],
        "tokens": [each.counts.tokens for each in moments],
        "running": [each.num_running for each in moments],
        "swapped": [len(each.lengths) - each.num_running for each in moments],
        "queued": [each.num_queued for each in moments],
        "saved": [each.saved for each in moments],
        "tree": [each.tree for each in moments],
    }


def _reserved(run: Run, pool: ReservedPool, reserved: list[Reserved]) -> dict[str, Any]:
    cells, rest = divmod(pool.region_blocks, run.grid.cell_blocks)
    return {
        "regions": pool.num_regions,
        "regionBlocks": pool.region_blocks,
        "regionCells": cells if not rest and pool.num_regions else 0,
        "maxTokens": run.max_tokens,
        "isLongest": run.header.max_tokens is None,
        "running": [each.running for each in reserved],
        "waiting": [each.waiting for each in reserved],
        "waitingIds": [each.waiting_requests[:WAITING_NAMED] for each in reserved],
        "tokens": [each.tokens for each in reserved],
    }


def _busiest(moments: Sequence[Moment]) -> int:
    """Return the index of the moment at which most sequences run."""
    sizes = [(each.num_running, each.counts.tokens) for each in moments]
    return sizes.index(max(sizes))


def _traffic(run: Run, moments: Sequence[Moment]) -> list[dict[str, Any]]:
    found = []
    for index, name in enumerate(run.header.tiers):
        tiers = [each.tiers[index] if index < len(each.tiers) else None for each in moments]
        if any(tiers):
            found.append(
                {
                    "name": name,
                    "unit": "bytes",
                    "inwards": [each.loaded_bytes if each else 0 for each in tiers],
                    "outwards": [each.saved_bytes if each else 0 for each in tiers],
                    "blocks": [each.blocks if each else None for each in tiers],
                }
            )
    if moments[-1].totals.swapped_out:
        found.insert(
            0,
            {
                "name": "swap to host memory",
                "unit": "blocks",
                "inwards": [each.totals.swapped_in for each in moments],
                "outwards": [each.totals.swapped_out for each in moments],
                "blocks": [each.counts.host for each in moments],
            },
        )
    return found

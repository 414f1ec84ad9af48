"""Measure every peer that can be imported: `python -m benchmarks.peers [module ...]`."""

from __future__ import annotations

import json
import sys
from importlib import import_module

from benchmarks.peers import MODULES


def main(names: list[str]) -> None:
    """Print one line per figure, and why where a peer cannot be measured."""
    for name in names or list(MODULES):
        peer = import_module(f"benchmarks.peers.{name}")
        reason = peer.available()
        if reason is not None:
            print(json.dumps({"peer": peer.NAME, "module": name, "skipped": reason}), flush=True)
            continue
        for figure, value, unit in peer.figures():
            line = {"name": figure, "value": round(value, 1), "unit": unit, "peer": peer.NAME}
            line["module"] = name
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    main(sys.argv[1:])

"""Crash processes that use a disk store, lose power, flip bits, and damage directories.

    python tests/crash.py         # 1,000 kills and power losses, 10,000 flips, 20 of each damage
    python tests/crash.py --kills 50 --seed 7

Ends with status 1 if a wrong block was served, a flipped bit was accepted, a crash left less than
90 % of the capacity, or a dropped block returned after a power loss.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support.disk_campaign import NUM_SLOTS, Tally, crashes
from tests.support.disk_damage import DAMAGE, damaged, flips
from tests.support.disk_faults import FAULTS
from tests.support.power_loss import power_losses

LEAST = 0.9


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=1000, help="killed processes")
    parser.add_argument("--power-losses", type=int, default=1000, help="losses of power")
    parser.add_argument("--flips", type=int, default=10_000, help="flipped bits")
    parser.add_argument("--damage", type=int, default=20, help="directories of each kind of damage")
    parser.add_argument(
        "--fault-kills", type=int, default=40, help="at most, for each planted fault"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's)")
    args = parser.parse_args()
    logging.getLogger("kvpager").setLevel(logging.ERROR)  # damage is expected here
    multiprocessing.set_forkserver_preload(["tests.support.disk_campaign"])
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        good = [
            _kills(Path(folder, "kills"), args.kills, args.seed),
            _power_losses(Path(folder, "power"), args.power_losses, args.seed),
            *(_fault(Path(folder, f"fault{n}"), name, args) for n, name in enumerate(FAULTS)),
            _flips(Path(folder, "flips"), args.flips, args.seed),
            *(_damage(Path(folder), kind, args) for kind in DAMAGE),
        ]
    print("All good." if all(good) else "FAILED", flush=True)
    return 0 if all(good) else 1


def _kills(folder: Path, kills: int, seed: int) -> bool:
    tally = Tally()
    for tally in tqdm(crashes(folder, kills, seed), total=kills, desc="kills", disable=None):  # noqa: B007
        pass
    print(
        f"{tally.runs} kills: {_told(tally)}; at least {tally.least} of {NUM_SLOTS} offered",
        flush=True,
    )
    return not tally.wrong and tally.least >= LEAST * NUM_SLOTS


def _power_losses(folder: Path, losses: int, seed: int) -> bool:
    tally, found = Tally(), power_losses(folder, losses, seed)
    for tally in tqdm(found, total=losses, desc="power losses", disable=None):  # noqa: B007
        pass
    print(
        f"{tally.runs} power losses: {_told(tally)}; {tally.returned} dropped ones returned",
        flush=True,
    )
    return not tally.wrong and not tally.returned


def _fault(folder: Path, name: str, args: argparse.Namespace) -> bool:
    found = crashes(folder, args.fault_kills, args.seed, name, verify=False)
    tally = next((tally for tally in found if tally.wrong), None)
    found.close()
    outcome = "NOT FOUND" if tally is None else f"found after {tally.runs} kills"
    print(f"planted, frames not checked: {name}: {outcome}", flush=True)
    return tally is not None


def _flips(folder: Path, count: int, seed: int) -> bool:
    results = list(tqdm(flips(folder, count, seed), total=count, desc="flips", disable=None))
    refused = sum(refused for refused, _ in results)
    print(f"{count} flipped bits: {refused} refused", flush=True)
    return refused == count and all(back for _, back in results)


def _damage(folder: Path, kind: str, args: argparse.Namespace) -> bool:
    tally = damaged(folder, kind, args.damage, args.seed)
    print(f"{tally.runs} directories, {kind}: {_told(tally)}", flush=True)
    return not tally.wrong


def _told(tally: Tally) -> str:
    return (
        f"{tally.offered} offered, {tally.served} served, {tally.bad} refused, {tally.wrong} wrong"
    )


if __name__ == "__main__":
    sys.exit(main())

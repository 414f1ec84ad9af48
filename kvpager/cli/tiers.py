"""The commands `kvpager tiers`: look at the blocks that a store holds, print the probe."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from kvpager._text import counted, size
from kvpager.cli.errors import FAILED, wrong_usage
from kvpager.cli.files import check_writable, write_json
from kvpager.cli.options import JsonFile
from kvpager.errors import BadInput

if TYPE_CHECKING:
    from kvpager.storage.tiers.inspection import Inspector

_T = TypeVar("_T")
_PART = 256  # blocks of one deletion
_KEPT = ("version", "seal")  # faults of blocks that may be whole
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

_Place = Annotated[
    str,
    typer.Argument(metavar="DIR|URL", help="A disk store's directory, or valkey://host:port."),
]
_Secret = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The secret of the seal, if the store has one."),
]


def ls(
    place: _Place,
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="Blocks to show.")] = 50,
    json_file: JsonFile = None,
) -> None:
    """List blocks, the youngest first: key, bytes, and age.

    The age counts from the save on a disk, and from the last use on a server.
    """
    check_writable(json_file)
    with _opened(place) as store:
        blocks = sorted(store.blocks(), key=lambda block: block.age_s)
    shown = blocks[:limit]
    write_json(
        json_file,
        {
            "blocks": len(blocks),
            "shown": [
                {"key": block.key.hex(), "bytes": block.num_bytes, "age_s": block.age_s}
                for block in shown
            ],
        },
    )
    if json_file == "-":
        return
    for block in shown:
        typer.echo(f"{block.key.hex()}  {size(block.num_bytes):>9}  {_age(block.age_s):>8}")
    if len(blocks) > limit or not blocks:
        typer.echo(f"{counted(len(blocks), 'block')} in all")


def stats(place: _Place, json_file: JsonFile = None) -> None:
    """Show how many blocks a store has, their bytes and ages, and what the store is."""
    check_writable(json_file)
    with _opened(place) as store:
        facts: dict[str, str | int | float] = dict(store.facts())
        ages, num_bytes = list[float](), 0
        for block in store.blocks():
            ages.append(block.age_s)
            num_bytes += block.num_bytes
    found = {"blocks": len(ages), "bytes": num_bytes}
    if ages:
        facts |= {"youngest_s": min(ages), "oldest_s": max(ages)}
    write_json(json_file, found | facts)
    if json_file == "-":
        return
    typer.echo(f"{'blocks':<20}{len(ages):,} ({size(num_bytes)})")
    for name, value in facts.items():
        text = _age(value) if isinstance(value, float) else str(value)
        typer.echo(f"{name.removesuffix('_s'):<20}{text}")


def verify(place: _Place, secret_file: _Secret = None, json_file: JsonFile = None) -> None:
    """Read every block and check its frame. Damaged blocks are dropped, as by a load.

    On a server, blocks of another release or seal are kept.

    Exit status: 0; 1 if a block was damaged or the store cannot be read; 2 for wrong usage.
    """
    check_writable(json_file)
    with _opened(place, secret_file) as store:
        keys = [block.key for block in store.blocks()]
        faults = Counter(
            fault.value
            for key in _progress(keys, "verify", json_file)
            for fault in store.check([key])
            if fault is not None
        )
    write_json(json_file, {"blocks": len(keys), "faults": dict(faults)})
    if json_file != "-":
        found = "; ".join(
            f"{count} of another {fault}, kept"
            if fault in _KEPT
            else f"{count} damaged ({fault}), dropped"
            for fault, count in faults.items()
        )
        typer.echo(f"{counted(len(keys), 'block')}: {found or 'all whole'}")
    if faults:
        raise typer.Exit(FAILED)


def gc(
    place: _Place,
    older_than: Annotated[
        str, typer.Option(metavar="AGE", help="Blocks of this age go: 30m, 12h, 7d.")
    ],
    secret_file: _Secret = None,
    json_file: JsonFile = None,
) -> None:
    """Delete blocks that were saved (disk) or used last (server) longer ago than AGE."""
    check_writable(json_file)
    seconds = _parsed_age(older_than)
    with _opened(place, secret_file) as store:
        blocks = list(store.blocks())
        old = [block.key for block in blocks if block.age_s > seconds]
        parts = [old[start : start + _PART] for start in range(0, len(old), _PART)]
        for part in _progress(parts, "gc", json_file):
            store.drop(part)
    write_json(json_file, {"blocks": len(blocks), "deleted": len(old)})
    if json_file != "-":
        typer.echo(f"{counted(len(old), 'block')} of {len(blocks)} deleted")


def probe() -> None:
    """Print the probe prompt of cross_stack=True as token ids in JSON, for a server."""
    from kvpager.storage.tiers.agreement import probe_request

    typer.echo(json.dumps(probe_request()))


@contextlib.contextmanager
def _opened(place: str, secret_file: Path | None = None) -> Iterator[Inspector]:
    from kvpager.storage.tiers.urls import open_inspector

    with wrong_usage():
        secret = None if secret_file is None else secret_file.read_bytes()
        store = open_inspector(place, secret)
    try:
        yield store
    except ValueError as error:  # a secret that is missing or wrong
        raise BadInput(
            re.sub(r"^(secret=None|secret|seal)\b", "--secret-file", str(error))
        ) from None
    finally:
        store.close()


def _progress(items: list[_T], name: str, json_file: str | None) -> Iterator[_T]:
    from tqdm import tqdm

    hidden = json_file == "-" or None  # tqdm's None: on a terminal only
    yield from tqdm(items, desc=name, leave=False, disable=hidden, file=sys.stderr)


def _parsed_age(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if match is None:
        raise BadInput(f"--older-than={text}: expected a number with s, m, h or d, such as 7d.")
    return float(match[1]) * _SECONDS[match[2]]


def _age(seconds: float) -> str:
    for unit, length in reversed(_SECONDS.items()):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return "0 s"

"""One moment of an engine, as `screen` shows it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple


class Cell(NamedTuple):
    """Some neighbouring blocks, as most of them are. `request`: their holder, if it is one."""

    kind: Kind
    request: int | None = None


class Kind(Enum):
    """What holds blocks."""

    FREE = "free"
    CACHED = "cached"
    HELD = "held"
    SHARED = "shared"
    KEPT = "kept"


class Row(NamedTuple):
    """A live request. `shared`: blocks that another sequence holds as well."""

    request: int
    state: str
    tokens: int
    max_tokens: int
    blocks: int
    shared: int


class TierRow(NamedTuple):
    """A store, None for what is not known."""

    name: str
    blocks: int | None
    loaded_bytes: int | None
    saved_bytes: int | None


@dataclass(frozen=True, slots=True)
class View:
    """Counts at one moment.

    Attributes:
        title: what is shown.
        seconds: since the start of a recording; None for an engine.
        blocks: device blocks by kind; shared blocks count as held.
        block_size: token slots of a block; None if it is not known.
        tokens: slots in use of held blocks.
        requests: live requests by state.
        rates: things per second, by name.
        totals: things since the start, by name.
        cells: the blocks in order; empty if they are not known.
        cell_blocks: blocks of a cell.
        rows: the oldest live requests.
        tiers: the stores.
    """

    title: str
    blocks: dict[str, int]
    tokens: int
    requests: dict[str, int]
    block_size: int | None = None
    seconds: float | None = None
    rates: dict[str, float] = field(default_factory=dict)
    totals: dict[str, int] = field(default_factory=dict)
    cells: tuple[Cell, ...] = ()
    cell_blocks: int = 1
    rows: tuple[Row, ...] = ()
    tiers: tuple[TierRow, ...] = ()

"""The figures of both caches in every scenario, and their JSON form."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

import kvpager
from kvpager.blocks.stats import BlockStatus
from kvpager.demo.measurement import States
from kvpager.demo.scenarios import Scenario
from kvpager.demo.settings import Settings
from kvpager.integrations.huggingface.patching.report import PatchStats


@dataclass(frozen=True, slots=True)
class Difference:
    """The first token of a row that differs, and how close a choice it was.

    `margin` is the log-probability of transformers' choice less that of kvpager's, both computed
    by transformers without a cache. `tolerance` is how much of it rounding explains.
    """

    call: int
    row: int
    position: int  # among the generated tokens
    expected: int | None
    got: int | None
    margin: float | None
    tolerance: float | None

    @property
    def is_near_tie(self) -> bool:
        """True if rounding in the model's dtype explains the difference."""
        if self.margin is None or self.tolerance is None:
            return False
        return abs(self.margin) <= self.tolerance

    def __str__(self) -> str:
        margin = ""
        if self.margin is not None:
            margin = f", margin {self.margin:.3g} (rounding: {self.tolerance:.3g})"
        call = f"call {self.call}, " if self.call else ""
        return (
            f"{call}row {self.row}, new token {self.position}: transformers {self.expected}, "
            f"kvpager {self.got}{margin}"
        )


@dataclass(frozen=True, slots=True)
class RowText:
    """The end of a prompt, and the generated text."""

    prompt_tokens: int
    prompt_end: str
    text: str


@dataclass(frozen=True, slots=True)
class CallFigures:
    """The blocks that one call of `generate` took from kvpager's pool."""

    prompt_tokens: int  # of all rows
    prefix_hit_tokens: int
    new_blocks: int  # not in the pool before, neither held nor cached


@dataclass(frozen=True, slots=True)
class Contiguous:
    """A buffer for each row, of the known length or of the model's limit."""

    known_length_tokens: int
    known_length_bytes: int
    model_limit_tokens: int | None
    model_limit_bytes: int | None


@dataclass(frozen=True, slots=True)
class Plain:
    """Transformers' own cache, and the buffers that would hold as much."""

    reserved_bytes: int
    needed_bytes: int
    seconds: float
    contiguous: Contiguous


@dataclass(frozen=True, slots=True)
class Paged:
    """kvpager's pool, while the caches are alive."""

    stats: PatchStats
    block_bytes: int
    calls: tuple[CallFigures, ...]
    states: tuple[States, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Result:
    """One scenario on both sides."""

    scenario: Scenario
    texts: tuple[RowText, ...]
    num_compared: int
    differences: tuple[Difference, ...]  # at most one for each row
    plain: Plain
    paged: Paged

    @property
    def difference(self) -> Difference | None:
        """Return the difference to show: a wrong token before a near-tie."""
        return min(self.differences, key=lambda found: found.is_near_tie, default=None)

    @property
    def is_wrong(self) -> bool:
        """True if a token differs by more than rounding explains."""
        return not all(found.is_near_tie for found in self.differences)

    def as_json(self) -> dict[str, Any]:
        """Return plain data. O(rows + blocks)."""
        plain, paged = self.plain, self.paged
        states = np.concatenate([*paged.states, np.empty(0, np.int8)])
        return {
            "key": self.scenario.key,
            "title": self.scenario.title,
            "rows": self.scenario.rows_alive,
            "identical": not self.differences,
            "wrong": self.is_wrong,
            "differences": [
                {**dataclasses.asdict(found), "near_tie": found.is_near_tie}
                for found in self.differences
            ],
            "compared_tokens": self.num_compared,
            "texts": [dataclasses.asdict(text) for text in self.texts],
            "dynamic_cache": {
                "reserved_bytes": plain.reserved_bytes,
                "used_bytes": plain.needed_bytes,
                "wasted_bytes": plain.reserved_bytes - plain.needed_bytes,
                "seconds": plain.seconds,
            },
            "kvpager": {
                **dataclasses.asdict(paged.stats),
                "needed_bytes": plain.needed_bytes,
                "wasted_bytes": paged.stats.held_bytes - plain.needed_bytes,
                "open_bytes": paged.stats.held_bytes - paged.stats.used_bytes,
                "block_bytes": paged.block_bytes,
                "blocks_by_state": {
                    state.name.lower(): int((states == state).sum()) for state in BlockStatus
                },
                "calls": [dataclasses.asdict(call) for call in paged.calls],
                "seconds": paged.seconds,
            },
            "contiguous": dataclasses.asdict(plain.contiguous),
        }


@dataclass(frozen=True, slots=True)
class Results:
    """All scenarios of one run."""

    settings: Settings
    model: str
    device: str
    dtype: str
    scenarios: tuple[Result, ...]
    modes: tuple[dict[str, Any], ...] = ()  # the figures of `kvpager.bench.modes`

    @property
    def identical(self) -> bool:
        """True if kvpager generated every token that transformers generated."""
        return not any(result.differences for result in self.scenarios)

    @property
    def is_wrong(self) -> bool:
        """True if any token differs by more than rounding explains."""
        return any(result.is_wrong for result in self.scenarios)

    def as_json(self) -> dict[str, Any]:
        """Return plain data for `json.dumps`."""
        return {
            "kvpager": kvpager.__version__,
            "model": self.model,
            "device": self.device,
            "dtype": self.dtype,
            "block_size": self.settings.block_size,
            "new_tokens": self.settings.max_new_tokens,
            "memory": self.settings.memory,
            "identical": self.identical,
            "wrong": self.is_wrong,
            "scenarios": [result.as_json() for result in self.scenarios],
            "modes": list(self.modes),
        }

"""Columns that layers may write: those announced for a prompt, and those that their group takes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kvpager.errors import KVPagerError


class Announced(NamedTuple):
    """The columns of a prompt, as `generate` hands it to the model.

    `is_binding` is true if rows or columns were left out. The result of a pass that writes
    other columns is then discarded.
    """

    rows: int
    columns: int
    columns_per_pass: int
    is_binding: bool = False

    def holds(self, rows: int, start: int, stop: int) -> bool:
        """True if a pass may write columns `start` to `stop` of `rows` rows."""
        return (rows, stop) == (self.rows, self._stop(start))

    def shows(self, mask: Any, padding: NDArray[np.int64], start: int) -> bool:
        """True if a pass from column `start` on hides `padding` [rows] and nothing else.

        `mask` is what the model builds its masks from. Waits for a GPU.
        """
        if mask is None:
            return not padding.any()
        if not isinstance(mask, Tensor) or mask.shape != (self.rows, self._stop(start)):
            return False
        tokens = np.arange(mask.shape[1]) >= padding[:, None]
        return np.array_equal((mask != 0).cpu().numpy(), tokens)

    def _stop(self, start: int) -> int:
        return min(start + self.columns_per_pass, self.columns)


class Origin(NamedTuple):
    """The group that a group's layers were in before they wrote other columns."""

    number: int
    is_fork: bool  # layers had written columns there; otherwise they begin


class Unannounced(KVPagerError):
    """A forward pass writes other columns than those it was given, or hides others."""


class OtherColumns(KVPagerError):
    """A layer writes other columns than its group. Nothing has changed."""

"""The columns of a batch, and the tokens among them.

    columns        0  1  2  3  4  5  6  7        a batch as transformers sees it: one length,
    row 0          .  .  .  t0 t1 t2 t3 t4       left-padded
    row 1          t0 t1 t2 t3 t4 t5 t6 t7
    sequences      row 0: t0..t4 in 2 blocks of 4; row 1: t0..t7 in 2 blocks

transformers counts columns, the block manager counts tokens: token = column - padding. So padding
is never stored, and equal prompts have equal blocks with any padding.

The arguments of `generate` show the padding before the model runs. But a model may add columns
before the prompt, such as soft prompts or an image. So the first write of a prompt is compared with
the expected columns. If they differ, every column is stored.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from kvpager.errors import KVPagerError
from kvpager.plans import Int64


class ExpectedPrompt(NamedTuple):
    """The columns of a prompt that `generate` passes to the model.

    `is_binding` is true if rows or columns were left out. A pass that writes other columns is then
    wrong, and its result is discarded.
    """

    rows: int
    columns: int
    columns_per_pass: int
    is_binding: bool = False

    def holds(self, rows: int, start: int, stop: int) -> bool:
        """Return True if a pass from `start` on writes `rows` rows up to column `stop`. O(1)."""
        return (rows, stop) == (self.rows, self._stop(start))

    def shows(self, mask: Any, padding: Int64, start: int) -> bool:
        """Return True if `mask`, which a model passes from column `start` on, hides `padding` only.

        `padding` is [rows]. O(rows * columns). Waits for a GPU.
        """
        if mask is None:
            return not padding.any()
        if not isinstance(mask, Tensor) or mask.shape != (self.rows, self._stop(start)):
            return False
        tokens = np.arange(mask.shape[1]) >= padding[:, None]
        return np.array_equal((mask != 0).cpu().numpy(), tokens)

    def _stop(self, start: int) -> int:
        return min(start + self.columns_per_pass, self.columns)


class Columns:
    """The number of columns of a batch, and the padding of its rows."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all columns. O(1)."""
        self.count = 0
        self.padding: Int64 = np.zeros(0, np.int64)  # columns before each row's first token
        self.first_private = 0  # no other group shares blocks from this column on
        self.announced: ExpectedPrompt | None = None  # while the prompt is computed
        self._step = 0, 0  # start and stop of the columns that were added last

    def lengths(self, count: int) -> Int64:
        """Return the tokens of each row among the first `count` columns, int64 [rows]. O(rows)."""
        return np.maximum(count - self.padding, 0)

    def begin(self, num_rows: int) -> None:
        """Begin with `num_rows` rows, without padding unless it was expected. O(rows)."""
        if len(self.padding) != num_rows:
            self.padding = np.zeros(num_rows, np.int64)

    def start_at(self, count: int) -> None:
        """Begin with `count` cached columns. O(1)."""
        self.count = self.first_private = count

    def add(self, start: int, stop: int) -> None:
        """Add the columns `start` to `stop` of a step. O(1)."""
        self._step, self.count = (start, stop), stop

    def select(self, rows: Int64) -> None:
        """Keep the padding of `rows`. Their blocks may be shared afterwards. O(rows)."""
        self.padding, self.first_private = self.padding[rows], self.count

    def truncate(self, count: int) -> None:
        """Forget all columns from `count` on. O(rows)."""
        self.padding = np.minimum(self.padding, count)
        self.count, self.first_private = count, min(self.first_private, count)

    def fork(self) -> Columns:
        """Return a copy for a batch that shares all blocks of this one. O(rows)."""
        self.first_private = self.count
        fork = copy.copy(self)
        fork.padding = self.padding.copy()
        return fork

    def check_takes(self, held_rows: int, num_rows: int, start: int, num_new: int) -> None:
        """Check that a layer can write these columns of `num_rows` rows. O(1).

        Raises: `ColumnMismatch`; `ValueError` if `num_rows` differs from `held_rows`, the rows of
        the batch.
        """
        stop = start + num_new
        if start == self.count:
            if held_rows not in (0, num_rows):
                raise ValueError(
                    f"keys of {num_rows} rows: the cache holds {held_rows} rows. "
                    "Pass as many rows, or a new cache."
                )
            return
        # Another layer has added the columns already, in this pass or in an earlier pass.
        private = start >= self.first_private and num_rows == held_rows
        if private and (start, stop) == self._step:
            return
        late = start > 0 and stop <= self.count
        if private and late and start >= int(self.padding.max(initial=0)):
            return
        raise ColumnMismatch(
            f"a layer writes columns {start} to {stop} of {num_rows} rows, but its group has "
            f"{self.count} columns of {held_rows} rows, copied or reordered at column "
            f"{self.first_private}. In compiled code, all layers must write the same columns."
        )

    def agree_with_mask(self, mask: Any) -> bool:
        """Return True if the mask of a pass agrees with the expected prompt. O(rows * columns).

        Raises: as `agree_with_write`.
        """
        announced, start = self.announced, self.count
        if announced is None or start >= announced.columns:
            return True
        return announced.shows(mask, self.padding, start) or self._distrust(announced, start)

    def agree_with_write(self, num_rows: int, start: int, stop: int) -> bool:
        """Return True if new columns agree with the expected prompt; else store them all. O(rows).

        Raises: `UnexpectedColumns` if the result of the pass must be discarded.
        """
        announced = self.announced
        if announced is None or stop <= self.count or start >= announced.columns:
            return True
        return announced.holds(num_rows, start, stop) or self._distrust(announced, start)

    def _distrust(self, announced: ExpectedPrompt, start: int) -> bool:
        """Treat all columns from `start` on as tokens. Returns False."""
        if announced.is_binding:
            raise UnexpectedColumns(f"the pass from column {start} on differs from {announced}")
        self.padding, self.announced = np.minimum(self.padding, start), None
        return False


class Origin(NamedTuple):
    """The group that a group's layers left because they wrote other columns."""

    number: int
    is_fork: bool  # True if the layers had written columns there


class UnexpectedColumns(KVPagerError):
    """A forward pass writes or hides other columns than its prompt has."""


class ColumnMismatch(KVPagerError):
    """A layer writes other columns than its group has. Nothing has changed."""

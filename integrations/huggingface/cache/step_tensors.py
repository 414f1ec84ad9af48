"""The slots that a step writes and the block tables that it reads, as tensors.

They are made once for all layers of a step, and again when the batch changes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvpager.integrations.huggingface.cache.columns import Columns
from kvpager.integrations.huggingface.cache.row_tables import RowTables
from kvpager.integrations.huggingface.cache.rows import BatchRows, Partition
from kvpager.kernels.host_rows import to_device
from kvpager.ops import HostRows
from kvpager.plans import Int64

_CPU = torch.device("cpu")


class Slots(NamedTuple):
    """The slots of new tokens of the rows in one tier."""

    rows: Tensor | None  # indices in the batch; None for all
    slots: Tensor  # int64 [rows * columns], in the order of rows; -1 for padding
    on_host: bool


class Tables(NamedTuple):
    """The block tables of the rows in one tier."""

    rows: Tensor | None  # indices in the batch, int64 on the layer's device; None for all
    tables: RowTables
    on_host: bool


class StepTensors:
    """The slots and block tables of a batch's rows, on each device that needs them."""

    def __init__(self, rows: BatchRows, columns: Columns) -> None:
        self._rows, self._columns = rows, columns
        self.clear()

    def clear(self) -> None:
        """Drop all tensors, since the batch changes. O(1)."""
        self._slots: dict[tuple[torch.device, int, int], list[Slots]] = {}
        self._tables: dict[tuple[torch.device, int], list[Tables]] = {}
        # The start and stop of columns that were just added, and their slots in each tier.
        self.new: tuple[int, int, list[Int64]] | None = None

    def slots(self, start: int, stop: int, device: torch.device) -> list[Slots]:
        """Return the slots of columns `start` to `stop`, for each tier with rows.

        O(rows * columns), or O(1) if they were made before.
        """
        slots = self._slots.get((device, start, stop))
        if slots is None:
            slots = self._slots[device, start, stop] = []
            for number, partition in enumerate(self._rows.partitions()):
                if self.new is not None and self.new[:2] == (start, stop):
                    flat = self._with_padding(self.new[2][number], partition, start, stop)
                else:  # a layer that writes columns after other layers
                    flat = self._written(partition, start, stop)
                tensor = to_device(flat, _CPU if partition.on_host else device)
                slots.append(Slots(self._row_indices(partition, device), tensor, partition.on_host))
            if stop == self._columns.count:
                # Slots of later columns, for tokens that `fill` appends without a table change.
                ahead = to_device(self._rows.ahead(), device).unbind()
                for column, tensor in enumerate(ahead, start=stop):
                    self._slots[device, column, column + 1] = [Slots(None, tensor, False)]
        return slots

    def _with_padding(self, slots: Int64, partition: Partition, start: int, stop: int) -> Int64:
        """Return the slots of all columns: `slots` for tokens, -1 for padding."""
        num_columns = len(partition.rows) * (stop - start)
        if len(slots) == num_columns:
            return slots
        padded = np.full(num_columns, -1, np.int64)
        padding = self._columns.padding[partition.rows, None]
        padded[(np.arange(start, stop) >= padding).reshape(-1)] = slots
        return padded

    def _written(self, partition: Partition, start: int, stop: int) -> Int64:
        slots_of, lengths = partition.pool.manager.slots, self._columns.lengths
        ranges = (lengths(column)[partition.rows].tolist() for column in (start, stop))
        slots = [slots_of(*each) for each in zip(partition.sequences, *ranges, strict=True)]
        return self._with_padding(np.concatenate(slots), partition, start, stop)

    def _row_indices(self, partition: Partition, device: torch.device) -> Tensor | None:
        return None if len(partition.rows) == len(self._rows) else to_device(partition.rows, device)

    def tables(self, num_columns: int, device: torch.device) -> list[Tables]:
        """Return block tables and lengths at `num_columns` columns, for each tier with rows.

        All layers of a step share one tensor, and with it the kernel's plan.
        O(rows * blocks), or O(1) if they were made before.
        """
        found = self._tables.get((device, num_columns))
        if found is None:
            # Until a table changes, later steps differ in lengths only.
            steps = range(num_columns, num_columns + self._rows.pool.block_size)
            for column in steps:
                self._tables[device, column] = []
            lengths = np.stack([self._columns.lengths(column) for column in steps]).astype(np.int32)
            for partition in self._rows.partitions():
                here = partition.pool.manager.block_tables(partition.batch)
                row_lengths = lengths[:, partition.rows]
                on_host = partition.on_host
                there = _CPU if on_host else device
                tables, each = to_device(here, there), to_device(row_lengths, there).unbind()
                rows = self._row_indices(partition, device)
                for column, lens, tensor in zip(steps, row_lengths, each, strict=True):
                    self._tables[device, column].append(
                        Tables(rows, RowTables(tables, tensor, HostRows(here, lens)), on_host)
                    )
            found = self._tables[device, num_columns]
        return found

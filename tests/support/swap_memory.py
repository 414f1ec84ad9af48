"""A manager and the memory of both tiers, every token written and read back."""

from __future__ import annotations

import numpy as np

from kvpager import BlockManager
from kvpager.blocks.sequences import SequenceHandle
from kvpager.plans import AppendPlan, CopyPlan

BLOCK_SIZE = 4


class Memory:
    """The data plane in miniature: one integer for each slot of both tiers."""

    def __init__(self, manager: BlockManager) -> None:
        self.manager = manager
        self.tiers = {
            "device": np.full((manager.num_blocks, manager.block_size), -1, np.int64),
            "host": np.full((manager.num_host_blocks, manager.block_size), -1, np.int64),
        }
        self.contents: dict[SequenceHandle, list[int]] = {}

    def copy(self, copies: np.ndarray, source: str = "device", target: str = "device") -> None:
        self.tiers[target][copies[:, 1]] = self.tiers[source][copies[:, 0]]

    def apply(self, plan: CopyPlan) -> CopyPlan:
        self.copy(plan.copies, plan.source, plan.destination)
        return plan

    def begin(self, sequence: SequenceHandle, ids: list[int]) -> SequenceHandle:
        self.copy(sequence.copies)
        new = ids[sequence.num_cached_tokens :]
        slots = self.manager.slots(sequence, sequence.num_cached_tokens)
        self.tiers["device"].reshape(-1)[slots] = new
        self.contents[sequence] = list(ids)
        return sequence

    def write(
        self, sequences: list[SequenceHandle], step: AppendPlan, ids: list[list[int]]
    ) -> None:
        self.copy(step.copies)
        self.tiers["device"].reshape(-1)[step.slots] = np.concatenate(ids)
        for sequence, new in zip(sequences, ids, strict=True):
            self.contents[sequence].extend(new)

    def allocate(self, ids: list[int], namespace: str | None = None) -> SequenceHandle:
        return self.begin(self.manager.allocate(ids, namespace=namespace), ids)

    def append(self, sequences: list[SequenceHandle], ids: list[list[int]]) -> None:
        self.write(sequences, self.manager.append(sequences, ids), ids)

    def fork(self, parent: SequenceHandle) -> SequenceHandle:
        child = self.manager.fork(parent)
        self.contents[child] = list(self.contents[parent])
        return child

    def swap(self, sequences, to, at_most: int | None = None) -> CopyPlan:
        return self.apply(self.manager.swap(sequences, to, at_most=at_most))

    def free(self, sequence: SequenceHandle) -> None:
        self.manager.free(sequence)
        del self.contents[sequence]

    def check(self) -> None:
        """Every token of every sequence stands where the tables say, on either tier."""
        self.manager.check()
        rows = self.manager._state.rows
        for sequence, expected in self.contents.items():
            found: list[int] = []
            for block in rows.blocks(sequence._row).tolist():
                tier = "device" if block >= 0 else "host"
                found.extend(self.tiers[tier][block if block >= 0 else -2 - block].tolist())
            assert found[: len(expected)] == expected, sequence


def family(memory: Memory) -> list[SequenceHandle]:
    """Three forks: two blocks of all, then a block of each one's own."""
    parent = memory.allocate(list(range(8)))
    members = [parent, memory.fork(parent), memory.fork(parent)]
    memory.append(members, [[n] * 3 for n in (100, 101, 102)])
    return members

"""A history of a `DeviceAllocator`, checked against a list of tokens per row.

Every token written is a new number, in a payload of one number per slot, so whatever goes wrong
with a block - written by two, freed while held, copied too late - shows as a wrong token.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from kvpager.kernels import reference
from kvpager.kernels.device_allocator import DeviceAllocator


class History:
    """`kernels` has the functions of `reference_alloc`, or of `step_alloc` itself."""

    def __init__(
        self,
        kernels: Any,
        num_blocks: int,
        block_size: int,
        num_rows: int,
        max_blocks_per_row: int,
        device: str = "cpu",
    ) -> None:
        self.kernels = kernels
        self.allocator = DeviceAllocator(
            num_blocks, block_size, num_rows, max_blocks_per_row, device=device
        )
        self.payload = torch.full((num_blocks, block_size), -1, dtype=torch.int64, device=device)
        self.tokens: list[list[int]] = [[] for _ in range(num_rows)]
        self.written = 0
        self.refused = 0
        self.copied = 0
        self.last_step: list[Tensor] = []

    def ids(self, rows: list[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int32, device=self.payload.device)

    def step(self, rows: list[int]) -> list[int]:
        """Append a token to each of `rows`; return the slots. Check that refusals were due."""
        slots, copies = self.kernels.step_alloc(self.allocator, self.ids(rows))
        self.last_step = [slots, copies]
        self.follow(rows, slots, copies)
        return slots.tolist()

    def follow(self, rows: list[int], slots: Tensor, copies: Tensor) -> None:
        """Carry out the copies and writes of a step, and append the tokens to the lists."""
        reference.copy_blocks(self.payload, copies)
        self.copied += int((copies[:, 0] >= 0).sum())
        given = [slot for slot in slots.tolist() if slot >= 0]
        assert len(set(given)) == len(given), "a slot was given twice"
        room = self.allocator.block_tables.numel() // len(self.tokens) * self.allocator.block_size
        free = int(self.allocator.num_free)
        for row, slot in zip(rows, slots.tolist(), strict=True):
            if row < 0:
                assert slot == -1
            elif slot < 0:
                self.refused += 1
                assert slot == -1
                assert free == 0 or len(self.tokens[row]) == room, "refused with blocks left"
            else:
                self.payload.view(-1)[slot] = self.written
                self.tokens[row].append(self.written)
                self.written += 1

    def fork(self, pairs: list[tuple[int, int]]) -> None:
        sources, targets = (self.ids([pair[side] for pair in pairs]) for side in (0, 1))
        self.kernels.fork_rows(self.allocator, sources, targets)
        for source, target in pairs:
            if source >= 0 and target >= 0:
                if self.tokens[target]:
                    self.refused += 1
                else:
                    self.tokens[target] = list(self.tokens[source])

    def release(self, rows: list[int]) -> None:
        self.kernels.release_rows(self.allocator, self.ids(rows))
        for row in rows:
            if row >= 0:
                self.tokens[row] = []

    def check(self) -> None:
        """Check that every block is free or held, and that every row reads back its tokens."""
        self.allocator.check()
        assert self.allocator.seq_lens.tolist() == [len(tokens) for tokens in self.tokens]
        assert int(self.allocator.failures) == self.refused
        for row, tokens in enumerate(self.tokens):
            used = -(-len(tokens) // self.allocator.block_size)
            blocks = self.allocator.block_tables[row, :used].long()
            assert self.payload[blocks].view(-1)[: len(tokens)].tolist() == tokens, f"row {row}"

    def state(self) -> list[Tensor]:
        """Return everything that a call may change or return, with free blocks sorted."""
        books = self.allocator
        free = books.free[: int(books.num_free)]
        changed = [free, books.ref_counts, books.block_tables, books.seq_lens, books.failures]
        return [*changed, self.payload, *self.last_step]


Operation = tuple[str, list[Any]]


def random_operation(history: History, chance: random.Random) -> Operation:
    """Choose the next call: mostly steps of most rows in any order, some rows being -1."""
    rows = list(range(len(history.tokens)))
    chance.shuffle(rows)
    used = [row for row in rows if history.tokens[row]]
    unused = [row for row in rows if not history.tokens[row]]
    kind = chance.random()
    if kind < 0.3 and used:
        # Sometimes a target in use, which must be refused.
        targets = (unused if unused and chance.random() < 0.9 else rows)[: chance.randint(1, 3)]
        sources = [-1, *(row for row in used if row not in targets)]
        return "fork", [(chance.choice(sources[-2:]), target) for target in targets]
    if kind < 0.5 and used:
        return "release", [-1, *used[: chance.randint(1, 3)]]
    # Mostly few rows, so that tables do not fill up before a fork.
    return "step", rows[: chance.randint(1, 4)] + [-1] * chance.randint(0, 2)


def perform(history: History, operation: Operation) -> None:
    getattr(history, operation[0])(operation[1])

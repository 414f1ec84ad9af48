"""A model of the device-side allocator's kernels that runs their memory accesses in any order.

A GPU runs the lanes of `kernels/gpu/allocator.py` in any order, and interleaves their memory
accesses. Here each program is a generator that yields its accesses one by one and receives the
results, so a scheduler can choose the program of the next access. Numbers in brackets are those of
the statements in the kernels, which have the same order.

`explore` runs *all* schedules of a few programs. It skips states (memory, and the results each
program has received) that it reached before. It performs an access at once if no other program of
the launch touches the cell (partial-order reduction: Holzmann's SPIN, Godefroid's VeriSoft).
`run_random` runs one random schedule of all accesses.

Accesses of the model are atomic and sequentially consistent. The kernels need no order within a
launch: a program never reads a plain write of another program of the launch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

PENDING = -2
NONE = -1

# Each row occurs once in a call, and each lane belongs to one program. So do their cells.
OWN = ("rows", "targets", "seq_lens", "block_tables", "slots", "sources_copied", "blocks_copied")

Access = tuple[str, str, tuple[int, ...], int]
Program = Generator[Access, int, None]


@dataclass
class Memory:
    """The allocator's tensors and a step's results; places are (array, *index)."""

    block_size: int
    num_columns: int
    cells: dict[tuple[Any, ...], int] = field(default_factory=dict)

    def perform(self, access: Access) -> int:
        """Perform one access; return the previous value."""
        kind, array, index, value = access
        place = (array, *index)
        before = self.cells[place]
        if kind == "store":
            self.cells[place] = value
        elif kind != "load":
            self.cells[place] = before + value
        return before

    def copy(self) -> Memory:
        return replace(self, cells=dict(self.cells))

    def frozen(self) -> tuple[int, ...]:
        return tuple(self.cells.values())

    def __getitem__(self, place: Any) -> int:
        return self.cells[place if isinstance(place, tuple) else (place,)]

    def __setitem__(self, place: Any, value: int) -> None:
        self.cells[place if isinstance(place, tuple) else (place,)] = value

    def count(self, array: str) -> int:
        return sum(place[0] == array for place in self.cells)

    def num_blocks(self, row: int) -> int:
        return -(-self["seq_lens", row] // self.block_size)

    def table(self, row: int) -> list[int]:
        return [self["block_tables", row, column] for column in range(self.num_blocks(row))]


def memory_of(
    num_blocks: int, block_size: int, num_rows: int, num_columns: int, num_lanes: int
) -> Memory:
    """All blocks free, all rows unused; results for a call of up to `num_lanes` lanes."""
    memory = Memory(block_size, num_columns)
    for block in range(num_blocks):
        memory["free", block] = num_blocks - 1 - block
        memory["ref_counts", block] = 0
    for row in range(num_rows):
        memory["seq_lens", row] = 0
        for column in range(num_columns):
            memory["block_tables", row, column] = NONE
    for lane in range(num_lanes):
        for array in ("rows", "targets", "slots", "sources_copied", "blocks_copied"):
            memory[array, lane] = NONE
    memory["num_free"], memory["failures"] = num_blocks, 0
    return memory


def load(array: str, *index: int) -> Access:
    return "load", array, index, 0


def store(value: int, array: str, *index: int) -> Access:
    return "store", array, index, value


def add(value: int, array: str, *index: int) -> Access:
    """Return an atomic addition without a result (PTX: red)."""
    return "add", array, index, value


def fetch_add(value: int, array: str, *index: int) -> Access:
    """Return an atomic addition that returns the previous value (PTX: atom)."""
    return "fetch_add", array, index, value


def commutes(access: Access) -> bool:
    """Return True if the time of the access within a launch makes no difference."""
    kind, array, _, _ = access
    # Failures are only counted, and no kernel both reads and writes the free stack.
    return array in OWN or array == "failures" or (kind, array) == ("load", "free")


@dataclass
class Lane:
    """What the kernel holds in registers for one lane."""

    lane: int
    row: int = NONE
    length: int = 0
    tail: int = NONE
    partial: bool = False
    grows: bool = False
    shared: bool = False
    copying: bool = False
    keeps: bool = False
    rank: int = 0
    served: bool = False
    block: int = NONE

    @property
    def needs(self) -> bool:
        return self.grows or self.copying

    @property
    def stays(self) -> bool:
        return self.partial and not self.copying


class Variant(NamedTuple):
    """The algorithm, and ways to get it wrong that a test must notice."""

    last_holder_stores: bool = False  # True: [6] stores 1 where it has to add 1
    settles: bool = True  # False: who may keep its last block writes at once
    refunds: bool = True  # False: [8] keeps what was taken from below the bottom
    rejoins: bool = True  # False: [12] a refused row forgets that it was a holder


RIGHT = Variant()


def step_rows(memory: Memory, lanes: list[int], variant: Variant = RIGHT) -> Program:
    """`step_rows` of one program: every statement for all its lanes before the next one."""
    size, last = memory.block_size, memory.num_columns
    state = [Lane(lane) for lane in lanes]
    for x in state:  # [1]
        x.row = yield load("rows", x.lane)
    live = [x for x in state if x.row >= 0]
    for x in live:  # [2]
        x.length = yield load("seq_lens", x.row)
        x.partial = x.length % size != 0
        x.grows = x.length % size == 0 and x.length // size < last
    for x in filter(lambda x: x.partial, live):  # [3]
        x.tail = yield load("block_tables", x.row, x.length // size)
    for x in filter(lambda x: x.partial, live):  # [4]
        holders = yield load("ref_counts", x.tail)
        x.shared = holders > 1
    for x in filter(lambda x: x.shared, live):  # [5]
        before = yield fetch_add(-1, "ref_counts", x.tail)
        x.copying, x.keeps = before > 1, before == 1
    for x in filter(lambda x: x.keeps, live):  # [6]
        wrong = variant.last_holder_stores
        yield (store if wrong else add)(1, "ref_counts", x.tail)

    wanted = 0
    for x in live:
        x.rank, wanted = wanted, wanted + x.needs
    found = yield fetch_add(-wanted, "num_free")  # [7]
    for x in live:
        x.served = x.needs and x.rank < found
    served = [x for x in live if x.served]
    if variant.refunds:
        yield add(wanted - len(served), "num_free")  # [8]
    for x in served:  # [9]
        x.block = yield load("free", found - 1 - x.rank)
    for x in served:  # [10]
        yield store(1, "ref_counts", x.block)
    for x in served:  # [11]
        yield store(x.block, "block_tables", x.row, x.length // size)
    if variant.rejoins:
        for x in filter(lambda x: x.copying and not x.served, live):  # [12]
            yield add(1, "ref_counts", x.tail)

    for x in state:  # [13]
        slot = x.block * size + x.length % size if x.served else NONE
        if x.stays:
            slot = PENDING if variant.settles else x.tail * size + x.length % size
        yield store(slot, "slots", x.lane)
    for x in state:  # [14]
        copied = x.copying and x.served
        yield store(x.tail if copied else NONE, "sources_copied", x.lane)
        yield store(x.block if copied else NONE, "blocks_copied", x.lane)
    for x in live:  # [15]
        if x.served or (x.stays and not variant.settles):
            yield store(x.length + 1, "seq_lens", x.row)
    yield add(sum(not x.served and not x.stays for x in live), "failures")  # [16]


def settle_rows(memory: Memory, lanes: list[int]) -> Program:
    """`settle_rows` of one program, which a lone program runs at its end."""
    size = memory.block_size
    refused = 0
    for lane in lanes:
        if (yield load("slots", lane)) != PENDING:
            continue
        row = yield load("rows", lane)
        length = yield load("seq_lens", row)
        tail = yield load("block_tables", row, length // size)
        alone = (yield load("ref_counts", tail)) == 1  # [S1]
        yield store(tail * size + length % size if alone else NONE, "slots", lane)  # [S2]
        if alone:
            yield store(length + 1, "seq_lens", row)  # [S3]
        refused += not alone
    yield add(refused, "failures")  # [S4]


def share_rows(memory: Memory, pair: int) -> Program:
    """`share_rows`: "rows" are the sources."""
    source = yield load("rows", pair)  # [F1]
    target = yield load("targets", pair)
    if source < 0 or target < 0:
        return
    if (yield load("seq_lens", target)) != 0:  # [F2]
        yield add(1, "failures")  # [F3]
        return
    length = yield load("seq_lens", source)  # [F4]
    columns = range(-(-length // memory.block_size))
    blocks = {}
    for column in columns:  # [F5]
        blocks[column] = yield load("block_tables", source, column)
    for block in blocks.values():  # [F6]
        yield add(1, "ref_counts", block)
    for column in columns:  # [F7]
        yield store(blocks[column], "block_tables", target, column)
    yield store(length, "seq_lens", target)  # [F8]


def drop_rows(memory: Memory, lane: int) -> Program:
    """`drop_rows`."""
    row = yield load("rows", lane)  # [R1]
    if row < 0:
        return
    length = yield load("seq_lens", row)  # [R2]
    columns = range(-(-length // memory.block_size))
    blocks, unheld = {}, []
    for column in columns:  # [R3]
        blocks[column] = yield load("block_tables", row, column)
    for block in blocks.values():  # [R4]
        before = yield fetch_add(-1, "ref_counts", block)
        unheld += [block] if before == 1 else []
    top = yield fetch_add(len(unheld), "num_free")  # [R5]
    for rank, block in enumerate(unheld):  # [R6]
        yield store(block, "free", top + rank)
    for column in columns:  # [R7]
        yield store(NONE, "block_tables", row, column)
    yield store(0, "seq_lens", row)  # [R8]


# A launch: functions that make its programs for a given memory.
Launch = list[Callable[[Memory], Program]]


def step_launches(programs: list[list[int]], variant: Variant = RIGHT) -> list[Launch]:
    """A step whose programs have these lanes: two launches, one after the other."""
    first: Launch = [lambda memory, own=own: step_rows(memory, own, variant) for own in programs]
    second: Launch = [lambda memory, own=own: settle_rows(memory, own) for own in programs]
    return [first, second] if variant.settles else [first]


def run_random(memory: Memory, launches: Iterable[Launch], chance: random.Random) -> None:
    """Run launch after launch in place, the programs of each in a random order of accesses."""
    for launch in launches:
        running = [(program, next(program, None)) for program in (make(memory) for make in launch)]
        running = [(program, access) for program, access in running if access is not None]
        while running:
            index = chance.randrange(len(running))
            program, access = running[index]
            try:
                running[index] = (program, program.send(memory.perform(access)))
            except StopIteration:
                del running[index]


def explore(memory: Memory, launches: list[Launch]) -> Iterator[Memory]:
    """Every memory that some schedule of the launches ends with."""
    ends = {memory.frozen(): memory}
    for launch in launches:
        ends = {
            end.frozen(): end for start in ends.values() for end in _ends_of_launch(start, launch)
        }
    yield from ends.values()


def _ends_of_launch(start: Memory, launch: Launch) -> Iterator[Memory]:
    """Depth first through the states (memory, what each program has seen so far)."""
    Seen = tuple[tuple[int, ...], ...]
    nothing: Seen = tuple(() for _ in launch)
    waiting = [(start, nothing)]
    reached = {(start.frozen(), nothing)}
    known: dict[tuple[int, tuple[int, ...]], Access | None] = {}
    while waiting:
        memory, seen = waiting.pop()
        for program in enumerate(seen):
            if program not in known:
                known[program] = _next_access(launch[program[0]](start), program[1])
        accesses = {
            program[0]: access
            for program in enumerate(seen)
            if (access := known[program]) is not None
        }
        if not accesses:
            yield memory
        own = [index for index, access in accesses.items() if commutes(access)]
        for index in own[:1] or accesses:
            after = memory.copy()
            result = after.perform(accesses[index])
            # What its program is not told must not tell states apart.
            told = 0 if accesses[index][0] in ("store", "add") else result
            now_seen = (*seen[:index], (*seen[index], told), *seen[index + 1 :])
            key = (after.frozen(), now_seen)
            if key not in reached:
                reached.add(key)
                waiting.append((after, now_seen))


def _next_access(program: Program, seen: tuple[int, ...]) -> Access | None:
    """Return the next access of a program that has received the results `seen`."""
    try:
        access = next(program)
        for result in seen:
            access = program.send(result)
    except StopIteration:
        return None
    return access

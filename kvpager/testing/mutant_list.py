"""The planted bugs. Each fragment stands exactly once in the source of its module."""

from __future__ import annotations

from kvpager.testing.mutants import Mutant

MUTANTS = (
    Mutant(
        "write into a shared tail",
        "a shared block is never written",
        "kvpager.manager",
        'shared = pool.refs.take(index, mode="clip") > 1',
        'shared = pool.refs.take(index, mode="clip") > 2',
    ),
    Mutant(
        "write into a cached tail",
        "what the prefix index holds is never written",
        "kvpager.manager",
        'shared |= pool.cached.take(index, mode="clip")',
        "shared |= False",
    ),
    Mutant(
        "copy the wrong way round",
        "a sequence reads back what was written",
        "kvpager.manager",
        "step.copies[:, 0], step.copies[:, 1] = tails, taken[: len(tails)]",
        "step.copies[:, 1], step.copies[:, 0] = tails, taken[: len(tails)]",
    ),
    Mutant(
        "keep the reference to the copied tail",
        "every reference is released exactly once",
        "kvpager.manager",
        "self._release(blocks, times.astype(np.int32))",
        "pass",
    ),
    Mutant(
        "publish before commit",
        "nothing is visible before commit",
        "kvpager.manager",
        "full = min(int(table.committed[row]), int(table.known[row])) >> self._shift",
        "full = int(table.known[row]) >> self._shift",
    ),
    Mutant(
        "fork without a reference",
        "the refcount is the number of tables",
        "kvpager.manager",
        "self._pool.share(rows.device_blocks(parent), times)",
        "pass",
    ),
    Mutant(
        "forget to free the host blocks",
        "every reference is released exactly once",
        "kvpager.manager",
        "self._host.release(self._rows.host_blocks(row))",
        "pass",
    ),
    Mutant(
        "share without counting",
        "the refcount is the number of tables",
        "kvpager.pool",
        "self.refs[index] = refs + times",
        "self.refs[index] = refs",
    ),
    Mutant(
        "hand out a new block again",
        "no block is handed out twice",
        "kvpager.pool",
        "self._num_used_ever + count - from_stack,",
        "self._num_used_ever + count - from_stack - 1,",
    ),
    Mutant(
        "keep a released block's count",
        "every reference is released exactly once",
        "kvpager.pool",
        "refs = self.refs[index] - times",
        "refs = self.refs[index] - 0",
    ),
    Mutant(
        "evict and do not tell the pool",
        "a block is free or cached, never both",
        "kvpager.prefix",
        "self.pool.uncache(blocks)",
        "pass",
    ),
    Mutant(
        "a freed handle stays good",
        "a freed handle is refused",
        "kvpager.sequences",
        "self.generations[row] += 1",
        "pass",
    ),
)

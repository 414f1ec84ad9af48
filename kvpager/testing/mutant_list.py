"""The mutants: modules, and known bugs of each with the fragment that they replace.

An original fragment occurs exactly once in the source of its module.
"""

from __future__ import annotations

from kvpager.testing.mutants import Mutant

_BUGS = {
    "kvpager.blocks.pool": {
        "hand out a new block twice": (
            "self._num_used_ever += count - from_stack",
            "self._num_used_ever += count - from_stack - 1",
        ),
        "read the free list one too high": (
            "self._stack[base : base + from_stack]",
            "self._stack[base - 1 : base - 1 + from_stack]",
        ),
        "leave the block on the free list": (
            "            self._stack_size = size\n            block: int",
            "            block: int",
        ),
        "share without a reference": ("self.refs[index] = refs + times", "self.refs[index] = refs"),
        "keep the reference of a released block": (
            "refs = self.refs[index] - times",
            "refs = self.refs[index] - 0",
        ),
        "free a block at its first release": (
            "if view[block] != 1 or self._is_watched",
            "if self._is_watched",
        ),
        "lose freed blocks": (
            "self._stack_size += len(blocks)",
            "self._stack_size += len(blocks) // 2",
        ),
        "hold a block without counting it": ("self.holds[index] += 1", "pass"),
        "free blocks with a copy in flight": (
            "self.num_kept += int(np.count_nonzero(kept))\n            idle = idle[~kept]",
            "self.num_kept += int(np.count_nonzero(kept))",
        ),
        "forget the ids of a partly filled block": ("if num_full * size < len(ids):", "if False:"),
        "evict and leave the block marked as cached": ("self.cached[index] = False", "pass"),
        "move a block without its ids": ("self.ids[blocks] = ids", "pass"),
        "move a block and keep one reference": ("self.refs[blocks] = holders", "pass"),
        "lend a block and leave it on the free list": (
            "self._stack_size, self._num_used_ever = 0, self.num_blocks",
            "self._num_used_ever = self.num_blocks",
        ),
        "count each block that is given back twice": (
            "self.num_lent -= len(blocks)",
            "self.num_lent -= 2 * len(blocks)",
        ),
        "call back too few blocks, then refuse": (
            "self.borrower.give_back(count - self.num_free)",
            "self.borrower.give_back(min(count - self.num_free, self.num_lent))",
        ),
    },
    "kvpager.blocks.sequences": {
        "accept a freed handle": ("self.generations[first] += 1", "pass"),
        "leave a freed row's table": ("self.tables.release(row)", "pass"),
        "give all new tokens the first new slot": (
            "positions = starts[owners] + ranks(counts)",
            "positions = starts[owners]",
        ),
        "reuse a batch after a free": (
            "        self.free_rows.append(first)\n        self.epoch += 1",
            "        self.free_rows.append(first)",
        ),
        "reuse prefixes of another namespace": (
            "        return self.namespace, self.lora\n",
            "        return None, self.lora\n",
        ),
        "reuse prefixes of another LoRA": (
            "        return self.namespace, self.lora\n",
            "        return self.namespace, None\n",
        ),
    },
    "kvpager.blocks.state": {
        "accept another manager's handle": ("if handle._owner is not self:", "if False:"),
        "accept a sequence twice in a batch": (
            "if len(rows) > 1 and len(np.unique(rows)) != len(rows):",
            "if False:",
        ),
        "refuse a swap for which lent blocks suffice": (
            "if count > self.host.num_free and self.host.num_lent:",
            "if False:",
        ),
        "use a swapped sequence": ("if self.rows.swapped[row]:", "if False:"),
        "accept a call that lacks one block": (
            "if count > pool.num_free + evictable:",
            "if count > pool.num_free + evictable + 1:",
        ),
        "count a reused prefix as evictable": (
            "evictable = pool.num_evictable - len(revived)",
            "evictable = pool.num_evictable",
        ),
        "evict the prefix that was just matched": ("self.pool.hold(revived)", "pass"),
        "take ids after unknown tokens as known": (
            "whole = table.known[rows] == starts",
            "whole = table.known[rows] >= 0",
        ),
    },
    "kvpager.blocks.allocation": {
        "reuse the last token of a prompt": ("ids[: max(length - 1, 0)]", "ids"),
        "copy a partial match into the wrong block": (
            "copies[0, 1] = fresh[0]",
            "copies[0, 1] = fresh[-1]",
        ),
        "fork without a reference": (
            "state.pool.share(rows.device_blocks(row), times)",
            "state.pool.share(rows.device_blocks(row), max(times - 1, 0))",
        ),
        "keep the host blocks of a freed sequence": (
            "state.host.release(table.host_blocks(row))",
            "pass",
        ),
    },
    "kvpager.blocks.extension": {
        "write into a shared tail": (
            'shared = pool.refs.take(index, mode="clip") > 1',
            'shared = pool.refs.take(index, mode="clip") > 2',
        ),
        "write into a cached tail": (
            'shared |= pool.cached.take(index, mode="clip")',
            "shared |= False",
        ),
        "let every holder write a shared tail": (
            "leaves[last[keeps]] = False",
            "leaves[:] = False",
        ),
        "swap source and destination of copies": (
            "step.copies[:, 0], step.copies[:, 1] = tails, taken[: len(tails)]",
            "step.copies[:, 1], step.copies[:, 0] = tails, taken[: len(tails)]",
        ),
        "copy a block without its ids": ("state.pool.copy_ids(step.copies)", "pass"),
        "keep the reference to the copied tail": (
            "state.release(blocks, times.astype(np.int32))",
            "pass",
        ),
    },
    "kvpager.blocks.publication": {
        "publish before commit": (
            "full = min(int(table.committed[row]), int(table.known[row])) >> state.shift",
            "full = int(table.known[row]) >> state.shift",
        ),
        "publish speculative tokens": (
            "settled = int(table.lengths[row]) - int(table.speculative[row])",
            "settled = int(table.lengths[row])",
        ),
        "forget that a block has a duplicate": ("table.duplicates[row] |= is_duplicate", "pass"),
    },
    "kvpager.blocks.truncation": {
        "truncate and keep the ids": ("column[row] = min(int(column[row]), length)", "pass"),
        "truncate and keep the published length": (
            "rows.published[row] = min(int(rows.published[row]), length // state.block_size)",
            "pass",
        ),
        "release one block too few at the front": (
            "blocks = tables.data[behind]",
            "blocks = tables.data[behind][:-1]",
        ),
        "publish a sequence that lost its front": (
            "table.known[row] = table.published[row] = 0",
            "table.published[row] = 0",
        ),
    },
    "kvpager.blocks.swap": {
        "forget duplicates after a swap": (
            "table.duplicates[everyone] |= table.published[everyone] > 0",
            "pass",
        ),
        "swap out and release one reference only": (
            "state.release(blocks, holders)",
            "state.release(blocks)",
        ),
        "swap in and keep the host blocks": (
            "state.host.release(blocks, holders)",
            "pass",
        ),
        "swap out blocks that other sequences hold": (
            "alone = holders == device.refs[blocks]",
            "alone = holders >= 1",
        ),
    },
    "kvpager.blocks.fences": {
        "release a block with an unfinished copy": ('self._device.hold(kept["device"])', "pass"),
        "lend a host block that a copy still reads": (
            "in enumerate((source, destination)):",
            'in list(enumerate((source, destination)))[source == "host" :]:',
        ),
        "never release the host side of a copy": ("self._host.unhold(host)", "pass"),
    },
    "kvpager.blocks.accounts": {
        "let a namespace exceed its ceiling": ("over > ceiling:", "over > ceiling + 1:"),
        "keep freed blocks in the namespace's count": (
            "self._accounts[number].used -= count",
            "pass",
        ),
    },
    "kvpager.blocks.radix": {
        "reuse a run of another image": (
            "return tokens.tobytes() if tag is None else (tokens.tobytes(), tag)",
            "return tokens.tobytes()",
        ),
        "use a position that was evicted": (
            "return node if node is not None and position <= node.end else None",
            "return node",
        ),
    },
    "kvpager.blocks.prefix": {
        "reuse the first block that differs": (
            "agreed = int(same.argmin()) // self.block_size",
            "agreed = -(-int(same.argmin()) // self.block_size)",
        ),
    },
    "kvpager.blocks.eviction": {
        "extend a run that lost its tail": ("node.end, node.sealed = end, True", "node.end = end"),
        "evict pinned blocks": (
            "return not (self._pool.refs[block] or self._pool.holds[block])",
            "return not self._pool.refs[block]",
        ),
        "evict blocks that a sequence holds": ("leave &= self.idle(tail)", "pass"),
        "evict without telling the pool": ("self._pool.uncache(blocks)", "pass"),
        "forget idle blocks that precede held ones": (
            "            node.queue.defer(node)\n        else:",
            "            pass\n        else:",
        ),
    },
    "kvpager.storage.tiers.keyed": {
        "offer a block before it is written": (
            "self._keys[slot], self._states[slot] = slot, key, _WRITING",
            "self._keys[slot], self._states[slot] = slot, key, _READY",
        ),
        "reserve two slots for one key": (
            "slot is None and keys[index] not in new",
            "slot is None",
        ),
        "evict without a report": (
            "        return gone\n\n    def _withdraw",
            "        return []\n\n    def _withdraw",
        ),
        "offer a key whose slot has other bytes": (
            "        for key, _ in gone:\n            del self._slots[key]\n",
            "",
        ),
        "count evicted keys as offered": ("self._num_ready -= len(gone)", "pass"),
        "keep the slots of dropped keys": (
            "elif not self._pins[slot]:\n                    self._release(slot)",
            "elif False:\n                    pass",
        ),
        "refuse keys that the tier has": (
            "outcomes = [KNOWN] * len(keys)",
            "outcomes = [NO_ROOM] * len(keys)",
        ),
        "pin a slot without counting it": ("self._pins[slot] += 1", "pass"),
        "evict a block that is being read": (
            "self._order.touch([*dict.fromkeys(pinned)])",
            "pass",
        ),
        "find keys behind a gap": ("if self._offered(key) is None:", "if False:"),
        "find keys after the tier is closed": (
            "self._states[slot] == _READY and not self._closed else None",
            "self._states[slot] == _READY else None",
        ),
        "reserve slots after the tier is closed": ("room = 0 if self._closed else", "room ="),
    },
}

MUTANTS = tuple(
    Mutant(name, module, original, replacement)
    for module, bugs in _BUGS.items()
    for name, (original, replacement) in bugs.items()
)

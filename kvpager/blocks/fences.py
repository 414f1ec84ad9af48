"""Fenced blocks: an unfinished copy names them, or they are pinned.

A block must not be reused before its copies finish, or a late copy would read or write another
sequence's tokens: vLLM #45357 and TensorRT-LLM #8813 are that bug.
"""

from __future__ import annotations

import secrets

import numpy as np

from kvpager._validate import is_int
from kvpager.blocks.pool import BlockPool, Blocks
from kvpager.errors import BrokenInvariant
from kvpager.plans import NO_BLOCKS, Int32, Tier


class Fences:
    """Tickets, and the blocks that each one holds on the device and on the host."""

    def __init__(self, device: BlockPool, host: BlockPool, *, is_on: bool) -> None:
        self.is_on = is_on
        self.in_flight: dict[int, tuple[Int32, Int32]] = {}
        self.pins: dict[int, Blocks] = {}
        self.cut_off: set[int] = set()  # copies out of blocks that the pool no longer has
        # Tickets of two managers differ, so that one cannot complete the other's copies.
        self.last_ticket = secrets.randbits(48) << 8
        self._device = device
        self._host = host

    def ticket(self, copies: Int32) -> int:
        """Return the ticket for these copies; 0 if none is needed. O(1)."""
        return self.last_ticket + 1 if self.is_on and len(copies) else 0

    def begin(self, ticket: int, copies: Int32, source: Tier, destination: Tier) -> None:
        """Hold the blocks of these copies until `complete`. O(copies)."""
        if not ticket:
            return
        kept = {"device": NO_BLOCKS, "host": NO_BLOCKS}
        for side, tier in enumerate((source, destination)):
            kept[tier] = np.union1d(kept[tier], copies[:, side])
        # After a shrink the sources lie outside the pool, so no call can take them.
        inside = kept["device"] < self._device.num_blocks
        if not inside.all():
            self.cut_off.add(ticket)
        kept["device"] = kept["device"][inside]
        self._device.hold(kept["device"])
        self._host.hold(kept["host"])
        self.in_flight[ticket] = kept["device"], kept["host"]
        self.last_ticket = ticket

    def refuse_closed(self, ticket: int) -> None:
        """Raise `ValueError` unless the ticket is open. O(1)."""
        if ticket not in self.in_flight:
            raise ValueError(f"ticket={ticket}: completed already, or of another manager")

    def complete(self, ticket: int) -> Blocks:
        """Close a ticket. Return the device blocks that became evictable. O(copies)."""
        device, host = self.in_flight.pop(ticket)
        self.cut_off.discard(ticket)
        self._host.unhold(host)
        return self._device.unhold(device)

    def pin(self, blocks: Blocks) -> int:
        """Hold device blocks until `unpin`; return a ticket. O(blocks)."""
        self._device.hold(blocks)
        self.last_ticket += 1
        self.pins[self.last_ticket] = blocks
        return self.last_ticket

    def refuse_no_pin(self, ticket: int) -> None:
        """Raise `ValueError` for a ticket that is no pin. O(1)."""
        if not is_int(ticket) or ticket not in self.pins:
            raise ValueError(f"ticket={ticket!r}: not a pin of this manager, or ended already")

    def unpin(self, ticket: int) -> Blocks:
        """End an open pin. Return the device blocks that became evictable. O(blocks)."""
        return self._device.unhold(self.pins.pop(ticket))

    def check(self) -> None:
        """Raise `BrokenInvariant` unless the pools hold exactly these blocks. O(blocks)."""
        device = [kept for kept, _ in self.in_flight.values()] + list(self.pins.values())
        host = [kept for _, kept in self.in_flight.values()]
        if max([*self.in_flight, *self.pins], default=0) > self.last_ticket:
            raise BrokenInvariant("fences: a ticket is open that was never issued")
        for pool, kept in ((self._device, device), (self._host, host)):
            holds = np.bincount(np.concatenate([NO_BLOCKS, *kept]), minlength=pool.num_blocks)
            if not np.array_equal(holds, pool.holds):
                raise BrokenInvariant("fences: the holds of the pool differ from the open tickets")

"""Reading and writing the block of one slot: what happens before and after its transfer."""

from __future__ import annotations

from dataclasses import dataclass

from kvpager.storage.tiers.disk.segments import PAGE_BYTES
from kvpager.storage.tiers.frame import FRAME_BYTES, Framing
from kvpager.storage.tiers.keyed import KeyedTier
from kvpager.storage.tiers.losses import Losses
from kvpager.storage.tiers.protocol import Loaded, Saved


@dataclass(slots=True)
class Slots:
    """The slots of a store, and how their bytes are framed."""

    tier: KeyedTier
    framing: Framing
    losses: Losses

    def discard(self, slots: list[int]) -> None:
        """Stop to offer pinned slots, report their keys, and unpin them. O(slots)."""
        self.losses.add(key for key, _ in self.tier.discard(slots))
        self.tier.unpin(slots)


class Read:
    """Reads a pinned slot and unpins it. `outcome` is None until the transfer has ended."""

    operation = "READ"

    def __init__(self, slots: Slots, slot: int, key: bytes, into: memoryview) -> None:
        self.slot = slot
        self._slots, self._key, self._into = slots, key, into
        self.outcome: Loaded | None = None

    def begin(self, buffer: memoryview) -> None:
        buffer[:FRAME_BYTES] = bytes(FRAME_BYTES)  # an earlier block must not pass for this one

    def end(self, buffer: memoryview, moved: bool) -> None:
        into = self._into
        if moved:
            # Verified where it is served: no transfer reaches the caller's memory.
            into[:] = buffer[PAGE_BYTES:][: len(into)]
            frame = bytes(buffer[:FRAME_BYTES])
            if self._slots.framing.unframe(frame, self._key, into) is None:
                self.outcome = Loaded.HIT
                self._slots.tier.unpin([self.slot])
                return
        self.outcome = Loaded.BAD
        self._slots.discard([self.slot])

    def give_up(self) -> None:
        self._slots.tier.unpin([self.slot])


class Write:
    """Writes a reserved slot and offers it. `outcome` is None until the transfer has ended."""

    operation = "WRITE"

    def __init__(self, slots: Slots, slot: int, key: bytes, block: memoryview) -> None:
        self.slot = slot
        self._slots, self._key, self._block = slots, key, block
        self.outcome: Saved | None = None

    def begin(self, buffer: memoryview) -> None:
        frame, payload = self._slots.framing.frame(self._key, self._block)
        buffer[:FRAME_BYTES] = frame
        buffer[PAGE_BYTES:][: len(payload)] = payload

    def end(self, buffer: memoryview, moved: bool) -> None:
        self.outcome = Saved.SAVED if moved else Saved.REFUSED
        if moved:
            self._slots.tier.publish([self.slot])
        else:
            self.give_up()

    def give_up(self) -> None:
        # A save of the key was perhaps told meanwhile that the store gets the block.
        self._slots.losses.add([self._key])
        self._slots.tier.abandon([self.slot])

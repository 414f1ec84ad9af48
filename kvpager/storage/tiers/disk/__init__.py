"""A store in preallocated files. Blocks survive a restart, and a crash at any point.

    store  DiskStore: find, load, save, drop
      ├─ directory   the lock, the format file, who may use the directory
      ├─ segments    the files that hold blocks, O_DIRECT where it works
      ├─ slot_table  one checked record for each slot: its key and times
      └─ slots       key -> slot in memory, and which key leaves first

    slot   a page with the frame of a block, then the block, padded to whole pages

A block takes a slot in four steps: erase the record of the slot, write frame and block, write the
record, offer the key. A crash between two of them leaves a free slot, never a key with the bytes of
another block. Nothing waits for the device: what a power failure takes is found by the frame's
digest, and is a miss.
"""

from kvpager.storage.tiers.disk.store import DiskStore

__all__ = ["DiskStore"]

"""The frame before a block's bytes. Every read checks it before it serves the bytes.

    magic 8 | version 2 | seal 2 | length 4 | layout 16 | key 32 | nonce 12 | zero 4      the head
    tag 16 | check 16

All numbers are little-endian. `tag` is the seal's. `check` is a BLAKE2b digest of all before it, so
a damaged head is noticed whatever the seal is. 112 bytes in all.
"""

from __future__ import annotations

import struct
from enum import StrEnum
from hashlib import blake2b
from typing import NamedTuple

from kvpager.storage.keys import KEY_BYTES
from kvpager.storage.tiers.layout import BlockLayout
from kvpager.storage.tiers.seals import Digest, Seal

_MAGIC, _VERSION = b"KVPBLK\x00\x01", 1
_HEAD = struct.Struct("<8sHHI16s32s12s4x")
_TAG_BYTES, _CHECK_BYTES = 16, 16
_CHECKED = _HEAD.size + _TAG_BYTES
FRAME_BYTES = _CHECKED + _CHECK_BYTES


class Fault(StrEnum):
    """Why a frame was refused."""

    HEAD = "head"  # damaged, cut short, or no frame at all
    VERSION = "version"
    SEAL = "seal"
    LAYOUT = "layout"
    KEY = "key"
    LENGTH = "length"
    BYTES = "bytes"  # the block is not the one that was saved


class Framed(NamedTuple):
    """A frame and the bytes to store after it."""

    frame: bytes
    payload: memoryview


class Framing:
    """Makes and checks the frames of blocks of one layout."""

    def __init__(self, layout: BlockLayout, seal: Seal | None = None) -> None:
        """Frame blocks of `layout` with `seal`, `Digest()` unless given."""
        self.layout = layout
        self.seal: Seal = Digest() if seal is None else seal
        self._fingerprint = layout.fingerprint

    def frame(self, key: bytes, block: memoryview) -> Framed:
        """Return the frame of a block and the bytes to store after it. O(bytes).

        Raises: `ValueError` for a key or a block of another length.
        """
        if len(key) != KEY_BYTES:
            raise ValueError(f"key: expected {KEY_BYTES} bytes, got {len(key)}")
        if block.nbytes != self.layout.block_bytes:
            raise ValueError(f"block: expected {self.layout.block_bytes} bytes, got {block.nbytes}")
        # The nonce authenticates itself, so the seal covers a head without it.
        nonce, tag, payload = self.seal.seal(self._head(key), block.cast("B"))
        checked = self._head(key, nonce) + tag
        return Framed(checked + _check(checked), payload)

    def unframe(self, frame: bytes | memoryview, key: bytes, payload: memoryview) -> Fault | None:
        """Check a frame and turn `payload` into its block, in place. O(bytes).

        Returns None if the block is the one that was saved as `key`. Otherwise the content of
        `payload` is undefined.
        """
        frame = bytes(frame[:FRAME_BYTES])
        if len(frame) != FRAME_BYTES or _check(frame[:_CHECKED]) != frame[_CHECKED:]:
            return Fault.HEAD
        magic, version, seal, length, layout, written, nonce = _HEAD.unpack(frame[: _HEAD.size])
        for fault, good in (
            (Fault.HEAD, magic == _MAGIC),
            (Fault.VERSION, version == _VERSION),
            (Fault.SEAL, seal == self.seal.number),
            (Fault.LAYOUT, layout == self._fingerprint),
            (Fault.KEY, written == key),
            (Fault.LENGTH, length == payload.nbytes == self.layout.block_bytes),
        ):
            if not good:
                return fault
        tag = frame[_HEAD.size : _CHECKED]
        genuine = self.seal.unseal(self._head(key), nonce, tag, payload.cast("B"))
        return None if genuine else Fault.BYTES

    def _head(self, key: bytes, nonce: bytes = b"") -> bytes:
        return _HEAD.pack(
            _MAGIC, _VERSION, self.seal.number, self.layout.block_bytes, self._fingerprint, key,
            nonce,
        )  # fmt: skip


def _check(data: bytes) -> bytes:
    return blake2b(data, digest_size=_CHECK_BYTES).digest()

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
from kvpager.storage.tiers.seals import NONCE_BYTES, Digest, Hasher, Seal, Sealed

_MAGIC, _VERSION = b"KVPBLK\x00\x01", 1
_HEAD = struct.Struct("<8sHHI16s32s12s4x")
_KEY, _NONCE, _ZERO = slice(32, 64), slice(64, 76), bytes(4)  # parts of the head
_TAG_BYTES, _CHECK_BYTES = 16, 16
_CHECKED = _HEAD.size + _TAG_BYTES
FRAME_BYTES = _CHECKED + _CHECK_BYTES
_NO_NONCE = bytes(NONCE_BYTES)


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


class Head(NamedTuple):
    """What a frame says of its block. `seal` is the number of a seal, `layout` a fingerprint."""

    seal: int
    block_bytes: int
    layout: bytes
    key: bytes
    nonce: bytes = b""

    def packed(self) -> bytes:
        """Return the bytes of the head. O(1)."""
        return _HEAD.pack(_MAGIC, _VERSION, *self)


def read_head(frame: bytes | memoryview) -> Head | Fault:
    """Return the head of a frame of any layout, or why there is none. O(1)."""
    frame = bytes(frame[:FRAME_BYTES])
    if len(frame) != FRAME_BYTES or _check(frame[:_CHECKED]) != frame[_CHECKED:]:
        return Fault.HEAD
    magic, version, *fields = _HEAD.unpack(frame[: _HEAD.size])
    if magic != _MAGIC:
        return Fault.HEAD
    return Head(*fields) if version == _VERSION else Fault.VERSION


def check_block(
    frame: bytes | memoryview, head: Head | Fault, key: bytes, payload: memoryview, seal: Seal
) -> Fault | None:
    """Check the frame that has `head`, and turn `payload` into its block, in place. O(bytes).

    Returns None if the block is the one that was saved as `key`, in whatever layout.
    """
    if isinstance(head, Fault):
        return head
    for fault, good in (
        (Fault.SEAL, head.seal == seal.number),
        (Fault.KEY, head.key == key),
        (Fault.LENGTH, head.block_bytes == payload.nbytes),
    ):
        if not good:
            return fault
    tag = bytes(frame[_HEAD.size : _CHECKED])
    sealed = Sealed(head.nonce, tag, payload.cast("B"))
    return None if seal.unseal(head._replace(nonce=b"").packed(), sealed) else Fault.BYTES


class Framing:
    """Makes and checks the frames of blocks of one layout."""

    def __init__(self, layout: BlockLayout, seal: Seal | None = None) -> None:
        """Frame blocks of `layout` with `seal`, `Digest()` unless given."""
        self.layout = layout
        self.seal: Seal = Digest() if seal is None else seal
        self._fingerprint = layout.fingerprint
        head = Head(self.seal.number, layout.block_bytes, self._fingerprint, b"").packed()
        self._front = head[: _KEY.start]

    def frame(self, key: bytes, block: memoryview) -> Framed:
        """Return the frame of a block and the bytes to store after it. O(bytes).

        Raises: `ValueError` for a key or a block of another length.
        """
        if len(key) != KEY_BYTES:
            raise ValueError(f"key: expected {KEY_BYTES} bytes, got {len(key)}")
        if block.nbytes != self.layout.block_bytes:
            raise ValueError(f"block: expected {self.layout.block_bytes} bytes, got {block.nbytes}")
        # The nonce authenticates itself, so the seal covers a head without it.
        nonce, tag, payload = self.seal.seal(self._head(key, _NO_NONCE), block.cast("B"))
        checked = self._head(key, nonce) + tag
        return Framed(checked + _check(checked), payload)

    def hasher(self, key: bytes) -> Hasher:
        """Return a hasher for a payload of `key` that arrives in pieces. O(1)."""
        return self.seal.hasher(self._head(key, _NO_NONCE))

    def unframe(
        self,
        frame: bytes | memoryview,
        key: bytes,
        payload: memoryview,
        hasher: Hasher | None = None,
    ) -> Fault | None:
        """Check a frame and turn `payload` into its block, in place. O(bytes).

        A `hasher`, if given, has taken in `payload`. Returns None if the block is the one that was
        saved as `key`. Otherwise the content of `payload` is undefined.
        """
        frame = bytes(frame[:FRAME_BYTES])
        nonce, tag = frame[_NONCE], frame[_HEAD.size : _CHECKED]
        checked = self._head(key, nonce) + tag
        if frame != checked + _check(checked) or payload.nbytes != self.layout.block_bytes:
            return self._why_refused(frame, key, payload)
        sealed, head = Sealed(nonce, tag, payload.cast("B")), self._head(key, _NO_NONCE)
        return None if self.seal.unseal(head, sealed, hasher) else Fault.BYTES

    def _why_refused(self, frame: bytes, key: bytes, payload: memoryview) -> Fault | None:
        head = read_head(frame)
        if isinstance(head, Head) and head.layout != self._fingerprint:
            return Fault.LAYOUT
        if payload.nbytes != self.layout.block_bytes:
            return Fault.LENGTH
        return check_block(frame, head, key, payload, self.seal)

    def _head(self, key: bytes, nonce: bytes) -> bytes:
        return self._front + key + nonce + _ZERO


def _check(data: bytes) -> bytes:
    return blake2b(data, digest_size=_CHECK_BYTES).digest()

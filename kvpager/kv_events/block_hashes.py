"""vLLM's block hashes: SHA-256 of (hash before, token ids, extra keys), serialised as vLLM does.

vLLM serialises with pickle for `sha256`, and with canonical CBOR (RFC 8949, 4.2) for `sha256_cbor`.
Both are written here for the few types that occur, so that nothing is ever unpickled. The recorded
hashes in the tests come from vLLM.
"""

from __future__ import annotations

import os
import struct
from hashlib import sha256

# What vLLM hashes: None, 32-bit ints, bytes, texts, and tuples of these.
Value = int | str | bytes | tuple["Value", ...] | None

_SEED = "vllm-none-hash"


def hash_pickled(value: Value) -> bytes:
    """Return vLLM's `sha256` of a value. O(bytes).

    Equal to vLLM's for up to 64 KiB: pickle cuts longer output into several frames.
    """
    return sha256(_Pickle().dump(value)).digest()


def hash_cbor(value: Value) -> bytes:
    """Return vLLM's `sha256_cbor` of a value. O(bytes)."""
    out = bytearray()
    _write_cbor(out, value)
    return sha256(out).digest()


def first_seed() -> str:
    """Return the text whose hash is the parent of each first block, by vLLM's rule. O(1).

    Since vLLM 0.32 the text is fixed, unless PYTHONHASHSEED is set.
    """
    return os.environ.get("PYTHONHASHSEED", _SEED)


class _Pickle:
    """Protocol 5 of pickle, for one value."""

    def __init__(self) -> None:
        self._out = bytearray()
        # pickle writes an object once, and then refers to it. Equal objects are written again.
        self._places: dict[int, int] = {}
        self._num_places = 0

    def dump(self, value: Value) -> bytes:
        """Return the pickle of `value`. O(bytes)."""
        self._write(value)
        body = bytes(self._out) + b"."
        return b"\x80\x05\x95" + len(body).to_bytes(8, "little") + body

    def _write(self, value: Value) -> None:
        if value is None:
            self._out += b"N"
        elif isinstance(value, int):
            self._out += _pickled_int(value)
        elif isinstance(value, tuple):
            self._write_tuple(value)
        else:
            self._write_text(value)

    def _write_tuple(self, items: tuple[Value, ...]) -> None:
        if not items:
            self._out += b")"
            return
        if len(items) > 3:
            self._out += b"("
        for item in items:
            self._write(item)
        self._out += b"t" if len(items) > 3 else (b"\x85", b"\x86", b"\x87")[len(items) - 1]
        self._remember(items)

    def _write_text(self, value: str | bytes) -> None:
        place = self._places.get(id(value))
        if place is not None:
            self._out += b"h" + bytes([place]) if place < 256 else b"j" + struct.pack("<I", place)
            return
        data = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
        short, long = (b"C", b"B") if isinstance(value, bytes) else (b"\x8c", b"X")
        size = len(data)
        self._out += short + bytes([size]) if size < 256 else long + struct.pack("<I", size)
        self._out += data
        self._remember(value)

    def _remember(self, value: Value) -> None:
        self._places[id(value)] = self._num_places
        self._num_places += 1
        self._out += b"\x94"


def _pickled_int(value: int) -> bytes:
    if 0 <= value < 1 << 8:
        return struct.pack("<cB", b"K", value)
    if 0 <= value < 1 << 16:
        return struct.pack("<cH", b"M", value)
    return struct.pack("<ci", b"J", value)


def _write_cbor(out: bytearray, value: Value) -> None:
    if value is None:
        out += b"\xf6"
    elif isinstance(value, int):
        out += _cbor_head(0, value) if value >= 0 else _cbor_head(1, -1 - value)
    elif isinstance(value, tuple):
        out += _cbor_head(4, len(value))
        for item in value:
            _write_cbor(out, item)
    else:
        data = value if isinstance(value, bytes) else value.encode()
        out += _cbor_head(2 if isinstance(value, bytes) else 3, len(data)) + data


def _cbor_head(kind: int, number: int) -> bytes:
    """Return the shortest head of a CBOR item: its kind, and its value or length."""
    if number < 24:
        return bytes([kind << 5 | number])
    for extra, size in enumerate((1, 2, 4, 8)):
        if number < 1 << 8 * size:
            return bytes([kind << 5 | 24 + extra]) + number.to_bytes(size, "big")
    raise ValueError(f"{number}: too large")

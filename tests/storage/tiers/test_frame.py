"""Frames and seals: what is changed, cut, moved or forged is refused."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from hashlib import blake2b

import numpy as np
import pytest

from kvpager.storage.tiers.frame import FRAME_BYTES, Fault, Framing
from kvpager.storage.tiers.layout import BlockLayout
from kvpager.storage.tiers.seals import Digest, Encrypted, Mac, Seal, namespace_secret
from tests.support.programs import outputs_by_hash_seed

SECRET, OTHER_SECRET = b"s" * 32, b"t" * 32
LAYOUT = BlockLayout("a layout", 64)
KEY = bytes(range(32))
BLOCK = bytes(range(64))
SEALS: dict[str, Callable[[], Seal]] = {
    "digest": Digest,
    "mac": lambda: Mac(SECRET),
    "encrypted": lambda: Encrypted(SECRET),
}


@pytest.fixture(params=SEALS)
def framing(request: pytest.FixtureRequest) -> Framing:
    return Framing(LAYOUT, SEALS[request.param]())


def framed(framing: Framing, key: bytes = KEY, block: bytes = BLOCK) -> tuple[bytes, bytearray]:
    frame, payload = framing.frame(key, memoryview(block))
    return frame, bytearray(payload)


def read(framing: Framing, frame: bytes, payload: bytes, key: bytes = KEY) -> Fault | None:
    return framing.unframe(frame, key, memoryview(bytearray(payload)))


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def forged(frame: bytes, offset: int, data: bytes) -> bytes:
    """Write `data` into a frame and recompute its check, which needs no secret."""
    checked = frame[:offset] + data + frame[offset + len(data) : -16]
    return checked + blake2b(checked, digest_size=16).digest()


# ---------------------------------------------------------------- round trips


def test_a_frame_is_112_bytes_and_the_payload_as_long_as_the_block(framing: Framing) -> None:
    frame, payload = framed(framing)
    assert len(frame) == FRAME_BYTES == 112
    assert len(payload) == len(BLOCK)


def test_a_block_is_unframed_in_place(framing: Framing) -> None:
    frame, payload = framed(framing)
    assert framing.unframe(frame, KEY, memoryview(payload)) is None
    assert payload == BLOCK


def test_bytes_behind_the_frame_do_not_matter(framing: Framing) -> None:
    frame, payload = framed(framing)
    assert read(framing, frame + bytes(3984), payload) is None


def test_the_block_itself_is_left_as_it_is(framing: Framing) -> None:
    block = bytearray(BLOCK)
    framing.frame(KEY, memoryview(block))
    assert block == BLOCK


def test_blocks_of_wider_items_are_framed_as_their_bytes(framing: Framing) -> None:
    numbers = np.frombuffer(BLOCK, np.int64).copy()
    frame, payload = framing.frame(KEY, memoryview(numbers))
    target = np.frombuffer(payload, np.int64).copy()
    assert framing.unframe(frame, KEY, memoryview(target)) is None
    assert target.tobytes() == BLOCK


# ---------------------------------------------------------------- damage


def test_each_flipped_bit_of_a_frame_is_noticed(framing: Framing) -> None:
    frame, payload = framed(framing)
    for bit in range(8 * len(frame)):
        assert read(framing, flipped(frame, bit), payload) is Fault.HEAD


def test_each_flipped_bit_of_a_block_is_noticed(framing: Framing) -> None:
    frame, payload = framed(framing)
    for bit in range(8 * len(payload)):
        assert read(framing, frame, flipped(payload, bit)) is Fault.BYTES


def in_pieces(framing: Framing, frame: bytes, payload: bytes, taken_in: bytes) -> Fault | None:
    hasher = framing.hasher(KEY)
    for start in range(0, len(taken_in), 10):
        hasher.update(memoryview(taken_in)[start : start + 10])
    return framing.unframe(frame, KEY, memoryview(bytearray(payload)), hasher)


def test_a_block_in_pieces_is_verified_as_one(framing: Framing) -> None:
    frame, payload = framed(framing)
    assert in_pieces(framing, frame, payload, taken_in=payload) is None
    for bit in range(8 * len(payload)):
        damaged = flipped(payload, bit)
        assert in_pieces(framing, frame, damaged, taken_in=damaged) is Fault.BYTES
    for bit in range(8 * len(frame)):
        assert in_pieces(framing, flipped(frame, bit), payload, taken_in=payload) is Fault.HEAD


@pytest.mark.parametrize("name", ["digest", "mac"])
def test_pieces_that_are_missing_are_noticed(name: str) -> None:
    framing = Framing(LAYOUT, SEALS[name]())
    frame, payload = framed(framing)
    for length in range(len(payload)):
        assert in_pieces(framing, frame, payload, taken_in=payload[:length]) is Fault.BYTES


def test_a_frame_cut_short_is_noticed(framing: Framing) -> None:
    frame, payload = framed(framing)
    for length in range(len(frame)):
        assert read(framing, frame[:length], payload) is Fault.HEAD


@pytest.mark.parametrize("length", [0, 63, 65])
def test_a_payload_of_another_length_is_noticed(framing: Framing, length: int) -> None:
    frame, payload = framed(framing)
    assert read(framing, frame, (payload + b"\0")[:length]) is Fault.LENGTH


@pytest.mark.parametrize("junk", [bytes(112), b"\xff" * 112, bytes(range(112))])
def test_what_is_no_frame_is_noticed(framing: Framing, junk: bytes) -> None:
    assert read(framing, junk, BLOCK) is Fault.HEAD


def test_a_frame_does_not_fit_another_block(framing: Framing) -> None:
    frame, _ = framed(framing)
    _, payload = framed(framing, block=BLOCK[::-1])
    assert read(framing, frame, payload) is Fault.BYTES


# ---------------------------------------------------------------- other keys, layouts, seals


def test_a_block_is_not_read_under_another_key(framing: Framing) -> None:
    frame, payload = framed(framing)
    for bit in range(256):
        assert read(framing, frame, payload, flipped(KEY, bit)) is Fault.KEY


@pytest.mark.parametrize("other", [BlockLayout("another", 64), BlockLayout("a layout", 32)])
def test_a_block_of_another_layout_is_not_read(framing: Framing, other: BlockLayout) -> None:
    frame, payload = framed(framing)
    reader = Framing(other, framing.seal)
    assert read(reader, frame, payload[: other.block_bytes]) is Fault.LAYOUT


@pytest.mark.parametrize("writer", SEALS)
@pytest.mark.parametrize("reader", SEALS)
def test_seals_are_never_mixed_up(writer: str, reader: str) -> None:
    frame, payload = framed(Framing(LAYOUT, SEALS[writer]()))
    fault = read(Framing(LAYOUT, SEALS[reader]()), frame, payload)
    assert fault is (None if reader == writer else Fault.SEAL)


@pytest.mark.parametrize("seal", [Mac, Encrypted])
def test_another_secret_reads_nothing(seal: Callable[[bytes], Seal]) -> None:
    frame, payload = framed(Framing(LAYOUT, seal(SECRET)))
    assert read(Framing(LAYOUT, seal(OTHER_SECRET)), frame, payload) is Fault.BYTES


@pytest.mark.parametrize(
    ("offset", "data", "fault"),
    [
        (0, b"KVPBLK\0\2", Fault.HEAD),
        (8, b"\2\0", Fault.VERSION),
        (10, b"\x63\0", Fault.SEAL),
        (12, struct.pack("<I", 63), Fault.LENGTH),
        (12, struct.pack("<I", 2**32 - 1), Fault.LENGTH),
        (16, bytes(16), Fault.LAYOUT),
        (32, bytes(32), Fault.KEY),
    ],
)
def test_each_field_is_compared_even_if_the_check_is_right(
    framing: Framing, offset: int, data: bytes, fault: Fault
) -> None:
    frame, payload = framed(framing)
    assert read(framing, forged(frame, offset, data), payload) is fault


# ---------------------------------------------------------------- writers and readers of the store


@pytest.mark.parametrize("seal", ["mac", "encrypted"])
def test_a_writer_without_the_secret_cannot_move_a_block_to_another_key(seal: str) -> None:
    framing, other = Framing(LAYOUT, SEALS[seal]()), bytes(32)
    frame, payload = framed(framing)
    assert read(framing, forged(frame, 32, other), payload, other) is Fault.BYTES


@pytest.mark.parametrize("seal", ["mac", "encrypted"])
def test_a_writer_without_the_secret_cannot_move_a_block_to_another_layout(seal: str) -> None:
    frame, payload = framed(Framing(LAYOUT, SEALS[seal]()))
    other = BlockLayout("another", 64)
    moved = forged(frame, 16, other.fingerprint)
    assert read(Framing(other, SEALS[seal]()), moved, payload) is Fault.BYTES


def test_a_reader_of_the_store_learns_nothing_of_encrypted_blocks() -> None:
    framing = Framing(LAYOUT, Encrypted(SECRET))
    (first, one), (second, two) = (framed(framing, block=bytes(64)) for _ in range(2))
    assert one != two
    assert first != second
    assert bytes(8) not in one


def test_the_secrets_of_seals_and_of_tenants_are_apart() -> None:
    derived = {namespace_secret(SECRET, name) for name in (None, "", "a", "b", "0", "1a")}
    assert len(derived) == 6
    assert all(len(secret) == 32 for secret in derived)
    assert namespace_secret(OTHER_SECRET, "a") not in derived
    frame, payload = framed(Framing(LAYOUT, Mac(SECRET)))
    for name in (None, "", "a"):
        tenant = Mac(namespace_secret(SECRET, name))
        assert read(Framing(LAYOUT, tenant), frame, payload) is Fault.BYTES


@pytest.mark.parametrize("make", [Mac, Encrypted, lambda secret: namespace_secret(secret, "a")])
def test_secrets_of_a_bad_length_or_kind_are_refused(make: Callable[[object], object]) -> None:
    for secret in (b"", b"s" * 15, b"s" * 65):
        with pytest.raises(ValueError, match="expected 16 to 64 bytes, got"):
            make(secret)
    with pytest.raises(TypeError, match="expected bytes, got str"):
        make("s" * 32)


# ---------------------------------------------------------------- arguments


def test_keys_and_blocks_of_another_length_get_no_frame(framing: Framing) -> None:
    with pytest.raises(ValueError, match="key: expected 32 bytes, got 31"):
        framing.frame(KEY[1:], memoryview(BLOCK))
    with pytest.raises(ValueError, match="block: expected 64 bytes, got 63"):
        framing.frame(KEY, memoryview(BLOCK)[1:])


@pytest.mark.parametrize(
    ("module", "make", "extra"),
    [
        ("xxhash", Digest, "tiers"),
        ("blake3", lambda: Mac(SECRET), "sealed"),
        ("cryptography", lambda: Encrypted(SECRET), "sealed"),
    ],
)
def test_a_seal_says_which_extra_it_needs(
    monkeypatch: pytest.MonkeyPatch, module: str, make: Callable[[], Seal], extra: str
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'kvpager\[{extra}\]'"):
        make()


# ---------------------------------------------------------------- golden vectors

GOLDEN = {
    "digest": (
        "4b5650424c4b000101000100400000005033c914493cb06f3c092f128b3422c20001020304050607"
        "08090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f00000000000000000000000000000000"
        "9c6e140a465545e590c1971ddb04ce74b534c376be37a30e5888f158d8f05fc4"
    ),
    "mac": (
        "4b5650424c4b000101000200400000005033c914493cb06f3c092f128b3422c20001020304050607"
        "08090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f00000000000000000000000000000000"
        "d15c9343247e89088857a8429543048137e5bb39bcc7154a041494e9c11daa78"
    ),
    "encrypted": (
        "4b5650424c4b000101000300400000005033c914493cb06f3c092f128b3422c20001020304050607"
        "08090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f18d0f06586bda13bad3556f600000000"
        "93ff381cd37c4e9a981851ff8d472d1cb0c3f5e9c6ad3a1c3a54845417f6f164758b3e66e3ac4829"
        "4be48cfd04958b5ecddfb734267d480b8086193c56a4797f18a29bc3639c92dbb041f7af42bd5d7a"
        "79070c6d55ea34af0cb73717268e7d75"
    ),
}


@pytest.mark.parametrize("seal", ["digest", "mac"])
def test_a_frame_stays_the_same_from_release_to_release(seal: str) -> None:
    # Stores outlive releases: a change here loses their blocks. Raise the version with it.
    frame, _ = framed(Framing(LAYOUT, SEALS[seal]()))
    assert frame.hex() == GOLDEN[seal]


def test_an_encrypted_block_of_an_earlier_release_is_read() -> None:
    stored = bytes.fromhex(GOLDEN["encrypted"])
    payload = bytearray(stored[FRAME_BYTES:])
    framing = Framing(LAYOUT, Encrypted(SECRET))
    assert framing.unframe(stored, KEY, memoryview(payload)) is None
    assert payload == BLOCK


def test_frames_are_equal_in_every_process() -> None:
    code = (
        "from kvpager.storage.tiers.frame import *;"
        "from kvpager.storage.tiers.seals import *;"
        f"framing = Framing({LAYOUT!r}, Mac({SECRET!r}));"
        f"print(framing.frame({KEY!r}, memoryview({BLOCK!r})).frame.hex())"
    )
    assert outputs_by_hash_seed(code) == {GOLDEN["mac"]}

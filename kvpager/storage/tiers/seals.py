"""Seals: what proves that a block's bytes are the ones that were saved.

| seal | what it withstands | cost |
|---|---|---|
| `Digest` | damage, mix-ups, torn writes | xxh3-128, 9 to 26 GB/s |
| `Mac` | also writers of the store who do not know the secret | keyed BLAKE3, 6 GB/s |
| `Encrypted` | also readers of the store | AES-256-GCM, 1.5 GB/s |

`Digest` needs `kvpager[tiers]`, the others `kvpager[sealed]`.
"""

from __future__ import annotations

import hmac
import os
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol, cast

NONCE_BYTES, TAG_BYTES = 12, 16
_NO_NONCE = bytes(NONCE_BYTES)
_SECRET_MIN, _SECRET_MAX = 16, 64


class Sealed(NamedTuple):
    """The parts of a sealed block that a frame keeps. `payload` has the length of the block."""

    nonce: bytes
    tag: bytes
    payload: memoryview


class Hasher(Protocol):
    """Takes in a payload piece by piece, each while it is in the processor's cache."""

    def update(self, piece: memoryview, /) -> object:
        """Take in the next bytes. O(bytes)."""
        ...

    def digest(self) -> bytes:
        """Return the digest of all bytes. O(1)."""
        ...


class Seal(Protocol):
    """How frames protect blocks. `number` stands in each frame, so seals are never mixed up.

    Blocks and payloads are memoryviews of bytes.
    """

    @property
    def number(self) -> int:
        """The seal's number in a frame."""
        ...

    @property
    def master(self) -> bytes:
        """The master of `namespace_secret`; public if the seal has no secret."""
        ...

    def seal(self, head: bytes, block: memoryview) -> Sealed:
        """Protect `block`, and `head` along with it. O(bytes)."""
        ...

    def hasher(self, head: bytes) -> Hasher:
        """Return a hasher for a payload that arrives in pieces. O(1)."""
        ...

    def unseal(self, head: bytes, sealed: Sealed, hasher: Hasher | None = None) -> bool:
        """Return whether a block is genuine, and turn its payload into it, in place. O(bytes).

        A `hasher`, if given, comes from `head` and has taken in the payload.
        """
        ...


class Digest:
    """A digest without a secret: xxh3-128 (Collet)."""

    number = 1
    master = b"kvpager: blocks without a secret"

    def __init__(self) -> None:
        """Load xxhash. Raises: `ModuleNotFoundError` without it."""
        self._xxh3: Any = _module("xxhash", "tiers").xxh3_128

    def seal(self, head: bytes, block: memoryview) -> Sealed:
        """Digest the block; the frame checks `head` by itself."""
        return Sealed(_NO_NONCE, self._xxh3(block).digest(), block)

    def hasher(self, head: bytes) -> Hasher:
        """Return a hasher without any bytes."""
        return cast(Hasher, self._xxh3())

    def unseal(self, head: bytes, sealed: Sealed, hasher: Hasher | None = None) -> bool:
        """Return whether the digest is that of the payload."""
        return (hasher or _fed(self.hasher(head), sealed.payload)).digest() == sealed.tag


class Mac:
    """A keyed digest of head and block: BLAKE3 (O'Connor et al., 2020), cut to 128 bits."""

    number = 2

    def __init__(self, secret: bytes) -> None:
        """Load blake3. Raises: `ModuleNotFoundError` without it; `ValueError` for a bad secret."""
        self._blake3: Any = _module("blake3", "sealed").blake3
        self._key = _derived(secret, b"kvpager mac")
        self.master = _derived(secret, b"kvpager mac keys")

    def seal(self, head: bytes, block: memoryview) -> Sealed:
        """Authenticate head and block."""
        return Sealed(_NO_NONCE, _fed(self.hasher(head), block).digest()[:TAG_BYTES], block)

    def hasher(self, head: bytes) -> Hasher:
        """Return a hasher that has taken in `head`."""
        return cast(Hasher, self._blake3(head, key=self._key))

    def unseal(self, head: bytes, sealed: Sealed, hasher: Hasher | None = None) -> bool:
        """Return whether the tag is that of `head` and the payload."""
        hasher = hasher or _fed(self.hasher(head), sealed.payload)
        return hmac.compare_digest(hasher.digest()[:TAG_BYTES], sealed.tag)


class Encrypted:
    """AES-256-GCM (NIST SP 800-38D) with a random nonce for each block.

    Change the secret before 2^32 blocks were saved with it.
    """

    number = 3

    def __init__(self, secret: bytes) -> None:
        """Derive the key. Raises: `ModuleNotFoundError`; `ValueError` for a bad secret."""
        aead = _module("cryptography.hazmat.primitives.ciphers.aead", "sealed")
        invalid = _module("cryptography.exceptions", "sealed").InvalidTag
        self._cipher: Any = aead.AESGCM(_derived(secret, b"kvpager aes"))
        self.master = _derived(secret, b"kvpager aes keys")
        self._invalid: type[Exception] = invalid

    def seal(self, head: bytes, block: memoryview) -> Sealed:
        """Encrypt the block into new memory, and authenticate `head`."""
        nonce, sealed = os.urandom(NONCE_BYTES), bytearray(len(block) + TAG_BYTES)
        self._cipher.encrypt_into(nonce, block, head, sealed)
        whole = memoryview(sealed)
        return Sealed(nonce, bytes(whole[len(block) :]), whole[: len(block)])

    def hasher(self, head: bytes) -> Hasher:
        """Return a hasher that ignores all bytes: the cipher verifies them."""
        return _NoHasher()

    def unseal(self, head: bytes, sealed: Sealed, hasher: Hasher | None = None) -> bool:
        """Decrypt the payload in place, unless it is not genuine."""
        nonce, tag, payload = sealed
        try:
            self._cipher.decrypt_into(nonce, b"".join((payload, tag)), head, payload)
        except self._invalid:
            return False
        return True


class _NoHasher:
    def update(self, piece: memoryview, /) -> None: ...

    def digest(self) -> bytes:
        return b""


def _fed(hasher: Hasher, payload: memoryview) -> Hasher:
    hasher.update(payload)
    return hasher


def seal_of(number: int, secret: bytes | None) -> Seal:
    """Return the seal with a frame's `number`. Raises: `ValueError` for a missing or bad secret."""
    if number == Digest.number:
        return Digest()
    kinds: dict[int, type[Mac | Encrypted]] = {Mac.number: Mac, Encrypted.number: Encrypted}
    if number not in kinds:
        raise ValueError(f"seal={number}: unknown. Use the release that wrote the blocks.")
    if secret is None:
        raise ValueError(
            f"secret=None: blocks are sealed by {kinds[number].__name__}. Pass its secret."
        )
    return kinds[number](secret)


def namespace_secret(master: bytes, namespace: str | None) -> bytes:
    """Return the secret of a tenant's content keys, 32 bytes. O(1).

    One master serves a whole deployment: tenants cannot form each other's keys. The absence of a
    namespace is a tenant of its own. Raises: `ValueError` for a master of a bad length.
    """
    tenant = b"0" if namespace is None else b"1" + namespace.encode()
    return blake2b(
        tenant, digest_size=32, key=_checked(master, "master"), person=b"kvpager tenant"
    ).digest()


def _derived(secret: bytes, purpose: bytes) -> bytes:
    return blake2b(b"", digest_size=32, key=_checked(secret, "secret"), person=purpose).digest()


def _checked(secret: bytes, name: str) -> bytes:
    if not isinstance(secret, bytes):
        raise TypeError(f"{name}: expected bytes, got {type(secret).__name__}")
    if not _SECRET_MIN <= len(secret) <= _SECRET_MAX:
        raise ValueError(
            f"{name}: expected {_SECRET_MIN} to {_SECRET_MAX} bytes, got {len(secret)}. "
            "Make one with secrets.token_bytes(32)."
        )
    return secret


def _module(name: str, extra: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name.partition('.')[0]} is not installed. Run: pip install 'kvpager[{extra}]'",
            name=error.name,
        ) from error

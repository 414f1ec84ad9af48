"""Content keys of blocks that leave the process: a chain of keyed 256-bit digests.

A block's key covers everything its KV depends on: storage layout, group of layers, model, the
namespace's secret, LoRA adapter, multimodal hashes, all earlier blocks, and its tokens. Fields are
length-prefixed and in a fixed order, so different inputs never have the same encoding. Making a key
or testing a guess needs the secret. The prefix index hashes nothing: it compares tokens.

Keys are the same in every process and on every machine. BLAKE2b: RFC 7693.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from kvpager import _validate as arguments
from kvpager.blocks.groups.digests import extend_digests
from kvpager.blocks.mm_hashes import MMHash, Tag, read_mm_hashes
from kvpager.plans import Int32

KEY_BYTES = 32
_ROOT, _BLOCK, _WINDOW = b"kvpager root", b"kvpager block", b"kvpager window"  # <= 16 bytes
_SHARD = b"kvpager shard"


@dataclass(frozen=True, slots=True)
class KeyContext:
    """Fields that all blocks of a cache share.

    Attributes:
        layout: name of dtype, order, heads and block size, never inferred from a shape.
        model: name of the weights and their revision.
        secret: 16 to 64 random bytes of the namespace, or empty to share with all namespaces.
        lora: name of the LoRA adapter, or None.
    """

    layout: str
    model: str
    secret: bytes = b""
    lora: str | None = None

    def __post_init__(self) -> None:
        """Check the fields. Raises: `TypeError` or `ValueError` for a bad field."""
        for name in ("layout", "model"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name}={getattr(self, name)!r}: expected a str")
            if not getattr(self, name):
                raise ValueError(f'{name}="": blocks of any {name} would be the same. Name it.')
        arguments.label("lora", self.lora)
        secret = self.secret
        if not isinstance(secret, bytes) or (secret and not 16 <= len(secret) <= 64):
            raise ValueError("secret: expected 16 to 64 bytes, or empty")


class KeyGroup(NamedTuple):
    """One of a model's groups of layers, see `kvpager.blocks.groups`.

    Attributes:
        number: of the group.
        windows: of all groups, in tokens; None for full attention.
    """

    number: int = 0
    windows: tuple[int | None, ...] = (None,)

    @property
    def fields(self) -> tuple[bytes, ...]:
        """The fields that keys cover; none if the only group has no window."""
        if self == _ALL_LAYERS:
            return ()
        numbers = self.number, *(0 if window is None else window for window in self.windows)
        return tuple(number.to_bytes(8, "little") for number in numbers)


_ALL_LAYERS = KeyGroup()


def content_keys(
    ids: ArrayLike,
    block_size: int,
    context: KeyContext,
    mm_hashes: Iterable[tuple[int, int, bytes]] = (),
    group: KeyGroup = _ALL_LAYERS,
) -> list[bytes]:
    """Return the keys of a prompt's full blocks in a group without a window. O(tokens).

    Each has 32 bytes. `mm_hashes`: as in `BlockManager.allocate`.
    Raises: `ValueError`, `TypeError` for bad arguments.
    """
    tokens = arguments.token_ids(ids)
    block_size = arguments.block_size(block_size)
    shown = read_mm_hashes(mm_hashes, len(tokens))
    key, secret = _root(context, block_size, group), context.secret
    # One digest per block, of the previous key and its own bytes. Little-endian on every machine.
    data = np.ascontiguousarray(tokens, "<i4").tobytes()
    step, keys = 4 * block_size, list[bytes]()
    for stop, tag in shown.stretches(block_size, 0, len(tokens) // block_size):
        behind = _behind(tag)
        for start in range(step * len(keys), step * stop, step):
            key = _block(key, data[start : start + step], behind, secret)
            keys.append(key)
    return keys


def shard_key(key: bytes, rank: int, layout: bytes) -> bytes:
    """Return the key under which rank `rank` keeps its shard of the block with this key. O(1).

    `key` is a key of rank 0, which covers model, secret and tokens. `layout` is the fingerprint of
    the shard's layout.
    """
    shard = key + rank.to_bytes(8, "little") + layout  # of fixed lengths
    return blake2b(shard, digest_size=KEY_BYTES, person=_SHARD).digest()


class PromptKeys:
    """The keys of a prompt's full blocks in all groups of layers.

    Those of a group without a window are a chain. Those of a group with a window are digests of all
    tokens up to the end of a block: the blocks before it may be gone.

    Attributes:
        block_size: tokens of a block.
        windows: of the groups, None for full attention.
    """

    def __init__(
        self,
        tokens: Int32,
        block_size: int,
        context: KeyContext,
        mm_hashes: Iterable[tuple[int, int, bytes]],
        windows: tuple[int | None, ...],
    ) -> None:
        """Make the keys of groups without a window; the others on demand. O(tokens * groups)."""
        self.block_size = block_size
        self.windows = windows
        shown = list(mm_hashes)
        self._secret = context.secret
        self._chains, self._roots = dict[int, list[bytes]](), dict[int, bytes]()
        for number, window in enumerate(windows):
            group = KeyGroup(number, windows)
            if window is None:
                self._chains[number] = content_keys(tokens, block_size, context, shown, group)
            else:
                self._roots[number] = _root(context, block_size, group)
        self._digests: list[bytes] = []
        if self._roots:
            num_blocks = len(tokens) // block_size
            blocks = tokens[: num_blocks * block_size].reshape(num_blocks, block_size)
            extend_digests(self._digests, blocks, read_mm_hashes(shown, len(tokens)))

    def of(self, group: int, position: int) -> bytes:
        """Return the key of a block. O(1)."""
        if group in self._chains:
            return self._chains[group][position]
        return _windowed(self._roots[group], self._secret, self._digests[position])


class ContentKeying:
    """Makes the keys of blocks one by one, for `manager.cached.keys`.

    The keys equal those of `PromptKeys`. `context_of` returns the context of a namespace and LoRA
    adapter, always the same one. `windows` are the manager's.
    """

    def __init__(
        self,
        block_size: int,
        context_of: Callable[[str | None, str | None], KeyContext],
        windows: tuple[int | None, ...] = (None,),
    ) -> None:
        self._block_size = arguments.block_size(block_size)
        self._context_of = context_of
        self._windows = windows
        self._secrets: dict[str | None, bytes] = {}

    def root(self, namespace: str | None, lora: str | None, group: int) -> bytes:
        """Return the key before the first block of a group. O(groups)."""
        context = self._context_of(namespace, lora)
        self._secrets[namespace] = context.secret
        return _root(context, self._block_size, KeyGroup(group, self._windows))

    def windowed(self, root: bytes, namespace: str | None, digest: bytes) -> bytes:
        """Return the key of a block of a group with a window, whose root this is. O(1)."""
        return _windowed(root, self._secrets[namespace], digest)

    def block(self, namespace: str | None, before: bytes, tokens: Int32, tag: Tag) -> bytes:
        """Return the key of a block after the block with the key `before`. O(block_size)."""
        data = np.ascontiguousarray(tokens, "<i4").tobytes()
        return _block(before, data, _behind(tag), self._secrets[namespace])


def _block(before: bytes, tokens: bytes, behind: bytes, secret: bytes) -> bytes:
    block = before + tokens + behind
    return blake2b(block, digest_size=KEY_BYTES, key=secret, person=_BLOCK).digest()


def _windowed(root: bytes, secret: bytes, digest: bytes) -> bytes:
    return blake2b(root + digest, digest_size=KEY_BYTES, key=secret, person=_WINDOW).digest()


def _behind(tag: Tag) -> bytes:
    return _joined(_fields(tag)) if tag else b""


def _root(context: KeyContext, block_size: int, group: KeyGroup) -> bytes:
    lora = b"" if context.lora is None else context.lora.encode()
    fields = (
        context.layout.encode(),
        context.model.encode(),
        bytes([context.lora is not None]),
        lora,
        block_size.to_bytes(8, "little"),
        *group.fields,
    )
    return blake2b(
        _joined(fields), digest_size=KEY_BYTES, key=context.secret, person=_ROOT
    ).digest()


def _fields(tag: tuple[MMHash, ...]) -> Iterator[bytes]:
    for start, stop, digest, end in tag:
        cut = b"" if end == stop else end.to_bytes(8, "little")
        yield from (start.to_bytes(8, "little"), stop.to_bytes(8, "little") + cut, digest)


def _joined(fields: Iterable[bytes]) -> bytes:
    return b"".join(len(field).to_bytes(8, "little") + field for field in fields)

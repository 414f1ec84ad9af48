"""The names of blocks in KV events: kvpager's content keys, or vLLM's block hashes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import NamedTuple, Protocol

from kvpager.blocks.mm_hashes import Tag
from kvpager.kv_events.block_hashes import Value, first_seed, hash_cbor, hash_pickled
from kvpager.plans import Int32
from kvpager.storage.keys import ContentKeying, KeyContext

_MM, _LORA, _SALT = "mm", "lora", "cache_salt"  # one object each: pickle writes it once
ContextOf = Callable[[str | None, str | None], KeyContext]


class Block(NamedTuple):
    """A block and what its KV depends on besides the blocks before it."""

    tokens: Int32
    position: int  # blocks before it
    namespace: str | None
    lora: str | None
    tag: Tag  # the mm_hashes that overlap it
    group: int = 0
    digest: bytes | None = None  # of the tokens up to its end, if its group has a window
    digest_before: bytes | None = None  # of those before it

    @property
    def mm_items(self) -> list[tuple[str, int]]:
        """The hash of each image in hexadecimal digits, and its first token relative to the block.

        As vLLM's `mm_hash`: a negative number if the image begins in an earlier block. O(images).
        """
        first = self.position * len(self.tokens)
        return [(digest.hex(), start - first) for start, _, digest, _ in self.tag or ()]


class BlockNames(Protocol):
    """Names blocks by their content."""

    def name(self, before: bytes | None, block: Block) -> bytes:
        """Return the name of a block after the block named `before`, None for none. O(tokens)."""
        ...

    def before(self, block: Block) -> bytes | None:
        """Return the name before `block`, whose group has a window; None if unknown. O(1)."""
        ...


class ContentNames:
    """kvpager's content keys. In an engine with tiers, they are the keys in its stores.

    `context_of` returns what keys cover besides tokens; by default the namespace and `lora`.
    `windows` are the manager's.
    """

    def __init__(
        self,
        block_size: int,
        context_of: ContextOf | None = None,
        windows: tuple[int | None, ...] = (None,),
    ) -> None:
        self._keying = ContentKeying(block_size, context_of or _labels, windows)

    def name(self, before: bytes | None, block: Block) -> bytes:
        """Return the content key of a block. O(tokens)."""
        if block.digest is not None:
            return self._windowed(block, block.digest)
        if before is None:
            before = self._keying.root(block.namespace, block.lora, block.group)
        return self._keying.block(block.namespace, before, block.tokens, block.tag)

    def before(self, block: Block) -> bytes | None:
        """Return the content key of the block before this one. O(1)."""
        return None if block.digest_before is None else self._windowed(block, block.digest_before)

    def _windowed(self, block: Block, digest: bytes) -> bytes:
        root = self._keying.root(block.namespace, block.lora, block.group)
        return self._keying.windowed(root, block.namespace, digest)


class VLLMHashes:
    """The block hashes of vLLM's prefix cache, by its `--prefix-caching-hash-algo`.

    A namespace counts as vLLM's `cache_salt`. vLLM also hashes the path of a LoRA adapter:
    `lora_paths` maps names to paths; by default, the path is the name.

    A hash covers the hash before it. A block whose group has a window may outlive the block before
    it, so `num_remembered` hashes of such blocks are kept by the digests of their tokens.
    """

    def __init__(
        self, algorithm: str, lora_paths: Mapping[str, str], num_remembered: int = 1 << 16
    ) -> None:
        self._remembered: OrderedDict[tuple[str | None, str | None, bytes], bytes] = OrderedDict()
        self._num_remembered = num_remembered
        self._hash: Callable[[Value], bytes] = {"sha256": hash_pickled, "sha256_cbor": hash_cbor}[
            algorithm
        ]
        self._paths = dict(lora_paths)
        self._first = self._hash(first_seed())

    def name(self, before: bytes | None, block: Block) -> bytes:
        """Return vLLM's hash of a block. O(tokens)."""
        extra: list[Value] = []
        if block.lora is not None:
            extra.append((_LORA, block.lora, self._paths.get(block.lora, block.lora)))
        extra += [(_MM, digest, offset) for digest, offset in block.mm_items]
        if block.namespace is not None and not block.position:
            extra.append((_SALT, block.namespace))
        tokens = tuple(block.tokens.tolist())
        name = self._hash((before or self._first, tokens, tuple(extra) or None))
        if block.digest is not None:
            self._remembered[block.namespace, block.lora, block.digest] = name
            if len(self._remembered) > self._num_remembered:
                self._remembered.popitem(last=False)
        return name

    def before(self, block: Block) -> bytes | None:
        """Return the hash of the block before this one, if it is remembered. O(1)."""
        if block.digest_before is None:
            return None
        place = block.namespace, block.lora, block.digest_before
        if place in self._remembered:
            self._remembered.move_to_end(place)
        return self._remembered.get(place)


def _labels(namespace: str | None, lora: str | None) -> KeyContext:
    """Return a context for keys that only events use.

    It keeps namespaces apart. It hides nothing, because events show the tokens.
    """
    secret = b"" if namespace is None else blake2b(namespace.encode(), digest_size=32).digest()
    return KeyContext("events", "any model", secret, lora)

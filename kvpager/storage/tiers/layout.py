"""The layout of a block's bytes, by name: blocks of another layout are never read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from kvpager import _validate as arguments

FINGERPRINT_BYTES = 16
BLOCK_BYTES_MAX = 2**32 - 1  # a frame has 32 bits for it


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """What a block's bytes mean, as a text, and how many they are.

    Two processes that name the same layout may read each other's blocks. `text` goes into the
    content keys, `fingerprint` into each frame.
    """

    text: str
    block_bytes: int

    def __post_init__(self) -> None:
        """Check the size. Raises: `ValueError`, `TypeError` unless it is 1 to 4 GiB - 1."""
        arguments.count("block_bytes", self.block_bytes, at_least=1, at_most=BLOCK_BYTES_MAX)

    @classmethod
    def of(
        cls,
        *,
        block_size: int,
        layers: Sequence[tuple[int, int, int]],
        dtype: str,
        kv_cache_dtype: str | None = None,
        block_bytes: int,
        groups: Sequence[tuple[int | None, Sequence[int]]] = (),
        token_first: bool = False,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> BlockLayout:
        """Name the layout of a `BlockStorage`. O(layers).

        `layers` are (kv heads, head dim, value head dim), in order. `dtype` is a torch dtype's
        name, such as "bfloat16". `groups` are the window and the layers of each group of layers;
        leave them out if all layers form one group without a window. `token_first`: each token has
        all its layers together, as in the modes "virtual" and "reserved". `rank` of `num_ranks` is
        the shard of a tensor-parallel model.
        Raises: `ValueError`, `TypeError` for a bad argument.
        """
        size = arguments.block_size(block_size)
        num_ranks = arguments.count("num_ranks", num_ranks, at_least=1)
        rank = arguments.count("rank", rank, at_most=num_ranks - 1)
        fields = [
            f"kvpager {'token-first' if token_first else 'block-first'} 1",
            f"block_size {size}",
            f"dtype {dtype}",
            f"kv_cache_dtype {kv_cache_dtype or dtype}",
            "layers " + " ".join("x".join(map(str, layer)) for layer in layers),
            f"rank {rank} of {num_ranks}",
        ]
        if groups:
            named = (f"{window or 'full'}:{','.join(map(str, of))}" for window, of in groups)
            fields.append(f"groups {' '.join(named)}")
        return cls("; ".join(fields), block_bytes)

    @property
    def fingerprint(self) -> bytes:
        """16 bytes that stand for the layout in a frame. O(length of the text)."""
        told = f"{self.text}; {self.block_bytes} bytes".encode()
        return blake2b(told, digest_size=FINGERPRINT_BYTES, person=b"kvpager layout").digest()

"""One cache for several serving stacks: the bytes they share, and the self-test before they do.

Each stack writes a block as `CommonLayout` says. Before it reads or writes any, it computes the
keys and values of a probe prompt, and compares them with those that the first stack stored:

    nothing stored    its own become the reference
    they agree        it takes the reference
    they differ       its own are its reference: it shares with no other stack

All keys of blocks cover the reference. So blocks of stacks that disagree are never mixed up, even
if a store loses the reference.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvpager import _validate as arguments
from kvpager._text import listed
from kvpager.plans import Int32
from kvpager.storage.keys import KeyContext, content_keys
from kvpager.storage.tiers.asking import outcomes_of
from kvpager.storage.tiers.layout import BlockLayout
from kvpager.storage.tiers.protocol import BlockStore, Loaded, Saved
from kvpager.storage.tiers.seals import Digest, namespace_secret
from kvpager.storage.tiers.urls import are_private

logger = logging.getLogger("kvpager")

PROBE_TOKENS = 512


class Difference(NamedTuple):
    """How far keys and values of two stacks are from each other, as parts of their size.

    The first layer follows a few operations, so it shows each error of positions, heads or layout,
    and little rounding. Later layers add the rounding of all layers before them.

    Attributes:
        first: of the first layer, the largest of all tokens.
        later: of the other layers, the root mean square over tokens, the largest of all layers.
    """

    first: float
    later: float

    def is_within(self, other: Difference) -> bool:
        """Return True if neither part is above that of `other`, or NaN. O(1)."""
        return self.first <= other.first and self.later <= other.later


# The largest differences by dtype. Two attention functions of transformers differ by .005 and .012
# in bfloat16, for 24 layers of usual random weights; large weights raise the second to .086.
TOLERANCES = {
    "float32": Difference(1e-4, 1e-3),
    "float16": Difference(4e-3, 2e-2),
    "bfloat16": Difference(2e-2, 1e-1),
}
_LENGTH_DEPENDENT = ("dynamic", "longrope")  # kinds of rotary embeddings
_LOAD_S, _SAVE_S = 10.0, 30.0
_OFFERS = 2  # a store without room admits what is offered twice

Blocks = NDArray[np.uint8]


class CommonLayout(NamedTuple):
    """What a block holds, whichever stack wrote it.

    For each layer, in the order of the model, the keys and then the values: both
    [block_size, kv heads, head dim], keys after the rotary embedding. A `BlockStorage` of mode
    "paged" keeps its blocks so.

    Attributes:
        block_size: tokens of a block.
        layers: (kv heads, head dim, value head dim) of each layer.
        dtype: the name of a torch dtype, such as "bfloat16".
    """

    block_size: int
    layers: tuple[tuple[int, int, int], ...]
    dtype: str

    @classmethod
    def of(
        cls, block_size: int, layers: Sequence[tuple[int, int, int]], dtype: str
    ) -> CommonLayout:
        """Check and return a layout. O(layers). Raises: `ValueError` for one of no use here."""
        size = arguments.block_size(block_size)
        if size > PROBE_TOKENS:
            raise ValueError(f"cross_stack: blocks have {size} tokens, at most {PROBE_TOKENS} may.")
        if dtype not in TOLERANCES:
            raise ValueError(
                f"cross_stack: keys and values are {dtype}, expected {listed(TOLERANCES)}."
            )
        return cls(size, tuple((int(h), int(k), int(v)) for h, k, v in layers), dtype)

    @property
    def layout(self) -> BlockLayout:
        """The name and size of these blocks. O(layers)."""
        return BlockLayout.of(
            block_size=self.block_size,
            layers=self.layers,
            dtype=self.dtype,
            block_bytes=sum(self.part_elements) * self.element_bytes,
        )

    @property
    def element_bytes(self) -> int:
        """Bytes of one number. O(1)."""
        return 4 if self.dtype == "float32" else 2

    @property
    def part_elements(self) -> list[int]:
        """The number of numbers in keys and in values of each layer, in order. O(layers)."""
        dims = (dim for heads, *both in self.layers for dim in (heads * both[0], heads * both[1]))
        return [self.block_size * dim for dim in dims]

    def parts(self, blocks: Blocks) -> Iterator[NDArray[np.float32]]:
        """Yield keys or values of all tokens, float32 [tokens, heads * dim], in order. O(bytes).

        `blocks` is uint8 [n, bytes of a block].
        """
        numbers, start = _as_float32(blocks, self.dtype), 0
        for count in self.part_elements:
            part = numbers[:, start : start + count]
            yield part.reshape(-1, count // self.block_size)
            start += count

    def difference(self, ours: Blocks, theirs: Blocks) -> Difference:
        """Return how far keys and values are from theirs. O(bytes).

        Lengths of vectors of a token are divided by their root mean square in that layer. Parts are
        NaN or infinite if a number is.
        """
        worst, means = list[float](), list[float]()
        with np.errstate(all="ignore"):
            for one, other in zip(self.parts(ours), self.parts(theirs), strict=True):
                size = np.square(other).sum(axis=1).mean()
                far = np.square(one - other).sum(axis=1) / size
                worst.append(float(np.sqrt(far.max())))
                means.append(float(np.sqrt(far.mean())))
        return Difference(float(np.max(worst[:2])), float(np.max(means[2:], initial=0.0)))


def probe_prompt() -> Int32:
    """Return the token ids of the probe, int32 [512]: all from 3 to 66. O(tokens)."""
    steps = np.arange(PROBE_TOKENS, dtype=np.int64)
    return (3 + (steps * steps * 7 + steps // 8) % 64).astype(np.int32)


def check_shared(tiers: Sequence[str | BlockStore], model_id: str | None) -> None:
    """Raise `ValueError` unless other stacks can read the stores and know the model. O(tiers)."""
    if are_private(tiers):
        raise ValueError(
            "cross_stack: no other process reads the tiers. Pass tiers= with a store that both "
            'stacks use, such as "valkey://cache:6379".'
        )
    if model_id is None:
        raise ValueError("cross_stack: stacks know a model by its name. Pass model_id=.")


def rope_obstacle(config: Any) -> str | None:
    """Return why prompts of a model cannot be shared: keys depend on their length. O(1).

    `config` is a configuration of transformers, which vLLM uses, too.
    """
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if kind not in _LENGTH_DEPENDENT:
        return None
    return f"its rotary embedding ({kind}) depends on the length of a prompt"


def probe_request() -> list[int]:
    """Return the probe and one more token, as a prompt: some stacks keep what is before the last.

    O(tokens).
    """
    return [*probe_prompt().tolist(), 3]


class Agreement(NamedTuple):
    """The result of the self-test.

    Attributes:
        model: the model's name in the keys of blocks. It covers the reference.
        difference: from the reference; None if no store keeps it.
        is_shared: False if this stack keeps its blocks apart.
    """

    model: str
    difference: Difference | None
    is_shared: bool


def agree(
    stores: Sequence[BlockStore], common: CommonLayout, model_id: str, probe: Blocks
) -> Agreement:
    """Compare the blocks of `probe_prompt` with the reference of a model. O(bytes of the probe).

    The store that is asked last has the reference: it is the one that most processes share. Logs
    the result; a disagreement as a warning. Waits for stores, up to a minute. `probe` is uint8
    [512 / block_size, bytes of a block].
    """
    stores = [store for store in stores if not getattr(store, "is_private", False)]
    layout = common.layout
    secret = namespace_secret(Digest.master, None)
    context = KeyContext(f"{layout.text}; probe", model_id, secret)
    keys = content_keys(probe_prompt(), common.block_size, context)
    theirs = _stored(stores, keys, probe)
    if theirs is None:
        _save(stores, keys, probe)
        theirs = _stored(stores, keys, probe)  # of a stack that came at the same time
    difference = None if theirs is None else common.difference(probe, theirs)
    is_shared = difference is None or difference.is_within(TOLERANCES[common.dtype])
    reference = probe if theirs is None or not is_shared else theirs
    if is_shared:
        _save(stores, keys, reference)
    digest = blake2b(reference.tobytes(), digest_size=16, person=b"kvpager probe").hexdigest()
    agreement = Agreement(f"{model_id}; agrees with {digest}", difference, is_shared)
    _log(agreement, common, model_id)
    return agreement


def _log(agreement: Agreement, common: CommonLayout, model_id: str) -> None:
    blocks = f"blocks of {common.block_size} tokens of model_id={model_id!r}"
    found = "no store keeps the probe"
    if agreement.difference is not None:
        found = f"{_shown(agreement.difference)}, at most {_shown(TOLERANCES[common.dtype])}"
    if agreement.is_shared:
        logger.info("kvpager: %s are shared with other stacks (differences: %s)", blocks, found)
    else:
        logger.warning(
            "kvpager: cross_stack is off: keys and values of the probe differ from what another "
            "stack stored (first and later layers: %s). Weights, rotary embedding or layout "
            "differ. The %s are kept apart.",
            found, blocks,
        )  # fmt: skip


def _shown(difference: Difference) -> str:
    return " and ".join(f"{part:.2g}" for part in difference)


def _stored(stores: Sequence[BlockStore], keys: list[bytes], like: Blocks) -> Blocks | None:
    """Return the first full set of blocks that a store has, from the last store on."""
    for store in reversed(stores):
        found = np.empty_like(like)
        deadline = time.monotonic() + _LOAD_S
        into = [memoryview(block) for block in found]
        outcomes = outcomes_of(store, "load", keys, into, deadline)
        if (outcomes == Loaded.HIT).all():
            return found
    return None


def _save(stores: Sequence[BlockStore], keys: list[bytes], blocks: Blocks) -> None:
    """Offer blocks to all stores. Those that have a block keep theirs."""
    buffers = [memoryview(block) for block in blocks]
    for store in stores:
        for _ in range(_OFFERS):
            outcomes = outcomes_of(store, "save", keys, buffers, time.monotonic() + _SAVE_S)
            if not (outcomes == Saved.REFUSED).any():
                break


def _as_float32(blocks: Blocks, dtype: str) -> NDArray[np.float32]:
    """Return numbers as float32: NumPy has no bfloat16, which is the upper half of a float32."""
    if dtype == "bfloat16":
        return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return blocks.view("<f4" if dtype == "float32" else "<f2").astype(np.float32)

"""One cache for several serving stacks: their common layout, and the self-test before they share.

Each stack writes blocks in the `CommonLayout`. Before a stack reads or writes a block, it computes
the keys and values of a probe prompt, and compares them with the reference: those that the first
stack stored.

    no reference stored     the stack stores its own as the reference
    within the tolerance    the stack uses the stored reference
    beyond the tolerance    the stack uses its own as the reference, and shares no blocks

The key of each block covers the reference. So stacks that disagree never read each other's blocks,
even if a store loses the reference.
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
from kvpager.storage.tiers.asking import found_in, outcomes_of
from kvpager.storage.tiers.layout import BlockLayout
from kvpager.storage.tiers.protocol import BlockStore, Loaded, Saved
from kvpager.storage.tiers.seals import Digest, namespace_secret
from kvpager.storage.tiers.urls import are_private

logger = logging.getLogger("kvpager")

PROBE_TOKENS = 512


class Difference(NamedTuple):
    """The relative difference between the keys and values of two stacks.

    Few operations come before the first layer. So its difference shows errors of positions, heads
    or layout, and little rounding. Later layers add the rounding of all layers before them.

    Attributes:
        first: the first layer: maximum over tokens.
        later: the other layers: root mean square over tokens, maximum over layers.
    """

    first: float
    later: float

    def is_within(self, other: Difference) -> bool:
        """Return True if both parts are at most those of `other`, and not NaN. O(1)."""
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
_OFFERS = 2  # a full store admits a block when it is offered for the second time

Blocks = NDArray[np.uint8]


class CommonLayout(NamedTuple):
    """The layout of a block that all stacks share.

    A block has, for each layer in the model's order, the keys and then the values. Both are
    [block_size, kv heads, head dim], with keys after the rotary embedding. A `BlockStorage` of mode
    "paged" has this layout.

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
        """Check and return a layout. O(layers). Raises: `ValueError` if stacks cannot share it."""
        size = arguments.block_size(block_size)
        if size > PROBE_TOKENS:
            raise ValueError(
                f"cross_stack: block_size={size}: expected at most {PROBE_TOKENS}, the tokens of "
                "the probe. Lower it."
            )
        if dtype not in TOLERANCES:
            raise ValueError(
                f"cross_stack: keys and values are {dtype}, expected {listed(TOLERANCES)}."
            )
        return cls(size, tuple((int(h), int(k), int(v)) for h, k, v in layers), dtype)

    @property
    def layout(self) -> BlockLayout:
        """The `BlockLayout` of these blocks: their name and size. O(layers)."""
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
        """The elements in the keys and in the values of each layer, in order. O(layers)."""
        dims = (dim for heads, *both in self.layers for dim in (heads * both[0], heads * both[1]))
        return [self.block_size * dim for dim in dims]

    def parts(self, blocks: Blocks) -> Iterator[NDArray[np.float32]]:
        """Yield the keys, then the values of each layer: float32 [tokens, heads * dim]. O(bytes).

        `blocks` is uint8 [n, bytes of a block].
        """
        numbers, start = _as_float32(blocks, self.dtype), 0
        for count in self.part_elements:
            part = numbers[:, start : start + count]
            yield part.reshape(-1, count // self.block_size)
            start += count

    def difference(self, ours: Blocks, theirs: Blocks) -> Difference:
        """Return the relative difference between our keys and values and theirs. O(bytes).

        The length of a token's difference vector is divided by the root mean square length of their
        vectors in that layer. A NaN or infinite input makes the result NaN or infinite.
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
    """Return the token ids of the probe, int32 [512], each from 3 to 66. O(tokens)."""
    steps = np.arange(PROBE_TOKENS, dtype=np.int64)
    return (3 + (steps * steps * 7 + steps // 8) % 64).astype(np.int32)


def check_shared(tiers: Sequence[str | BlockStore], model_id: str | None) -> None:
    """Raise `ValueError` unless other stacks can read the stores and know the model. O(tiers)."""
    if are_private(tiers):
        raise ValueError(
            "cross_stack: no other process reads the tiers. Add a store that both stacks use, such "
            'as "valkey://cache:6379".'
        )
    if model_id is None:
        raise ValueError("cross_stack: stacks find a model by its name. Pass model_id=.")


def rope_obstacle(config: Any) -> str | None:
    """Return why blocks of a model cannot be shared: keys depend on the prompt's length. O(1).

    None if they do not. `config` is a configuration of transformers, which vLLM uses, too.
    """
    stated = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # Some models state one embedding for each kind of layer.
    for each in (stated, *(part for part in stated.values() if isinstance(part, dict))):
        kind = each.get("rope_type", each.get("type"))
        if kind in _LENGTH_DEPENDENT:
            return f"its rotary embedding ({kind}) depends on the length of a prompt"
    return None


def probe_request() -> list[int]:
    """Return the probe and one more token, because some stacks do not cache the last token.

    O(tokens).
    """
    return [*probe_prompt().tolist(), 3]


class Agreement(NamedTuple):
    """The result of the self-test.

    Attributes:
        model: the model's name in the keys of blocks. It covers the reference.
        difference: the difference from the reference; None if no store has kept it.
        is_shared: False if this stack does not share its blocks.
    """

    model: str
    difference: Difference | None
    is_shared: bool


def agree(
    stores: Sequence[BlockStore], common: CommonLayout, model_id: str, probe: Blocks
) -> Agreement:
    """Compare the blocks of `probe_prompt` with the reference of a model. O(bytes of the probe).

    If several stores have a reference, the last store's counts: most processes share that store.
    Logs the result, and a disagreement as a warning. Waits for stores, about a minute at most.
    `probe` is uint8 [512 / block_size, bytes of a block].
    """
    stores = [store for store in stores if not getattr(store, "is_private", False)]
    keys = _probe_keys(common, model_id)
    theirs = _stored(stores, keys, probe)
    if theirs is None:
        _save(stores, keys, probe)
        theirs = _stored(stores, keys, probe)  # perhaps of a stack that started at the same time
    difference = None if theirs is None else common.difference(probe, theirs)
    is_shared = difference is None or difference.is_within(TOLERANCES[common.dtype])
    reference = probe if theirs is None or not is_shared else theirs
    if is_shared:
        _save(stores, keys, reference)
    digest = blake2b(reference.tobytes(), digest_size=16, person=b"kvpager probe").hexdigest()
    agreement = Agreement(f"{model_id}; agrees with {digest}", difference, is_shared)
    _log(agreement, common, model_id)
    _warn_of_strangers(stores, common, model_id)
    return agreement


def _probe_keys(common: CommonLayout, model_id: str) -> list[bytes]:
    """Return the keys of the probe's blocks. No block of a prompt has one of them. O(tokens)."""
    secret = namespace_secret(Digest.master, None)
    context = KeyContext(f"{common.layout.text}; probe", model_id, secret)
    return content_keys(probe_prompt(), common.block_size, context)


def _warn_of_strangers(stores: Sequence[BlockStore], common: CommonLayout, model_id: str) -> None:
    """Warn if a store has probes of the model in another block size or dtype. O(stores)."""
    sizes = [2**power for power in range(PROBE_TOKENS.bit_length())]
    layouts = [
        common._replace(block_size=size, dtype=dtype) for dtype in TOLERANCES for size in sizes
    ]
    layouts.remove(common)
    first = {each: _probe_keys(each, model_id)[:1] for each in layouts}
    found = [each for each in layouts if any(found_in(store, first[each]) for store in stores)]
    if found:
        logger.warning(
            "kvpager: cross_stack: a store has blocks of model_id=%r with another layout: %s. This "
            "engine has %d tokens in %s, and shares nothing with those stacks. Set the same block "
            "size (vLLM: block_size * blocks_per_chunk) and dtype on all sides.",
            model_id, ", ".join(f"{each.block_size} tokens in {each.dtype}" for each in found),
            common.block_size, common.dtype,
        )  # fmt: skip


def _log(agreement: Agreement, common: CommonLayout, model_id: str) -> None:
    blocks = f"blocks of {common.block_size} tokens of model_id={model_id!r}"
    if agreement.difference is None:
        logger.warning(
            "kvpager: cross_stack: no store kept the probe, so other stacks may not find "
            "the %s. Check that the stores answer and have room for %d blocks, and restart.",
            blocks, PROBE_TOKENS // common.block_size,
        )  # fmt: skip
        return
    found = f"{_shown(agreement.difference)}, at most {_shown(TOLERANCES[common.dtype])}"
    if agreement.is_shared:
        logger.info("kvpager: %s are shared with other stacks (differences: %s)", blocks, found)
    else:
        logger.warning(
            "kvpager: cross_stack is off: keys and values of the probe differ from those of "
            "another stack (first and later layers: %s). Check weights, rotary embedding and "
            "layout. The %s are not shared.",
            found, blocks,
        )  # fmt: skip


def _shown(difference: Difference) -> str:
    return " and ".join(f"{part:.2g}" for part in difference)


def _stored(stores: Sequence[BlockStore], keys: list[bytes], like: Blocks) -> Blocks | None:
    """Return the blocks from the last store that has all of them; None if no store has."""
    for store in reversed(stores):
        found = np.empty_like(like)
        deadline = time.monotonic() + _LOAD_S
        into = [memoryview(block) for block in found]
        outcomes = outcomes_of(store, "load", keys, into, deadline)
        if (outcomes == Loaded.HIT).all():
            return found
    return None


def _save(stores: Sequence[BlockStore], keys: list[bytes], blocks: Blocks) -> None:
    """Offer blocks to all stores. A store that has a block keeps its own."""
    buffers = [memoryview(block) for block in blocks]
    for store in stores:
        for _ in range(_OFFERS):
            outcomes = outcomes_of(store, "save", keys, buffers, time.monotonic() + _SAVE_S)
            if not (outcomes == Saved.REFUSED).any():
                break


def _as_float32(blocks: Blocks, dtype: str) -> NDArray[np.float32]:
    """Return elements as float32. NumPy has no bfloat16, the upper half of a float32."""
    if dtype == "bfloat16":
        return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return blocks.view("<f4" if dtype == "float32" else "<f2").astype(np.float32)

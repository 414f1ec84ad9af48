"""The bytes of the blocks: one tensor per tier, block after block.

    tier    [ block 0 ][ block 1 ][ block 2 ] ...                           one tensor
    block   [ layer 0: key | value ][ layer 1: key | value ] ...            one run of bytes
    key     [ block_size, kv_heads, head_dim ]       value  [ block_size, kv_heads, value_head_dim ]

With equal sizes this is exactly `[blocks, layers, 2, block_size, kv_heads, head_dim]`. Because a
block is one run through all layers, copy-on-write is one memory copy, a swap one DMA and a remote
put one buffer; layer-first storage needs two per layer. `BlockStorage` knows nothing of
`BlockManager`: it holds tensors and carries out plans, whoever made them.

Keys and values may be stored in eight bits (`kv_cache_dtype`), with one scale per token and head.
The scales lie inside the block, so whatever moves a block moves its scales too. The tier is then a
tensor of bytes. Every part starts at a multiple of 16 bytes, after 0 to 15 unused bytes:

    layer   key | value | key scales | value scales
    key scales, value scales    float32 [ block_size, kv_heads ]

`kvpager.kernels.quantisation` says what a stored number and its scale mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Sized
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvpager import _validate as arguments
from kvpager._text import counted
from kvpager.kernels.quantisation import KV_CACHE_DTYPES, SCALE_DTYPE
from kvpager.ops import copy_blocks
from kvpager.plans import Int32, Plan, Tier
from kvpager.storage import streams
from kvpager.storage.memory import allocate

LayerCache = tuple[Tensor, Tensor]
LayerScales = tuple[Tensor, Tensor]
KVCacheDtype = Literal["int8", "fp8_e4m3"]

# What the widest loads of GPUs and CPUs take, and every dtype's own alignment divides.
PART_ALIGNMENT_BYTES = 16


class LayerShape(NamedTuple):
    """What one layer keeps per token: a key and a value for each kv head."""

    num_kv_heads: int
    head_dim: int
    value_head_dim: int

    @property
    def elements_per_token(self) -> int:
        """Numbers per token: key and value of all heads. O(1)."""
        return self.num_kv_heads * (self.head_dim + self.value_head_dim)


class _Part(NamedTuple):
    """One tensor of a layer: where it lies in a block, in elements of the tier."""

    start: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]  # of one block

    def view(self, tier: Tensor) -> Tensor:
        """The part of every block: [blocks, *shape]. O(1)."""
        return tier[:, self.start : self.end].view(self.dtype).view(-1, *self.shape)


class BlockStorage:
    """Block-first key and value tensors for the layers of one group on one device.

    `layers` may differ in heads and head sizes. `num_host_blocks` more blocks are kept in host
    memory to swap to, page-locked when `device` is a GPU; `pinned` page-locks the device blocks of
    a CPU, for a storage that a GPU's one swaps to. Errors of the allocation itself
    (`torch.OutOfMemoryError`, `RuntimeError`) are torch's.

    Keys and values are stored as `dtype`, or in eight bits with `kv_cache_dtype` "int8" or
    "fp8_e4m3". Then `dtype` is the dtype of the maths, and kernels need `scales` beside `layer`.

    Memory is not zeroed: pages never written cost nothing on a CPU (see `memory`), and no kernel
    reads a slot that was never written.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        layers: Sequence[LayerShape | tuple[int, int, int]],
        *,
        dtype: torch.dtype,
        kv_cache_dtype: KVCacheDtype | None = None,
        device: torch.device | str = "cpu",
        num_host_blocks: int = 0,
        pinned: bool = False,
    ) -> None:
        """Allocate the blocks. O(1) on a CPU, O(bytes) if memory is page-locked.

        Raises:
            ValueError: a size is not positive, `block_size` is not a power of two, or
                `kv_cache_dtype` is unknown.
            TypeError: `dtype` is not a floating dtype of at least 16 bits, or `layers` is a single
                `LayerShape`.
        """
        self._block_size = arguments.block_size(block_size)
        self._layers = _layer_shapes(layers)
        self._dtype, self._kv_cache_dtype = _dtypes(dtype, kv_cache_dtype)
        num_blocks = arguments.count("num_blocks", num_blocks, at_least=1)
        num_host_blocks = arguments.count("num_host_blocks", num_host_blocks)
        arguments.flag("pinned", pinned)
        _, run = self._layout(self._layers)
        stored = dtype if kv_cache_dtype is None else torch.uint8
        # Made in inference mode, the storage could never be written outside of it.
        with torch.inference_mode(False):
            self._device_tier = allocate(num_blocks, run, stored, device, pinned=pinned)
            swaps = self._device_tier.is_cuda and num_host_blocks > 0
            self._host_tier = allocate(num_host_blocks, run, stored, "cpu", pinned=swaps)
            self._views = self._layer_views(self._layers, self._device_tier)
        self._pinned = pinned, swaps
        self._order = streams.StreamOrder(self._device_tier)
        self._host_reads = streams.HostReads()

    def __repr__(self) -> str:
        stored = "" if self._kv_cache_dtype is None else f" as {self._kv_cache_dtype}"
        return (
            f"<BlockStorage: {counted(self.num_blocks, 'block')} of {self.block_bytes} bytes, "
            f"{counted(len(self._layers), 'layer')} of {self.dtype}{stored} on {self.device}>"
        )

    @staticmethod
    def bytes_of_a_block(
        block_size: int,
        layers: Sequence[LayerShape | tuple[int, int, int]],
        *,
        dtype: torch.dtype,
        kv_cache_dtype: KVCacheDtype | None = None,
    ) -> int:
        """`block_bytes` of the storage that these arguments would make. O(layers)."""
        dtype, kv_cache_dtype = _dtypes(dtype, kv_cache_dtype)
        _, elements = _layout(
            arguments.block_size(block_size), _layer_shapes(layers), dtype, kv_cache_dtype
        )
        return elements * (dtype if kv_cache_dtype is None else torch.uint8).itemsize

    @property
    def num_blocks(self) -> int:
        """Blocks on the device."""
        return self._device_tier.shape[0]

    @property
    def num_host_blocks(self) -> int:
        """Blocks in host memory."""
        return self._host_tier.shape[0]

    @property
    def block_size(self) -> int:
        """Token slots per block."""
        return self._block_size

    @property
    def layers(self) -> tuple[LayerShape, ...]:
        """The layers' shapes, in order."""
        return self._layers

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of keys and values in the maths, and in memory unless `kv_cache_dtype` is set."""
        return self._dtype

    @property
    def kv_cache_dtype(self) -> KVCacheDtype | None:
        """The eight bits that keys and values are stored in; None where they are of `dtype`."""
        return self._kv_cache_dtype

    @property
    def device(self) -> torch.device:
        """Where the device blocks are."""
        return self._device_tier.device

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, all layers."""
        return self._device_tier.shape[1] * self._device_tier.element_size()

    @property
    def nbytes(self) -> int:
        """Bytes of all device blocks."""
        return self.num_blocks * self.block_bytes

    @property
    def host_nbytes(self) -> int:
        """Bytes of all host blocks."""
        return self.num_host_blocks * self.block_bytes

    def tier(self, tier: Tier = "device") -> Tensor:
        """A tier's whole tensor [blocks, elements per block], to move bytes by hand. O(1).

        Its dtype is `dtype`, or uint8 with a `kv_cache_dtype`, since a block then holds several
        dtypes. `grow` replaces the device tier: call this again. Waits until copies out of host
        memory have ended.
        """
        if tier not in ("device", "host"):
            raise ValueError(f'tier {tier!r}: expected "device" or "host"')
        if tier == "host":
            self._host_reads.wait()
            return self._host_tier
        self._order.enter()
        return self._device_tier

    def layer(self, index: int) -> LayerCache:
        """A layer's key and value cache: views [blocks, block_size, kv_heads, head_dim]. O(1).

        Writing to them writes to the storage. One block's slots are contiguous, blocks lie
        `block_bytes` apart (so `.view(-1, ...)` over blocks is not possible). After `grow` they
        are other views: ask again. `IndexError` if there is no such layer.
        """
        key, value = self._layer(index)[:2]
        return key, value

    def scales(self, index: int) -> LayerScales | None:
        """A layer's key and value scales: float32 views [blocks, block_size, kv_heads]. O(1).

        None unless the storage has a `kv_cache_dtype`. Otherwise as `layer`.
        """
        scales = self._layer(index)[2:]
        return (scales[0], scales[1]) if scales else None

    def _layer(self, index: int) -> list[Tensor]:
        if not 0 <= index < len(self._layers):
            raise IndexError(f"layer {index} does not exist; the storage has {len(self._layers)}")
        self._order.enter()
        return self._views[index]

    def copy(self, copies: Int32) -> None:
        """Copy device blocks for pairs (source, destination), int32 [n, 2]. O(n * block_bytes).

        What `Step.copies` asks for, before the step's tokens are written. All reads happen before
        all writes. A pair with a negative entry is skipped. `ValueError` for a block that does
        not exist.
        """
        if len(copies) == 0:
            return
        copies = _as_copies(copies)
        _check_copies(copies, self.num_blocks, self.num_blocks, lowest=-1)
        self._order.enter()
        # torch.tensor copies: arrays of a plan may be read-only, which torch cannot share.
        copy_blocks(self._device_tier, torch.tensor(copies, device=self.device))

    def apply(self, plan: Plan) -> None:
        """Carry out a plan: move blocks between device and host. O(n * block_bytes).

        A copy within one tier reads everything before it writes. On a GPU the copies run in order
        on the current stream, and this call waits for copies to the host. A copy out of the host
        tier may still be under way afterwards: what writes to that tier next by way of this
        storage waits for it. `ValueError` for a block that does not exist.
        """
        if not isinstance(plan, Plan):
            kind = type(plan).__name__
            raise TypeError(f"expected a Plan, got {kind}; for a step, use copy(step.copies)")
        source, destination = self.tier(plan.source), self.tier(plan.destination)
        if len(plan) == 0:
            return
        copies = _as_copies(plan.copies)
        _check_copies(copies, len(source), len(destination), lowest=0)
        if plan.source == plan.destination:
            copy_blocks(source, torch.tensor(copies, device=source.device))
            return
        event = streams.copy_across(source, destination, copies)
        if event is not None:
            self._host_reads.note(event)

    def copy_from(self, other: BlockStorage, copies: Int32) -> torch.cuda.Event | None:
        """Copy another storage's blocks for pairs (theirs, ours), int32 [n, 2]. O(n * block_bytes).

        Between devices, and to and from storages in host memory. Waits for copies to the host. A
        copy out of host memory may be under way when this returns: the returned event is its end,
        and the caller keeps their blocks from being written before. None if the copy is done, or
        if later work on the device runs after it.
        `ValueError` for a block that does not exist, or where the layers or dtypes differ.
        """
        if (self.layers, self.dtype, self.kv_cache_dtype, self.block_size) != (
            other.layers, other.dtype, other.kv_cache_dtype, other.block_size
        ):  # fmt: skip
            raise ValueError(f"{other!r} keeps other blocks than {self!r}")
        copies = _as_copies(copies)
        _check_copies(copies, other.num_blocks, self.num_blocks, lowest=0)
        if not len(copies):
            return None
        return streams.copy_across(other.tier(), self.tier(), copies)

    def grow(self, num_blocks: int) -> None:
        """Raise the device tier to `num_blocks`, keeping every byte. O(nbytes).

        Old and new tensor exist side by side for a moment. Views and tensors handed out before
        still show the old storage. On a GPU the copy runs after all writes that are queued on
        any stream, and before all work that is queued later. `ValueError` if that is fewer blocks
        than now; when memory does not suffice, torch raises and nothing has changed.
        """
        self._resize(arguments.count("num_blocks", num_blocks, at_least=self.num_blocks))

    def shrink(self, num_blocks: int) -> None:
        """Lower the device tier to `num_blocks`, keeping the bytes of those. O(nbytes).

        `apply` the plan of `BlockManager.shrink` first. Otherwise as `grow`.
        """
        self._resize(arguments.count("num_blocks", num_blocks, at_least=1, at_most=self.num_blocks))

    def _resize(self, num_blocks: int) -> None:
        if num_blocks == self.num_blocks:
            return
        kept = min(num_blocks, self.num_blocks)
        with torch.inference_mode(False):
            other = self._new_device_tier(num_blocks, self._device_tier.shape[1])
            other[:kept].copy_(self._device_tier[:kept])
            self._replace(self._layers, other, self._host_tier)

    def keep_layers(self, count: int) -> None:
        """Drop all layers but the first `count`, and the memory they took. O(nbytes).

        Views handed out before still show the old storage. `ValueError` unless
        `1 <= count <= len(layers)`; when memory does not suffice for the copy, torch raises and
        nothing has changed.
        """
        if not 1 <= count <= len(self._layers):
            raise ValueError(f"count {count}: expected 1 to {len(self._layers)}, the layers there")
        if count == len(self._layers):
            return
        _, run = self._layout(self._layers[:count])
        with torch.inference_mode(False):
            # A block's layers lie in order, so the first ones are the front of its run.
            device_tier = self._new_device_tier(self.num_blocks, run)
            device_tier.copy_(self._device_tier[:, :run])
            host_tier = allocate(
                self.num_host_blocks, run, self._host_tier.dtype, "cpu", pinned=self._pinned[1]
            )
            host_tier.copy_(self._host_tier[:, :run])
            self._host_reads.wait()  # the old host tier goes
            self._replace(self._layers[:count], device_tier, host_tier)

    def _new_device_tier(self, num_blocks: int, run: int) -> Tensor:
        """Return other memory of the device tier's kind, which the current stream may fill."""
        self._order.enter()
        tier = self._device_tier
        return allocate(num_blocks, run, tier.dtype, tier.device, pinned=self._pinned[0])

    def _replace(self, layers: tuple[LayerShape, ...], device: Tensor, host: Tensor) -> None:
        views = self._layer_views(layers, device)
        self._order.replace(device)
        # At once: an interrupt must not leave views of memory that is gone.
        self._layers, self._device_tier, self._host_tier, self._views = layers, device, host, views

    def _layout(self, layers: Sequence[LayerShape]) -> tuple[list[list[_Part]], int]:
        return _layout(self._block_size, layers, self._dtype, self._kv_cache_dtype)

    def _layer_views(self, layers: tuple[LayerShape, ...], device: Tensor) -> list[list[Tensor]]:
        layout, _ = self._layout(layers)
        return [[part.view(device) for part in parts] for parts in layout]


def _layout(
    block_size: int,
    layers: Sequence[LayerShape],
    dtype: torch.dtype,
    kv_cache_dtype: KVCacheDtype | None,
) -> tuple[list[list[_Part]], int]:
    """Every layer's parts, in order, and the elements of a block."""
    stored = dtype if kv_cache_dtype is None else KV_CACHE_DTYPES[kv_cache_dtype]
    # Elements of the tier: bytes where it is quantised, and then aligned.
    unit, alignment = (dtype.itemsize, 1) if kv_cache_dtype is None else (1, PART_ALIGNMENT_BYTES)
    layout, start = [], 0
    for heads, key_dim, value_dim in layers:
        kinds: list[tuple[torch.dtype, tuple[int, ...]]]
        kinds = [(stored, (block_size, heads, key_dim)), (stored, (block_size, heads, value_dim))]
        kinds += [] if kv_cache_dtype is None else [(SCALE_DTYPE, (block_size, heads))] * 2
        parts = []
        for part_dtype, shape in kinds:
            end = start + math.prod(shape) * part_dtype.itemsize // unit
            parts.append(_Part(start, end, part_dtype, shape))
            start = -(-end // alignment) * alignment
        layout.append(parts)
    return layout, start


def _as_copies(copies: Int32) -> Int32:
    array = np.asarray(copies)
    if array.dtype.kind not in "iu":
        raise TypeError(f"copies of dtype {array.dtype}: expected int32 [n, 2]")
    return array


def _check_copies(copies: Int32, num_sources: int, num_destinations: int, lowest: int) -> None:
    """`ValueError` unless `copies` is [n, 2] and names existing blocks. O(n)."""
    if copies.ndim != 2 or copies.shape[1] != 2:
        raise ValueError(f"copies has shape {list(copies.shape)}; pass int32 [n, 2]")
    for column, name, bound in ((0, "source", num_sources), (1, "destination", num_destinations)):
        blocks = copies[:, column]
        wrong = blocks[(blocks < lowest) | (blocks >= bound)]
        if len(wrong):
            raise ValueError(
                f"{name} block {wrong[0]} does not exist; pass {lowest} to {bound - 1}"
                + (" (-1 skips the pair)" if lowest < 0 else "")
            )


def _dtypes(
    dtype: torch.dtype, kv_cache_dtype: KVCacheDtype | None
) -> tuple[torch.dtype, KVCacheDtype | None]:
    """Both, checked."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype {dtype!r}: expected a torch.dtype, such as torch.float32")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype is {dtype}; pass a floating dtype such as torch.bfloat16")
    if dtype.itemsize < 2:
        raise TypeError(
            f"dtype is {dtype}, which has no maths; store it with kv_cache_dtype instead"
        )
    if kv_cache_dtype is not None and kv_cache_dtype not in KV_CACHE_DTYPES:
        raise ValueError(
            f"kv_cache_dtype={kv_cache_dtype!r}: must be None or one of {list(KV_CACHE_DTYPES)}"
        )
    return dtype, kv_cache_dtype


def _layer_shapes(layers: Sequence[LayerShape | tuple[int, int, int]]) -> tuple[LayerShape, ...]:
    shapes = []
    for index, layer in enumerate(layers):
        if not isinstance(layer, Sized):
            raise TypeError(
                f"layers[{index}] {layer!r}: expected a LayerShape; pass a list with one per layer"
            )
        if len(layer) != len(LayerShape._fields):
            raise ValueError(f"layers[{index}] {layer!r}: expected {LayerShape._fields}")
        sizes = (
            arguments.count(f"layers[{index}].{name}", size, at_least=1)
            for name, size in zip(LayerShape._fields, layer, strict=True)
        )
        shapes.append(LayerShape(*sizes))
    if not shapes:
        raise ValueError("layers is empty; pass a LayerShape for every layer")
    return tuple(shapes)

"""Storage of blocks: one tensor per tier, block after block.

    tier    [ block 0 ][ block 1 ][ block 2 ] ...                           one tensor
    block   [ layer 0: key | value ][ layer 1: key | value ] ...            one run of bytes
    key     [ block_size, kv_heads, head_dim ]       value  [ block_size, kv_heads, value_head_dim ]

If all sizes are equal this is `[blocks, layers, 2, block_size, kv_heads, head_dim]`. A block is one
run of memory through all layers. So copy-on-write is one memory copy and a swap one DMA; a layout
that stores one layer after the other needs two of each per layer. `BlockStorage` does not know
`BlockManager`: it holds tensors and carries out plans of any origin.

The modes "virtual" and "reserved" keep the tokens of a block one after the other, each with all its
layers: `[blocks, block_size, layers, 2, kv_heads, head_dim]`. So a layer of consecutive blocks is
one strided tensor (`open_rows`).

Keys and values may be stored in eight bits (`kv_cache_dtype`), with one scale per token and head.
The scales lie inside the block, so whatever moves a block moves its scales too. The tier is then a
tensor of bytes. Every part starts at a multiple of 16 bytes, after 0 to 15 unused bytes:

    layer   key | value | key scales | value scales
    key scales, value scales    float32 [ block_size, kv_heads ]

`kvpager.kernels.quantisation` defines stored numbers and scales.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvpager import _validate as arguments
from kvpager._text import counted, listed
from kvpager.kernels.quantisation import KV_CACHE_DTYPES
from kvpager.modes import ModeName, mode_named
from kvpager.modes.protocol import Memory, Rows, layer_caches
from kvpager.ops import LayerCaches, copy_blocks
from kvpager.plans import CopyPlan, Int32, Tier
from kvpager.storage import streams
from kvpager.storage.layout import KVCacheDtype, StorageLayout, storage_layout
from kvpager.storage.memory import host_pages

LayerCache = tuple[Tensor, Tensor]
LayerScales = tuple[Tensor, Tensor]


class LayerShape(NamedTuple):
    """Shape of a layer's KV per token: a key and a value for each kv head."""

    num_kv_heads: int
    head_dim: int
    value_head_dim: int

    @property
    def elements_per_token(self) -> int:
        """Elements per token: key and value of all heads. O(1)."""
        return self.num_kv_heads * (self.head_dim + self.value_head_dim)


class BlockStorage:
    """Block-first key and value tensors for the layers of one group on one device.

    `layers` may differ in heads and head sizes. `num_host_blocks` adds blocks in host memory for
    swapping, page-locked if `device` is a GPU. `pinned` page-locks the blocks of a storage with
    `device="cpu"`, so that a GPU storage copies to and from it faster (`copy_from`). If allocation
    fails, torch raises (`torch.OutOfMemoryError`, `RuntimeError`).

    Keys and values are stored as `dtype`, or in eight bits with `kv_cache_dtype` "int8" or
    "fp8_e4m3". In that case `dtype` is the dtype of queries and outputs, and kernels need `scales`
    beside `layer`.

    `mode` is how rows find their blocks: "paged" by block tables, which all kernels read. "virtual"
    and "reserved" also offer rows as runs of memory (`open_rows`); see `kvpager.modes`. On a GPU,
    "virtual" needs the extra `kvpager[virtual]`, and blocks that fill at least 7/8 of their
    pages of 2 MiB. The `ValueError` for other blocks names a `block_size` that does.

    Memory is not zeroed. On a CPU, pages never written take no memory (see `memory`). Numbers in
    slots that no query sees, NaNs included, never reach the output of a kernel.

    Attributes:
        block_size: token slots per block.
        layers: the layers' shapes, in order.
        dtype: of keys and values in the maths, and in memory unless `kv_cache_dtype` is set.
        kv_cache_dtype: the eight-bit format of keys and values; None if they are stored as `dtype`.
        mode: "paged", "virtual" or "reserved".
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
        mode: ModeName = "paged",
    ) -> None:
        """Allocate the blocks. O(1) on a CPU, O(bytes) if memory is page-locked.

        Raises:
            ValueError: a size is not positive, `block_size` is not a power of two,
                `kv_cache_dtype` or `mode` is unknown, or the mode does not support the device.
            TypeError: `dtype` is not a floating dtype of at least 16 bits, or `layers` is a single
                `LayerShape`.
        """
        self.block_size = arguments.block_size(block_size)
        self.layers = _layer_shapes(layers)
        self.dtype, self.kv_cache_dtype = dtype, kv_cache_dtype
        stored = _stored_dtype(dtype, kv_cache_dtype)
        num_blocks = arguments.count("num_blocks", num_blocks, at_least=1)
        num_host_blocks = arguments.count("num_host_blocks", num_host_blocks)
        arguments.flag("pinned", pinned)
        place = torch.device(device)
        self.mode, self._mode = mode, mode_named(mode, place)
        layout = self._layout(self.layers)
        # Made in inference mode, the storage could never be written outside of it.
        with torch.inference_mode(False):
            self._memory = self._mode.allocate(num_blocks, layout, stored, place, pinned)
            swaps = self._device_tier.is_cuda and num_host_blocks > 0
            self._host_tier = host_pages(num_host_blocks, layout.num_elements, stored, pinned=swaps)
            self._caches = self._layer_caches(self.layers, self._device_tier)
        self._pinned = pinned, swaps
        self._order = streams.StreamOrder(self._device_tier)
        self._host_reads = streams.HostReads()

    def __repr__(self) -> str:
        stored = "" if self.kv_cache_dtype is None else f" as {self.kv_cache_dtype}"
        return (
            f"<BlockStorage: {counted(self.num_blocks, 'block')} of {self.block_bytes} bytes, "
            f"{counted(len(self.layers), 'layer')} of {self.dtype}{stored} on {self.device}, "
            f"{self.mode}>"
        )

    @staticmethod
    def bytes_of_a_block(
        block_size: int,
        layers: Sequence[LayerShape | tuple[int, int, int]],
        *,
        dtype: torch.dtype,
        kv_cache_dtype: KVCacheDtype | None = None,
        mode: ModeName = "paged",
        device: torch.device | str = "cpu",
    ) -> int:
        """Return `block_bytes` of a storage with these arguments. O(layers)."""
        stored, shapes = _stored_dtype(dtype, kv_cache_dtype), _layer_shapes(layers)
        block_size, order = arguments.block_size(block_size), mode_named(mode, device).token_first
        layout = storage_layout(block_size, shapes, dtype, kv_cache_dtype, token_first=order)
        return layout.num_elements * stored.itemsize

    @property
    def _device_tier(self) -> Tensor:
        return self._memory.tier

    @property
    def num_blocks(self) -> int:
        """Blocks on the device."""
        return self._device_tier.shape[0]

    @property
    def num_host_blocks(self) -> int:
        """Blocks in host memory."""
        return self._host_tier.shape[0]

    @property
    def device(self) -> torch.device:
        """Device of the device blocks."""
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
        """Return a tier's tensor [blocks, elements per block], for custom copies. O(1).

        Its dtype is `dtype`, or uint8 with a `kv_cache_dtype`, since a block then holds several
        dtypes. `grow` replaces the device tier: call this again. Waits until copies out of host
        memory have ended.
        """
        if tier not in ("device", "host"):
            raise ValueError(f'tier={tier!r}: expected "device" or "host"')
        if tier == "host":
            self._host_reads.wait()
            return self._host_tier
        self._order.enter()
        return self._device_tier

    def layer(self, index: int) -> LayerCache:
        """Return a layer's key and value cache: [blocks, block_size, kv_heads, head_dim]. O(1).

        The caches are views: writing to them writes to the storage. The slots of a block are
        contiguous, and blocks are `block_bytes` apart, so `.view(-1, ...)` over blocks fails.
        `grow` replaces the views: call this again. Raises: `IndexError` for an unknown layer.
        """
        caches = self.caches(index)
        return caches.key, caches.value

    def scales(self, index: int) -> LayerScales | None:
        """Return a layer's key and value scales: float32 [blocks, block_size, kv_heads]. O(1).

        Returns None without a `kv_cache_dtype`. Views as in `layer`.
        """
        return self.caches(index).scales

    def caches(self, index: int) -> LayerCaches:
        """Return what `layer` and `scales` return, as `ops.append` and `ops.attend` take it. O(1).

        `grow` replaces it: call this again. Raises: `IndexError` for an unknown layer.
        """
        if not 0 <= index < len(self.layers):
            raise IndexError(f"layer={index}: expected 0 to {len(self.layers) - 1}")
        self._order.enter()
        return self._caches[index]

    def open_rows(self, num_rows: int, max_length: int) -> Rows:
        """Return rows of up to `max_length` tokens over the device blocks. O(rows * blocks).

        Open rows again after `grow`, `shrink` and `keep_layers`, like the views of `layer`. Rows of
        "virtual" stay valid after `grow` and `shrink`.
        Raises: `ValueError` if the mode has no rows, or too few blocks or mappings for them;
        `OSError` if the system lacks addresses for them.
        """
        num_rows = arguments.count("num_rows", num_rows, at_least=1)
        max_length = arguments.count("max_length", max_length, at_least=1)
        num_blocks = -(-max_length // self.block_size)
        layout = self._layout(self.layers)
        return self._mode.open_rows(self._memory, layout, num_rows, num_blocks)

    def copy(self, copies: Int32) -> None:
        """Copy device blocks for pairs (source, destination), int32 [n, 2]. O(n * block_bytes).

        Pass `AppendPlan.copies` before writing the step's tokens. All reads happen before all
        writes. Pairs with a negative entry are skipped. Raises: `ValueError` for an unknown block.
        """
        if len(copies) == 0:
            return
        copies = _as_copies(copies)
        _check_copies(copies, self.num_blocks, self.num_blocks, lowest=-1)
        self._order.enter()
        # torch.tensor copies: torch cannot share the read-only arrays of a plan.
        copy_blocks(self._device_tier, torch.tensor(copies, device=self.device))

    def apply(self, plan: CopyPlan) -> None:
        """Carry out a plan: copy blocks between device and host. O(n * block_bytes).

        A copy within a tier reads all blocks before it writes. On a GPU the copies run in order on
        the current stream. This call waits for copies to the host. A copy out of the host tier may
        still run afterwards: the next write to that tier through this storage waits for it.
        Raises: `ValueError` for an unknown block.
        """
        if not isinstance(plan, CopyPlan):
            fix = "For a step, call copy(step.copies)."
            raise TypeError(f"plan: expected a CopyPlan, got {type(plan).__name__}. {fix}")
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
        """Copy blocks of `other` for pairs (source in `other`, destination). O(n * block_bytes).

        `copies` is int32 [n, 2]. Either storage may be on any device or in host memory. This call
        waits for copies to the host. A copy out of host memory may still run afterwards. In that
        case this returns a CUDA event: do not overwrite the source blocks before it has occurred.
        Returns None if the copy has ended, or if later work on the device runs after it.
        Raises: `ValueError` for an unknown block, or different layers or dtypes.
        """
        if (self.layers, self.dtype, self.kv_cache_dtype, self.block_size, self.mode) != (
            other.layers, other.dtype, other.kv_cache_dtype, other.block_size, other.mode
        ):  # fmt: skip
            raise ValueError(
                f"other={other!r}: expected the layers, dtypes, block size and mode of {self!r}"
            )
        copies = _as_copies(copies)
        _check_copies(copies, other.num_blocks, self.num_blocks, lowest=0)
        if not len(copies):
            return None
        return streams.copy_across(other.tier(), self.tier(), copies)

    def grow(self, num_blocks: int) -> None:
        """Raise the device tier to `num_blocks` and keep the contents. O(nbytes).

        Old and new tensor exist at the same time during the copy. Views and tensors returned
        earlier still refer to the old tensor. With mode "virtual" nothing is copied, and earlier
        views show the same memory. On a GPU the copy runs after all writes queued on any
        stream, and before all work queued later. If memory is short, torch raises and the storage
        is unchanged. Raises: `ValueError` if `num_blocks` is below the current number.
        """
        self._resize(arguments.count("num_blocks", num_blocks, at_least=self.num_blocks))

    def shrink(self, num_blocks: int) -> None:
        """Lower the device tier to its first `num_blocks` blocks. O(nbytes).

        First `apply` the plan of `BlockManager.shrink`. Otherwise as `grow`.
        """
        self._resize(arguments.count("num_blocks", num_blocks, at_least=1, at_most=self.num_blocks))

    def _resize(self, num_blocks: int) -> None:
        if num_blocks == self.num_blocks:
            return
        self._order.enter()
        with torch.inference_mode(False):
            memory = self._mode.resized(self._memory, num_blocks, self._pinned[0])
            self._replace(self.layers, memory, self._host_tier)

    def keep_layers(self, count: int) -> None:
        """Drop all layers but the first `count`, and free their memory. O(nbytes).

        Views returned earlier still refer to the old tensor. If memory is short, torch raises and
        the storage is unchanged. Raises: `ValueError` unless `1 <= count <= len(layers)`.
        """
        if not 1 <= count <= len(self.layers):
            raise ValueError(
                f"count={count}: expected 1 to {len(self.layers)}, the number of layers"
            )
        if count == len(self.layers):
            return
        layers, dtype = self.layers[:count], self._host_tier.dtype
        layout, whole = self._layout(layers), self._layout(self.layers)
        with torch.inference_mode(False):
            self._order.enter()
            tier = self._device_tier
            memory = self._mode.allocate(
                self.num_blocks, layout, tier.dtype, tier.device, self._pinned[0]
            )
            host_tier = host_pages(
                self.num_host_blocks, layout.num_elements, dtype, pinned=self._pinned[1]
            )
            for new, old in ((memory.tier, tier), (host_tier, self._host_tier)):
                layout.runs(new).copy_(whole.runs(old)[..., : layout.run_elements])
            self._host_reads.wait()  # before the old host tier is freed
            self._replace(layers, memory, host_tier)

    def _replace(self, layers: tuple[LayerShape, ...], memory: Memory, host: Tensor) -> None:
        caches = self._layer_caches(layers, memory.tier)
        self._order.replace(memory.tier)
        # In one statement: an interrupt must not leave views of freed memory.
        state = layers, memory, host, caches
        self.layers, self._memory, self._host_tier, self._caches = state

    def _layout(self, layers: Sequence[LayerShape]) -> StorageLayout:
        return storage_layout(
            self.block_size, layers, self.dtype, self.kv_cache_dtype,
            token_first=self._mode.token_first,
        )  # fmt: skip

    def _layer_caches(self, layers: tuple[LayerShape, ...], device: Tensor) -> list[LayerCaches]:
        return [layer_caches(views) for views in self._layout(layers).views(device)]


def _as_copies(copies: Int32) -> Int32:
    array = np.asarray(copies)
    if array.dtype.kind not in "iu":
        raise TypeError(f"copies.dtype={array.dtype}: expected an integer dtype, such as int32")
    return array


def _check_copies(copies: Int32, num_sources: int, num_destinations: int, lowest: int) -> None:
    """Raise `ValueError` unless `copies` is [n, 2] and names existing blocks. O(n)."""
    if copies.ndim != 2 or copies.shape[1] != 2:
        raise ValueError(f"copies.shape={list(copies.shape)}: expected int32 [n, 2]")
    for column, name, bound in ((0, "source", num_sources), (1, "destination", num_destinations)):
        blocks = copies[:, column]
        wrong = blocks[(blocks < lowest) | (blocks >= bound)]
        if len(wrong):
            raise ValueError(
                f"{name} block {wrong[0]}: expected {lowest} to {bound - 1}"
                + (" (-1 skips the pair)" if lowest < 0 else "")
            )


def _stored_dtype(dtype: torch.dtype, kv_cache_dtype: KVCacheDtype | None) -> torch.dtype:
    """Check both dtypes; return that of the tiers."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype={dtype!r}: expected a torch.dtype, such as torch.float32")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype={dtype}: expected a floating dtype, such as torch.bfloat16")
    if dtype.itemsize < 2:
        raise TypeError(
            f"dtype={dtype}: expected at least 16 bits. Set kv_cache_dtype to store eight bits."
        )
    if kv_cache_dtype is not None and kv_cache_dtype not in KV_CACHE_DTYPES:
        raise ValueError(
            f"kv_cache_dtype={kv_cache_dtype!r}: expected one of {listed(KV_CACHE_DTYPES)} or None"
        )
    return dtype if kv_cache_dtype is None else torch.uint8


def _layer_shapes(layers: Sequence[LayerShape | tuple[int, int, int]]) -> tuple[LayerShape, ...]:
    shapes = []
    for index, layer in enumerate(layers):
        if not isinstance(layer, Sized):
            raise TypeError(
                f"layers[{index}]={layer!r}: expected a LayerShape. Pass a list with one per layer."
            )
        if len(layer) != len(LayerShape._fields):
            raise ValueError(f"layers[{index}]={layer!r}: expected {LayerShape._fields}")
        for name, size in zip(LayerShape._fields, layer, strict=True):
            arguments.count(f"layers[{index}].{name}", size, at_least=1)
        shapes.append(LayerShape(*map(int, layer)))
    if not shapes:
        raise ValueError("layers: expected at least one. Pass a LayerShape for every layer.")
    return tuple(shapes)

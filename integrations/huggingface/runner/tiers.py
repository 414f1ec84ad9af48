"""Open the tiers of an engine: stores for the blocks of one model in one layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from kvpager.blocks.manager import BlockManager
from kvpager.blocks.protocol import CacheManager
from kvpager.engine.config import EngineConfig
from kvpager.engine.core import EngineCore
from kvpager.errors import KVPagerError
from kvpager.integrations.huggingface.model_state.fingerprint import ModelWatch
from kvpager.integrations.huggingface.model_state.model_id import model_id
from kvpager.integrations.huggingface.runner.cross_stack import agreed_name
from kvpager.integrations.huggingface.runner.model_info import ModelInfo
from kvpager.scheduling.preemption import PreemptionCosts
from kvpager.storage.block_storage import BlockStorage
from kvpager.storage.keys import KeyContext
from kvpager.storage.staging import Staging
from kvpager.storage.tiers.layout import BlockLayout
from kvpager.storage.tiers.seals import Digest, namespace_secret
from kvpager.storage.tiers.tiering import Tiering
from kvpager.storage.tiers.urls import open_stores

_STAGING_BYTES, _STAGING_MIN = 1 << 30, 16


def refuse_tiers(model: Any, info: ModelInfo) -> None:
    """Raise `KVPagerError` for a model whose prefixes cannot continue from blocks alone. O(1)."""
    reason = None
    if info.has_state:
        reason = "it has recurrent layers, and blocks do not hold their state"
    elif info.is_encoder_decoder:
        reason = "its blocks depend on the encoder's input, which their keys do not cover"
    if reason is not None:
        raise no_tiers(model, reason)


def no_tiers(model: Any, reason: str) -> KVPagerError:
    """Return the error for a model that cannot use tiers. O(1)."""
    return KVPagerError(
        f"tiers: {type(model).__name__} cannot use them: {reason}. Leave tiers out."
    )


class ModelTiers(NamedTuple):
    """The tiers of an engine, and the model as it was when they were opened."""

    tiering: Tiering
    watch: ModelWatch
    version: int

    def refuse_change(self) -> None:
        """Raise `KVPagerError` if the model changed since its id was computed. O(weights)."""
        if self.watch.look().version != self.version:
            raise KVPagerError("tiers: the model changed while its engine was made. Make it again.")


def open_tiers(
    model: Any,
    info: ModelInfo,
    watch: ModelWatch | None,
    config: EngineConfig,
    storage: BlockStorage,
    manager: CacheManager,
    costs: PreemptionCosts | None,
) -> ModelTiers | None:
    """Open the tiers of an engine; return None if it has none. O(bytes of the weights).

    Raises: `KVPagerError` for a model that cannot be named or watched; otherwise as `open_stores`.
    """
    if not config.tiers:
        return None
    assert isinstance(manager, BlockManager)  # as `make_manager` made it
    assert watch is not None  # `EngineConfig._check_tiers`: no prefix_cache=False
    assert costs is not None  # `costs_of` measures them for tiers
    state = watch.look()
    if state.doubt is not None:
        raise KVPagerError(f"tiers: {type(model).__name__} shares no prefixes: {state.doubt}.")
    if storage.num_host_blocks:
        manager.host.lend_to(staging := Staging.of_host(storage))
    else:
        staging = buffer_for(storage, storage.num_blocks)
    tiering = tiering_of(model, info, config, costs, storage, manager, staging)
    return ModelTiers(tiering, watch, state.version)


def buffer_for(storage: BlockStorage, num_blocks: int | None) -> Staging:
    """Return staging of at most 1 GiB. `num_blocks` bounds the blocks of `storage`, unless None."""
    num_slots = max(_STAGING_BYTES // storage.block_bytes, _STAGING_MIN)
    return Staging(storage, num_slots if num_blocks is None else min(num_slots, num_blocks))


def tiering_of(
    model: Any,
    info: ModelInfo,
    config: EngineConfig,
    costs: PreemptionCosts,
    storage: BlockStorage,
    manager: BlockManager,
    staging: Staging,
    adapter_of: Callable[[str | None], str | None] = lambda lora: lora,
) -> Tiering:
    """Name the model, open the stores, and return what moves its blocks. O(bytes of the weights).

    `adapter_of` maps the `lora` of blocks in `manager` to the one in their content keys.
    Raises: as `model_id`, `agreed_name` and `open_stores`.
    """
    name = model_id(model) if config.model_id is None else config.model_id
    layout = layout_of(storage, info)
    master = Digest.master if config.seal is None else config.seal.master
    stores = open_stores(config.tiers, layout=layout, seal=config.seal, host=staging.store)
    if config.cross_stack:
        try:
            name = agreed_name(model, info, storage, stores, name)
        except BaseException:
            for store in stores:
                store.close()
            raise

    def context_of(namespace: str | None, lora: str | None) -> KeyContext:
        secret = namespace_secret(master, namespace)
        return KeyContext(layout.text, name, secret, adapter_of(lora))

    def recompute_s(num_blocks: int) -> float:
        num_tokens = num_blocks * storage.block_size
        return costs.recompute_s(num_tokens, num_tokens)

    return Tiering(manager, staging, stores, context_of, recompute_s=recompute_s)


def start_with_tiers(tiers: ModelTiers | None, begin: Callable[..., EngineCore]) -> EngineCore:
    """Return the engine that `begin` makes with `tiers`; close them if it fails.

    Raises: `KVPagerError` if the model changed meanwhile.
    """
    if tiers is None:
        return begin()
    try:
        core = begin(tiering=tiers.tiering)
    except BaseException:
        tiers.tiering.close()
        raise
    try:
        tiers.refuse_change()  # the engine notices each change from now on
    except BaseException:
        core.close()
        raise
    return core


def layout_of(storage: BlockStorage, info: ModelInfo) -> BlockLayout:
    """Return the layout of the blocks of a model in `storage`. O(layers * groups)."""
    groups = [
        (window, [layer.number for layer in info.layers if layer.group == group])
        for group, window in enumerate(info.windows)
    ]
    return BlockLayout.of(
        block_size=storage.block_size,
        layers=storage.layers,
        dtype=str(storage.dtype).removeprefix("torch."),
        kv_cache_dtype=storage.kv_cache_dtype,
        block_bytes=storage.block_bytes,
        groups=groups if any(info.windows) else (),
        token_first=storage.mode != "paged",
    )

"""Opens the stores below an engine's host memory, for its model and the layout of its rows."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpager.integrations.vllm.identity import chunk_layout, store_keys
from kvpager.integrations.vllm.interface import OffloadingConfig, get_current_vllm_config_or_none
from kvpager.integrations.vllm.lower_tiers import LowerTiers
from kvpager.storage.keys import KEY_BYTES
from kvpager.storage.tiers.agreement import CommonLayout
from kvpager.storage.tiers.urls import are_private, open_stores

logger = logging.getLogger("kvpager")


def current_model_config() -> Any:
    """Return the configuration of the model whose engine is being made. O(1).

    Raises: `ValueError` in vLLM's own connector, which does not tell the configuration.
    """
    vllm_config = get_current_vllm_config_or_none()
    if vllm_config is None:
        raise ValueError(
            'kv_connector: expected "KvpagerOffloadingConnector", as '
            "kvpager.integrations.vllm.offload(...) sets it"
        )
    return vllm_config.model_config


def open_lower_tiers(
    tiers: Sequence[str],
    rows: NDArray[np.uint8],
    config: OffloadingConfig,
    model_config: Any,
    *,
    model_id: str | None,
    arrangement: str,
) -> LowerTiers:
    """Open stores for the chunks of `rows`, uint8 [slots, bytes of a chunk].

    `arrangement` names how a row holds its blocks. O(bytes of the model) without `model_id`, if
    others read a store. Raises: as `chunk_layout` and `open_stores`.
    """
    if are_private(tiers):
        model_id = model_id or config.model.name
    elif os.environ.pop("PYTHONHASHSEED", None) is not None:
        # vLLM's hashes would begin with the seed; vLLM reads it soon after this.
        logger.warning("kvpager: PYTHONHASHSEED is ignored, so that processes share blocks.")
    layout = chunk_layout(config, model_config, model_id, rows.shape[1], arrangement)
    return LowerTiers(open_stores(tiers, layout=layout), rows, store_keys(layout))


def open_common_tiers(
    tiers: Sequence[str], rows: NDArray[np.uint8], common: CommonLayout
) -> LowerTiers:
    """Open stores for blocks that several stacks read, uint8 [slots, at least their bytes].

    They stay closed for chunks until the self-test has run. Keys of chunks begin with the key of
    their block. Raises: as `open_stores`.
    """
    layout = common.layout
    stores = open_stores(tiers, layout=layout)
    lower = LowerTiers(stores, rows[:, : layout.block_bytes], lambda key: key[:KEY_BYTES])
    lower.is_open = False
    return lower

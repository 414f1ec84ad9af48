"""Finds where vLLM stores each number of a block in a page, whatever its attention backend.

Backends pack the keys of a page for their instructions. So kvpager writes a block of known numbers
with vLLM's own code, and looks up the place of each number in the page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvpager.storage.tiers.agreement import CommonLayout

# Numbers up to 128 are exact in all dtypes of `CommonLayout`.
_DIGITS = 128

# Writes keys and values, [tokens, heads, dim] each, to slots of pages.
Write = Callable[[Tensor, Tensor, Tensor, Tensor], object]


class PageOrder(NamedTuple):
    """The place of each number in a page of one layer, int64.

    Attributes:
        keys: places of [tokens, heads, dim].
        values: the same.
    """

    keys: NDArray[np.int64]
    values: NDArray[np.int64]


def page_orders(
    vllm_config: Any, kv_cache_config: Any, pages: Mapping[str, Tensor], common: CommonLayout
) -> list[PageOrder]:
    """Return the order of each layer of the only group. O(numbers of a page * layers).

    `pages` has the pages of each layer, by the layer's name. Raises: `NotImplementedError` if a
    page of vLLM does not hold each number of a block exactly once.
    """
    [group] = kv_cache_config.kv_cache_groups
    context = vllm_config.compilation_config.static_forward_context
    orders = list[PageOrder]()
    for name, shape in zip(group.layer_names, common.layers, strict=True):
        layer, its_pages = context[name], pages[name]
        write = partial(layer.impl.do_kv_cache_update, layer)
        try:
            if len(its_pages) != kv_cache_config.num_blocks:
                raise ValueError("its blocks are divided into smaller pages")
            order = page_order(write, its_pages, vllm_config.cache_config.block_size, shape)
        except ValueError as error:
            raise NotImplementedError(f"cross_stack: {name}: {error}") from None
        # Layers that are alike share one order, which is larger than a page.
        is_like_last = bool(orders) and all(map(np.array_equal, order, orders[-1]))
        orders.append(orders[-1] if is_like_last else order)
    return orders


def page_order(
    write: Write, pages: Tensor, num_tokens: int, layer: tuple[int, int, int]
) -> PageOrder:
    """Return the order of a layer's pages. O(numbers).

    `layer` is (kv heads, head dim, value head dim). `write` writes to a new page with the strides
    of `pages`. Raises: `ValueError` if the page does not hold each number exactly once.
    """
    heads, key_dim, value_dim = layer
    num_keys, total = num_tokens * heads * key_dim, num_tokens * heads * (key_dim + value_dim)
    memory = torch.zeros(pages.stride(0), dtype=pages.dtype, device=pages.device)
    page = memory.as_strided((1, *pages.shape[1:]), (len(memory), *pages.stride()[1:]))
    slots = torch.arange(num_tokens, device=pages.device)
    found, is_used = np.zeros(len(memory), np.int64), np.ones(len(memory), bool)
    numbers, weight = np.arange(total), 1
    while weight < total:  # one digit of each number at a time
        digits = torch.from_numpy(numbers // weight % _DIGITS + 1).to(memory)
        key = digits[:num_keys].view(num_tokens, heads, key_dim)
        value = digits[num_keys:].view(num_tokens, heads, value_dim)
        memory.zero_()
        write(key, value, page, slots)
        read = memory.float().cpu().numpy().astype(np.int64)
        found += (read - 1) * weight
        is_used &= read > 0
        weight *= _DIGITS
    places = np.flatnonzero(is_used)
    if not np.array_equal(np.sort(found[places]), numbers):
        raise ValueError("its pages do not hold each number of a block exactly once")
    order = places[np.argsort(found[places])]
    return PageOrder(order[:num_keys], order[num_keys:])

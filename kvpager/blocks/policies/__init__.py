"""The eviction policies, by name.

`lru` evicts the least recently used block. `priority` ranks by the priority that `retain` set, then
by last use. `lifetime` follows the strategy with most recent hits: see `lifetime.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from kvpager import _validate as arguments
from kvpager._text import listed
from kvpager.blocks.policies.base import EvictionPolicy
from kvpager.blocks.policies.lifetime import Lifetime
from kvpager.blocks.policies.lru import LRU
from kvpager.blocks.policies.priority import Priority

POLICIES: dict[str, Callable[[int], EvictionPolicy]] = {
    "lru": LRU,
    "priority": Priority,
    "lifetime": Lifetime,
}


# A policy as users pass it: a name, or a function from a number of blocks to a policy.
Eviction = str | Callable[[int], EvictionPolicy]


def check_eviction(eviction: Eviction) -> Eviction:
    """Return `eviction`. O(1).

    Raises: `ValueError` for a name outside `POLICIES`; `TypeError` for another object.
    """
    if isinstance(eviction, str):
        make_policy(eviction, 1)
    elif not callable(eviction):
        raise TypeError(
            f"eviction={arguments.shown(eviction)}: expected a policy's name, or a function that "
            "makes a policy for a number of blocks"
        )
    return eviction


def chosen_policy(eviction: Eviction, num_blocks: int) -> EvictionPolicy:
    """Make the policy for a pool of `num_blocks` blocks. O(blocks)."""
    return make_policy(eviction, num_blocks) if isinstance(eviction, str) else eviction(num_blocks)


def make_policy(name: str, num_blocks: int) -> EvictionPolicy:
    """Make the policy called `name`. Raises `ValueError` for a name outside `POLICIES`."""
    if name not in POLICIES:
        raise ValueError(f"eviction={name!r}: expected one of {listed(POLICIES)}")
    return POLICIES[name](num_blocks)

"""The properties of a paged block manager, and the adapter through which the kit checks them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

PROPERTIES = {
    "reads_back": "a sequence reads back exactly what was written to it",
    "shared_not_written": "a block that another sequence holds is never written",
    "blocks_add_up": "free and held blocks add up to the pool; none is lost",
    "handed_out_once": "no block is handed out twice",
    "nothing_before_commit": "nothing is reusable before it was committed",
    "namespaces_isolated": "what one namespace wrote, no other namespace reuses",
    "refusal_changes_nothing": "a refused call changes nothing",
    "full_pool_refused": "what cannot fit is refused with out_of_blocks",
    "served_when_it_fits": "a valid call that fits is served",
    "double_free_refused": "a second free is refused and changes nothing",
    "stale_handle_refused": "a freed handle is refused and the call changes nothing",
    "fork_takes_no_block": "a fork takes no block",
    "check_passes": "the manager's own check finds nothing wrong",
}

# The method without which a property is not checked.
REQUIRED_METHODS = {
    "nothing_before_commit": "commit",
    "namespaces_isolated": "allocate_in",
    "fork_takes_no_block": "fork",
    "check_passes": "check",
}


class ManagerAdapter(Protocol):
    """The methods of a manager that the kit needs; handles may be of any type.

    Optional, used when present:

        commit(handle)                    the KV of all tokens is written: reusable now
        fork(handle) -> handle            a second sequence that shares every block
        copies(handle) -> [(src, dst)]    block copies that `allocate` or `fork` requires
        swap(handle, to) -> [(src, dst)]  to "host" or "device"; with `num_host_blocks: int`
        truncate(handle, length)          drop the tokens from `length` on
        allocate_in(tokens, namespace)    `allocate` in a namespace
        check()                           raises if the manager's state is inconsistent
        num_block_ids: int                bound of the block ids, if some ids are reserved
    """

    num_blocks: int
    block_size: int
    out_of_blocks: type[Exception] | tuple[type[Exception], ...]

    def allocate(self, tokens: list[int]) -> Any:
        """Begin a sequence of `tokens`; their KV is written right after."""

    def num_cached_tokens(self, handle: Any) -> int:
        """Return the number of cached leading tokens."""

    def append(self, handle: Any, tokens: list[int]) -> Iterable[tuple[int, int]]:
        """Make room for `tokens`; return the blocks to copy before the writes."""

    def free(self, handle: Any) -> None:
        """End the sequence."""

    def block_table(self, handle: Any) -> Iterable[int]:
        """Return the sequence's blocks, in order."""

    def num_free_blocks(self) -> int:
        """Return the number of free and evictable blocks."""


def is_supported(name: str, adapter: object) -> bool:
    """Return True if the adapter has the method that the property needs. O(1)."""
    return name not in REQUIRED_METHODS or hasattr(adapter, REQUIRED_METHODS[name])


def check_adapter(adapter: Any) -> None:
    """Validate an adapter. O(1).

    Raises: `TypeError` for a missing member or one of the wrong kind.
    """
    for name in ("allocate", "num_cached_tokens", "append", "free", "block_table"):
        if not callable(getattr(adapter, name, None)):
            raise TypeError(f"adapter.{name}: expected a method")
    for name in ("num_blocks", "block_size"):
        if not isinstance(getattr(adapter, name, None), int):
            raise TypeError(f"adapter.{name}: expected an int")
    errors = getattr(adapter, "out_of_blocks", None)
    kinds = errors if isinstance(errors, tuple) else (errors,)
    if not all(isinstance(kind, type) and issubclass(kind, Exception) for kind in kinds):
        raise TypeError("adapter.out_of_blocks: expected an exception class, or several")
    free = getattr(adapter, "num_free_blocks", None)
    if not callable(free) or not isinstance(free(), int):
        raise TypeError("adapter.num_free_blocks: expected a method that returns an int")
    if hasattr(adapter, "swap") and not hasattr(adapter, "num_host_blocks"):
        raise TypeError("adapter.swap: needs num_host_blocks. Give the adapter both, or neither.")

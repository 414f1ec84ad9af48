"""Which store has each chunk of a request, as far as the stores below have answered."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from kvpager.integrations.vllm.interface import ReqContext, get_offload_group_idx
from kvpager.integrations.vllm.lower_tiers import LowerTiers

ABSENT, ASKED = -1, -2  # instead of a store's number


class Places:
    """Asks the stores for each chunk of a request once, all chunks of a step together."""

    def __init__(self) -> None:
        self._stores: dict[bytes, int] = {}
        self._unknown: list[tuple[int, bytes]] = []  # not asked for yet, with positions

    def look(self, key: bytes, req_context: ReqContext) -> int:
        """Return the number of the store that has a chunk, `ABSENT`, or `ASKED`. O(1).

        A chunk that is not known yet is asked for by the next `ask`.
        """
        place = self._stores.get(key)
        if place is None:
            place = self._stores[key] = ASKED
            self._unknown.append((position(req_context, key), key))
        return place

    def ask(self, lower: LowerTiers) -> None:
        """Look for unknown chunks in the stores, group by group. O(chunks)."""
        unknown, self._unknown = self._unknown, []
        for _, group in groupby(unknown, lambda each: get_offload_group_idx(each[1])):
            positions, keys = zip(*group, strict=True)
            # vLLM asks for a prefix from the front, for a window from the end.
            is_prefix = positions[0] <= positions[-1]
            lower.locate(keys, self._stores.update, absent=ABSENT, is_prefix=is_prefix)

    def use_up(self, keys: Iterable[bytes]) -> dict[bytes, int]:
        """Return the store of each key that a store has, and mark these keys absent. O(keys).

        So a request loads a chunk once. If the chunk leaves again, or is not loaded, vLLM computes
        it.
        """
        found = {key: self._stores.get(key, ABSENT) for key in keys}
        found = {key: place for key, place in found.items() if place >= 0}
        self._stores.update(dict.fromkeys(found, ABSENT))
        return found


def position(req_context: ReqContext, key: bytes) -> int:
    """Return the tokens of the prompt up to the end of a chunk; 0 if vLLM did not tell. O(1)."""
    said: int | None = req_context.get_offload_key_position(key)
    return said or 0

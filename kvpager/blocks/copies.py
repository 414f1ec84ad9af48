"""Copies that run behind the manager's back: `manager.copies`."""

from __future__ import annotations

from kvpager.blocks.sequences import SequenceHandle
from kvpager.blocks.state import BlockState
from kvpager.plans import Plan, Step


class Copies:
    """The unfinished copies of a manager. Its methods are as safe to share as the manager's.

    Writes the holds of both pools, through the fences.
    """

    def __init__(self, state: BlockState) -> None:
        self._state = state

    @property
    def is_fenced(self) -> bool:
        """True if the blocks of a plan are kept back until `complete(plan)`. O(1)."""
        return self._state.fences.is_on

    def complete(self, work: Plan | Step | SequenceHandle | int) -> None:
        """Say that the copies of a plan, step or new sequence are made. O(copies).

        Lets their blocks go. Needed with `fences=True` only; without it, or without copies, there
        is nothing to do. The ticket alone will do as well.
        Raises: `ValueError` where they were completed already, or are of another manager.
        """
        ticket = work if isinstance(work, int) else getattr(work, "ticket", None)
        if ticket is None or isinstance(work, bool):
            raise TypeError(f"expected a plan, step, sequence or ticket, got {type(work).__name__}")
        state = self._state
        with state.lock, state.change:
            if ticket:
                state.fences.refuse_closed(ticket)
                state.change.begin()
                state.evictor.release(state.fences.complete(ticket))

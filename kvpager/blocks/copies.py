"""Copies that run asynchronously: `manager.copies`."""

from __future__ import annotations

from kvpager.blocks.sequences import SequenceHandle
from kvpager.blocks.state import BlockState
from kvpager.plans import AppendPlan, CopyPlan


class Copies:
    """The unfinished copies of a manager. Thread-safe.

    Writes the holds of both pools, through the fences.
    """

    def __init__(self, state: BlockState) -> None:
        self._state = state

    @property
    def is_fenced(self) -> bool:
        """True if the blocks of a plan are fenced until `complete(plan)`. O(1)."""
        return self._state.fences.is_on

    def complete(self, work: CopyPlan | AppendPlan | SequenceHandle | int) -> None:
        """Unfence the blocks of a finished plan, step or new sequence, or of its ticket. O(copies).

        Without `fences=True`, or without copies, there is nothing to do.
        Raises: `ValueError` if it was completed already, or is of another manager.
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

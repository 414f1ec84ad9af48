"""Host blocks that no sequence needs now: `manager.host`."""

from __future__ import annotations

from kvpager.blocks.pool import Borrower
from kvpager.blocks.state import BlockState


class HostBlocks:
    """Lends free host blocks to another user of host memory, and calls them back. Thread-safe.

    Swapped sequences come first: a swap that finds too few free blocks calls lent ones back, if the
    borrower can spare as many.
    """

    def __init__(self, state: BlockState) -> None:
        self._state = state

    @property
    def num_lent(self) -> int:
        """Blocks that the borrower has. O(1)."""
        return self._state.host.num_lent

    def lend_to(self, borrower: Borrower) -> None:
        """Lend all free host blocks to `borrower`. O(blocks). Raises: `ValueError` for a second."""
        state = self._state
        with state.lock, state.change:
            if state.host.borrower is not None:
                raise ValueError("borrower: there is one already. A manager lends to one only.")
            state.change.begin()
            state.host.borrower = borrower
            state.host.lend()

    def lend(self) -> None:
        """Lend the host blocks that swaps freed meanwhile, if there is a borrower. O(blocks).

        Call it only after all plans were carried out, or with `fences=True`: an unfinished plan may
        still read these blocks.
        """
        state = self._state
        with state.lock, state.change:
            if state.host.borrower is not None and state.host.num_free:
                state.change.begin()
                state.host.lend()

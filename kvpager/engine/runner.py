"""What an engine needs of the code that computes: a `Runner` and a `Sampler`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from kvpager.plans import StepPlan


class Runner(Protocol):
    """Computes the plans of one scheduler, over blocks of its own.

    An engine calls `run` and `fork` on its own thread.
    """

    @property
    def device_type(self) -> str:
        """Return the type of the device that computes, such as `"cpu"`. O(1)."""

    @property
    def block_bytes(self) -> int:
        """Return the bytes of a block, all layers. O(1)."""

    def run(self, plan: StepPlan, prompts: Mapping[int, list[int]]) -> Any:
        """Apply the swaps and copies of `plan`, then compute its rows.

        Args:
            plan: may have swaps but no rows. What the samples in `plan.freed` keep
                besides blocks is not needed any more.
            prompts: the prompt of each row's request, by the row's number in `plan.seq_ids`.

        Returns the logits of the rows that want them, in order; only the sampler reads them.
        An exception ends the requests of the step.
        """

    def fork(self, parent: int, child: int) -> None:
        """Let sample `child` continue from where sample `parent` is, besides the blocks."""


class Row(NamedTuple):
    """A row of logits, and what its request says about it."""

    sampling: Any  # see `RequestSettings`
    times: int  # how many tokens to choose: one for each sample that continues from this row
    generator: Any  # see `RequestSettings`
    ids: Callable[[], list[int]]  # the row's tokens so far
    with_logprobs: bool


class Draw(NamedTuple):
    """The tokens chosen for a row, or the error that prevented it."""

    tokens: list[int]
    logprobs: list[float] | None
    error: BaseException | None = None


class Sampler(Protocol):
    """Chooses tokens from logits."""

    def choose(self, logits: Any, rows: Sequence[Row]) -> list[Draw]:
        """Return a draw for each row of `logits`, in order.

        The error of one request belongs into its draw. An exception ends all requests of the step.
        """

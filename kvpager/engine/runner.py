"""The protocols of the code that computes: `Runner` and `Sampler`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from kvpager.plans import StepPlan


class Runner(Protocol):
    """Computes the plans of one scheduler.

    The engine calls `run` and `fork` on its own thread.
    """

    @property
    def device_type(self) -> str:
        """The type of the device that computes, such as `"cpu"`. O(1)."""

    @property
    def block_bytes(self) -> int:
        """The bytes of a block, all layers. O(1)."""

    def run(self, plan: StepPlan, prompts: Mapping[int, list[int]]) -> Any:
        """Apply the swaps and copies of `plan`, then compute its rows.

        Args:
            plan: the plan. It may have swaps but no rows. The runner may drop its state of the
                sequences in `plan.freed`.
            prompts: the prompt of each row's request, by sequence id.

        Returns the logits of the rows with `needs_logits`, in order, in a form that the sampler
        reads. An exception ends the requests of the step.
        """

    def fork(self, parent: int, child: int) -> None:
        """Copy the runner's state of sequence `parent` to sequence `child`, blocks excluded."""


class Row(NamedTuple):
    """A row of logits, and how to choose tokens from it."""

    sampling: Any  # see `RequestSettings`
    times: int  # number of tokens to choose: one per sample that continues from this row
    generator: Any  # see `RequestSettings`
    ids: Callable[[], list[int]]  # returns the tokens of the row so far
    with_logprobs: bool


class Draw(NamedTuple):
    """The tokens chosen for a row, or the error that prevented the choice."""

    tokens: list[int]
    logprobs: list[float] | None
    error: BaseException | None = None


class Sampler(Protocol):
    """Chooses tokens from logits."""

    def choose(self, logits: Any, rows: Sequence[Row]) -> list[Draw]:
        """Return a draw for each row of `logits`, in order.

        Return an error of one request in its draw. An exception ends all requests of the step.
        """

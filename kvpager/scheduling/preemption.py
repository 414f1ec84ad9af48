"""The cost model that chooses between swapping and recomputing a preempted request."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from kvpager import _validate as arguments


@dataclass(frozen=True, slots=True, kw_only=True)
class PreemptionCosts:
    """The time that a preemption takes, by swap and by recompute.

        swap       2 * blocks * seconds_per_block
        recompute  tokens * seconds_per_token + tokens * longest * seconds_per_token_squared

    `blocks` is the number of distinct blocks that the request holds on the device. `tokens` is the
    number of tokens computed in them; a shared token counts once. `longest` is the length of the
    request's longest sequence. The scheduler swaps if that is cheaper and the host has room.
    The model assumes that recompute starts from nothing, although a prefix may still be cached when
    the request resumes.

    Args:
        seconds_per_token: time to compute one prompt token, without attention.
        seconds_per_token_squared: time for one token to attend to one other token.
        seconds_per_block: time to move one block over the link, one way. `math.inf` disables swap.

    The defaults are estimates for a model of eight billion 16-bit parameters on a data-centre GPU:
    20,000 prompt tokens per second, and blocks of 2 MiB over a link of 25 GB/s. Measure your own.

    Raises: `TypeError`, `ValueError` for a time that is negative or not a number.
    """

    seconds_per_token: float = 5e-5
    seconds_per_token_squared: float = 1e-9
    seconds_per_block: float = 8.4e-5

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value != np.inf:
                arguments.seconds(field.name, value)

    def swap_s(self, blocks: int) -> float:
        """Return the seconds to move `blocks` blocks out and back. O(1)."""
        return 2 * blocks * self.seconds_per_block if blocks else 0.0

    def recompute_s(self, tokens: int, longest: int) -> float:
        """Return the seconds to recompute `tokens`, if the longest sequence has `longest`. O(1)."""
        if not tokens:
            return 0.0
        attention = tokens * longest * self.seconds_per_token_squared
        return tokens * self.seconds_per_token + attention

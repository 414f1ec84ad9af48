"""What the two ways of preempting a request would cost: a stated model, no measurement."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from kvpager import _validate as arguments


@dataclass(frozen=True, slots=True, kw_only=True)
class PreemptionCosts:
    """What it takes to move a block, and to compute a token again.

        swap       2 * blocks * seconds_per_block
        recompute  tokens * seconds_per_token + tokens * longest * seconds_per_token_squared

    `blocks` are the different ones that the request holds on the device, `tokens` those computed in
    them (shared ones once), `longest` its longest row. It is swapped where that is cheaper and the
    host has room. All of it is taken as lost by recompute, though some may still be cached when
    the request returns.

    Args:
        seconds_per_token: to compute one token of a prompt, without attention.
        seconds_per_token_squared: the attention of one token to one other.
        seconds_per_block: to move one block over the link, one way.

    The defaults are guesses for eight billion parameters in 16 bits on a data-centre GPU: 20,000
    tokens of a prompt a second, and 2 MiB blocks over 25 GB/s. Measure your own; a link that is
    too slow (`seconds_per_block=math.inf`) never swaps.
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
        """Return the seconds to move `blocks` out and in again. O(1)."""
        return 2 * blocks * self.seconds_per_block if blocks else 0.0

    def recompute_s(self, tokens: int, longest: int) -> float:
        """Return the seconds to compute `tokens` again; the longest row has `longest`. O(1)."""
        if not tokens:
            return 0.0
        attention = tokens * longest * self.seconds_per_token_squared
        return tokens * self.seconds_per_token + attention

"""What the control plane asks of the data plane: plain arrays, so that they can cross a process.

Plans are applied in the order in which the manager gave them, each before the writes of its
step. Under that rule a block may be handed out again as soon as a plan that reads it exists. Who
copies behind the manager's back, on another stream or thread, makes it with `fences=True`: then
every block a plan names stays where it is until `complete(plan)`. The order among plans still
holds: a later one may read what an earlier, unfinished one is about to write.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Tier = Literal["device", "host"]

NO_COPIES: NDArray[np.int32] = np.empty((0, 2), np.int32)
NO_COPIES.flags.writeable = False


@dataclass(frozen=True, slots=True)
class Plan:
    """Blocks to move between tiers, or on the device.

    `copies` is int32 [n, 2]: a block of tier `source`, and the block of tier `destination` that
    receives its bytes. No destination is also a source. `ticket` is what `complete` asks for: 0
    where nothing waits for it.
    """

    copies: NDArray[np.int32]
    source: Tier
    destination: Tier
    ticket: int = 0

    def __len__(self) -> int:
        return len(self.copies)


@dataclass(frozen=True, slots=True)
class Step:
    """Where the tokens of one `append` go.

    `slots` is int64 [tokens], `block * block_size + offset`, sequence by sequence in the order
    given. `copies` is int32 [n, 2]: blocks to copy on the device before anything is written,
    because another holder still reads the source (copy-on-write). `ticket`: as in `Plan`.
    """

    slots: NDArray[np.int64]
    copies: NDArray[np.int32]
    ticket: int = 0

"""Step plans as bytes for another process: a line of JSON, then the arrays that it describes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from kvpager import plans
from kvpager.plans import CopyPlan, StepPlan

_ARRAYS = (
    "copies", "seq_ids", "num_computed", "num_scheduled", "token_ids", "slot_mapping", "seq_lens",
    "block_tables", "needs_logits", "freed",
)  # fmt: skip


def encode(plan: StepPlan) -> bytes:
    """Return the bytes of a plan over one group of layers, without ids of requests."""
    assert not plan.more_groups
    arrays: list[bytes] = []

    def described(value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        arrays.append(value.tobytes())
        return {"dtype": value.dtype.str, "shape": value.shape}

    parts = [
        [[described(swap.copies), swap.source, swap.destination] for swap in plan.swaps],
        [[type(each).__name__, *map(described, each)] for each in plan.transfers],
        [described(getattr(plan, name)) for name in _ARRAYS],
    ]
    return json.dumps(parts).encode() + b"\n" + b"".join(arrays)


def decode(data: bytes) -> StepPlan:
    """Return the plan of bytes that `encode` made."""
    head, _, rest = data.partition(b"\n")
    offset = 0

    def values(described: list[Any]) -> Iterator[Any]:
        nonlocal offset
        for value in described:
            if not isinstance(value, dict):
                yield value
                continue
            dtype, shape = np.dtype(value["dtype"]), value["shape"]
            count = int(np.prod(shape))
            yield np.frombuffer(rest, dtype, count, offset).reshape(shape)
            offset += count * dtype.itemsize

    swaps, transfers, arrays = json.loads(head)
    moved = [CopyPlan(*values(swap)) for swap in swaps]
    carried = tuple(getattr(plans, name)(*values(each)) for name, *each in transfers)
    fields = dict(zip(_ARRAYS, values(arrays), strict=True))
    num_rows = len(fields["seq_ids"])
    return StepPlan(
        swaps=moved, transfers=carried, request_ids=[None] * num_rows, ended=[], **fields
    )

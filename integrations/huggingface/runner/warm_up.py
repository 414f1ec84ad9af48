"""Compile all kernels before an engine's first request, by computing a step of every shape.

Triton compiles a kernel at its first launch with new types or compile-time constants. For attention
these depend on the shape of a step: one or several queries per row, rows with a common prefix, and
rows long enough to be split.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from kvpager.integrations.huggingface.runner.model_runner import ModelRunner, trial_plan
from kvpager.plans import StepPlan

COMPILING = ("cuda",)  # device types whose kernels are compiled at the first launch
_SHORT = 8  # tokens of rows that are too short to be split
_ROWS = 4


def warm_up(runner: ModelRunner, max_batch_tokens: int, max_num_seqs: int) -> None:
    """Compute a step of every shape. Overwrites the first blocks: call it before any request."""
    for plan in warm_up_steps(runner, max_batch_tokens, max_num_seqs):
        runner.run(plan, {sample: [0] for sample in plan.seq_ids.tolist()})
        runner.forget(plan.seq_ids)


def warm_up_steps(
    runner: ModelRunner, max_batch_tokens: int, max_num_seqs: int
) -> Iterator[StepPlan]:
    """Yield steps with copies of blocks, with decoding, with prompts, and with both."""
    storage, longest = runner.storage, runner.info.max_length or 2**15
    begins_in_cache = not runner.info.has_state  # recurrent states are not in the blocks
    room = min(longest, storage.num_blocks * storage.block_size)
    few = min(_ROWS, max_num_seqs, max_batch_tokens)
    prompt = min(max_batch_tokens - few + 1, room)
    yield from _copies(runner)
    yield step_of_rows(runner, [(0, prompt)])
    if not begins_in_cache:
        return
    yield step_of_rows(runner, [(room - 1, 1)])  # one long row, split
    yield step_of_rows(runner, [(min(_SHORT, room) - 1, 1)] * few)  # short rows
    yield step_of_rows(runner, [(room - 1, 1)] * few)  # long rows with a prefix in common
    if few > 1:
        rows = [(room - 1, 1)] * (few - 1)
        yield step_of_rows(runner, [*rows, (0, prompt)])
        yield step_of_rows(runner, [*rows, (room - min(prompt, 2), min(prompt, 2))])


def step_of_rows(runner: ModelRunner, rows: list[tuple[int, int]]) -> StepPlan:
    """Return a step of rows (cached tokens, new tokens) that all share the same blocks."""
    storage = runner.storage
    starts, counts = (np.array(each, np.int32) for each in zip(*rows, strict=True))
    ends = starts + counts
    num_blocks = -(-int(ends.max()) // storage.block_size)
    tables = np.broadcast_to(np.arange(num_blocks, dtype=np.int32), (len(rows), num_blocks))
    prompts = [[0] * int(end) for end in ends]
    groups = len(runner.info.windows)
    plan = trial_plan(prompts, starts, counts, tables, storage, groups)
    # Two rows must not write to one slot.
    if len(np.unique(plan.slot_mapping)) < len(plan.slot_mapping):
        none = np.full_like(plan.slot_mapping, -1)
        others = tuple(group._replace(slot_mapping=none) for group in plan.more_groups)
        plan = replace(plan, slot_mapping=none, more_groups=others)
    return plan


def _copies(runner: ModelRunner) -> Iterator[StepPlan]:
    """Yield steps that copy blocks, one for each number of pairs with a kernel of its own."""
    plan = step_of_rows(runner, [(0, 1)])
    for count in (1, 2, 9, 65, 257):
        if 2 * count <= runner.storage.num_blocks:
            blocks = np.arange(2 * count, dtype=np.int32).reshape(2, count).T
            yield replace(plan, copies=blocks)

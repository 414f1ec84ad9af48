"""What a scheduler counts."""

from __future__ import annotations

from typing import NamedTuple


class SchedulerStats(NamedTuple):
    """A moment's counts, in requests unless the name says otherwise; totals since the beginning."""

    num_waiting: int
    num_running: int
    num_running_seqs: int
    num_preempted: int
    total_steps: int
    total_tokens: int  # computed, prompts and decoding, again after a preemption included
    total_reused_tokens: int  # of prompts, found in the prefix index
    total_preempted_by_swap: int
    total_preempted_by_recompute: int

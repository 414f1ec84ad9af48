"""The counts of a scheduler."""

from __future__ import annotations

from typing import NamedTuple


class SchedulerStats(NamedTuple):
    """Counts at one moment, in requests unless the name says otherwise.

    Names that begin with `total_` count since the scheduler was made.
    """

    num_waiting: int
    num_running: int
    num_running_seqs: int
    num_preempted: int
    total_steps: int
    total_tokens: int  # of prompts and of decoding; recomputed tokens count again
    total_reused_tokens: int  # of prompts, found in the prefix cache
    total_preempted_by_swap: int
    total_preempted_by_recompute: int

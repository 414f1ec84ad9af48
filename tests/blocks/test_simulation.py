"""Half a minute of the seeded simulator; `kvpager check --operations 1e7` is the long run."""

from __future__ import annotations

import pytest

from kvpager.testing.simulator import run


@pytest.mark.slow
def test_no_law_is_broken_in_many_random_histories() -> None:
    summary = run(150_000, seed=0, processes=2)
    assert not summary.failures, "\n".join(map(str, summary.failures))
    assert summary.num_operations == 150_000
    assert summary.num_seeds == 30
    # It must have come to what is rare: refusals, hits, shrinking, shared swaps.
    for name in ("refused", "hits", "shrink", "swap_some", "accept", "preempt"):
        assert summary.counts[name] > 100, name

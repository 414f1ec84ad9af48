"""The table of numbers: both allocators, over the whole run."""

from __future__ import annotations

from collections.abc import Iterator

from kvpager._text import counted, size
from kvpager.report.model import Reserved, Run
from kvpager.report.reserved import ReservedPool

Row = tuple[str, str, str, str]  # name, reserved, paged, meaning


def numbers(run: Run, pool: ReservedPool, reserved: list[Reserved], noun: str) -> list[Row]:
    """Return the rows of the table. O(moments). `noun` names a sequence."""
    return [*_both(run, pool, reserved, noun), *_paged(run), *_tiers(run)]


def _both(run: Run, pool: ReservedPool, reserved: list[Reserved], noun: str) -> Iterator[Row]:
    held = sum(each.counts.held for each in run.moments) * run.header.block_size
    tokens = sum(each.counts.tokens for each in run.moments)
    taken = sum(each.running for each in reserved) * pool.max_tokens
    yield (
        f"most {noun}s at once",
        f"{pool.most_running:,}",
        f"{run.most_running:,}",
        "With the same memory.",
    )
    yield (
        "taken memory that holds tokens",
        _percent(sum(each.tokens for each in reserved), taken),
        _percent(tokens, held),
        "Mean of the shown steps. The rest is taken and empty.",
    )
    yield (
        "most tokens at once",
        f"{max(each.tokens for each in reserved):,}",
        f"{run.most_tokens:,}",
        "Paged, a shared token counts once. Reserved, each sequence has a copy.",
    )
    users = set(run.users.values())
    refused = len(users - {run.users[each] for each in pool.served})
    yield (
        f"{noun}s that never had a region",
        f"{refused:,} of {len(users):,}",
        "",
        "Paging ran them.",
    )


def _paged(run: Run) -> Iterator[Row]:
    last = run.moments[-1]
    totals, saved = last.totals, max(each.saved for each in run.moments)
    yield ("steps", "", f"{run.num_steps:,}", f"They took {last.t:,.1f} s.")
    if totals.prefix_query_tokens:
        found = _percent(totals.prefix_hit_tokens, totals.prefix_query_tokens)
        yield ("prompt tokens found in the cache", "", found, "They are not computed again.")
    worth = f" ({size(saved * run.header.block_bytes)})" if run.header.block_bytes and saved else ""
    yield ("blocks saved by sharing", "", f"{saved:,}{worth}", "At the shown step with the most.")
    yield ("blocks copied", "", f"{totals.copied:,}", "A shared block is copied before a write.")
    yield ("blocks evicted", "", f"{totals.evicted:,}", "Cached blocks that made room for others.")
    swapped = f"{totals.swapped_out:,} out, {totals.swapped_in:,} in"
    yield ("blocks swapped", "", swapped, "Blocks of preempted sequences go to host memory.")


def _tiers(run: Run) -> Iterator[Row]:
    for name, tier in zip(run.header.tiers, run.moments[-1].tiers, strict=False):
        traffic = f"{size(tier.loaded_bytes)} loaded, {size(tier.saved_bytes)} saved"
        known = "" if tier.blocks is None else f"It has {counted(tier.blocks, 'block')} at the end."
        yield (f"tier {name}", "", traffic, known)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "–"

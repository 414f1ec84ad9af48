"""Divide a batch's prompts into passes by the length of their cached prefixes.

    row 0   [cached .......][new]           a batch is a rectangle: in a single pass, every row
    row 1   [new ................]          computes as many columns as the longest uncached row
    row 2   [cached .......][new]

So rows with about as many new tokens share a pass, and passes with more new tokens come first. Of
rows with a common prefix, one row is computed first. The others find the prefix in the pool.
"""

from __future__ import annotations

import itertools

import numpy as np

from kvpager.plans import Int32, Int64

# The fixed cost of a pass in tokens: it reads all weights, even for a few tokens.
PASS_TOKENS = 256


def prefill_batches(prompts: list[Int32], known: Int64) -> list[Int64]:
    """Return the rows of each pass, in order. O(rows^2 + rows log rows * tokens).

    Args:
        prompts: each row's token ids, without padding.
        known: the number of cached leading tokens of each row, int64 [rows].
    """
    new = np.array([len(prompt) for prompt in prompts], np.int64) - known
    order, cost = _split(np.arange(len(prompts)), new)
    shared = _shared_with_an_owner(prompts, known)
    follows = shared > known
    if follows.any():
        # Owners publish their blocks, so the rows that share a prefix find it cached.
        less = np.where(follows, new - (shared - known), new)
        ahead, of_owners = _split(np.flatnonzero(~follows), less)
        behind, of_others = _split(np.flatnonzero(follows), less)
        if of_owners + of_others < cost:
            order = ahead + behind
    return order


def _split(rows: Int64, new: Int64) -> tuple[list[Int64], int]:
    """Return the cheapest division of `rows` into passes, longest first, and its token cost."""
    if not len(rows):
        return [], 0
    rows = rows[np.argsort(-new[rows], kind="stable")]
    longest = new[rows]
    # best[n]: the cost of the first n rows. A pass costs its number of rows times its longest row.
    best, begins = [0], [0]
    for end in range(1, len(rows) + 1):
        costs = np.array(best) + (end - np.arange(end)) * longest[:end] + PASS_TOKENS
        begins.append(int(costs.argmin()))
        best.append(int(costs.min()))
    passes, end = [], len(rows)
    while end:
        passes.append(np.sort(rows[begins[end] : end]))
        end = begins[end]
    return passes[::-1], best[-1]


def _shared_with_an_owner(prompts: list[Int32], known: Int64) -> Int64:
    """Return how many leading tokens each row shares with an owner; -1 for owners themselves.

    An owner is a row that is computed first. Rows are compared in lexicographic order, in which
    rows with a common prefix are adjacent.
    """
    order = sorted(range(len(prompts)), key=lambda row: prompts[row].astype(">u4").tobytes())
    shared = np.full(len(prompts), -1, np.int64)
    common = 0
    for before, row in itertools.pairwise(order):
        adjacent = _common(prompts[before], prompts[row])
        common = min(common, adjacent) if shared[before] >= 0 else adjacent
        # At least one token of each row is computed.
        common = min(common, len(prompts[row]) - 1)
        if common > known[row]:
            shared[row] = common
    return shared


def _common(first: Int32, second: Int32) -> int:
    length = min(len(first), len(second))
    differs = np.flatnonzero(first[:length] != second[:length])
    return int(differs[0]) if len(differs) else length

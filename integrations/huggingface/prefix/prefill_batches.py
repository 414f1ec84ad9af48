"""In which order the prompts of a batch are computed, when parts of them are known.

    row 0   [known ........][new]           a batch is a rectangle: in one pass, every row would
    row 1   [new ................]          compute as many columns as the row that knows least
    row 2   [known ........][new]

So rows that know about as much are computed together, those that know least first, and of rows that
begin alike one goes ahead: the others then find its beginning in the pool.
"""

from __future__ import annotations

import itertools

import numpy as np

from kvpager.plans import Int32, Int64

# What a pass costs besides its tokens, in tokens: it reads all weights, however few there are.
PASS_TOKENS = 256


def prefill_batches(prompts: list[Int32], known: Int64) -> list[Int64]:
    """The rows of each pass, in order. O(rows^2 + rows log rows * tokens).

    Args:
        prompts: each row's token ids, without padding.
        known: how many tokens of each row need no computing, int64 [rows].
    """
    new = np.array([len(prompt) for prompt in prompts], np.int64) - known
    order, cost = _split(np.arange(len(prompts)), new)
    shared = _shared_with_an_owner(prompts, known)
    follows = shared > known
    if follows.any():
        # Owners publish what they compute, so the rows that share it know as much.
        less = np.where(follows, new - (shared - known), new)
        ahead, of_owners = _split(np.flatnonzero(~follows), less)
        behind, of_others = _split(np.flatnonzero(follows), less)
        if of_owners + of_others < cost:
            order = ahead + behind
    return order


def _split(rows: Int64, new: Int64) -> tuple[list[Int64], int]:
    """The cheapest division of `rows` into passes, the longest first, and its cost in tokens."""
    if not len(rows):
        return [], 0
    rows = rows[np.argsort(-new[rows], kind="stable")]
    longest = new[rows]
    # best[n]: the cost of the first n rows; a pass costs its rows times the longest of them.
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
    """Return how many tokens each row shares with a row that goes ahead; -1 for one that does.

    In lexicographic order, rows that begin alike stand together.
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


def _common(one: Int32, other: Int32) -> int:
    length = min(len(one), len(other))
    differs = np.flatnonzero(one[:length] != other[:length])
    return int(differs[0]) if len(differs) else length

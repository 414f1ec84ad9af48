"""S3-FIFO, ARC and 2Q as in their papers: caches of keys, one access at a time.

A cache whose parts are set for `size` keys holds `room` of them.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable

Keys = OrderedDict[int, None]


def s3_fifo(keys: Iterable[int], size: int, room: int) -> int:
    """Return the hits of S3-FIFO with a small queue of `size` / 10 and 4 * `size` fingerprints."""
    small, main, ghosts = deque[int](), deque[int](), deque[int]()
    uses: dict[int, int] = {}
    hits = 0

    def evict() -> None:
        if len(small) >= max(size // 10, 1) or not main:
            while small:
                key = small.popleft()
                if uses[key] < 2:
                    del uses[key]
                    ghosts.append(key)
                    while len(ghosts) > 4 * size:
                        ghosts.popleft()
                    return
                uses[key] = 0
                main.append(key)
        while True:
            key = main.popleft()
            if not uses[key]:
                del uses[key]
                return
            uses[key] -= 1
            main.append(key)

    for key in keys:
        if key in uses:
            hits += 1
            uses[key] = min(uses[key] + 1, 3)
            continue
        if len(uses) == room:
            evict()
        if key in ghosts:
            ghosts.remove(key)
            main.append(key)
        else:
            small.append(key)
        uses[key] = 0
    return hits


def two_q(keys: Iterable[int], size: int, room: int) -> int:
    """Return the hits of full 2Q with Kin = `size` / 4 and Kout = `size` / 2."""
    a1in, am, a1out = Keys(), Keys(), Keys()
    hits = 0
    for key in keys:
        if key in am:
            hits += 1
            am.move_to_end(key)
        elif key in a1in:
            hits += 1
        else:
            if len(a1in) + len(am) == room:
                if len(a1in) > size // 4 or not am:
                    a1out[a1in.popitem(last=False)[0]] = None
                    if len(a1out) > size // 2:
                        a1out.popitem(last=False)
                else:
                    am.popitem(last=False)
            if key in a1out:
                del a1out[key]
                am[key] = None
            else:
                a1in[key] = None
    return hits


def arc(keys: Iterable[int], size: int, room: int) -> int:
    """Return the hits of ARC. As in a pool of blocks, `replace` precedes the new target."""
    t1, t2, b1, b2 = Keys(), Keys(), Keys(), Keys()
    target, hits = 0.0, 0
    for key in keys:
        if key in t1 or key in t2:
            hits += 1
            t1.pop(key, None)
            t2.pop(key, None)
            t2[key] = None
            continue
        if len(t1) + len(t2) == room:
            if t1 and (len(t1) > target or not t2):
                b1[t1.popitem(last=False)[0]] = None
            else:
                b2[t2.popitem(last=False)[0]] = None
        if key in b1:
            target = min(target + max(len(b2) / len(b1), 1), size)
            del b1[key]
            t2[key] = None
        elif key in b2:
            target = max(target - max(len(b1) / len(b2), 1), 0)
            del b2[key]
            t2[key] = None
        else:
            t1[key] = None
            while len(t1) + len(b1) > size:
                b1.popitem(last=False)
            while len(t1) + len(t2) + len(b1) + len(b2) > 2 * size:
                b2.popitem(last=False)
    return hits

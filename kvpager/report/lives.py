"""The lives of requests: when each was queued, fetched, computed, preempted and finished."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from kvpager.recording.format import LIVE_STATES, Step

SEGMENTS_MAX = 60  # of a life
_LIVE = frozenset(LIVE_STATES)


@dataclass(slots=True)
class Life:
    """The events of a request, each with its step."""

    request: int
    first: int
    prompt: int
    cached: int = 0
    states: list[tuple[int, str]] = field(default_factory=list)
    chunks: list[tuple[int, int, int]] = field(default_factory=list)  # step, first token, tokens
    end: str | None = None
    last: int = 0

    @property
    def kinds(self) -> set[str]:
        """Return the states that it was in. O(states)."""
        return {state for _, state in self.states}

    @property
    def interest(self) -> tuple[int, int]:
        """Return a sort key: larger for a life with more kinds of events. O(states)."""
        # Many times the same state says little.
        return len(self.kinds) + (self.end is not None), min(len(self.states), 6)

    def segments(self) -> Iterator[list[Any]]:
        """Yield [kind, first step, end, first token, tokens, chunks], in order. O(events)."""
        ends = [step for step, _ in self.states[1:]] + [self.last]
        for (begin, state), end in zip(self.states, ends, strict=True):
            if state == "running":
                yield from self._running(begin, end)
            elif end > begin:
                yield [state, begin, end]

    def _running(self, begin: int, end: int) -> Iterator[list[Any]]:
        chunks = [chunk for chunk in self.chunks if begin <= chunk[0] < end]
        if len(chunks) > SEGMENTS_MAX // 3:  # one piece, with pauses in it
            chunks_of = [(chunks[0][0], chunks[-1][0] + 1, chunks)]
        else:
            chunks_of = [(chunk[0], chunk[0] + 1, [chunk]) for chunk in chunks]
        for first, last, inside in chunks_of:
            yield ["prefill", first, last, inside[0][1], sum(c[2] for c in inside), len(inside)]
        decode = chunks[-1][0] + 1 if chunks else begin
        if end > decode:
            yield ["decode", decode, end]

    def as_json(self) -> dict[str, Any]:
        """Return plain data for the page. O(events)."""
        odd = [kind for kind in ("swapped", "dropped", "fetching") if kind in self.kinds]
        names = {"swapped": "swapped", "dropped": "preempted", "fetching": "fetched"}
        return {
            "request": self.request,
            "first": self.first,
            "last": self.last,
            "prompt": self.prompt,
            "cached": self.cached,
            "end": self.end,
            "note": ", ".join(names[kind] for kind in odd),
            "segments": _joined(self.segments())[:SEGMENTS_MAX],
        }


def _joined(segments: Iterable[list[Any]]) -> list[list[Any]]:
    """Return the segments; those of one kind that touch are one. Chunks stay apart."""
    joined: list[list[Any]] = []
    for segment in segments:
        if joined and joined[-1][0] == segment[0] != "prefill" and joined[-1][2] == segment[1]:
            joined[-1][2] = segment[2]
        else:
            joined.append(segment)
    return joined


class Lives:
    """All lives of a recording."""

    def __init__(self) -> None:
        self._lives: dict[int, Life] = {}
        self._requests: dict[int, int] = {}  # of live sequences

    def observe(self, step: Step) -> None:
        """Note the events of a step. O(events)."""
        now, lives = step.step, self._lives
        for request, prompt, _, _ in step.new:
            lives[request] = Life(request, now, prompt, states=[(now, "queued")])
        for sequence in step.end:
            self._requests.pop(sequence, None)
        for sequence, owner, cached in step.begin:
            if owner is not None and owner in lives:
                self._requests[sequence] = owner
                lives[owner].cached = max(lives[owner].cached, cached)
        for sequence, first, tokens in step.prefill:
            if sequence in self._requests:
                lives[self._requests[sequence]].chunks.append((now, first, tokens))
        for request, state in step.state:
            if state in _LIVE:
                lives[request].states.append((now, state))
            else:
                lives[request].end, lives[request].last = state, now

    def chosen(self, num_lives: int, last_step: int) -> tuple[list[dict[str, Any]], int]:
        """Return at most `num_lives` lives by number, and the index of the one to show first.

        Half are those in which most happened; the others are spread evenly. O(lives).
        """
        lives = list(self._lives.values())
        if not lives:
            return [], 0
        for life in lives:
            if life.end is None:
                life.last = last_step
        lives.sort(key=lambda life: life.interest, reverse=True)
        kept, others = lives[: num_lives // 2], lives[num_lives // 2 :]
        stride = max(1, -(-len(others) // max(1, num_lives - len(kept))))
        kept += others[::stride]
        first = kept[0].request
        kept.sort(key=lambda life: life.request)
        return [life.as_json() for life in kept], [life.request for life in kept].index(first)

"""Requests: what a caller submits, and the scheduler's state of each live request."""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import Enum, auto

from kvpager import _validate as arguments
from kvpager.blocks.protocol import CacheManager
from kvpager.plans import Int32, Reason


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """A prompt to continue.

    Args:
        request_id: the caller's id, any hashable value; unique among live requests.
        prompt: int32 token ids, at least one.
        max_new_tokens: maximum new tokens per sequence; bounds the blocks of the request.
        n: maximum sequences at a time, for parallel sampling or beams. They decode in the
            same steps.
        namespace: requests share prefixes, and a quota, only within a namespace.
        lora: a label of the LoRA adapter, or of other weights, with which the KV is computed.
            Requests share prefixes only if `lora` is equal. `Engine` sets none.
        tenant: the policy `"fair"` serves the tenant with the fewest tokens so far first. Other
            built-in policies refuse one. Independent of `namespace`.
        priority: the policy `"priority"` serves lower numbers first. Other built-in policies refuse
            all but 0.
        deadline: time at which the request ends, on the scheduler's clock; None for no deadline.
    """

    request_id: Hashable
    prompt: Int32
    max_new_tokens: int
    n: int = 1
    namespace: str | None = None
    lora: str | None = None
    tenant: str | None = None
    priority: int = 0
    deadline: float | None = None


class Status(Enum):
    """Where a live request is."""

    WAITING = auto()  # not started
    RUNNING = auto()  # has device blocks
    SWAPPED = auto()  # preempted by swap; its blocks are on the host
    DROPPED = auto()  # preempted by recompute; it has no blocks


@dataclass(slots=True, eq=False)
class RequestState:
    """A live request.

    `RequestTable` writes its fields. `Scheduler` writes `is_held` and `ending`, and
    `AdmissionPolicy` writes `waits_for` and `num_shared`.
    """

    request: Request
    prompt: Int32
    arrival: int
    submitted: float
    cache_version: int = 0  # of the cached prefixes that it may share
    status: Status = Status.WAITING
    seq_ids: list[int] = field(default_factory=list)  # its sequences in `SequenceState`
    is_held: bool = False  # it may not start yet
    is_ready: bool = False  # every sequence has finished prefill and may decode
    ending: Reason | None = None  # the reason to end it with after the current step
    waits_for: RequestState | None = None  # computes a prefix that this request will share
    num_shared: int = 0  # tokens of that prefix

    @property
    def request_id(self) -> Hashable:
        """The caller's id of the request."""
        return self.request.request_id

    @property
    def identity(self) -> tuple[str | None, str | None]:
        """Return the namespace and the LoRA whose prefixes the request may share."""
        return self.request.namespace, lora_of_version(self.request.lora, self.cache_version)


def lora_of_version(lora: str | None, cache_version: int) -> str | None:
    """Return the LoRA under which prefixes of a version of the cache are cached. O(1)."""
    # Double the caller's NULs, so that no name ends like a name with a version.
    lora = lora and lora.replace("\0", "\0\0")
    return f"{lora or ''}\0{cache_version}" if cache_version else lora


def split_lora(label: str | None) -> tuple[str | None, int]:
    """Return the LoRA and the version that `lora_of_version` joined. O(characters)."""
    versioned = label and re.fullmatch(r"(.*?)(\0*)\0(\d+)", label, re.DOTALL)
    if not label or not versioned or len(versioned[2]) % 2:  # doubled NULs belong to the name
        return label and label.replace("\0\0", "\0"), 0
    name = versioned[1] + versioned[2]
    return name.replace("\0\0", "\0") or None, int(versioned[3])


def checked_prompt(request: Request) -> Int32:
    """Check all fields of a request and return a copy of its prompt. O(tokens).

    Raises: `TypeError`, `ValueError`.
    """
    if not isinstance(request, Request):
        raise TypeError(f"request: expected a Request, got {type(request).__name__}.")
    hash(request.request_id)
    prompt = arguments.token_ids(request.prompt).copy()
    if not len(prompt):
        raise ValueError(
            f"request {request.request_id!r}: the prompt is empty. Pass at least one token id."
        )
    arguments.count("max_new_tokens", request.max_new_tokens, at_least=1)
    arguments.count("n", request.n, at_least=1)
    for name in ("namespace", "lora", "tenant"):
        arguments.label(name, getattr(request, name))
    most = arguments.PRIORITY_MAX
    arguments.count("priority", request.priority, at_least=-most, at_most=most)
    if request.deadline is not None:  # the scheduler's clock may start anywhere
        far = float(2**53)
        arguments.number("deadline", request.deadline, at_least=-far, at_most=far)
    return prompt


def blocks_needed(request: Request, num_prompt: int, manager: CacheManager) -> int:
    """Return the maximum number of blocks that a request may hold. O(groups).

    Sequences of a request share its prompt. If layers have a window, each sequence computes the
    prompt by itself after a preemption; see `Placement`.
    """
    # The last token needs no slot, because no step computes it.
    longest = manager.queries.blocks_for(num_prompt + request.max_new_tokens - 1)
    if any(manager.windows):
        return request.n * longest
    shared = manager.queries.blocks_for(num_prompt // manager.block_size * manager.block_size)
    return shared + request.n * (longest - shared)

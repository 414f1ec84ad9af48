"""Requests, as a caller hands them in, and what a scheduler knows of each that lives."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum, auto

from kvpager import _validate as arguments
from kvpager.blocks.protocol import CacheManager
from kvpager.plans import Int32, Reason


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """A prompt to be continued, and how.

    Args:
        request_id: the caller's id, any hashable value; unique among live requests.
        prompt: token ids, at least one.
        max_new_tokens: no row gets more; what a request may ever need goes by it.
        n: the most rows at a time (parallel sampling, beams). They step together.
        namespace: only prefixes of the same namespace and `lora` are reused.
        lora: the LoRA adapter, or other fine-tuned weights, that compute it.
        tenant: whom the policy `"fair"` charges for it.
        priority: lower goes first, under the policy `"priority"`.
        deadline: when to end it, on the scheduler's clock, running or not.
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

    WAITING = auto()  # not begun
    RUNNING = auto()  # on the device
    SWAPPED = auto()  # preempted; its blocks are on the host
    DROPPED = auto()  # preempted; its blocks were given back


class RequestState:
    """A request from `submit` to its end.

    `RequestTable` writes all of it, except what the request waits for: that is the admission
    policy's.
    """

    __slots__ = (
        "arrival",
        "ending",
        "generation",
        "is_ready",
        "num_shared",
        "prompt",
        "request",
        "seq_ids",
        "status",
        "submitted",
        "waits_for",
    )

    def __init__(
        self, request: Request, prompt: Int32, arrival: int, submitted: float, generation: int = 0
    ) -> None:
        self.request = request
        self.prompt = prompt
        self.arrival = arrival
        self.generation = generation  # of the prefixes it may share
        self.submitted = submitted
        self.status = Status.WAITING
        self.seq_ids: list[int] = []  # its rows, see `SequenceState`
        self.is_ready = False  # all rows have all their tokens computed: they may decode
        self.ending: Reason | None = None  # what it ends with when the step it is in is over
        self.waits_for: RequestState | None = None  # computes the beginning of its prompt
        self.num_shared = 0  # tokens of that beginning

    @property
    def request_id(self) -> Hashable:
        """Return the caller's id of the request."""
        return self.request.request_id

    @property
    def identity(self) -> tuple[str | None, str | None]:
        """Return the namespace and the LoRA whose prefixes the request may share."""
        # A caller's NULs are doubled: no name of a LoRA ends like one with a generation.
        lora = self.request.lora and self.request.lora.replace("\0", "\0\0")
        if self.generation:
            lora = f"{lora or ''}\0{self.generation}"
        return self.request.namespace, lora


def read_prompt(request: Request) -> Int32:
    """Return a copy of the prompt's ids, once all of the request is found right. O(tokens).

    Raises: `TypeError`, `ValueError`.
    """
    if not isinstance(request, Request):
        raise TypeError(f"expected a Request, got {type(request).__name__}")
    hash(request.request_id)
    prompt = arguments.token_ids(request.prompt).copy()
    if not len(prompt):
        raise ValueError(
            f"request {request.request_id!r}: the prompt is empty; give at least one token"
        )
    arguments.count("max_new_tokens", request.max_new_tokens, at_least=1)
    arguments.count("n", request.n, at_least=1)
    for name in ("namespace", "lora", "tenant"):
        arguments.label(name, getattr(request, name))
    most = arguments.PRIORITY_MAX
    arguments.count("priority", request.priority, at_least=-most, at_most=most)
    if request.deadline is not None:  # on the scheduler's clock, which may begin anywhere
        far = float(2**53)
        arguments.number("deadline", request.deadline, at_least=-far, at_most=far)
    return prompt


def blocks_needed(request: Request, num_prompt: int, manager: CacheManager) -> int:
    """Return the most blocks that a request can come to hold. O(groups).

    Rows share their prompt. Where layers have a window, they compute it by themselves after a
    preemption: see `Placement`.
    """
    # The last token is chosen, and nothing is computed with it.
    longest = manager.queries.blocks_for(num_prompt + request.max_new_tokens - 1)
    if any(manager.windows):
        return request.n * longest
    shared = manager.queries.blocks_for(num_prompt // manager.block_size * manager.block_size)
    return shared + request.n * (longest - shared)

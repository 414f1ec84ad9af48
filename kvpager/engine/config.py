"""The settings of an engine, shared by `Engine`, the command line and the benchmarks."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from kvpager import _validate as arguments
from kvpager._text import listed
from kvpager.blocks.policies import Eviction, check_eviction
from kvpager.kv_events.settings import KVEvents
from kvpager.modes import ModeName, mode_named
from kvpager.scheduling.preemption import PreemptionCosts
from kvpager.storage.layout import KVCacheDtype
from kvpager.storage.tiers.agreement import check_shared
from kvpager.storage.tiers.protocol import BlockStore
from kvpager.storage.tiers.seals import Seal
from kvpager.storage.tiers.urls import are_private, checked_tiers

_BESIDE = ("tokenizer", "on_step")  # arguments of `Engine` that are no settings
_CUDA_GRAPHS = "triton.cudagraphs"
Forward = Literal["auto", "packed", "per_sequence"]
Role = Literal["prefill", "decode"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The settings of an engine.

    Args:
        memory: bytes of the KV cache, such as `"4GiB"`. The default is enough for `max_num_seqs`
            sequences of maximum length, but at most 90 % of the free GPU memory, or 50 % of the
            free host memory on a CPU.
        host_memory: bytes of host memory for swapped requests; None for no swap. With `tiers`,
            cached blocks use what swapped requests leave: the first tier.
        block_size: token slots per block, a power of two.
        kv_cache_dtype: `"int8"` or `"fp8_e4m3"` to store keys and values in eight bits.
        eviction: the eviction policy: a name in `kvpager.blocks.policies.POLICIES`, or a function
            that returns an `EvictionPolicy` for a number of blocks. Each pool gets its own policy.
        max_batch_tokens: maximum tokens per forward pass.
        max_num_seqs: maximum concurrent sequences, capped at `max_batch_tokens`.
        max_queue_size: maximum waiting requests; None for no limit.
        policy: scheduling policy: `"fifo"`, `"priority"`, or `"fair"` between tenants.
        prefix_cache: share the KV of equal prefixes between requests. The engine drops cached
            prefixes when the model's weights, hooks or settings change. Running requests continue
            with the KV they have.
        max_model_len: maximum tokens of a sequence, prompt included; None takes the model's
            `max_position_embeddings`.
        costs: cost model for swap or fetch vs. recompute; None measures it if `host_memory` or
            `tiers` is set.
        forward: `"packed"` computes all rows of a step in one forward pass, `"per_sequence"` each
            row in its own. `"auto"` probes the model and packs if the logits stay the same.
        compile: True compiles the packed forward pass with `torch.compile`. A dict passes
            arguments to it, such as `{"options": {"freezing": True}}` for constant weights. Modes
            that record CUDA graphs (`"reduce-overhead"`, `"max-autotune"`) are refused.
        tiers: stores for cached blocks that leave the device, asked in order: URLs as in
            `kvpager.storage.tiers.urls.open_store`, or stores, which the engine closes. `"host"`
            alone is for `host_memory` without other tiers.
        seal: what protects blocks in tiers outside of the process, such as `Encrypted(secret)`. Its
            secret also keeps namespaces apart. Processes share blocks if their seals are equal.
        model_id: the name of the weights and their revision, for tiers, the same in all processes.
            None takes a digest of the model.
        cross_stack: True shares blocks with other serving stacks, such as vLLM, that have the same
            `tiers`, `model_id` and `block_size`. First the engine computes the keys and values of a
            probe prompt, and compares them with those that another stack stored.
        role: `"prefill"` answers with the first token, and ends a request when the tiers have the
            full blocks of its prompt. `"decode"` computes the rest elsewhere. Both need tiers that
            other processes read.
        mode: the memory management. `"paged"`: blocks anywhere in the pool. `"virtual"` (Linux)
            also maps the blocks of each sequence into a range of addresses. `"reserved"`: a region
            of `max_model_len` tokens for each sequence, as before paging, for comparison.
        kv_events: where routers learn which prompts are cached: an address such as
            `"tcp://127.0.0.1:5557"`, or `KVEvents`. None for nowhere.
        record: path of a recording for `kvpager report` and `kvpager top`: the blocks and the state
            of each request at each step. None for no recording. See `docs/guides/recordings.md`.

    Raises: `TypeError`, `ValueError` for settings of a wrong type or value.
    """

    memory: int | str | None = None
    host_memory: int | str | None = None
    block_size: int = 16
    kv_cache_dtype: KVCacheDtype | None = None
    eviction: Eviction = "lru"
    max_batch_tokens: int = 1024
    max_num_seqs: int = 256
    max_queue_size: int | None = None
    policy: Literal["fifo", "priority", "fair"] = "fifo"
    prefix_cache: bool = True
    max_model_len: int | None = None
    costs: PreemptionCosts | None = None
    forward: Forward = "auto"
    compile: bool | Mapping[str, Any] = False
    tiers: str | BlockStore | Sequence[str | BlockStore] = ()
    seal: Seal | None = None
    model_id: str | None = None
    cross_stack: bool = False
    role: Role | None = None
    kv_events: str | KVEvents | None = None
    mode: ModeName = "paged"
    record: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        shown = arguments.shown
        arguments.flag("prefix_cache", self.prefix_cache)
        arguments.count("max_num_seqs", self.max_num_seqs, at_least=1)
        check_eviction(self.eviction)
        if self.forward not in get_args(Forward):
            error = ValueError if isinstance(self.forward, str) else TypeError
            raise error(
                f"forward={shown(self.forward)}: expected one of {listed(get_args(Forward))}."
            )
        if not isinstance(self.compile, bool | Mapping):
            raise TypeError(
                f"compile={shown(self.compile)}: expected a bool, or a dict for torch.compile."
            )
        if self.compile:
            require_no_cuda_graphs(self.compile_arguments)
        if self.costs is not None and not isinstance(self.costs, PreemptionCosts):
            raise TypeError(f"costs={shown(self.costs)}: expected PreemptionCosts or None.")
        self._check_record()
        self._check_tiers()
        self._check_role()
        self._check_mode()
        if self.published_events is not None and not self.prefix_cache:
            raise ValueError("kv_events: they report cached prompts. Leave out prefix_cache=False.")

    def _check_record(self) -> None:
        if self.record is not None and not isinstance(self.record, str | os.PathLike):
            shown = arguments.shown(self.record)
            raise TypeError(f"record={shown}: expected the path of a file, or None.")
        if self.record is not None and self.mode == "reserved":
            raise ValueError(
                "record: mode='reserved' cannot be recorded. Record mode='paged': its report shows "
                "reserved regions, too."
            )

    def _check_tiers(self) -> None:
        arguments.label("model_id", self.model_id)
        if self.seal is not None and not callable(getattr(self.seal, "unseal", None)):
            raise TypeError(f"seal={arguments.shown(self.seal)}: expected a Seal or None.")
        if self._stores and not self.prefix_cache:
            raise ValueError("tiers: they keep cached prefixes. Leave out prefix_cache=False.")
        for name in ("seal", "model_id"):
            if not self.tiers and getattr(self, name) is not None:
                raise ValueError(f"{name}: of use with tiers only. Pass tiers=, or leave it out.")
        if arguments.flag("cross_stack", self.cross_stack):
            check_shared(self._stores, self.model_id)
            if self.seal is not None:
                raise ValueError("cross_stack: other stacks have no seal. Leave out seal=.")

    def _check_role(self) -> None:
        role, roles = self.role, get_args(Role)
        if role is None:
            return
        if role not in roles:
            error = ValueError if isinstance(role, str) else TypeError
            raise error(f"role={arguments.shown(role)}: expected one of {listed(roles)}, or None.")
        if are_private(self._stores):
            raise ValueError(
                f"role={role!r}: no other process reads the tiers of this engine. "
                'Pass tiers= with a store that both share, such as "valkey://cache:6379".'
            )

    def _check_mode(self) -> None:
        if not isinstance(self.mode, str):
            raise TypeError(f"mode={arguments.shown(self.mode)}: expected a str.")
        mode_named(self.mode)
        if self.mode != "reserved":
            return
        for name, default in (
            ("host_memory", None), ("tiers", ()), ("kv_events", None), ("eviction", "lru")
        ):  # fmt: skip
            if getattr(self, name) != default:
                raise ValueError(
                    f'{name}: mode="reserved" does not support it. Leave {name} out, or pass '
                    'mode="paged".'
                )

    @property
    def _stores(self) -> tuple[str | BlockStore, ...]:
        return checked_tiers(self.tiers, with_host=self.host_memory is not None)

    @classmethod
    def of(cls, config: EngineConfig | None, overrides: Mapping[str, Any]) -> EngineConfig:
        """Return `config`, or the defaults, with `overrides` applied. O(settings).

        Raises: `TypeError` for an unknown setting, or a `config` of another type.
        """
        if config is not None and not isinstance(config, EngineConfig):
            raise TypeError(
                f"config={arguments.shown(config)}: expected an EngineConfig. Pass single settings "
                "by keyword, such as memory='4GiB'."
            )
        known = [field.name for field in dataclasses.fields(cls)]
        for name in overrides:
            if name not in known:
                names = [*known, *_BESIDE]
                closest = difflib.get_close_matches(name, names, 1)
                meant = f" Did you mean {closest[0]}?" if closest else ""
                raise TypeError(
                    f"{name}: unknown engine setting. Known settings: {', '.join(names)}.{meant}"
                )
        return dataclasses.replace(config or cls(), **overrides)

    @property
    def published_events(self) -> KVEvents | None:
        """The settings of `kv_events`."""
        return None if self.kv_events is None else KVEvents.of(self.kv_events)

    @property
    def compile_arguments(self) -> dict[str, Any]:
        """The arguments of `torch.compile`."""
        return {} if isinstance(self.compile, bool) else dict(self.compile)


def require_no_cuda_graphs(arguments: Mapping[str, Any]) -> None:
    """Raise `ValueError` if arguments of `torch.compile` request CUDA graphs. O(1).

    torch keeps its CUDA graph trees in thread-local state of the main thread and of autograd's
    threads. In the engine's thread, the compiled forward pass would fail an assertion.
    """
    asked = _asking(arguments)
    if asked is not None:
        raise ValueError(
            f"compile={{{asked}}}: torch cannot record CUDA graphs in the engine's thread. "
            "Use mode='default' or mode='max-autotune-no-cudagraphs'."
        )


def _asking(arguments: Mapping[str, Any]) -> str | None:
    """Return the argument that requests CUDA graphs as text, or None."""
    from torch._inductor import config, list_mode_options

    backend, mode = arguments.get("backend", "inductor"), arguments.get("mode")
    options = arguments.get("options") or {}
    if backend == "cudagraphs":
        return "'backend': 'cudagraphs'"
    if backend != "inductor":
        return None
    if _CUDA_GRAPHS in options:
        return f"'options': {{{_CUDA_GRAPHS!r}: True}}" if options[_CUDA_GRAPHS] else None
    if isinstance(mode, str) and list_mode_options().get(mode, {}).get(_CUDA_GRAPHS):
        return f"'mode': {mode!r}"
    if config.triton.cudagraphs:
        return "torch._inductor.config.triton.cudagraphs"
    return None

"""Where an engine publishes its KV events, and in which form."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal, get_args

from kvpager import _validate as arguments
from kvpager._text import listed

BlockHashes = Literal["kvpager", "sha256", "sha256_cbor"]
Encoding = Literal["maps", "arrays"]

_TCP = re.compile(r"tcp://(\[[^\]]+\]|[^:\[\]]+):(\d+)")


@dataclass(frozen=True)
class KVEvents:
    """The settings of published KV events.

    Args:
        endpoint: ZeroMQ address of the events, such as "tcp://127.0.0.1:5557" or "ipc:///path". A
            port of 0 lets the system choose one.
        replay_endpoint: address where routers ask for batches that they missed; None for none.
        topic: what routers subscribe to. llm-d reads the pod and the model from it.
        block_hashes: `"kvpager"` names blocks by content keys. `"sha256"` and `"sha256_cbor"` are
            vLLM's hashes, for routers that compute these themselves.
        int_hashes: send the last 64 bits of a hash as an int, as vLLM does by default. False sends
            all 32 bytes.
        encoding: `"maps"` as vLLM from 0.24 on; `"arrays"` as vLLM before.
        rank: the data-parallel rank that events name.
        lora_paths: for vLLM's hashes, the path of each LoRA adapter by its name.
        connect: connect to a router that binds `endpoint`, in place of binding it.
        any_host: allow addresses that other machines reach. Events hold the tokens of all prompts,
            and are not encrypted.
        interval_s: seconds between two batches, at most 1.
        queue_size: maximum number of batches that wait for a router. A slower router misses some.
        replay_memory: bytes of sent batches to keep for `replay_endpoint`.
        num_events: how many events the manager keeps from one batch to the next. If there are more,
            all cached blocks are sent again.

    Raises: `TypeError`, `ValueError` for settings of a wrong type or value.
    """

    endpoint: str
    _: KW_ONLY
    replay_endpoint: str | None = None
    topic: str = ""
    block_hashes: BlockHashes = "kvpager"
    int_hashes: bool = True
    encoding: Encoding = "maps"
    rank: int = 0
    lora_paths: Mapping[str, str] = field(default_factory=dict)
    connect: bool = False
    any_host: bool = False
    interval_s: float = 0.05
    queue_size: int = 10_000
    replay_memory: int | str = "64MiB"
    num_events: int = 10_000

    def __post_init__(self) -> None:
        for name in ("int_hashes", "connect", "any_host"):
            arguments.flag(name, getattr(self, name))
        _one_of("block_hashes", self.block_hashes, get_args(BlockHashes))
        _one_of("encoding", self.encoding, get_args(Encoding))
        if not isinstance(self.topic, str):
            raise TypeError(f"topic={arguments.shown(self.topic)}: expected a str")
        arguments.count("rank", self.rank)
        arguments.number("interval_s", self.interval_s, at_least=0.001, at_most=1)
        arguments.count("queue_size", self.queue_size, at_least=1)
        arguments.count("num_events", self.num_events, at_least=1)
        if arguments.parse_memory(self.replay_memory, "replay_memory") is None:
            raise TypeError("replay_memory=None: expected bytes or a text such as '64MiB'")
        self._check_address("endpoint", self.endpoint)
        if self.replay_endpoint is not None:
            self._check_address("replay_endpoint", self.replay_endpoint)

    @classmethod
    def of(cls, value: str | KVEvents) -> KVEvents:
        """Return settings as they are, or make them for an address. Raises: as the class."""
        if isinstance(value, str):
            return cls(value)
        if not isinstance(value, KVEvents):
            shown = arguments.shown(value)
            raise TypeError(f"kv_events={shown}: expected an address or KVEvents(...)")
        return value

    def _check_address(self, name: str, address: str) -> None:
        if not isinstance(address, str):
            raise TypeError(f"{name}={arguments.shown(address)}: expected a str")
        if address.startswith("ipc://") and len(address) > len("ipc://"):
            return
        found = _TCP.fullmatch(address)
        if found is None or int(found[2]) > 0xFFFF:
            raise ValueError(
                f'{name}={address!r}: expected "tcp://127.0.0.1:5557" or "ipc:///path".'
            )
        if not self.any_host and not _is_loopback(found[1]):
            raise ValueError(
                f"{name}={address!r}: other machines could read the tokens of all prompts. Use "
                "127.0.0.1, or KVEvents(..., any_host=True) in a network that you trust."
            )


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        error = ValueError if isinstance(value, str) else TypeError
        raise error(f"{name}={arguments.shown(value)}: expected one of {listed(allowed)}.")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"

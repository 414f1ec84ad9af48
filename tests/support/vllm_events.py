"""What vLLM calls the blocks of some prompts, and the bytes in which it publishes them.

.venv-vllm/bin/python -m tests.support.vllm_events      # make new records
"""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

RECORDS = Path(__file__).with_name("vllm_events.json")
BLOCK_SIZE = 4
TIME = 1_700_000_000.25
ALGORITHMS = ("sha256", "sha256_cbor")
_ONE, _TWO = bytes(range(32)), bytes(range(100, 132))


class Prompt(NamedTuple):
    tokens: list[int]
    salt: str | None = None
    lora: str | None = None
    lora_path: str = "adapters/math"
    images: tuple[tuple[int, int, bytes], ...] = ()

    @property
    def key(self) -> dict[str, Any]:
        """The arguments of `BlockManager.allocate`."""
        return {"namespace": self.salt, "lora": self.lora, "mm_hashes": self.images}


# Numbers of every length in pickle and CBOR; texts and images in every place.
PROMPTS = {
    "plain": Prompt([0, 1, 23, 24, 255, 256, 65_535, 65_536, 151_644, 2**31 - 1, 7, 7, 9]),
    "salted": Prompt(list(range(8)), salt="alice"),
    "long salt": Prompt(list(range(8)), salt="é" * 200),
    "lora": Prompt(list(range(8)), lora="math"),
    "image": Prompt([*range(3), *[9] * 6, *range(3)], images=((3, 9, _ONE),)),
    "two images": Prompt([9] * 8, images=((0, 2, _ONE), (2, 7, _TWO))),
    "all": Prompt([9] * 12, salt="bob", lora="math", images=((1, 3, _ONE), (3, 6, _TWO))),
}


@contextmanager
def _bytes_shown(shown: bool) -> Any:
    name = "VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES"
    os.environ[name] = "0" if shown else "1"
    try:
        yield
    finally:
        del os.environ[name]


def vllm_events(prompt: Prompt, algorithm: str, *, int_hashes: bool) -> tuple[list[bytes], Any]:
    """Return vLLM's block hashes of a prompt, and its events when the blocks are cached."""
    from vllm.lora.request import LoRARequest
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    function = get_hash_fn_by_name(algorithm)
    init_none_hash(function)
    images = [
        MultiModalFeatureSpec(None, "image", digest.hex(), PlaceholderRange(start, stop - start))
        for start, stop, digest in prompt.images
    ]
    request = Request(
        request_id="a",
        prompt_token_ids=prompt.tokens,
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        mm_features=images or None,
        lora_request=prompt.lora and LoRARequest(prompt.lora, 1, prompt.lora_path),
        cache_salt=prompt.salt,
        block_hasher=get_request_block_hasher(BLOCK_SIZE, function),
    )
    pool = BlockPool(64, True, BLOCK_SIZE, enable_kv_cache_events=True)
    count = len(prompt.tokens) // BLOCK_SIZE
    with _bytes_shown(not int_hashes):
        pool.cache_full_blocks(request, pool.get_new_blocks(count), 0, count, BLOCK_SIZE, 0)
    events = pool.take_events()
    for event in events:
        event.lora_id = None  # kvpager has names alone
        event.kv_cache_spec_kind = "full_attention"  # KVCacheManager.take_events fills it in
    return [bytes(each) for each in request.block_hashes], events


def vllm_payload(events: list[Any]) -> bytes:
    """Return what vLLM sends of events."""
    import msgspec
    from vllm.distributed.kv_events import KVEventBatch

    return msgspec.msgpack.Encoder().encode(KVEventBatch(TIME, events, 0))


def vllm_record() -> dict[str, Any]:
    """Return hashes and payloads of vLLM as it is installed, the bytes as hexadecimal digits."""
    import vllm
    from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved

    hashes: dict[str, Any] = {algorithm: {} for algorithm in ALGORITHMS}
    payloads = {}
    for name, prompt in PROMPTS.items():
        for algorithm in ALGORITHMS:
            found, events = vllm_events(prompt, algorithm, int_hashes=algorithm == "sha256")
            hashes[algorithm][name] = [each.hex() for each in found]
            payloads[f"{name}, {algorithm}"] = vllm_payload(events).hex()
    last = int(hashes["sha256"]["plain"][-1][-16:], 16)
    others = {"removed": BlockRemoved([last], "GPU", 0), "cleared": AllBlocksCleared()}
    payloads |= {name: vllm_payload([event]).hex() for name, event in others.items()}
    return {"vllm": vllm.__version__, "hashes": hashes, "maps": payloads}


if __name__ == "__main__":
    records = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
    RECORDS.write_text(json.dumps(records | vllm_record(), indent=1) + "\n")

"""Runs one stack over a store that another stack uses, and prints what it answered.

    python -m tests.support.vllm_sharing MODEL '{"stack": "vllm", "tiers": [...], "prompts": [...]}'

`stack` is "vllm", "engine" or "patch"; a prompt is its seed, its length and its salt. Prints one
line of JSON: for each prompt the tokens and the number of cached tokens, and what the log said of
the self-test. With `dump`, the blocks that vLLM saved and loaded are written to that file, in the
common layout.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.support.vllm_scenarios import ENVIRONMENT, tokens

COUNT = 8  # tokens of a reply


def ask_vllm(model: str, given: dict[str, Any]) -> Callable[..., tuple[list[int], int]]:
    os.environ.update(
        {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    )
    from vllm import LLM, SamplingParams

    from kvpager.integrations.vllm import offload, run_probe

    llm = LLM(
        model,
        skip_tokenizer_init=True,
        dtype=given["dtype"],
        max_model_len=2048,
        enforce_eager=True,
        block_size=given["block_size"] // given["per_chunk"],
        num_gpu_blocks_override=400,
        max_num_batched_tokens=4096,
        disable_log_stats=False,
        hf_overrides=given.get("hf_overrides"),
        kv_transfer_config=offload(
            "128MiB",
            tiers=given["tiers"],
            model_id=given["model_id"],
            synchronous=True,
            cross_stack=True,
            blocks_per_chunk=given["per_chunk"],
        ),
    )
    run_probe(llm)
    settings = SamplingParams(max_tokens=COUNT, temperature=0, ignore_eos=True, detokenize=False)

    def ask(prompt: list[int], salt: str | None) -> tuple[list[int], int]:
        request: dict[str, Any] = {"prompt_token_ids": prompt}
        if salt is not None:
            request["cache_salt"] = salt
        [output] = llm.generate([request], settings, use_tqdm=False)
        return list(output.outputs[0].token_ids), output.num_cached_tokens

    return ask


def ask_engine(model: str, given: dict[str, Any]) -> Callable[..., tuple[list[int], int]]:
    from transformers import AutoModelForCausalLM

    from kvpager import Engine
    from tests.support.tiered_engines import DEAR, patient_tiering

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=given["dtype"])
    with patient_tiering():
        engine = Engine(
            loaded,
            memory="64MiB",
            block_size=given["block_size"],
            tiers=given["tiers"],
            model_id=given["model_id"],
            cross_stack=True,
            costs=DEAR,
        )

    def ask(prompt: list[int] | None, salt: str | None = None) -> tuple[list[int], int]:
        if prompt is None:
            engine.close()
            return [], 0
        stream = engine.submit(prompt, max_new_tokens=COUNT, do_sample=False, namespace=salt)
        output = stream.result(120)
        return output.token_ids, output.num_cached_tokens

    return ask


def ask_patch(model: str, given: dict[str, Any]) -> Callable[..., tuple[list[int], int]]:
    import torch
    from transformers import AutoModelForCausalLM

    import kvpager
    from tests.support.tiered_engines import DEAR, patient_tiering

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=given["dtype"])
    with patient_tiering():
        patch = kvpager.patch(
            loaded,
            block_size=given["block_size"],
            prefix_cache=True,
            tiers=given["tiers"],
            model_id=given["model_id"],
            cross_stack=True,
            costs=DEAR,
        )

    def ask(prompt: list[int] | None, salt: str | None = None) -> tuple[list[int], int]:
        if prompt is None:
            patch.undo()
            return [], 0
        before = patch.tiers.stats().tiers[0].store.hits
        ids = torch.tensor([prompt])
        written = loaded.generate(ids, max_new_tokens=COUNT, min_new_tokens=COUNT, do_sample=False)
        hits = patch.tiers.stats().tiers[0].store.hits - before
        return written[0, len(prompt) :].tolist(), hits * given["block_size"]

    return ask


class Dump:
    """Keeps what vLLM's pages hold after each load and at each save, in the common layout."""

    def __init__(self, spoil: bool) -> None:
        from kvpager.integrations.vllm import synchronous, worker

        self.blocks: dict[str, list[Any]] = {"saved": [], "loaded": []}
        kind = worker.KvpagerOffloadingWorker
        store, load = kind.submit_store, kind.submit_load

        def submit_store(this: Any, job: int, device: Any, host: Any) -> bool:
            done = store(this, job, device, host)
            self.blocks["saved"] += [this._memory.rows[slot].copy() for slot in host.block_ids]
            return done

        def submit_load(this: Any, job: int, host: Any, device: Any) -> bool:
            load(this, job, host, device)
            rows = this._memory.rows
            kept = [rows[slot].copy() for slot in host.block_ids]
            rows[host.block_ids] = 0
            store(this, job, device, host)  # as vLLM's own code reads the pages
            self.blocks["loaded"] += [rows[slot].copy() for slot in host.block_ids]
            for slot, row in zip(host.block_ids, kept, strict=True):
                rows[slot] = row
            return True

        kind.submit_store, kind.submit_load = submit_store, submit_load  # type: ignore[method-assign]
        if spoil:  # heads exchange their keys
            find = synchronous.page_orders

            def page_orders(*args: Any) -> list[Any]:
                return [each._replace(keys=np.roll(each.keys, 64)) for each in find(*args)]

            synchronous.page_orders = page_orders  # type: ignore[assignment]

    def write(self, path: str) -> None:
        np.savez(path, **{name: np.array(blocks) for name, blocks in self.blocks.items()})


def main() -> None:
    model, given = sys.argv[1], json.loads(sys.argv[2])
    given = {"dtype": "float32", "block_size": 32, "per_chunk": 1, "model_id": "m", **given}
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("kvpager")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    dump = Dump(given.get("spoil", False)) if given["stack"] == "vllm" else None
    makers = {"vllm": ask_vllm, "engine": ask_engine, "patch": ask_patch}
    ask = makers[given["stack"]](model, given)
    answers = []
    for seed, length, salt in given["prompts"]:
        found, cached = ask(tokens(seed, length), salt)
        answers.append({"tokens": found, "cached": cached})
    if dump is None:
        ask(None)
    elif "dump" in given:
        dump.write(given["dump"])
    print(json.dumps({"answers": answers, "said": [each for each in said if "differ" in each]}))


if __name__ == "__main__":
    main()

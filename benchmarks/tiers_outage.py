"""The part `outage` of benchmarks/tiers.py: throughput while the server of a tier is stopped."""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import redis
import torch
from transformers import LlamaForCausalLM

from benchmarks.tiers_engine import BLOCK_SIZE, ROWS, llama, token_bytes, tokens
from benchmarks.tiers_rig import add, valkey_server
from kvpager import Engine

PROMPT = 256  # tokens of a request
OPENS_WITHIN_S = 60


def outage(args: argparse.Namespace) -> None:
    """Serve the same new requests in turns: without a tier, with a server, with a stopped one."""
    torch.set_num_threads(args.threads)
    model = llama(args.layers)
    with ExitStack() as stack:
        urls = {name: stack.enter_context(valkey_server()) for name in ("working", "stopped")}
        if not all(urls.values()):
            return
        engines = {"without": stack.enter_context(new_engine(model, [], args.steps))}
        for name, each in urls.items():
            engine = new_engine(model, [each["unix"]], args.steps)
            engines[name] = stack.enter_context(engine)
        stack.enter_context(stopped(urls["stopped"]["unix"]))
        open_breaker(engines["stopped"])
        rates = _turns(engines, args.steps, args.repeats)
        assert is_bypassed(engines["stopped"])
        assert not is_bypassed(engines["working"])
    _report(rates, args)


def new_engine(model: LlamaForCausalLM, tiers: list[str], num_new: int) -> Engine:
    """Return an engine with room for two batches."""
    length = PROMPT + num_new + BLOCK_SIZE
    memory = 2 * ROWS * length * token_bytes(model.config.num_hidden_layers)
    if tiers:
        return Engine(model, memory=memory, model_id="benchmark", tiers=tiers)
    return Engine(model, memory=memory)


@contextmanager
def stopped(url: str) -> Iterator[None]:
    """Stop the process of a server: it takes connections, and answers nothing."""
    with redis.Redis.from_url(url) as client:
        process = client.info("server")["process_id"]
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


def is_bypassed(engine: Engine) -> bool:
    stats = engine.stats().tiers
    assert stats is not None
    return stats.tiers[0].bypassed


def open_breaker(engine: Engine) -> None:
    """Serve requests until the store is bypassed. Raises: `TimeoutError`."""
    limit, seed = time.monotonic() + OPENS_WITHIN_S, -1
    while not is_bypassed(engine):
        if time.monotonic() > limit:
            raise TimeoutError(f"the store was not bypassed within {OPENS_WITHIN_S} s")
        serve(engine, [tokens(PROMPT, seed=seed)], num_new=1)
        seed -= 1


def serve(engine: Engine, prompts: list[list[int]], num_new: int) -> float:
    """Return the seconds of a batch."""
    start = time.perf_counter()
    streams = [engine.submit(each, max_new_tokens=num_new, do_sample=False) for each in prompts]
    for stream in streams:
        stream.result()
    return time.perf_counter() - start


def _turns(engines: dict[str, Engine], num_new: int, repeats: int) -> dict[str, list[float]]:
    """Return the tokens per second of each turn, after one turn that is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in engines}
    order = list(engines)
    for turn in range(repeats + 1):
        prompts = [tokens(PROMPT, seed=turn * ROWS + row) for row in range(ROWS)]
        for name in order:
            seconds = serve(engines[name], prompts, num_new)
            if turn:
                rates[name].append(ROWS * num_new / seconds)
        order.append(order.pop(0))  # each has each place
    return rates


def _report(rates: dict[str, list[float]], args: argparse.Namespace) -> None:
    setting = {"rows": ROWS, "prompt": PROMPT, "new": args.steps, "threads": args.threads}
    for name, each in rates.items():
        add(f"outage_{name}", statistics.median(each), "tokens/s", **setting)
    for name, shown in (("working", "outage_working_of_without"), ("stopped", "outage_of_without")):
        ratios = [a / b for a, b in zip(rates[name], rates["without"], strict=True)]
        add(shown, statistics.median(ratios), "ratio")

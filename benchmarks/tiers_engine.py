"""The parts of benchmarks/tiers.py that serve a model: time to the first token, and of a step.

A Llama of 8 layers with random weights, the same in every process: 16 KiB of keys and values for a
token.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import redis
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import tiers_rig
from benchmarks.tiers_rig import (
    BATCH,
    NEVER,
    RawClient,
    add,
    batches,
    keys_of,
    staging,
    valkey_server,
)
from kvpager import Engine
from kvpager.engine.metrics import StepRecord
from kvpager.scheduling.preemption import PreemptionCosts
from kvpager.storage.tiers.layout import BlockLayout
from kvpager.storage.tiers.protocol import BlockStore
from kvpager.storage.tiers.urls import open_store

VOCAB, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 8000, 4, 64, 16
ROWS, RATE = 8, 100e6  # of a batch that decodes; bytes a second
WARM = 64  # tokens that an engine has computed before it is measured
# A fetch is always worth it, also with the small models of a test.
DEAR = PreemptionCosts(seconds_per_token=1)
LEAST_S = 0.05  # that the goal allows beside the transfer


def llama(layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None  # a batch decodes until its end
    return model


def token_bytes(layers: int) -> int:
    return 2 * layers * KV_HEADS * HEAD_DIM * 4


def tokens(count: int, seed: int) -> list[int]:
    ids = torch.randint(1, VOCAB, (count,), generator=torch.Generator().manual_seed(seed))
    return list(ids.tolist())


def engine_over(model: LlamaForCausalLM, tiers: list[str], prompt: int) -> Engine:
    """Return an engine with room for `prompt` tokens and little more, which has computed some."""
    layers = model.config.num_hidden_layers
    options: dict[str, Any] = {"model_id": "benchmark", "tiers": tiers} if tiers else {}
    memory = (prompt + WARM + BLOCK_SIZE) * token_bytes(layers)
    engine = Engine(model, memory=memory, costs=DEAR, **options)
    ask(engine, tokens(WARM, seed=1))
    return engine


class Answer(NamedTuple):
    """The first token of a prompt, and what it took."""

    seconds: float
    num_cached: int
    token: int


def ask(engine: Engine, prompt: list[int]) -> Answer:
    start = time.perf_counter()
    stream = engine.submit(prompt, max_new_tokens=1, do_sample=False)
    token = next(iter(stream)).id
    seconds = time.perf_counter() - start
    return Answer(seconds, stream.result().num_cached_tokens, token)


def wait_for_saves(engine: Engine, prompt: int) -> None:
    """Wait until every tier has the blocks of what was computed. Raises: `TimeoutError`."""
    num_blocks, limit = (WARM + prompt) // BLOCK_SIZE, time.monotonic() + 60
    while True:
        stats = engine.stats().tiers
        assert stats is not None
        if all(tier.store.saved + tier.store.known >= num_blocks for tier in stats.tiers):
            return
        if time.monotonic() > limit:
            raise TimeoutError(f"{num_blocks} blocks were not saved in a minute: {stats}")
        time.sleep(0.01)


# -------------------------------------------------------------------- the first token


def first_token(args: argparse.Namespace) -> None:
    """Ask for one prompt in turns: computed, and from each tier by an engine that starts empty."""
    torch.set_num_threads(args.threads)
    capacity = 8 * (args.prompt + WARM) * token_bytes(args.layers)
    with valkey_server() as urls, tempfile.TemporaryDirectory(dir=args.folder) as folder:
        tiers = urls | {"disk": f"disk:{folder}/kv?capacity={capacity}&admit=always"}
        # Another process computes and saves.
        shared = [url for name, url in tiers.items() if name != "unix"]  # the server's other URL
        settings = json.dumps([shared, args.prompt, args.layers, args.threads])
        subprocess.run([sys.executable, __file__, settings], check=True)
        model, prompt = llama(args.layers), tokens(args.prompt, seed=0)
        with engine_over(model, [f"host:{capacity}"], args.prompt) as host:
            ask(host, prompt)
            wait_for_saves(host, args.prompt)
            works = {
                "computed": lambda: ask_once(model, [], prompt),
                "host": lambda: ask_again(host, prompt),
                "device": lambda: ask(host, prompt),  # all of it is still there
            }
            for name, url in tiers.items():
                works[f"{name}_new_engine"] = lambda url=url: ask_once(model, [url], prompt)
            raw = {name: RawReader(url, args.prompt // BLOCK_SIZE) for name, url in urls.items()}
            with contextlib.ExitStack() as engines:
                for name, url in urls.items():
                    engine = engines.enter_context(engine_over(model, [url], args.prompt))
                    works[name] = lambda engine=engine: ask_again(engine, prompt)
                answers, raw_seconds = _turns(works, raw, args.repeats)
    _report(answers, raw_seconds, args)


def fill(urls: list[str], prompt: int, layers: int, threads: int) -> None:
    """Compute the prompt, and save its blocks in every tier."""
    torch.set_num_threads(threads)
    with engine_over(llama(layers), urls, prompt) as engine:
        ask(engine, tokens(prompt, seed=0))
        wait_for_saves(engine, prompt)


def ask_once(model: LlamaForCausalLM, tiers: list[str], prompt: list[int]) -> Answer:
    """Ask a new engine."""
    with engine_over(model, tiers, len(prompt)) as engine:
        return ask(engine, prompt)


def ask_again(engine: Engine, prompt: list[int]) -> Answer:
    """Ask after a longer prompt, which takes all blocks of the device."""
    ask(engine, tokens(len(prompt) + WARM, seed=2))
    return ask(engine, prompt)


class RawReader:
    """Reads blocks from a server, with `recv_into` alone."""

    def __init__(self, url: str, count: int) -> None:
        with redis.Redis.from_url(url.replace("valkey://", "redis://")) as client:
            names = client.keys("kvp1:*")[:count]
            self._value_bytes = client.strlen(names[0])
        self._keys = [name.removeprefix(b"kvp1:") for name in names]
        self._client = RawClient(url)
        self._memory = staging(BATCH * (self._value_bytes + 32))

    def __call__(self) -> float:
        """Return the seconds for all blocks."""
        start = time.perf_counter()
        for batch in batches(self._keys):
            self._client.load(batch, self._value_bytes, self._memory)
        return time.perf_counter() - start


Answers = dict[str, list[Answer]]
Seconds = dict[str, list[float]]


def _turns(
    works: dict[str, Callable[[], Answer]], raw: dict[str, RawReader], repeats: int
) -> tuple[Answers, Seconds]:
    """Run each work and its raw reader once per turn, after one turn that is not counted."""
    answers: Answers = {name: [] for name in works}
    seconds: Seconds = {name: [] for name in raw}
    for turn in range(repeats + 1):
        for name, work in works.items():
            answer, raw_s = work(), raw[name]() if name in raw else math.nan
            if turn:
                answers[name].append(answer)
                if name in raw:
                    seconds[name].append(raw_s)
    return answers, seconds


def _report(answers: Answers, raw_seconds: Seconds, args: argparse.Namespace) -> None:
    assert len({answer.token for each in answers.values() for answer in each}) == 1
    computed = [answer.seconds for answer in answers.pop("computed")]
    add = partial(tiers_rig.add, threads=args.threads)
    add("first_token_computed", statistics.median(computed) * 1e3, "ms", tokens=args.prompt)
    for name, each in answers.items():
        seconds = [answer.seconds for answer in each]
        cached = min(answer.num_cached for answer in each)
        add(f"first_token_{name}", statistics.median(seconds) * 1e3, "ms", cached_tokens=cached)
        ratios = [a / b for a, b in zip(seconds, computed, strict=True)]
        add(f"first_token_{name}_of_computed", statistics.median(ratios), "ratio")
        if raw := raw_seconds.get(name.removesuffix("_new_engine")):
            if name in raw_seconds:
                add(f"first_token_{name}_raw", statistics.median(raw) * 1e3, "ms")
            ratios = [a / (1.3 * b + LEAST_S) for a, b in zip(seconds, raw, strict=True)]
            add(f"first_token_{name}_of_goal", statistics.median(ratios), "ratio")


# -------------------------------------------------------------------- the steps


def steps(args: argparse.Namespace) -> None:
    """Decode a batch in turns: alone, and while a thread loads or saves 100 MB/s."""
    torch.set_num_threads(args.threads)
    layout = BlockLayout("benchmark", BLOCK_SIZE * token_bytes(args.layers))
    capacity = 8 * BATCH * layout.block_bytes
    model = llama(args.layers)
    with valkey_server() as urls, tempfile.TemporaryDirectory(dir=args.folder) as folder:
        places = {"disk": f"disk:{folder}/kv?capacity={capacity}&admit=always"}
        if urls:
            places["valkey"] = f"{urls['tcp']}?timeout_s=60"
        for name, url in places.items():
            with contextlib.closing(open_store(url, layout=layout)) as store:
                _steps(name, model, store, layout.block_bytes, args)


def _steps(
    name: str,
    model: LlamaForCausalLM,
    store: BlockStore,
    block_bytes: int,
    args: argparse.Namespace,
) -> None:
    keys = keys_of(4 * BATCH)
    memory = staging(BATCH * block_bytes)
    blocks = [memory[n * block_bytes : (n + 1) * block_bytes] for n in range(BATCH)]

    def load(batch: list[bytes]) -> None:
        assert not store.load(batch, blocks, NEVER).any()

    def save(batch: list[bytes]) -> None:
        store.drop(batch)
        assert not store.save(batch, blocks, NEVER).any()

    for batch in batches(keys):
        save(batch)
    moves = {"alone": None, "load": load, "save": save}
    found: Seconds = {what: [] for what in moves}
    rates: Seconds = {what: [] for what in moves}
    decoder = Decoder(model, args.steps)
    with decoder.engine:
        for turn in range(args.repeats + 1):
            for what, move in moves.items():
                with moving(move, keys, block_bytes) as rate:
                    median = decoder.median_step()
                if turn:
                    found[what].append(median)
                    rates[what].extend(rate)
    for what, medians in found.items():
        more = {"mb_per_s": round(statistics.median(rates[what]) / 1e6)} if rates[what] else {}
        add(f"step_{name}_{what}", statistics.median(medians) * 1e3, "ms", **more)
        if what != "alone":
            ratios = [a / b for a, b in zip(medians, found["alone"], strict=True)]
            add(f"step_{name}_{what}_of_alone", statistics.median(ratios), "ratio")


class Decoder:
    """Decodes batches of equal length, and times their steps."""

    def __init__(self, model: LlamaForCausalLM, num_steps: int) -> None:
        length = WARM + num_steps + BLOCK_SIZE
        memory = 2 * ROWS * length * token_bytes(model.config.num_hidden_layers)
        self.engine = Engine(model, memory=memory, on_step=self._note)
        self._num_steps = num_steps
        self._stamps: list[tuple[float, bool]] = []

    def _note(self, step: StepRecord) -> None:
        is_full = step.rows == step.tokens == ROWS
        self._stamps.append((time.perf_counter(), is_full))

    def median_step(self) -> float:
        """Return the median seconds from a step of all rows to the next, in one batch."""
        self._stamps.clear()
        streams = [
            self.engine.submit(
                tokens(WARM, seed=row), max_new_tokens=self._num_steps, do_sample=False
            )
            for row in range(ROWS)
        ]
        for stream in streams:
            stream.result()
        pairs = zip(self._stamps, self._stamps[1:], strict=False)
        return statistics.median(end - start for (start, a), (end, b) in pairs if a and b)


@contextlib.contextmanager
def moving(
    move: Callable[[list[bytes]], None] | None, keys: list[bytes], block_bytes: int
) -> Iterator[list[float]]:
    """Move batches of `keys` in a thread, at most `RATE`. The rate is yielded, once it is known."""
    rates, stop = list[float](), threading.Event()
    if move is None:
        yield rates
        return

    def run() -> float:
        start, num_bytes = time.perf_counter(), 0
        for batch in itertools.cycle(batches(keys)):
            move(batch)
            num_bytes += len(batch) * block_bytes
            if stop.wait(max(0.0, start + num_bytes / RATE - time.perf_counter())):
                break
        return num_bytes / (time.perf_counter() - start)

    with ThreadPoolExecutor(1) as threads:
        work = threads.submit(run)
        try:
            yield rates
        finally:
            stop.set()
    rates.append(work.result())


if __name__ == "__main__":
    fill(*json.loads(sys.argv[1]))

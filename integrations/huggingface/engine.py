"""Continuous batching of a transformers model: requests come and go while others are computed.

    with kvpager.Engine(model, memory="4GiB") as engine:
        outputs = engine.generate(prompts, max_new_tokens=128)
        for token in engine.submit(prompt, do_sample=True, temperature=0.8):
            print(token.id)

The engine's thread repeats four things: the scheduler plans a step (Orca's iteration-level
scheduling, Yu et al., 2022), `ModelRunner` computes it, `LogitsSampler` chooses the next tokens,
and streams deliver them.
"""

from __future__ import annotations

import functools
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm
from transformers import GenerationConfig

from kvpager import _validate as arguments
from kvpager._atomic import Uninterrupted, new_lock
from kvpager._text import counted, size
from kvpager.blocks.quotas import NamespaceQuotas
from kvpager.engine.config import EngineConfig
from kvpager.engine.core import EngineCore
from kvpager.engine.detokenizer import text_tokenizer
from kvpager.engine.metrics import EngineStats, StepRecord
from kvpager.engine.stream import Output, Stream
from kvpager.errors import KVPagerError
from kvpager.integrations.huggingface.cache.budget import Budget
from kvpager.integrations.huggingface.model_state.fingerprint import ModelWatch
from kvpager.integrations.huggingface.releases import warn_if_untested
from kvpager.integrations.huggingface.runner import warm_up as warming
from kvpager.integrations.huggingface.runner.build import (
    costs_of,
    make_runner,
    make_scheduler,
    max_length_of,
    record_of,
)
from kvpager.integrations.huggingface.runner.model_info import inspect_model
from kvpager.integrations.huggingface.runner.probe import AttentionSwitch, choose_forward
from kvpager.integrations.huggingface.runner.prompt_reader import (
    PromptReader,
    decoder_start,
    options_per_prompt,
    prompt_argument,
)
from kvpager.integrations.huggingface.runner.sampling import (
    LogitsSampler,
    SamplingSettings,
    SettingsMaker,
)
from kvpager.integrations.huggingface.runner.setting_checks import refuse_request_settings
from kvpager.integrations.huggingface.runner.sizing import pool_blocks, require_room
from kvpager.integrations.huggingface.runner.tiers import open_tiers, refuse_tiers, start_with_tiers
from kvpager.integrations.huggingface.runner.wrappers import unwrapped
from kvpager.scheduling.request import Request
from kvpager.storage.tiers.controls import TierControls

logger = logging.getLogger("kvpager")

_SAVE_WAIT_S = 5.0  # a slower store is not worth waiting for


class Engine:
    """A model that serves many requests at once, from one pool of blocks.

    Args:
        model: a transformers model that can generate, on one device. While an engine is open, the
            model is in evaluation mode with the attention implementation `kvpager`. When its last
            engine closes, both are restored.
        config: the engine's settings; the defaults if None.
        tokenizer: the model's tokenizer, for `Stream.text`, `Output.text` and `stop_strings`.
        on_step: a callback that gets a `StepRecord` after every step, on the engine's thread.
        overrides: settings that override those of `config`, such as `memory="4GiB"`.

    Thread-safe. Raises: `KVPagerError` for a model that cannot be batched; `TypeError`,
    `ValueError` for invalid arguments.
    """

    def __init__(
        self,
        model: Any,
        config: EngineConfig | None = None,
        *,
        tokenizer: Any = None,
        on_step: Callable[[StepRecord], None] | None = None,
        **overrides: Any,
    ) -> None:
        warn_if_untested()
        refuse_request_settings(overrides)
        self.config = config = EngineConfig.of(config, overrides)
        if on_step is not None and not callable(on_step):
            shown = arguments.shown(on_step)
            raise TypeError(f"on_step={shown}: expected a function or None")
        self.model = model = unwrapped(model)
        self._tokenizer = text_tokenizer(tokenizer)
        self._settings = SettingsMaker(model, self._tokenizer)
        self._numbers = itertools.count()
        switch, lock = AttentionSwitch(model), new_lock()
        try:
            switch.acquire()
            start = self._prepare(switch, on_step)
            with lock, Uninterrupted(lock):  # an interrupt in between would lose the thread
                self._core = start()
        except BaseException:
            if hasattr(self, "_core"):
                self._core.close()
            switch.release()
            raise
        logger.info("engine started: %r", self)

    def _prepare(
        self, switch: AttentionSwitch, on_step: Callable[[StepRecord], None] | None
    ) -> Callable[[], EngineCore]:
        """Make the parts for the model. Return a function that starts the engine."""
        model, config = self.model, self.config
        self._budget = budget = Budget(
            config.memory,
            config.block_size,
            kv_cache_dtype=config.kv_cache_dtype,
            host_memory=config.host_memory,
            mode=config.mode,
        )
        self._info = info = inspect_model(model, one_group=config.mode == "reserved")
        if config.tiers:
            refuse_tiers(model, info)
        self.is_packed = choose_forward(model, info, budget, switch, config.forward)
        length = max_length_of(info, config)
        # Not every recurrent layer can continue with several tokens at once.
        max_chunk = None if info.has_state else config.max_batch_tokens
        sizes = pool_blocks(info, budget, config.max_num_seqs, length, max_chunk)
        self._storage = storage = budget.new_storage(
            sizes.device, info.shapes, info.dtype, info.device, sizes.host
        )
        runner = make_runner(model, info, config, storage, budget, self.is_packed, length)
        costs = costs_of(config, sizes, runner)
        scheduler = make_scheduler(info, config, sizes, length, max_chunk, costs)
        if info.device.type in warming.COMPILING:
            warming.warm_up(runner, config.max_batch_tokens, config.max_num_seqs)
        watch = ModelWatch(model, has_parts=True) if scheduler.prefix_cache else None
        tiers = open_tiers(model, info, watch, config, storage, scheduler.manager, costs)
        begin = functools.partial(
            EngineCore,
            scheduler,
            runner,
            LogitsSampler(),
            tokenizer=self._tokenizer,
            watch=watch,
            save_wait_s=_SAVE_WAIT_S if config.role == "prefill" else None,
            kv_events=config.published_events,
            record=record_of(config, model, length),
            on_step=on_step,
            # A new thread begins with a number of its own.
            on_begin=functools.partial(torch.set_num_threads, torch.get_num_threads()),
            on_end=switch.release,
        )
        return functools.partial(start_with_tiers, tiers, begin)

    def __repr__(self) -> str:
        # Without locks: a debugger may ask while another thread has them.
        storage, scheduler = self._storage, self._core.scheduler
        pool = (
            f"{counted(storage.num_blocks, 'block')} of {counted(storage.block_size, 'token')} "
            f"({size(storage.num_blocks * storage.block_bytes)})"
        )
        if storage.num_host_blocks:
            pool += f" and {storage.num_host_blocks} in host memory"
        state = "open" if self._core.is_open else "closed"
        mode = "packed" if self.is_packed else "per sequence"
        return (
            f"<Engine of {type(self.model).__name__}: {state}, {mode}, {pool}, {storage.dtype} on "
            f"{storage.device}; {scheduler.num_running} running, {scheduler.num_waiting} waiting>"
        )

    # ---------------------------------------------------------------- for callers

    def submit(
        self,
        prompt: Sequence[int] | torch.Tensor | NDArray[Any] | Mapping[str, Any] | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        input_ids: Any = None,
        attention_mask: Any = None,
        request_id: str | None = None,
        namespace: str | None = None,
        tenant: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
        seed: int | None = None,
        logprobs: bool = False,
        sampling_settings: SamplingSettings | None = None,
        **overrides: Any,
    ) -> Stream:
        """Queue a request. O(tokens).

        Args:
            prompt: token ids, or a tokenizer's output for one text; what an encoder reads.
            generation_config: generation settings; the model's own if None.
            input_ids: the prompt, if it is not the first argument: `submit(**tokenizer(text))`.
            attention_mask: zeros for padding before or after the prompt, which is left out.
            request_id: unique among live requests; None makes one up.
            namespace: requests share cached prompts within it alone; `quotas` may bound its blocks.
            tenant: `policy="fair"`, and no other, serves first who had the fewest tokens.
            priority: `policy="priority"`, and no other, serves lower numbers first.
            timeout: seconds after which the request ends, finished or not.
            seed: of the request's own generator. Without it, samples depend on other requests.
            logprobs: report each token's log probability, after all processors.
            sampling_settings: from `engine.sampling_settings`, in place of the other settings.
            overrides: single generation settings. Without a limit, a request gets 20 new tokens.

        Raises: `EngineClosed`, `QueueFull`; `ValueError`, `TypeError` for invalid requests.
        """
        self._core.refuse_closed()
        arguments.flag("logprobs", logprobs)
        given = prompt_argument("prompt", prompt, input_ids)
        ids = self._reader(generation_config, overrides).one(given, attention_mask)
        sampling = self._chosen_settings(sampling_settings, generation_config, overrides)
        new_request = functools.partial(
            Request,
            request_id=self._request_id(request_id),
            namespace=namespace,
            tenant=tenant,
            priority=priority,
            deadline=_deadline(timeout),
        )
        return self._queue(new_request, ids, sampling, seed, logprobs)

    def _queue(
        self,
        new_request: Callable[..., Request],
        ids: list[int],
        sampling: SamplingSettings,
        seed: int | None,
        logprobs: bool,
    ) -> Stream:
        begins = [decoder_start(self.model)] if self._info.is_encoder_decoder else ids
        resolved = sampling.resolve(len(begins), ids)
        settings = resolved.settings(self._generator(seed), with_logprobs=logprobs)
        request = new_request(
            prompt=np.asarray(begins, np.int32),
            max_new_tokens=1 if self.config.role == "prefill" else resolved.max_new_tokens,
            n=sampling.num_samples,
        )
        require_room(request, self._core.scheduler, self._storage, self._budget)
        return self._core.submit(request, settings, ids)

    def _request_id(self, given: str | None) -> str:
        arguments.label("request_id", given)
        return given or f"request-{next(self._numbers)}"

    def _generator(self, seed: int | None) -> torch.Generator | None:
        if seed is None:
            return None
        number = arguments.count("seed", seed, at_most=2**63 - 1)
        return torch.Generator(self._info.device).manual_seed(number)

    def generate(
        self,
        prompts: Iterable[Any] | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        input_ids: Any = None,
        attention_mask: Any = None,
        progress: bool = False,
        **options: Any,
    ) -> list[Output]:
        """Serve `prompts` and wait for their outputs, in their order.

        Prompts are a list (of none for no outputs), a padded tensor, or a tokenizer's output:
        `generate(tokenizer(texts))` and `generate(**tokenizer(texts))` do the same. A padded tensor
        without `attention_mask` is read as by the model's `generate`. `progress` shows a progress
        bar. Other options are those of `submit`, except `request_id`. With a `seed`, prompts get
        seed, seed + 1, and so on. If a request fails, the others are cancelled.

        Raises: as `submit` and `Stream.result`.
        """
        arguments.flag("progress", progress)
        with _submitted() as streams:
            given = prompt_argument("prompts", prompts, input_ids)
            self._submit_all(streams, given, generation_config, attention_mask, options)
            bar = tqdm(streams, desc="requests", unit="request", disable=not progress)
            return [stream.result() for stream in bar]

    async def agenerate(
        self,
        prompts: Iterable[Any] | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        input_ids: Any = None,
        attention_mask: Any = None,
        **options: Any,
    ) -> list[Output]:
        """Serve `prompts` as `generate` does, without blocking other asyncio tasks."""
        with _submitted() as streams:
            given = prompt_argument("prompts", prompts, input_ids)
            self._submit_all(streams, given, generation_config, attention_mask, options)
            return [await stream for stream in streams]

    def sampling_settings(
        self, generation_config: GenerationConfig | None = None, **options: Any
    ) -> SamplingSettings:
        """Return settings for many requests. The options are those of `SamplingSettings`."""
        return self._settings.new(generation_config, **options)

    def cancel(self, request_id: str) -> None:
        """End a request; its stream then raises `RequestCancelled`. No effect if it ended. O(1)."""
        if not isinstance(request_id, str):
            shown = arguments.shown(request_id)
            raise TypeError(f"cancel({shown}): expected a request id. Pass stream.request_id.")
        self._core.cancel(request_id)

    def stats(self) -> EngineStats:
        """Return current counts, and totals since the engine was made. O(blocks + sequences)."""
        return self._core.stats()

    @property
    def quotas(self) -> NamespaceQuotas:
        """The quota of each namespace, as bytes or blocks: `engine.quotas["acme"] = "2GiB"`."""
        return self._core.quotas

    @property
    def tiers(self) -> TierControls:
        """The engine's tiers: `engine.tiers.forget("acme")`. Raises: `KVPagerError` if none."""
        if self._core.tiers is None:
            raise KVPagerError("this engine has no tiers. Pass Engine(model, tiers=...).")
        return self._core.tiers

    @property
    def kv_events(self) -> Any:
        """The publisher of `kv_events`, with its addresses; None without."""
        return self._core.kv_events

    @property
    def block_bytes(self) -> int:
        """The bytes of a block: the KV of `block_size` tokens in all layers of one group.

        The layers of a group share a block table; blocks of all groups have the same size.
        """
        return self._storage.block_bytes

    @property
    def error(self) -> BaseException | None:
        """The exception that stopped the engine's thread (a bug, not a failed request), or None."""
        return self._core.error

    def clear_prefix_cache(self) -> None:
        """Drop cached prompts. O(cached blocks)."""
        self._core.clear_prefix_cache()

    def pause(self) -> AbstractContextManager[None]:
        """Hold steps inside the `with` block. `submit` still queues requests.

        Use it to change the model's weights, so that no step computes with half of the change.
        The end of the block always drops cached prompts.
        """
        return self._core.pause()

    @property
    def is_paused_here(self) -> bool:
        """Return True inside a pause of the current thread. O(pauses)."""
        return self._core.is_paused_here

    def close(self) -> None:
        """Cancel all requests and end the engine's thread. Idempotent.

        The model's last engine restores its mode and its attention implementation. In a forked
        process, `close` does nothing; every other call raises `EngineClosed`.
        """
        self._core.close()

    def __del__(self) -> None:
        # getattr: a half-made engine is finalised as well.
        core = getattr(self, "_core", None)
        if core is not None:
            core.stop()

    def __enter__(self) -> Engine:
        self._core.refuse_closed()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---------------------------------------------------------------- making requests

    def _submit_all(
        self,
        streams: list[Stream],
        prompts: Any,
        config: GenerationConfig | None,
        mask: Any,
        options: dict[str, Any],
    ) -> None:
        rows = self._reader(config, options).several(prompts, mask)
        for row, each in zip(rows, options_per_prompt(options, len(rows)), strict=True):
            streams.append(self.submit(row, config, **each))

    def _reader(self, config: GenerationConfig | None, overrides: dict[str, Any]) -> PromptReader:
        return PromptReader(self._info, self.model.generation_config, config, overrides)

    def _chosen_settings(
        self,
        sampling: SamplingSettings | None,
        config: GenerationConfig | None,
        overrides: dict[str, Any],
    ) -> SamplingSettings:
        if sampling is None:
            sampling = self._settings.of_request(config, overrides)
        elif config is not None or overrides:
            raise TypeError("sampling_settings: already complete. Pass no other settings.")
        elif not isinstance(sampling, SamplingSettings):
            shown = arguments.shown(sampling)
            raise TypeError(f"sampling_settings={shown}: expected engine.sampling_settings(...).")
        if self._info.has_state and sampling.num_samples > 1:
            raise ValueError(
                f"num_return_sequences={sampling.num_samples}: {type(self.model).__name__} keeps a "
                "state that requests cannot share; submit the prompt several times"
            )
        return sampling


def _deadline(timeout: float | None) -> float | None:
    if timeout is None:
        return None
    return time.monotonic() + arguments.seconds("timeout", timeout, is_limit=True)


@contextmanager
def _submitted() -> Iterator[list[Stream]]:
    """Yield a list of streams, which are cancelled if the `with` block raises."""
    streams: list[Stream] = []
    try:
        yield streams
    except BaseException:
        for stream in streams:
            stream.cancel()
        raise

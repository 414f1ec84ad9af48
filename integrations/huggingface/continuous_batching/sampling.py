"""Make the sampling settings of requests from transformers' continuous batching."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from kvpager.blocks.stats import Stats
from kvpager.integrations.huggingface.continuous_batching.options import warn_once
from kvpager.integrations.huggingface.runner.model_info import ModelInfo
from kvpager.integrations.huggingface.runner.sampling import SamplingSettings

# Arguments of logits processors that are not settings; transformers ignores them, too.
_PASSED_OVER = {"filter_value", "min_tokens_to_keep"}


class RequestOverrides(NamedTuple):
    """The settings that a request overrides."""

    max_new_tokens: int | None
    eos: int | list[int] | None
    settings: dict[str, Any]  # of logits processors


class SettingsFactory:
    """A maker of sampling settings from one config. Settings that the config leaves open are off.

    Args:
        model: the model to serve.
        config: the settings of all requests.
        info: the result of `inspect_model(model)`.
        per_request: True if requests may override settings.

    Raises: `ValueError` for settings that cannot be batched.
    """

    def __init__(self, model: Any, config: Any, info: ModelInfo, *, per_request: bool) -> None:
        self._model, self._config, self._info = model, config, info
        self._per_request = per_request
        self._known = functools.lru_cache(maxsize=256)(self._make)
        self._known(1, (), ())  # raises

    def settings_for(
        self, wanted: RequestOverrides, num_prompt: int, pool: Callable[[], Stats]
    ) -> SamplingSettings:
        """Return the settings of a request whose prompt has `num_prompt` tokens. O(1) if known.

        `pool` returns the size of the pool.
        Raises: `ValueError`, `TypeError` for invalid settings.
        """
        settings = {k: v for k, v in wanted.settings.items() if k not in _PASSED_OVER}
        for name in wanted.settings.keys() & _PASSED_OVER:
            warn_once(f"a request's {name}", "it is ignored, as in transformers")
        if settings and not self._per_request:
            raise ValueError(
                f"{', '.join(sorted(settings))}: requests may not override settings. "
                "Set per_request_processors=True in the ContinuousBatchingConfig."
            )
        limit = self._limit(wanted, num_prompt, pool)
        eos = self._config.eos_token_id if wanted.eos is None else wanted.eos
        ends = [eos] if isinstance(eos, int) else list(eos or ())
        return self._known(
            limit,
            tuple(token for token in ends if token >= 0),  # -1 is how transformers says none
            tuple(sorted(settings.items())),
        )

    def _limit(self, wanted: RequestOverrides, num_prompt: int, pool: Callable[[], Stats]) -> int:
        """Return the most new tokens: the requested number within the model's positions."""
        begins = 1 if self._info.is_encoder_decoder else num_prompt
        longest, asked = self._info.max_length, wanted.max_new_tokens
        if asked is None:
            asked = self._config.max_new_tokens
        if asked is None and self._config.max_length is not None:
            asked = self._config.max_length - begins
        room = None if longest is None else longest - begins
        if asked is None:
            fits = self._fits(begins, pool())
            return fits if room is None else max(min(room, fits), 1)
        if room is not None and 0 < room < asked:
            warn_once("max_new_tokens", f"a sequence ends at the model's {longest} positions")
            return room
        return asked

    def _fits(self, begins: int, pool: Stats) -> int:
        """Return how many new tokens fit if the request has the whole pool."""
        shared = begins // pool.block_size
        samples = self._config.num_return_sequences or 1
        blocks = shared + (pool.num_blocks - shared) // samples
        return max(blocks * pool.block_size - begins, 1)

    def _special_tokens(self) -> dict[str, int | list[int]]:
        """Return the model's special tokens that the config leaves open."""
        own = self._model.generation_config
        names = ("bos_token_id", "pad_token_id", "decoder_start_token_id")
        missing = [name for name in names if getattr(self._config, name) is None]
        return {name: token for name in missing if (token := getattr(own, name)) is not None}

    def _make(
        self, max_new_tokens: int, eos: tuple[int, ...], settings: tuple[tuple[str, Any], ...]
    ) -> SamplingSettings:
        options = {**self._special_tokens(), **dict(settings)}
        return SamplingSettings(
            self._model,
            self._config,
            is_complete=True,
            max_new_tokens=max_new_tokens,
            max_length=None,
            eos_token_id=list(eos) or None,
            **options,
        )

"""Choose the next token of each row by the generation settings of its request."""

from __future__ import annotations

import copy
import difflib
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from kvpager import _validate as arguments
from kvpager.engine.detokenizer import text_tokenizer
from kvpager.engine.request_state import RequestSettings
from kvpager.engine.runner import Draw, Row
from kvpager.integrations.huggingface.model_state.offloaded import execution_device
from kvpager.integrations.huggingface.runner.setting_checks import (
    OF_SUBMIT,
    check_config,
    check_given,
    check_served,
)

# Processors that use a row's scores only. Rows with equal settings share one call.
_ROWWISE = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

# Settings of OpenAI's API -> those of transformers, if there are any.
_OF_OTHERS = {
    "stop": "stop_strings",
    "n": "num_return_sequences",
    "presence_penalty": None,
    "frequency_penalty": None,
}

_MAX_LENGTHS = 256  # prompt lengths for which settings stay resolved


class SamplingSettings:
    """Settings by which requests choose their tokens and stop.

    Args:
        model: the model whose defaults fill the gaps of `generation_config`.
        generation_config: settings; the model's own if None.
        is_complete: True turns settings that `generation_config` leaves open off.
        logits_processor: further logits processors.
        stopping_criteria: further stopping criteria.
        tokenizer: a tokenizer for settings that need one, such as `stop_strings`.
        overrides: single settings that override those of `generation_config`.

    Raises: `ValueError` for decoding strategies that cannot be batched continuously; `ValueError`,
    `TypeError` for settings that are invalid or have no effect.
    """

    def __init__(
        self,
        model: Any,
        generation_config: GenerationConfig | None = None,
        *,
        is_complete: bool = False,
        logits_processor: Iterable[Callable[..., Tensor]] = (),
        stopping_criteria: Iterable[Callable[..., Any]] = (),
        tokenizer: Any = None,
        **overrides: Any,
    ) -> None:
        arguments.flag("is_complete", is_complete)
        check_given(overrides)
        if generation_config is not None and not is_complete:
            check_config(generation_config, model.generation_config)
        self._has_default = [
            overrides.get(name) is None and getattr(generation_config, name, None) is None
            for name in ("max_length", "min_length")
        ]
        self._minimum = None if is_complete else _minimum(generation_config, overrides)
        settings = _merged(model, generation_config, is_complete, overrides)
        check_served(settings)
        self._tokenizer = text_tokenizer(tokenizer)
        if settings.stop_strings is not None and self._tokenizer is None:
            raise ValueError(
                f"stop_strings={arguments.shown(settings.stop_strings)}: needs a tokenizer. "
                "Make the engine with Engine(model, tokenizer=tokenizer)."
            )
        samples = settings.num_return_sequences
        self.num_samples = (
            1 if samples is None else arguments.count("num_return_sequences", samples, at_least=1)
        )
        if settings.do_sample is not None:
            arguments.flag("do_sample", settings.do_sample)
        self.is_greedy = not settings.do_sample
        self._model, self._device = model, execution_device(model)
        self._settings = settings
        self._further = (
            _callables("logits_processor", logits_processor),
            _callables("stopping_criteria", stopping_criteria),
        )
        self._by_length: dict[int, ResolvedSettings] = {}

    def resolve(self, prompt_length: int, encoder_ids: list[int]) -> ResolvedSettings:
        """Return the settings for a prompt of `prompt_length` tokens. O(1) for a known length.

        `encoder_ids` are the encoder's token ids; without an encoder, the prompt.

        Raises: `ValueError` if `max_length` leaves no room for a new token, or the limits none for
        the fewest tokens.
        """
        known = self._by_length.get(prompt_length)
        if known is not None:
            return known
        settings = self._completed(prompt_length)
        resolved = self._make(settings, prompt_length, encoder_ids)
        of_encoder = settings.encoder_repetition_penalty or settings.encoder_no_repeat_ngram_size
        # Criteria such as a time limit start with their request.
        if not resolved.criteria and not of_encoder:
            if len(self._by_length) >= _MAX_LENGTHS:
                self._by_length.clear()
            self._by_length[prompt_length] = resolved
        return resolved

    def _completed(self, prompt_length: int) -> GenerationConfig:
        """Return the settings, completed for a prompt as by `generate`. Raises: as `resolve`."""
        settings, model = copy.deepcopy(self._settings), self._model
        model._prepare_special_tokens(settings, True, device=self._device)
        model._prepare_generated_length(
            settings,
            *self._has_default,
            "input_ids",
            prompt_length,
            torch.empty(1, prompt_length),
        )
        if settings.max_length <= prompt_length:
            raise ValueError(
                f"max_length={settings.max_length}: the prompt has {prompt_length} tokens already. "
                "Shorten the prompt, raise max_length, or set max_new_tokens."
            )
        if self._minimum and settings.min_length > settings.max_length:
            raise ValueError(
                f"{self._minimum}: only {settings.max_length - prompt_length} new tokens are "
                "allowed. Raise max_new_tokens or lower the minimum."
            )
        return settings

    def _make(
        self, settings: GenerationConfig, prompt_length: int, encoder_ids: list[int]
    ) -> ResolvedSettings:
        model, (further, criteria) = self._model, self._further
        processors = model._get_logits_processor(
            settings,
            input_ids_seq_length=prompt_length,
            encoder_input_ids=torch.tensor([encoder_ids], device=self._device),
            logits_processor=LogitsProcessorList(further),
            device=self._device,
            model_kwargs={},
        )
        stops = model._get_stopping_criteria(
            settings, StoppingCriteriaList(criteria), tokenizer=self._tokenizer
        )
        eos = settings._eos_token_tensor
        return ResolvedSettings(
            settings.max_length - prompt_length,
            frozenset() if eos is None else frozenset(eos.tolist()),
            processors,
            [s for s in stops if type(s) not in (EosTokenCriteria, MaxLengthCriteria)],
            self.is_greedy,
            _shared_key(self.is_greedy, processors),
            self._tokenizer,
        )


class SettingsMaker:
    """Make the settings of an engine's requests. Requests that set only a length share them."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model = model
        self._defaults: dict[str, Any] = {}
        # Not a bound method: a reference cycle would keep this object alive.
        self.new = functools.partial(SamplingSettings, model, tokenizer=tokenizer)
        self._usual = functools.lru_cache(maxsize=64, typed=True)(self.new)

    def of_request(
        self, config: GenerationConfig | None, overrides: dict[str, Any]
    ) -> SamplingSettings:
        """Return settings. Equal lengths share them until the model's own settings change."""
        if overrides.keys() - {"max_new_tokens"} or config is not None:
            return self.new(config, **overrides)
        defaults = vars(self._model.generation_config)
        if defaults != self._defaults:
            self._defaults = copy.deepcopy(defaults)
            self._usual.cache_clear()
        return self._usual(**{k: v for k, v in overrides.items() if v is not None})


def _merged(
    model: Any, config: GenerationConfig | None, is_complete: bool, overrides: dict[str, Any]
) -> GenerationConfig:
    """Return `overrides` over `config`, over the model's own settings unless it is complete.

    Raises: `ValueError` for names that no `GenerationConfig` has.
    """
    if is_complete and config is not None:
        settings = copy.deepcopy(config)
        unknown = settings.update(**overrides)
    else:
        settings, unknown = model._prepare_generation_config(config, **overrides)
    if unknown:
        raise ValueError(
            f"{', '.join(sorted(unknown))}: not among the settings of a GenerationConfig."
            + _meant(min(unknown))
        )
    return settings


def _meant(name: str) -> str:
    """Return advice to a caller who may have meant another name, or an empty text."""
    if name in OF_SUBMIT:
        return f" Pass {name} to submit or generate."
    if name in _OF_OTHERS:
        known = _OF_OTHERS[name]
    else:
        names = OF_SUBMIT.union(vars(GenerationConfig()))
        known = next(iter(difflib.get_close_matches(name, names, 1, 0.7)), None)
    return f" Did you mean {known}?" if known else ""


def _minimum(config: GenerationConfig | None, overrides: dict[str, Any]) -> str | None:
    """Return the minimum length that a caller set, as an argument; None if there is none."""
    for name in ("min_new_tokens", "min_length"):
        value = overrides.get(name, getattr(config, name, None))
        if value:
            return f"{name}={value}"
    return None


def _callables(name: str, given: Iterable[Callable[..., Any]]) -> list[Callable[..., Any]]:
    found = list(given)
    for each in found:
        if not callable(each):
            raise TypeError(f"{name}: expected functions, got {arguments.shown(each)}")
    return found


class ResolvedSettings(NamedTuple):
    """Settings of a request, resolved for the length of its prompt."""

    max_new_tokens: int
    eos: frozenset[int]
    processors: LogitsProcessorList
    criteria: list[Callable[..., Any]]  # besides length and eos
    is_greedy: bool
    # Equal for settings with which rows can be drawn together; None if one must be drawn alone,
    # because a processor looks at its earlier tokens.
    key: object | None
    tokenizer: Any  # finds stop strings; None if the engine has none

    def settings(
        self, generator: torch.Generator | None = None, *, with_logprobs: bool = False
    ) -> RequestSettings:
        """Return the settings of a request as the engine takes them. O(1)."""
        find_stop = self._find_stop if self.criteria else None
        return RequestSettings(self, generator, self.eos, find_stop, with_logprobs)

    def _find_stop(self, ids: list[int]) -> str | None:
        """Return the stop string or the name of the criterion that `ids` meet, if any do."""
        for criterion in self.criteria:
            if torch.as_tensor(criterion(torch.tensor([ids]), None)).all():
                if isinstance(criterion, StopStringCriteria):
                    return self._stop_string(criterion, ids)
                return getattr(criterion, "__name__", type(criterion).__name__)
        return None

    def _stop_string(self, criterion: StopStringCriteria, ids: list[int]) -> str:
        strings = criterion.stop_strings
        if len(strings) == 1:
            return strings[0]
        # A token has at least one character of the string that it is part of.
        text = self.tokenizer.decode(
            ids[-criterion.maximum_token_len :], clean_up_tokenization_spaces=False
        )
        return next((each for each in strings if each in text), ", ".join(strings))


class LogitsSampler:
    """A sampler that chooses tokens with transformers' logits processors.

    The `sampling` of each row is a `ResolvedSettings`, its generator a `torch.Generator`.
    """

    def choose(self, logits: Tensor, rows: Sequence[Row]) -> list[Draw]:
        """Choose tokens for the rows of `logits` [rows, vocabulary]. O(rows * vocabulary).

        An error of a request's processors is returned in that request's `Draw`.
        """
        with_logprobs = any(row.with_logprobs for row in rows)
        chosen = [row.sampling for row in rows]
        if not with_logprobs and all(s.is_greedy and not s.processors for s in chosen):
            # The usual case, and quicker.
            return [Draw([token], None) for token in _highest(logits)]
        draws: list[Draw | None] = [None] * len(rows)
        for numbers in _alike(rows):
            index = torch.tensor(numbers, device=logits.device)
            try:
                found = _draw(logits[index].float(), [rows[i] for i in numbers], with_logprobs)
            except BaseException as error:  # of a user's processor, SystemExit included
                if len(numbers) == 1:
                    found = [Draw([], None, error)]
                else:  # one row may have caused it
                    found = [self.choose(logits[i : i + 1], [rows[i]])[0] for i in numbers]
            for number, draw in zip(numbers, found, strict=True):
                draws[number] = draw
        return [draw for draw in draws if draw is not None]


def _highest(logits: Tensor) -> list[int]:
    if logits.device.type == "cpu":
        # For 64 rows of 4,096 in bfloat16, torch takes 0.93 ms, NumPy 0.04 (medians, one core).
        logits = logits.float()
        tokens: list[int] = logits.numpy().argmax(axis=1).tolist()
        return tokens
    return logits.argmax(dim=-1).tolist()


def _alike(rows: Sequence[Row]) -> list[list[int]]:
    """Return the indices of rows, grouped by rows that one call can serve."""
    groups: dict[object, list[int]] = {}
    for number, row in enumerate(rows):
        is_alone = row.sampling.key is None or row.generator is not None or row.times > 1
        groups.setdefault(number if is_alone else row.sampling.key, []).append(number)
    return list(groups.values())


def _shared_key(is_greedy: bool, processors: LogitsProcessorList) -> object | None:
    """Return a key of the settings, to compare them; None if a processor needs a row's tokens."""
    if not all(type(each) in _ROWWISE for each in processors):
        return None

    def exact(value: Any) -> str:  # `str` of a tensor rounds its elements
        return str(value.tolist() if isinstance(value, Tensor) else value)

    held = [tuple(sorted((k, exact(v)) for k, v in vars(each).items())) for each in processors]
    return is_greedy, tuple(map(type, processors)), tuple(held)


def _draw(scores: Tensor, rows: Sequence[Row], with_logprobs: bool) -> list[Draw]:
    """Choose tokens for rows with equal settings from `scores` [rows, vocabulary] in float32."""
    first = rows[0]
    resolved: ResolvedSettings = first.sampling
    if resolved.processors:
        # Row-wise processors need no ids; other processors get a single row.
        ids: Any = None
        if resolved.key is None:
            ids = torch.tensor([first.ids()], device=scores.device)
        scores = resolved.processors(ids, scores)
    if resolved.is_greedy:
        tokens = scores.argmax(dim=-1, keepdim=True)
    else:
        tokens = torch.multinomial(
            scores.softmax(dim=-1), first.times, replacement=True, generator=first.generator
        )
    chosen = tokens.tolist()
    if not with_logprobs:
        return [Draw(each, None) for each in chosen]
    logprobs = scores.log_softmax(dim=-1).gather(1, tokens).tolist()
    return [Draw(*each) for each in zip(chosen, logprobs, strict=True)]

"""The next tokens of a step's rows, each by the generation settings of its own request."""

from __future__ import annotations

import copy
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
from kvpager.engine.request_state import RequestSettings
from kvpager.engine.runner import Draw, Row
from kvpager.engine.text import text_tokenizer
from kvpager.integrations.huggingface.model_state.offloaded import execution_device
from kvpager.integrations.huggingface.runner.setting_checks import (
    check_config,
    check_given,
    check_served,
)

# What looks at a row's own scores alone: rows with the same settings are served at once.
_ROWWISE = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

_MAX_CHOICES = 256  # of prompts of unlike lengths, kept by an object of settings


class SamplingSettings:
    """How requests of one generation config choose their tokens, and when they stop.

    Args:
        model: whose defaults hold where `generation_config` says nothing.
        generation_config: settings; the model's own where None.
        is_complete: settings that `generation_config` leaves open are off, not the model's own.
        logits_processor: further logits processors.
        stopping_criteria: further stopping criteria.
        tokenizer: for settings that need one, such as `stop_strings`.
        overrides: single settings over those of `generation_config`.

    Raises: `ValueError` for ways to generate that cannot be batched continuously; `ValueError`,
    `TypeError` for settings that make no sense or have no effect.
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
        self._has_default_length = overrides.get("max_length") is None and (
            generation_config is None or generation_config.max_length is None
        )
        self._has_default_minimum = overrides.get("min_length") is None and (
            generation_config is None or generation_config.min_length is None
        )
        if is_complete and generation_config is not None:
            settings = copy.deepcopy(generation_config)
            unknown = settings.update(**overrides)
        else:
            settings, unknown = model._prepare_generation_config(generation_config, **overrides)
        if unknown:
            raise ValueError(
                f"{', '.join(sorted(unknown))}: not among the settings of a GenerationConfig. "
                "Pass your own functions as logits_processor= or stopping_criteria=."
            )
        check_served(settings)
        self._tokenizer = text_tokenizer(tokenizer)
        if settings.stop_strings is not None and self._tokenizer is None:
            raise ValueError(
                f"stop_strings={arguments.shown(settings.stop_strings)}: a tokenizer has to find "
                "them. Make the engine with Engine(model, tokenizer=tokenizer)."
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
        self._by_length: dict[int, Choice] = {}

    def choice(self, prompt_length: int, encoder_ids: list[int]) -> Choice:
        """How a request with a prompt of so many tokens goes on.

        `encoder_ids`: what its encoder reads; without an encoder, the prompt itself.

        Raises: `ValueError` where nothing can follow it.
        """
        known = self._by_length.get(prompt_length)
        if known is not None:
            return known
        settings = self._completed(prompt_length)
        choice = self._make(settings, prompt_length, encoder_ids)
        looks_at_encoder = (
            settings.encoder_repetition_penalty or settings.encoder_no_repeat_ngram_size
        )
        # Unusual is a clock, say, which starts with its request.
        if not choice.criteria and not looks_at_encoder:
            if len(self._by_length) >= _MAX_CHOICES:
                self._by_length.clear()
            self._by_length[prompt_length] = choice
        return choice

    def _completed(self, prompt_length: int) -> GenerationConfig:
        """Return the settings with what `generate` adds for a prompt. Raises: as `choice`."""
        settings, model = copy.deepcopy(self._settings), self._model
        model._prepare_special_tokens(settings, True, device=self._device)
        model._prepare_generated_length(
            settings,
            self._has_default_length,
            self._has_default_minimum,
            "input_ids",
            prompt_length,
            torch.empty(1, prompt_length),
        )
        if settings.max_length <= prompt_length:
            raise ValueError(
                f"the prompt has {prompt_length} tokens, and max_length={settings.max_length}: "
                "shorten the prompt, raise max_length, or set max_new_tokens"
            )
        return settings

    def _make(
        self, settings: GenerationConfig, prompt_length: int, encoder_ids: list[int]
    ) -> Choice:
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
        unusual = [s for s in stops if type(s) not in (EosTokenCriteria, MaxLengthCriteria)]
        eos = settings._eos_token_tensor
        return Choice(
            settings.max_length - prompt_length,
            frozenset() if eos is None else frozenset(eos.tolist()),
            processors,
            unusual,
            self.is_greedy,
            all(type(each) in _ROWWISE for each in processors),
            self._tokenizer,
        )


def _callables(name: str, given: Iterable[Callable[..., Any]]) -> list[Callable[..., Any]]:
    found = list(given)
    for each in found:
        if not callable(each):
            raise TypeError(f"{name}: expected functions, got {arguments.shown(each)}")
    return found


class Choice(NamedTuple):
    """How a request goes on."""

    max_new_tokens: int
    eos: frozenset[int]
    processors: LogitsProcessorList
    criteria: list[Callable[..., Any]]  # besides length and eos
    is_greedy: bool
    is_rowwise: bool  # no processor looks at earlier tokens
    tokenizer: Any  # finds stop strings; None if the engine has none

    def settings(
        self, generator: torch.Generator | None = None, *, with_logprobs: bool = False
    ) -> RequestSettings:
        """Return the settings of a request that samples by this choice. O(1)."""
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
    """A sampler of engines that chooses tokens with transformers' processors.

    The `sampling` of each row is a `Choice`, its generator one of torch.
    """

    def choose(self, logits: Tensor, rows: Sequence[Row]) -> list[Draw]:
        """Choose tokens for the rows of `logits` [rows, vocabulary]. O(rows * vocabulary).

        What a request's own processors raise is its own: in its `Draw`.
        """
        with_logprobs = any(row.with_logprobs for row in rows)
        if not with_logprobs and all(map(_is_plain, rows)):  # the usual case, and quicker
            return [Draw([token], None) for token in _highest(logits)]
        draws: list[Draw | None] = [None] * len(rows)
        for numbers in _alike(rows):
            index = torch.tensor(numbers, device=logits.device)
            try:
                found = _draw(logits[index].float(), [rows[i] for i in numbers], with_logprobs)
            except BaseException as error:  # of a processor of the caller's, SystemExit as well
                if len(numbers) == 1:
                    found = [Draw([], None, error)]
                else:  # it may be the fault of one row
                    found = [self.choose(logits[i : i + 1], [rows[i]])[0] for i in numbers]
            for number, draw in zip(numbers, found, strict=True):
                draws[number] = draw
        return [draw for draw in draws if draw is not None]


def _is_plain(row: Row) -> bool:
    """True for a row whose next token is the one with the highest logit."""
    choice: Choice = row.sampling
    return choice.is_greedy and not choice.processors


def _highest(logits: Tensor) -> list[int]:
    if logits.device.type == "cpu":
        # Of 64 rows of 4,096 in bfloat16, torch takes 0.93 ms, numpy 0.04 (medians, one core).
        logits = logits.float()
        tokens: list[int] = logits.numpy().argmax(axis=1).tolist()
        return tokens
    return logits.argmax(dim=-1).tolist()


def _alike(rows: Sequence[Row]) -> list[list[int]]:
    """Rows that can be served by one call, as lists of their numbers."""
    groups: dict[object, list[int]] = {}
    for number, row in enumerate(rows):
        choice: Choice = row.sampling
        is_shared = choice.is_rowwise and row.generator is None and row.times == 1
        groups.setdefault(_key(choice) if is_shared else (number,), []).append(number)
    return list(groups.values())


def _key(choice: Choice) -> object:
    settings = tuple(
        (type(each), tuple(sorted((k, str(_exact(v))) for k, v in vars(each).items())))
        for each in choice.processors
    )
    return choice.is_greedy, settings


def _exact(value: Any) -> Any:
    # As text, a tensor's numbers are rounded.
    return value.tolist() if isinstance(value, Tensor) else value


def _draw(scores: Tensor, rows: Sequence[Row], with_logprobs: bool) -> list[Draw]:
    """Tokens for rows of one kind: their `scores` [rows, vocabulary] in float32."""
    first = rows[0]
    choice: Choice = first.sampling
    if choice.processors:
        # Processors that look at rows alone are told no ids; others serve one row.
        ids: Any = None if choice.is_rowwise else torch.tensor([first.ids()], device=scores.device)
        scores = choice.processors(ids, scores)
    if choice.is_greedy:
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

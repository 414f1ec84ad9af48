"""Check the generation settings of a request: which an engine serves, and their values.

transformers checks few of them. Unchecked settings raise during a step, or have no effect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from transformers import GenerationConfig

from kvpager import _validate as arguments

_ANY_SETTINGS = GenerationConfig()

# Decoding strategies that an engine does not serve, and the values that turn them off.
_NOT_SERVED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "num_beams": ("beam search", (None, 1)),
    "num_beam_groups": ("beam search", (None, 1)),
    "constraints": ("constrained search", (None,)),
    "force_words_ids": ("constrained search", (None,)),
    "penalty_alpha": ("contrastive search", (None, 0, 0.0)),
    "prompt_lookup_num_tokens": ("prompt lookup", (None,)),
    "dola_layers": ("decoding by contrasting layers", (None,)),
    "assistant_early_exit": ("assisted decoding", (None,)),
    "guidance_scale": ("guidance", (None, 1, 1.0)),
    "token_healing": ("token healing", (None, False)),
    "watermarking_config": ("watermarking", (None,)),
}

# Settings without effect in an engine, and the replacement of each.
_RETURNS = "an engine gives tokens and texts, and log probabilities with logprobs=True"
_COMPILES = "an engine compiles its passes with Engine(compile=)"
_KEEPS = "an engine keeps keys and values in its own pool"
_SEARCHES = "it is for beams, and an engine has none"
_WITHOUT_EFFECT: dict[str, tuple[str, tuple[Any, ...]]] = {
    "output_attentions": (_RETURNS, (None, False)),
    "output_hidden_states": (_RETURNS, (None, False)),
    "output_logits": (_RETURNS, (None, False)),
    "output_scores": (_RETURNS, (None, False)),
    "return_dict_in_generate": (_RETURNS, (None, False)),
    "use_cache": (_KEEPS, (None, True)),
    "cache_implementation": (_KEEPS, (None,)),
    "cache_config": (_KEEPS, (None,)),
    "prefill_chunk_size": ("an engine divides prompts by Engine(max_batch_tokens=)", (None,)),
    "compile_config": (_COMPILES, (None,)),
    "diversity_penalty": (_SEARCHES, (None, 0.0, 0)),
    "early_stopping": (_SEARCHES, (None, False)),
    "length_penalty": (_SEARCHES, (None, 1.0, 1)),
    "low_memory": ("it is for contrastive search, which an engine does not have", (None, False)),
}


# Arguments of `submit` beside the generation settings.
OF_SUBMIT = {
    "input_ids", "attention_mask", "request_id", "namespace", "tenant", "priority", "timeout",
    "seed", "logprobs", "sampling_settings", "logits_processor", "stopping_criteria",
}  # fmt: skip


def refuse_request_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings of a request where an engine is made. O(settings). Raises: `TypeError`."""
    for name in settings:
        if name in OF_SUBMIT or hasattr(_ANY_SETTINGS, name):
            raise TypeError(f"{name}: a setting of requests. Pass it to submit or generate.")


def check_given(settings: Mapping[str, Any]) -> None:
    """Refuse single settings with wrong values, or without effect. O(settings).

    Raises: `TypeError`, `ValueError`.
    """
    if "streamer" in settings:
        raise ValueError("streamer: submit() returns a stream. Iterate over its tokens or text().")
    for name, value in settings.items():
        if value is None:
            continue
        if name in _CHECKS:
            _CHECKS[name](name, value)
        why, off = _WITHOUT_EFFECT.get(name, ("", (value,)))
        if not any(type(value) is type(each) and value == each for each in off):
            raise ValueError(f"{name}={arguments.shown(value)}: {why}. Leave {name} out.")


def check_config(config: Any, own: Any) -> None:
    """Refuse settings of a caller's `config` as `check_given` does.

    Settings without effect may stay if the model's `own` config has them, too.
    Raises: `TypeError`, `ValueError`.
    """
    if not isinstance(config, GenerationConfig):
        raise TypeError(
            f"generation_config: expected a GenerationConfig, got {type(config).__name__}"
        )
    given = {name: getattr(config, name, None) for name in _CHECKS.keys() | _WITHOUT_EFFECT.keys()}
    for name in _WITHOUT_EFFECT:
        if given[name] == getattr(own, name, None):
            del given[name]
    check_given(given)


def check_served(settings: Any) -> None:
    """Refuse decoding strategies that cannot be batched continuously, and sampling at 0.

    Raises: `ValueError`.
    """
    for name, (what, off) in _NOT_SERVED.items():
        value = getattr(settings, name, None)
        if value not in off:
            raise ValueError(
                f"{name}={value!r}: {what} cannot be batched continuously. Use model.generate()."
            )
    if settings.do_sample and settings.temperature == 0:
        raise ValueError(
            "temperature=0: expected more than 0 for sampling. Pass do_sample=False for the most "
            "likely token."
        )


# -------------------------------------------------------------------- values

_share = partial(arguments.number, at_least=0, at_most=1)
_factor = partial(arguments.number, at_least=0, at_most=10**9, is_open=True)
_token = partial(arguments.count, at_least=-1)  # in transformers, -1 means no such token


def _temperature(name: str, value: Any) -> None:
    # Greedy search takes 0, as servers do; `check_served` refuses it for sampling.
    if isinstance(value, bool) or value != 0:
        _factor(name, value)


def _tokens(name: str, value: Any) -> None:
    if arguments.is_int(value):
        _token(name, value)
        return
    ids = arguments.integers(name, value.cpu() if hasattr(value, "cpu") else value)
    if ids.size and ids.min() < -1:
        raise ValueError(f"{name}={arguments.shown(value)}: expected token ids")


def _suppressed(name: str, value: Any) -> None:
    if not isinstance(value, list | tuple):
        raise TypeError(f"{name}={arguments.shown(value)}: expected a list of token ids")
    _tokens(name, value)


def _texts(name: str, value: Any) -> None:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name}={arguments.shown(value)}: expected a str, or a list of them")
    if not texts or not all(texts):
        raise ValueError(f"{name}={arguments.shown(value)}: expected a text. Leave {name} out.")


_NAMES: dict[Callable[..., object], tuple[str, ...]] = {
    arguments.flag: ("do_sample", "remove_invalid_values", "renormalize_logits", "use_cache"),
    arguments.count: (
        "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens", "no_repeat_ngram_size",
        "top_k",
    ),
    partial(arguments.count, at_least=1): (
        "max_length", "max_new_tokens", "num_beams", "num_return_sequences",
    ),
    arguments.seconds: ("max_time",),
    _share: ("epsilon_cutoff", "eta_cutoff", "min_p", "top_p"),
    partial(_share, is_open=True): ("typical_p",),
    _factor: ("encoder_repetition_penalty", "repetition_penalty"),
    _temperature: ("temperature",),
    _token: ("decoder_start_token_id", "forced_bos_token_id", "pad_token_id"),
    _tokens: ("eos_token_id", "forced_eos_token_id"),
    _suppressed: ("begin_suppress_tokens", "suppress_tokens"),
    _texts: ("stop_strings",),
}  # fmt: skip
_CHECKS = {name: check for check, names in _NAMES.items() for name in names}

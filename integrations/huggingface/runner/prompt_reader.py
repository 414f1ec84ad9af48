"""Read prompts from token ids, padded batches, or the output of a tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig

from kvpager import _validate as arguments
from kvpager.plans import Int32

# Further outputs of a tokenizer, without effect on the prompt.
_BESIDE = {
    "length", "num_truncated_tokens", "offset_mapping", "overflow_to_sample_mapping",
    "overflowing_tokens", "special_tokens_mask", "token_type_ids",
}  # fmt: skip


_ANY_SETTINGS = GenerationConfig()
# Names of the prompt in the signature of transformers' `generate`.
_OTHER_NAMES = {"inputs", "inputs_embeds"}


class PromptReader:
    """A reader of the prompts of a call, which removes their padding.

    The call's `overrides` go before its `config`, and both before the model's own `settings`.
    Raises: `ValueError` for inputs of the model or of a tokenizer among `overrides`.
    """

    def __init__(
        self,
        info: Any,
        settings: GenerationConfig,
        config: GenerationConfig | None,
        overrides: Mapping[str, Any],
    ) -> None:
        self._vocabulary, self._arguments = info.vocabulary, info.arguments
        for name in overrides.keys() & (self._arguments | _BESIDE | _OTHER_NAMES):
            if not hasattr(_ANY_SETTINGS, name):  # such a name counts as a setting
                raise _not_read(name)
        configs = [config, settings] if isinstance(config, GenerationConfig) else [settings]
        pads = [overrides.get("pad_token_id"), *(each.pad_token_id for each in configs)]
        self._pad = next((pad for pad in pads if pad is not None), None)
        self._ends = next(filter(None, map(_eos_ids, configs)), frozenset[int]())

    def one(self, prompt: Any, mask: Any = None) -> list[int]:
        """Return the token ids of a prompt, or of a batch of one. O(tokens).

        Raises: `TypeError`, `ValueError` for invalid prompts, or several prompts.
        """
        prompt, mask = self._parts(prompt, mask)
        if isinstance(prompt, str):
            raise TypeError("prompt: expected token ids, got a str. Tokenize it first.")
        if isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], str):
            raise TypeError("prompt: expected token ids, got a list of str. Tokenize it first.")
        array = _ids(prompt)
        if array.ndim == 2:
            if len(array) != 1:
                raise ValueError(
                    f"prompt: expected one prompt, got {len(array)}. Use generate() for several."
                )
            if mask is None:
                return self.several(array)[0]
            array = array[0]
        return self._checked(array, mask)

    def several(self, prompts: Any, masks: Any = None) -> list[list[int]]:
        """Return the token ids of each of several prompts. O(tokens).

        `masks` hides padding. Without masks, a tensor is read as by `generate`: its pad tokens are
        padding, unless the pad token is an eos token as well.

        Raises: `TypeError`, `ValueError` for invalid prompts, or for ambiguous padding.
        """
        prompts, masks = self._parts(prompts, masks)
        if isinstance(prompts, str):
            raise TypeError("prompts: expected a list of prompts, got a str. Tokenize it first.")
        if not isinstance(prompts, Iterable):
            shown = arguments.shown(prompts)
            raise TypeError(f"prompts={shown}: expected a list of prompts or a padded tensor")
        is_batch = isinstance(prompts, torch.Tensor | np.ndarray) and prompts.dtype != object
        rows = list(_ids(prompts) if is_batch else prompts)
        for row in rows:
            if not isinstance(row, str | Mapping) and np.ndim(row) == 0:
                raise TypeError("prompts: expected a list of prompts, got one. Put it in a list.")
        if masks is None:
            masks = self._guessed(rows, is_batch)
        elif not hasattr(masks, "__len__") or any(np.ndim(mask) == 0 for mask in masks):
            raise TypeError(f"attention_mask={arguments.shown(masks)}: expected a row per prompt")
        elif len(masks) != len(rows):
            raise ValueError(
                f"attention_mask: expected one row for each of {len(rows)} prompts, "
                f"got {len(masks)} rows"
            )
        return [self.one(row, mask) for row, mask in zip(rows, masks, strict=True)]

    def _parts(self, prompt: Any, mask: Any) -> tuple[Any, Any]:
        """Return ids and mask from a tokenizer's output; return any other prompt unchanged."""
        if not isinstance(prompt, Mapping):
            return prompt, mask
        if "input_ids" not in prompt:
            raise TypeError(f"prompt: a dict without input_ids, but {sorted(prompt)}")
        for name in prompt.keys() - {"input_ids", "attention_mask"}:
            if name in self._arguments or name not in _BESIDE:
                raise _not_read(name)
        if mask is not None and "attention_mask" in prompt:
            raise ValueError("attention_mask: the prompt contains one. Leave out the argument.")
        return prompt["input_ids"], prompt.get("attention_mask", mask)

    def _guessed(self, rows: list[Any], is_batch: bool) -> Sequence[Any]:
        """Return masks for prompts without masks. Raises: `ValueError` for ambiguous padding."""
        none = [None] * len(rows)
        if any(isinstance(row, Mapping) for row in rows):
            return none
        if len({np.shape(row) for row in rows}) != 1 or np.ndim(rows[0]) != 1:
            return none  # prompts of different lengths were not padded
        ids = np.stack([_ids(row) for row in rows])
        if is_batch and self._pad is not None and self._pad not in self._ends:
            hidden = ids == self._pad
            return ~hidden if hidden.any() else none
        for token in {self._pad, *self._ends} - {None}:
            is_token = ids == token
            for runs in (_leading(is_token), _leading(is_token[:, ::-1])):
                if len(set(runs)) > 1:
                    raise ValueError(
                        f"prompts: {min(runs)} to {max(runs)} times token {token} at one end may "
                        "be padding or not. Pass attention_mask."
                    )
        return none

    def _checked(self, array: NDArray[Any], mask: Any) -> list[int]:
        ids: list[int] = without_padding(arguments.token_ids(array), mask).tolist()
        if not ids:
            raise ValueError("prompt: empty. Pass at least one token.")
        for token in (min(ids), max(ids)):
            if not 0 <= token < self._vocabulary:
                raise ValueError(
                    f"prompt: token id {token} is outside the vocabulary (0-{self._vocabulary - 1})"
                )
        return ids


def _eos_ids(settings: Any) -> frozenset[int]:
    ends = settings.eos_token_id
    return frozenset([ends] if isinstance(ends, int) else ends or ())


def decoder_start(model: Any) -> int:
    """Return the token that an encoder-decoder model's replies start with.

    Raises: `ValueError` if the model names none.
    """
    config = model.generation_config
    start = config.decoder_start_token_id
    if start is None:
        start = getattr(model.config, "decoder_start_token_id", None)
    if start is None:
        start = config.bos_token_id
    if start is None:
        raise ValueError(
            "decoder_start_token_id=None: expected a token. Set it in generation_config."
        )
    return int(start)


def _not_read(name: str) -> ValueError:
    return ValueError(
        f"{name}: an engine takes input_ids and attention_mask only. "
        f"Leave {name} out, or call model.generate()."
    )


def prompt_argument(name: str, given: Any, input_ids: Any) -> Any:
    """Return the prompt, which is given either as argument `name` or as `input_ids`. O(1).

    Raises: `TypeError` if neither or both are given.
    """
    if given is None and input_ids is None:
        raise TypeError(f"{name}: missing. Pass token ids, or what a tokenizer returned.")
    if given is not None and input_ids is not None:
        raise TypeError(f"{name}: given twice. Leave out {name} or input_ids.")
    return input_ids if given is None else given


def options_per_prompt(options: dict[str, Any], count: int) -> Iterator[dict[str, Any]]:
    """Yield the options of each of `count` requests; a seed increases by one each. O(1) each."""
    if "request_id" in options:
        raise TypeError("request_id: requests cannot share an id. Leave it out or use submit().")
    seed: Any = options.get("seed")
    for number in range(count):
        yield options if not arguments.is_int(seed) else options | {"seed": seed + number}


def _ids(prompt: Any) -> NDArray[Any]:
    """Return the ids of one or several prompts, from any device. O(tokens)."""
    if isinstance(prompt, torch.Tensor):
        prompt = prompt.cpu()
    return arguments.integers("prompt", prompt)


def _leading(is_token: NDArray[np.bool_]) -> list[int]:
    """Return the length of the run of true values at the start of each row. O(tokens)."""
    runs: list[int] = np.logical_and.accumulate(is_token, axis=1).sum(axis=1).tolist()
    return runs


def without_padding(ids: Int32, mask: Any) -> Int32:
    """Return the ids that `mask` shows, or all without a mask. O(tokens). Raises: `ValueError`."""
    if mask is None:
        return ids
    shown = np.asarray(mask.cpu() if isinstance(mask, torch.Tensor) else mask)
    if shown.ndim == 2 and len(shown) == 1:
        shown = shown[0]
    if shown.shape != ids.shape:
        raise ValueError(
            f"attention_mask: expected shape {ids.shape} of the ids, got {shown.shape}"
        )
    if not np.isin(shown, (0, 1)).all():
        raise ValueError("attention_mask: expected ones for tokens and zeros for padding")
    places = np.flatnonzero(shown)
    if len(places) and places[-1] - places[0] + 1 != len(places):
        raise ValueError(
            "attention_mask: padding between tokens of a prompt. Hide padding before or after the "
            "tokens only; pass ones for pad tokens that belong to the text."
        )
    return ids[places]

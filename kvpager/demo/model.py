"""A model of the demo: its tokenizer, and how to generate with it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from kvpager._text import counted
from kvpager.bench import models
from kvpager.demo import measurement
from kvpager.demo.scenarios import Row, Scenario
from kvpager.demo.settings import Settings
from kvpager.errors import BadInput
from kvpager.integrations.huggingface.releases import cache_of
from kvpager.testing import tiny_llama_path


@dataclass(frozen=True, slots=True)
class Generated:
    """The result of one call of `generate`: its rows, on the CPU, and its cache."""

    prompts: tuple[Row, ...]
    rows: list[Row]  # new tokens only
    cache: Any
    seconds: float


class Engine:
    """A model, its tokenizer, and how to generate with them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.device = models.find_device(settings.device)
        self.name = settings.model or "the bundled tiny Llama"
        self.model, self.tokenizer = _load(settings, self.device)
        self.max_positions = models.max_length(self.model)
        eos = self.model.generation_config.eos_token_id
        self.eos = eos if eos is not None else self.tokenizer.eos_token_id
        first_eos = self.eos[0] if isinstance(self.eos, list) else self.eos
        pad = self.tokenizer.pad_token_id
        self.pad: int = next((token for token in (pad, first_eos) if token is not None), 0)

    @property
    def dtype(self) -> str:
        """Return the dtype of keys and values. O(1)."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def place(self) -> str:
        """Return the device, with the number of threads for a CPU. O(1)."""
        if self.device.type != "cpu":
            return str(self.device)
        threads = torch.get_num_threads()
        return f"{self.device} ({counted(threads, 'thread')})"

    def tokenize(self, text: str) -> Row:
        """Return token ids, without an end-of-text token. O(text)."""
        ids = list(self.tokenizer(text, verbose=False)["input_ids"])
        while ids and ids[-1] == self.tokenizer.eos_token_id:
            ids.pop()
        return ids

    def decode(self, ids: Row) -> str:
        """Return the text of token ids. O(tokens)."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def generate(self, prompts: tuple[Row, ...], scenario: Scenario, num_tokens: int) -> Generated:
        """Call `generate`, greedy or with beams, for `num_tokens` new tokens in every row."""
        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad] * (width - len(row)) + row for row in prompts])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
        ids, mask = ids.to(self.device), mask.to(self.device)
        measurement.synchronize(self.device)
        start = time.perf_counter()
        output = self.model.generate(
            ids,
            attention_mask=mask,
            generation_config=self._config(scenario, num_tokens),
        )
        measurement.synchronize(self.device)
        seconds = time.perf_counter() - start
        new = output.sequences[:, width:].tolist()
        return Generated(prompts, new, cache_of(output), seconds)

    def _config(self, scenario: Scenario, num_tokens: int) -> Any:
        return GenerationConfig(
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,  # no row ends early, so that the figures compare
            do_sample=False,
            num_beams=scenario.num_beams,
            num_return_sequences=scenario.num_returned,
            pad_token_id=self.pad,
            eos_token_id=self.eos,
            return_dict_in_generate=True,
            use_cache=True,
        )

    @property
    def eps(self) -> float:
        """Return the distance from 1 to the next number of the model's dtype."""
        return torch.finfo(self.model.dtype).eps

    @torch.inference_mode()
    def logits(self, ids: Row, num_last: int) -> torch.Tensor:
        """Return float32 logits [num_last, vocabulary] at the last positions. O(tokens)."""
        output = self.model(torch.tensor([ids], device=self.device), use_cache=False)
        return output.logits[0, -num_last:].float()  # type: ignore[no-any-return]


def _load(settings: Settings, device: torch.device) -> tuple[Any, Any]:
    name = settings.model or str(tiny_llama_path())
    dtype = settings.dtype or ("auto" if settings.model else "float32")
    if settings.model and _looks_like_path(name) and not Path(name).expanduser().is_dir():
        raise BadInput(f"model={name}: no such folder.")
    tokenizer = models.from_pretrained(AutoTokenizer, name)
    model = models.from_pretrained(AutoModelForCausalLM, name, dtype=dtype)
    try:
        return model.to(device).eval(), tokenizer
    except torch.OutOfMemoryError:
        raise BadInput(f"model={name}: does not fit on {device}. Try --dtype bfloat16.") from None


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name

"""The options of `kvpager demo`, checked before torch and transformers load."""

from __future__ import annotations

from dataclasses import dataclass

from kvpager.bench.options import option
from kvpager.errors import BadInput

DTYPES = ("float32", "bfloat16", "float16", "auto")
_MODEL = "Model and hardware"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of one run. None: the default depends on the model or the machine."""

    model: str | None = option(
        _MODEL,
        "Any causal language model of transformers.",
        "NAME_OR_PATH",
        shown="the bundled one, offline",
    )
    device: str | None = option(
        _MODEL,
        "Device, such as cpu or cuda:1.",
        "DEVICE",
        shown="cuda if torch finds one, else cpu",
    )
    dtype: str | None = option(
        _MODEL,
        "float32, bfloat16, float16, or auto for the checkpoint's dtype.",
        "DTYPE",
        shown="float32 for the bundled model, else auto",
    )
    prompt: list[str] | None = option("Requests", "Prompt of scenario (a); repeatable.", "TEXT")
    max_new_tokens: int = option("Requests", "Generated tokens per row.", "TOKENS", 32)
    block_size: int = option("Memory", "Tokens per block, a power of two.", "TOKENS", 16)
    memory: str | None = option(
        "Memory", "Maximum KV cache memory, such as 64MiB.", "SIZE", shown="no bound"
    )

    def check(self) -> None:
        """Check the options that depend on no machine. O(prompts). Raises `BadInput`."""
        from kvpager import _validate as arguments

        if self.dtype is not None and self.dtype not in DTYPES:
            raise BadInput(f"dtype={self.dtype}: expected one of {', '.join(DTYPES)}.")
        if not all(prompt.strip() for prompt in self.prompt or ()):
            raise BadInput("prompt='': expected some text.")
        try:
            arguments.count("max_new_tokens", self.max_new_tokens, at_least=1)
            arguments.block_size(self.block_size)
            arguments.parse_memory(self.memory)
        except ValueError as error:
            raise BadInput(str(error)) from None

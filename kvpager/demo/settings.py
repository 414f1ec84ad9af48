"""The options of `kvpager demo`, checked before torch and transformers load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvpager import _validate as arguments
from kvpager.errors import BadInput

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16", "auto")


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of one run. None: the default depends on the model or the machine."""

    model: str | None = None
    prompts: tuple[str, ...] = ()
    max_new_tokens: int = 32
    device: str | None = None
    dtype: str | None = None
    block_size: int = 16
    memory: str | None = None

    def check(self) -> None:
        """Check the options that depend on no machine. O(prompts). Raises `BadInput`."""
        if self.dtype is not None and self.dtype not in DTYPES:
            raise BadInput(f"dtype={self.dtype}: expected one of {', '.join(DTYPES)}.")
        if not all(prompt.strip() for prompt in self.prompts):
            raise BadInput("prompt='': expected some text.")
        try:
            arguments.count("max_new_tokens", self.max_new_tokens, at_least=1)
            arguments.block_size(self.block_size)
            if self.memory is not None:
                arguments.parse_memory(self.memory)
        except ValueError as error:
            raise BadInput(str(error)) from None

    def found_device(self) -> torch.device:
        """Return the device to run on. Raises `BadInput` if torch does not find it."""
        import torch

        name = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(name)
        except RuntimeError:
            raise BadInput(f"device={name}: expected a name such as cpu or cuda:1.") from None
        if device.type == "meta":
            raise BadInput("device=meta: computes nothing. Choose cpu or cuda.")
        try:
            torch.empty(1, device=device).cpu()
        except (AssertionError, ImportError, NotImplementedError, RuntimeError):
            raise BadInput(
                f"device={name}: not found by torch {torch.__version__}. Choose from {_devices()}."
            ) from None
        return device


def _devices() -> str:
    import torch

    return ", ".join(["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))])

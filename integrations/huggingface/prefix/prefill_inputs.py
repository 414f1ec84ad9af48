"""The arguments of `GenerationMixin._prefill`, and the padding and repeats among their rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kvpager.integrations.huggingface.releases import cache_in

# The `model_kwargs` that have a row for each row of the batch. With other inputs, keys and values
# depend on more than ids and padding, so rows are neither merged nor reused.
PER_ROW = {"attention_mask", "position_ids"}

Padding = NDArray[np.int64]


class PrefillInputs(NamedTuple):
    """The first arguments of `GenerationMixin._prefill`."""

    model: nn.Module
    ids: Tensor  # [rows, columns]
    generation_config: Any
    model_kwargs: dict[str, Any]

    @property
    def cache(self) -> Any:
        """Return the cache to which the prompt is written."""
        return cache_in(self.model_kwargs)

    def of_rows(self, rows: Any) -> PrefillInputs:
        """Return the inputs of some rows, or of some (rows, columns). O(columns)."""
        of_rows = {
            name: value[rows] if name in PER_ROW and value is not None else value
            for name, value in self.model_kwargs.items()
        }
        return self._replace(ids=self.ids[rows], model_kwargs=of_rows)

    def repeats(self) -> int:
        """Return how often each prompt is repeated by `generate`; 1 if repeats differ. O(ids)."""
        repeats = returned_rows(self.generation_config)
        if repeats == 1 or len(self.ids) % repeats:
            return 1
        for tensor in (self.ids, *(self.model_kwargs.get(name) for name in PER_ROW)):
            if tensor is not None and not torch.equal(
                tensor[::repeats].repeat_interleave(repeats, dim=0), tensor
            ):
                return 1
        return repeats

    def left_padding(self) -> Padding | None:
        """Return the number of padding columns before each row's first token, int64 [rows]. O(ids).

        Returns None if the mask hides any other column.
        """
        rows, columns = self.ids.shape[:2]
        mask = self.model_kwargs.get("attention_mask")
        if mask is None:
            return np.zeros(rows, np.int64)
        if mask.shape != (rows, columns):
            return None
        here = mask.cpu().numpy() != 0
        padding = here.argmax(axis=1)
        tokens = np.arange(columns) >= padding[:, None]
        left_padded = (here == tokens).all() and here.any(axis=1).all()
        return padding if left_padded else None


def returned_rows(generation_config: Any) -> int:
    """Return how many rows `generate` makes of each prompt: beams, or samples. O(1)."""
    return int(max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1))

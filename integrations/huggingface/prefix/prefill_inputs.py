"""The arguments of `generate` once the prompt is known, and what can be told from them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kvpager.integrations.huggingface.releases import cache_in

# What `model_kwargs` may hold where a row's keys and values follow from its ids and padding. With
# anything else in play, rows are neither merged nor reused.
PER_ROW = {"attention_mask", "position_ids"}

Padding = NDArray[np.int64]


class PrefillInputs(NamedTuple):
    """What `GenerationMixin._prefill` is given first."""

    model: nn.Module
    ids: Tensor  # [rows, columns]
    generation_config: Any
    model_kwargs: dict[str, Any]

    @property
    def cache(self) -> Any:
        """The cache that the prompt is written to."""
        return cache_in(self.model_kwargs)

    def of_rows(self, rows: Any) -> PrefillInputs:
        """Return the inputs with only these rows, or these (rows, columns). O(columns)."""
        of_rows = {
            name: value[rows] if name in PER_ROW and value is not None else value
            for name, value in self.model_kwargs.items()
        }
        return self._replace(ids=self.ids[rows], model_kwargs=of_rows)

    def repeats(self) -> int:
        """Return how many equal rows stand behind one another, as `generate` expands them.

        1 if rows differ. O(ids).
        """
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
        """Return the padding columns before each row's first token, int64 [rows]. O(ids).

        None if the mask hides anything else.
        """
        rows, columns = self.ids.shape[:2]
        mask = self.model_kwargs.get("attention_mask")
        if mask is None:
            return np.zeros(rows, np.int64)
        if mask.shape != (rows, columns):
            return None
        here = mask.cpu().numpy() != 0
        padding = here.argmax(axis=1)
        behind = np.arange(columns) >= padding[:, None]
        left_padded = (here == behind).all() and here.any(axis=1).all()
        return padding if left_padded else None


def returned_rows(generation_config: Any) -> int:
    """Return how many rows `generate` makes of each prompt: beams, or samples. O(1)."""
    return int(max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1))

"""Carry out a scheduler's step plans with a transformers model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from kvpager.integrations.huggingface.cache.budget import Budget
from kvpager.integrations.huggingface.runner.model_info import ModelInfo, blank_layers
from kvpager.integrations.huggingface.runner.sequence_rows import SequenceRows
from kvpager.integrations.huggingface.runner.step_cache import StepCache, StepRows
from kvpager.kernels.host_rows import to_device
from kvpager.plans import NO_COPIES, GroupStep, Int32, StepPlan
from kvpager.storage.block_storage import BlockStorage


@dataclass
class SampleState:
    """The state that a sample keeps besides its blocks."""

    others: dict[int, Any]  # transformers' own layers
    encoded: Any = None  # the encoder's output for the prompt
    across: Any = None  # cross-attention keys and values


class ModelRunner:
    """A model in evaluation mode, the storage of its blocks, and further state of its samples.

    Args:
        budget: the format of the blocks; its counters count reads.
        is_packed: True for packed passes, False for one pass per sequence; see `probe`.
        forward: the compiled model for packed passes; None for the model itself.
        sequences: rows for each group of layers, through which a pass per sequence reads its
            blocks; empty to gather them.
    """

    def __init__(
        self,
        model: Any,
        info: ModelInfo,
        storage: BlockStorage,
        budget: Budget,
        *,
        is_packed: bool,
        forward: Any = None,
        sequences: Sequence[SequenceRows] = (),
    ) -> None:
        self.model = model
        self.info = info
        self.storage = storage
        self.is_packed = is_packed
        self._forward = model if forward is None else forward
        self._kept: dict[int, SampleState] = {}
        # A mask of four dimensions makes models build no mask of their own. It is never read.
        self._no_mask = torch.zeros(1, 1, 1, 1, dtype=info.dtype, device=info.device)
        others = blank_layers(model, info.others)
        self._sequences = sequences
        self._cache = StepCache(storage, info.layers, others, budget, sequences)

    @property
    def device_type(self) -> str:
        """Return the type of the model's device. O(1)."""
        return self.info.device.type

    @property
    def block_bytes(self) -> int:
        """Return the bytes of a block in all layers of a group. O(1)."""
        return self.storage.block_bytes

    @torch.inference_mode()
    def run(self, plan: StepPlan, prompts: Mapping[int, list[int]]) -> Tensor:
        """Return the logits [rows that want them, vocabulary] of `plan`. O(tokens * layers).

        `prompts` has the encoder's token ids of new samples.
        """
        for swap in plan.swaps:
            self.storage.apply(swap)
        if len(plan.copies):
            self.storage.copy(plan.copies)
        self.forget(plan.freed)
        if not len(plan):
            return torch.empty(0, 0)
        rows = StepRows.of(plan, self.storage.block_size, self.info.device)
        if self.is_packed:
            return self._packed(rows, plan)
        return self._row_by_row(rows, plan, prompts)

    def forget(self, samples: Int32) -> None:
        """Drop the state of samples. O(samples)."""
        for group in self._sequences:
            group.forget(samples)
        if self._kept:
            for sample in samples.tolist():
                self._kept.pop(sample, None)

    def fork(self, parent: int, child: int) -> None:
        """Give `child` a copy of the state of `parent`. O(bytes of state besides blocks)."""
        kept = self._kept.get(parent)
        if kept is not None:
            # The encoder's output and the cross-attention cache never change.
            self._kept[child] = SampleState(copy.deepcopy(kept.others), kept.encoded, kept.across)

    def _packed(self, rows: StepRows, plan: StepPlan) -> Tensor:
        last = np.cumsum(plan.num_scheduled, dtype=np.int64)[plan.needs_logits] - 1
        keep = to_device(last, self.info.device)
        options: dict[str, Any] = {self.info.cache_name: self._cache}
        selects = "logits_to_keep" in self.info.arguments
        if selects:
            options["logits_to_keep"] = keep
        self._cache.begin(rows, is_packed=True)
        logits: Tensor = self._forward(
            input_ids=rows.ids,
            position_ids=rows.positions,
            attention_mask=self._no_mask,
            use_cache=True,
            **options,
        ).logits[0]
        return logits if selects else logits[keep]

    def _row_by_row(
        self, rows: StepRows, plan: StepPlan, prompts: Mapping[int, list[int]]
    ) -> Tensor:
        logits = []
        ends = np.cumsum(plan.num_scheduled, dtype=np.int64).tolist()
        for number, last in enumerate(ends):
            sample, wanted = int(plan.seq_ids[number]), bool(plan.needs_logits[number])
            if plan.num_computed[number] == 0 or sample not in self._kept:
                assert not (plan.num_computed[number] and self.info.has_state), "a state was lost"
                self._kept[sample] = self._new(prompts.get(sample))
            kept = self._kept[sample]
            for index, layer in kept.others.items():
                self._cache.layers[index] = layer
            first = last - int(plan.num_scheduled[number])
            row = rows.row(number, first, last, int(plan.seq_lens[number]))
            for group in self._sequences:
                group.show(sample)
            self._cache.begin(row, is_packed=False)
            of_row = self._single(row, kept)
            if wanted:
                logits.append(of_row[0, -1])
        return torch.stack(logits) if logits else torch.empty(0, 0)

    def _single(self, row: StepRows, kept: SampleState) -> Tensor:
        accepted = self.info.arguments
        options: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in accepted:
            options["logits_to_keep"] = 1
        if self.info.is_encoder_decoder:
            options["decoder_input_ids"] = row.ids
            options["encoder_outputs"] = kept.encoded
            options[self.info.cache_name] = EncoderDecoderCache(self._cache, kept.across)
        else:
            options["input_ids"] = row.ids
            options[self.info.cache_name] = self._cache
            if "attention_mask" in accepted:
                options["attention_mask"] = row.ids.new_ones(1, row.longest)
            if "position_ids" in accepted:
                options["position_ids"] = row.positions
        logits: Tensor = self.model(**options).logits
        return logits

    def _new(self, encoder_ids: list[int] | None) -> SampleState:
        kept = SampleState(blank_layers(self.model, self.info.others))
        if self.info.is_encoder_decoder:
            ids = torch.tensor([encoder_ids], device=self.info.device)
            kept.encoded = self.model.get_encoder()(input_ids=ids)
            kept.across = DynamicCache()
        return kept


def trial_plan(
    prompts: list[list[int]],
    starts: Int32,
    counts: NDArray[Any],
    tables: Int32,
    storage: BlockStorage,
    num_groups: int = 1,
) -> StepPlan:
    """Return a plan without a scheduler: `counts` tokens of each of `prompts`, from `starts` on.

    `tables` are [rows, blocks], the same for all groups of layers, or [groups, rows, blocks].
    """
    size = storage.block_size
    spans = [range(start, start + count) for start, count in zip(starts, counts, strict=True)]
    rows = [row for row, span in enumerate(spans) for _ in span]
    positions = np.array([position for span in spans for position in span], np.int64)
    tables = np.broadcast_to(tables, (num_groups, *tables.shape[-2:])).copy()
    slots = tables[:, rows, positions // size].astype(np.int64) * size + positions % size
    ids = [prompts[row][position] for row, span in enumerate(spans) for position in span]
    return StepPlan(
        swaps=[],
        copies=NO_COPIES,
        request_ids=[None] * len(prompts),
        seq_ids=np.arange(len(prompts), dtype=np.int32),
        num_computed=starts,
        num_scheduled=counts.astype(np.int32),
        token_ids=np.array(ids, np.int32),
        slot_mapping=slots[0],
        seq_lens=(starts + counts).astype(np.int32),
        block_tables=tables[0],
        needs_logits=np.ones(len(prompts), np.bool_),
        freed=np.empty(0, np.int32),
        ended=[],
        more_groups=tuple(map(GroupStep, slots[1:], tables[1:])),
    )

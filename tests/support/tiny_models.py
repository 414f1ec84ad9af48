"""Tiny random-weight transformers models, one of each kind of attention that kvpager meets."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from tests.conformance import architectures
from tests.conformance import architectures_across as across
from tests.conformance import architectures_special as special
from tests.conformance.architectures import PAD, VOCAB

ARCHITECTURES = {
    **architectures.DECODERS,
    **special.OTHER_DECODERS,
    **special.RECURRENT,
    **across.ENCODER_DECODERS,
    **across.VISION,
}

# One of each kind of attention: what tests of a behaviour go through.
DECODERS = [
    "llama", "qwen2", "qwen3", "mistral", "mixtral", "gemma2", "gemma3", "gpt_oss", "gpt2", "opt",
    "bloom", "falcon", "deepseek_v3", "qwen3_next",
]  # fmt: skip
ENCODER_DECODERS = ["t5", "bart"]


def is_known(name: str) -> bool:
    """Return True if this transformers has the architecture."""
    known = ARCHITECTURES[name]
    return hasattr(transformers, known.model) and hasattr(transformers, known.config)


def tiny_model(
    name: str, *, seed: int = 0, attention: str | None = None, **changes: Any
) -> PreTrainedModel:
    """The same model for the same name, seed and changes to its configuration, in float32 and
    evaluation mode."""
    known = ARCHITECTURES[name]
    parts = {
        part: _config(config_class, arguments)
        for part, (config_class, arguments) in (known.parts or {}).items()
    }
    config = _config(known.config, {**copy.deepcopy(known.arguments), **parts, **changes})
    config._attn_implementation = attention
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(transformers, known.model)(config)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() > 1:
                # Wide enough apart that greedy text varies and rounding decides no token.
                spread = known.gain / parameter.shape[-1] ** 0.5
                if known.quiet is not None and path.endswith(known.quiet):
                    spread /= 4
                parameter.normal_(0, spread, generator=generator)
            elif path.endswith("gate"):
                parameter.fill_(1)  # a closed one hides what lies behind it
    return model.eval()


def _config(config_class: str, arguments: dict[str, Any]) -> Any:
    return getattr(transformers, config_class)(**copy.deepcopy(arguments))


def prompts(lengths: list[int], *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random prompts of these lengths as one left-padded batch: `input_ids`, `attention_mask`."""
    generator = torch.Generator().manual_seed(seed)
    columns = max(lengths)
    input_ids = torch.full((len(lengths), columns), PAD)
    mask = torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        ids = torch.randint(3, VOCAB, (length,), generator=generator)
        input_ids[row, columns - length :] = ids
        mask[row, columns - length :] = 1
    return {"input_ids": input_ids, "attention_mask": mask}


def assert_equal_but_for_near_ties(paged: Any, expected: Any, prompt_length: int) -> None:
    """Two exact attentions round bf16 differently: a token may differ only where two are level."""
    for row in range(len(expected.sequences)):
        differ = (paged.sequences[row] != expected.sequences[row]).nonzero()
        if len(differ):
            step = int(differ[0]) - prompt_length
            best, second = expected.logits[step][row].float().topk(2).values.tolist()
            assert best - second < 0.25, f"row {row}, step {step}: margin {best - second}"


class Computed:
    """Counts the ids that a model really computes: `with computed:` begins at zero.

    It only notes them, so a prefix cache takes the model for the same one in between.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        shapes: list[torch.Size] = []
        self._shapes = shapes
        model.get_input_embeddings().register_forward_pre_hook(
            lambda _module, inputs: shapes.append(inputs[0].shape)
        )

    def __enter__(self) -> Computed:
        self._shapes.clear()
        return self

    def __exit__(self, *error: object) -> None:
        pass

    @property
    def columns(self) -> list[int]:
        """The columns of each pass."""
        return [shape[1] for shape in self._shapes]

    @property
    def tokens(self) -> int:
        """The ids of all passes of more than one column."""
        return sum(shape.numel() for shape in self._shapes if shape[1] > 1)

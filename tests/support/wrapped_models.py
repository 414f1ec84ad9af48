"""Tuned models, ways to patch and to generate, and a model's tokens in each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")


peft = pytest.importorskip("peft")


from kvpager.integrations.huggingface import Patch  # noqa: E402
from tests.support import tiny_models  # noqa: E402

PATCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "gathered": {"in_place": False, "block_size": 4},
    "prefix cache": {"prefix_cache": True, "block_size": 4},
}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 4, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "chunks": {"prefill_chunk_size": 5},
}
PADDED = tiny_models.prompts([9, 23])


def tokens(model: Any, inputs: dict[str, Any] = PADDED, **options: Any) -> Any:
    """The text of a model, or the error's type where transformers raises one."""
    torch.manual_seed(3)
    lengths = {"max_new_tokens": 10, "min_new_tokens": 10}
    try:
        return model.generate(**inputs, **lengths, pad_token_id=tiny_models.PAD, **options).tolist()
    except (ValueError, RuntimeError, IndexError) as error:
        return type(error)


def check_pools(patch: Patch) -> None:
    for pool in patch.memory.pools():
        pool.settle()
        pool.manager.check()
        assert pool.manager.num_held_blocks == 0


VIRTUAL: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
PEFT_CONFIGS: dict[str, Callable[[], Any]] = {
    "prompt tuning": lambda: peft.PromptTuningConfig(**VIRTUAL),
    "p-tuning": lambda: peft.PromptEncoderConfig(**VIRTUAL, encoder_hidden_size=32),
    "prefix tuning": lambda: peft.PrefixTuningConfig(**VIRTUAL),
    "cpt": lambda: peft.CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=[4, 5, 6],
        cpt_mask=[1, 1, 1],
        cpt_tokens_type_mask=[1, 2, 3],
    ),
    "adaption prompt": lambda: peft.AdaptionPromptConfig(
        task_type="CAUSAL_LM", adapter_len=4, adapter_layers=1
    ),
    "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False),
    "ia3": lambda: peft.IA3Config(task_type="CAUSAL_LM", init_ia3_weights=False),
}


def tuned(kind: str) -> Any:
    model = peft.get_peft_model(tiny_models.tiny_model("llama"), PEFT_CONFIGS[kind]()).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.7, generator=generator)
    return model

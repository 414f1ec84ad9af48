"""A model is named by its content: equal ones alike in all processes, others differently."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from torch import nn  # noqa: E402

from kvpager.errors import KVPagerError  # noqa: E402
from kvpager.integrations.huggingface.model_state.model_id import model_id  # noqa: E402
from kvpager.testing import tiny_llama_path  # noqa: E402
from tests.support import model_changes  # noqa: E402
from tests.support.model_changes import CHANGES, Change, llama  # noqa: E402
from tests.support.programs import outputs_by_hash_seed  # noqa: E402

# After these, a model computes the same, up to rounding.
_NO_OTHER_MODEL = ("functions_are_replaced", "an_attention_function_is_replaced")
_NO_OTHER_MODEL += ("torch_computes_otherwise",)
_LAST_STEP_IS_NONE = ("a_weight_has_other_data", "settings_change")
_PROGRAM = """
import transformers
from kvpager.integrations.huggingface.model_state.model_id import model_id
from kvpager.testing import tiny_llama_path
print(model_id(transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_path(), dtype="auto")))
"""


def name(model: Any) -> str:
    """Return the name of a model, or why it has none."""
    try:
        return model_id(model)
    except KVPagerError as error:
        return str(error)


@pytest.mark.slow
def test_processes_give_a_model_one_name() -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_path(), dtype="auto")
    assert outputs_by_hash_seed(_PROGRAM) == {model_id(model)}


def test_neither_copies_nor_use_nor_attention_change_the_name() -> None:
    model = llama()
    first = model_id(model)
    model_changes.tokens(model)
    model.set_attn_implementation("eager")
    model.name_or_path = "/another/folder"
    assert {model_id(model), model_id(copy.deepcopy(model)), model_id(llama())} == {first}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_another_model_has_another_name_or_none(change: Change) -> None:
    model = llama()
    steps = change(model)
    names = [name(model) for _ in steps]
    if change.__name__ in _NO_OTHER_MODEL:
        assert len(set(names)) == 1
        return
    if change.__name__ in _LAST_STEP_IS_NONE:
        assert names.pop() == names[-1]
    for before, after in itertools.pairwise(names):
        assert before != after or "cannot be named" in after


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of PEFT's
def test_the_active_adapter_counts() -> None:
    peft = pytest.importorskip("peft")
    model = llama()
    plain = model_id(model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config, adapter_name="one")
    wrapped.add_adapter("two", config)
    names = [plain]
    for adapter in ("one", "two"):
        wrapped.set_adapter(adapter)
        names.append(model_id(model))
    with wrapped.disable_adapter():
        names.append(model_id(model))
    assert len(set(names)) == 4
    wrapped.set_adapter("one")
    assert model_id(model) == names[1]


def test_a_model_of_the_users_own_classes_has_no_name() -> None:
    class Own(nn.Module):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return states

    model = llama()
    model.model.layers[0].mlp = Own()
    with pytest.raises(KVPagerError, match=r"it calls .*Own.*Pass model_id='name@revision'"):
        model_id(model)


def test_weights_that_are_not_in_memory_have_no_name() -> None:
    model = llama()
    model.lm_head.weight = nn.Parameter(torch.empty(3, 3, device="meta"))
    with pytest.raises(KVPagerError, match="not in memory"):
        model_id(model)

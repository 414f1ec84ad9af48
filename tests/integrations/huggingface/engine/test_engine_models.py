"""Engines of wrapped, spread and unusual models: the right tokens, or a refusal that says why."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

from transformers import GenerationConfig, PreTrainedModel  # noqa: E402

import kvpager  # noqa: E402
from kvpager import Engine, KVPagerError  # noqa: E402
from tests.conformance.architectures import LLAMA_LIKE  # noqa: E402
from tests.support import tiny_models  # noqa: E402

# PEFT asks transformers 5.23 for an old name; torch imports its own deprecated parts.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning"),
]

PROMPTS = [[5, 6, 7, 9, 11], [12, 13, 14]]
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


def served(model: Any) -> list[list[int]]:
    with Engine(model, memory="4MiB") as engine:
        return [output.token_ids for output in engine.generate(PROMPTS, **GREEDY)]


def alone(model: Any) -> list[list[int]]:
    """Return the tokens that `generate` of the model, or of its wrapper, adds to each prompt."""
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY)
        found.append(tokens[0, len(prompt) :].tolist())
    return found


def adapted(config: Any) -> Any:
    """A model of PEFT's whose adapters change its tokens."""
    model = peft.get_peft_model(tiny_models.tiny_model("llama"), config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}
ON_QUERIES: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], **CAUSAL}


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(**ON_QUERIES),
        peft.LoraConfig(target_modules=["q_proj"]),  # of no task: another class wraps it
        peft.IA3Config(feedforward_modules=[], **ON_QUERIES),
        peft.LoHaConfig(**ON_QUERIES),
        peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, **CAUSAL),
    ],
    ids=lambda config: type(config).__name__,
)
def test_the_model_inside_peft_is_served_with_its_adapters(config: Any) -> None:
    model = adapted(config)
    assert served(model) == alone(model) != alone(tiny_models.tiny_model("llama"))


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(num_virtual_tokens=5, **CAUSAL),
        peft.PrefixTuningConfig(num_virtual_tokens=5, **CAUSAL),
        peft.PromptEncoderConfig(num_virtual_tokens=5, **CAUSAL),
        peft.MultitaskPromptTuningConfig(num_virtual_tokens=5, num_tasks=2, **CAUSAL),
        peft.LoraConfig(alora_invocation_tokens=[7, 9], **ON_QUERIES),
    ],
    ids=lambda config: type(config).__name__,
)
def test_adapters_that_the_model_inside_does_not_hold_are_refused(config: Any) -> None:
    with pytest.raises(KVPagerError, match=r"batched continuously.*Use model.generate\(\)"):
        Engine(adapted(config), memory="4MiB")


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_the_model_inside_a_wrapper_of_torch_is_served(wrap: Any) -> None:
    model = tiny_models.tiny_model("llama")
    assert served(wrap(model)) == alone(model)


class Holder(nn.Module):
    """A wrapper of the caller's own."""

    def __init__(self, model: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        self.pretrained_model = model
        self.scale = scale

    def forward(self, **options: Any) -> Any:
        output = self.pretrained_model(**options)
        output.logits = output.logits * self.scale
        return output


def test_a_model_in_a_transparent_wrapper_is_served() -> None:
    model = tiny_models.tiny_model("llama").train()
    wrapper = Holder(model)
    assert served(wrapper) == alone(model.eval())
    with pytest.raises(KVPagerError, match="its logits are not those of the LlamaForCausalLM"):
        Engine(Holder(model, scale=2.0), memory="4MiB")


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.filterwarnings("ignore:.*on a device type different:UserWarning")  # of 5.17
@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("where", ["host memory", "disk"])
def test_a_model_whose_weights_are_offloaded_is_served(
    name: str, where: str, tmp_path: Path
) -> None:
    model = tiny_models.tiny_model(name)
    expected = served(model)
    if where == "disk":
        accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    else:
        accelerate.cpu_offload(model, execution_device="cpu")
    assert served(model) == expected


def test_a_wrapper_that_is_refused_keeps_its_mode() -> None:
    model = Holder(tiny_models.tiny_model("llama"), scale=2.0).train()
    model.pretrained_model.lm_head.eval()
    with pytest.raises(KVPagerError):
        Engine(model, memory="4MiB")
    assert model.training
    assert model.pretrained_model.model.training
    assert not model.pretrained_model.lm_head.training


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda llama: "some/model", "AutoModelForCausalLM.from_pretrained"),
        (lambda llama: SimpleNamespace(model=llama), r"Pass its \.model\."),
        (lambda llama: llama.model, "language-model head"),
        (lambda llama: nn.ModuleList([llama, tiny_models.tiny_model("gpt2")]), r"model\.0, model"),
        (lambda llama: None, "got NoneType"),
    ],
)
def test_models_that_cannot_generate_are_refused_with_advice(model: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Engine(model(tiny_models.tiny_model("llama")), memory="4MiB")


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, Holder])
def test_a_patch_of_a_wrapper_serves_the_model_inside(wrap: Any) -> None:
    model = tiny_models.tiny_model("llama")
    expected = alone(model)
    with kvpager.patch(wrap(model)) as patch:
        assert alone(model) == expected
        assert patch.stats().peak_held_bytes


# -------------------------------------------------------------------- spread over processes


class OnAMesh(nn.Parameter):
    """A weight that looks like a DTensor."""

    device_mesh = "a mesh"


class FullyShardedDataParallel(nn.Sequential):
    """A module that has the name of FSDP's."""


def mesh(model: Any) -> Any:
    model._device_mesh = object()
    return model


def tensor_parallel(model: Any) -> Any:
    model._tp_size = 2
    return model


def sharded_weight(model: Any) -> Any:
    model.lm_head.weight = OnAMesh(model.lm_head.weight.detach())
    return model


def zero_3(model: Any) -> Any:
    model.lm_head.weight.ds_id = 1
    return model


def pipeline(model: Any) -> Any:
    model.hf_split_points = ["model.layers.1"]
    return model


SPREAD = [mesh, tensor_parallel, sharded_weight, zero_3, pipeline]


@pytest.mark.parametrize("spread", [*SPREAD, FullyShardedDataParallel])
def test_a_model_that_processes_compute_together_is_refused(spread: Any) -> None:
    model = spread(tiny_models.tiny_model("llama"))
    with pytest.raises(KVPagerError, match="is sharded by"):
        Engine(model, memory="4MiB")


@pytest.mark.parametrize("spread", SPREAD)
def test_a_spread_model_has_no_batches_of_generate_batch_either(spread: Any) -> None:
    model = spread(tiny_models.tiny_model("llama"))
    with kvpager.patch(model), pytest.raises(KVPagerError, match="is sharded by"):
        model.generate_batch(PROMPTS, GenerationConfig(max_new_tokens=2))


# -------------------------------------------------------------------- unusual ones


def mllama() -> PreTrainedModel:
    """Llama 3.2 Vision: layers 1 and 3 look at an image, and are passed over without one."""
    text = {**LLAMA_LIKE, "num_hidden_layers": 4, "cross_attention_layers": [1, 3]}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1,
        "attention_heads": 2, "image_size": 28, "patch_size": 14, "vision_output_dim": 64,
        "intermediate_layers_indices": [0], "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]],
    }  # fmt: skip
    config = transformers.MllamaConfig(
        vision_config=vision, text_config=text, image_token_index=126
    )
    torch.manual_seed(0)
    model = transformers.MllamaForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0, 0.2)
    return model.eval()


def test_text_of_a_model_with_layers_for_images_is_served() -> None:
    model = mllama()
    expected = alone(model)
    assert served(model) == expected
    with kvpager.patch(model, memory="4MiB"):
        outputs = model.generate_batch(PROMPTS, GenerationConfig(max_new_tokens=8))
    assert [output.generated_tokens for output in outputs.values()] == expected


def bark() -> PreTrainedModel:
    """Three models in one, with no layers of its own."""
    part = {"num_layers": 1, "num_heads": 2, "hidden_size": 32}
    return transformers.BarkModel(
        transformers.BarkConfig(semantic_config=part, coarse_acoustics_config=part,
                                fine_acoustics_config=part)
    ).eval()  # fmt: skip


def cpmant() -> PreTrainedModel:
    """Writes columns of its own in front of a prompt."""
    config = transformers.CpmAntConfig(
        vocab_size=128, hidden_size=64, num_attention_heads=4, dim_head=16, dim_ff=96,
        num_hidden_layers=2, prompt_length=8,
    )  # fmt: skip
    return transformers.CpmAntForCausalLM(config).eval()


def kosmos() -> PreTrainedModel:
    """Numbers positions in a way of its own, which `generate` leaves to the model."""
    text = {
        "vocab_size": 128, "embed_dim": 64, "ffn_dim": 96, "layers": 2, "attention_heads": 4,
        "max_position_embeddings": 256,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 16,
        "num_attention_heads": 2, "patch_embed_hidden_size": 32,
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.Kosmos2_5Config(text_config=text, vision_config=vision)
    model = transformers.Kosmos2_5ForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0, 0.2)
    return model.eval()


@pytest.mark.parametrize("make", [bark, cpmant, kosmos])
def test_models_without_a_block_cache_are_refused_as_documented(make: Any) -> None:
    model = make()
    attention = model.config._attn_implementation
    with pytest.raises(KVPagerError, match="cannot be batched continuously"):
        Engine(model, memory="4MiB")
    assert model.config._attn_implementation == attention
    with kvpager.patch(model), pytest.raises(KVPagerError, match="cannot be batched continuously"):
        model.generate_batch(PROMPTS, GenerationConfig(max_new_tokens=2))

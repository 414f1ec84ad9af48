"""What a token costs in models with attention of their own: gathered, mapped, and unpatched.

    python benchmarks/mapped_generate.py                    # bloom, falcon and deepseek_v3
    python benchmarks/mapped_generate.py --only bloom --contexts 512 --repeats 3

Their attention code knows nothing of blocks. With `kvpager.patch(model)` each step gathers their
keys and values; with `mode="virtual"` it reads mapped blocks. Models of random weights decode
greedily in turns: gathered, mapped, and with transformers' own cache. As in `generate.py`, the
prompt's keys and values are random numbers, and time runs from one token to the last. The first
logits have to agree but for rounding. Ratios above 1: mapped is quicker.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache, LogitsProcessorList

# As a file of its own, too: `python benchmarks/mapped_generate.py`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import kvpager
from benchmarks import timing
from benchmarks.generate import Stamps, numbers
from kvpager.integrations.huggingface.releases import with_cache
from kvpager.integrations.huggingface.runner.model_info import inspect_model
from kvpager.modes import ModeName

TOLERANCE = 1e-4
_COMMON = {"vocab_size": 4096, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bloom": ("BloomForCausalLM", "BloomConfig", {"hidden_size": 512, "n_layer": 4, "n_head": 8}),
    "falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8},
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            "hidden_size": 512,
            "intermediate_size": 1408,
            "moe_intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 2,
            "q_lora_rank": 128,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
            "max_position_embeddings": 8192,
        },
    ),
}


def made(name: str) -> Any:
    """Return a model of random weights in float32, whose replies have the requested length."""
    model_class, config_class, arguments = MODELS[name]
    config = getattr(transformers, config_class)(**_COMMON, **arguments)
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


class Contender:
    """Decodes from a full cache in one mode, and crops the cache to its prompt after each turn."""

    def __init__(
        self, model: Any, shapes: Iterable[Any], mode: ModeName | None, args: argparse.Namespace
    ) -> None:
        """Fill a cache; `mode` None is transformers' own cache, unpatched."""
        self.model, self.mode, self.new = model, mode, args.new
        self.context = args.context
        with self.patched() as self.patch:  # undone, but it goes on counting for its caches
            self.cache = DynamicCache(config=model.config)
            generator = torch.Generator().manual_seed(1)
            for layer, shape in enumerate(shapes):
                size = args.rows, shape.num_kv_heads, args.context
                keys = torch.randn(*size, shape.head_dim, generator=generator)
                values = torch.randn(*size, shape.value_head_dim, generator=generator)
                self.cache.update(keys, values, layer)
        ids = torch.Generator().manual_seed(2)
        # All but the last of these tokens stand in the cache.
        self.ids = torch.randint(1, 4096, (args.rows, args.context + 1), generator=ids)
        self.tokens = self.logits = torch.empty(0)

    def patched(self) -> contextlib.AbstractContextManager[Any]:
        if self.mode is None:
            return contextlib.nullcontext()
        return kvpager.patch(self.model, mode=self.mode)

    def __call__(self) -> float:
        """Return the seconds per token."""
        stamps = Stamps()
        with self.patched():
            output = self.model.generate(
                self.ids,
                attention_mask=torch.ones_like(self.ids),
                **with_cache({}, self.cache),
                max_new_tokens=self.new,
                do_sample=False,
                logits_processor=LogitsProcessorList([stamps]),
            )
            self.tokens, self.logits = output[:, self.ids.shape[1] :], stamps.first
            self.cache.crop(self.context - self.cache.get_seq_length())
        return stamps.seconds_per_token


def require_same(name: str, one: Contender, other: Contender) -> float:
    """Return the share of equal tokens. Stop unless the first logits are equal but for rounding."""
    error = float((one.logits - other.logits).abs().max() / other.logits.abs().max())
    if not error <= TOLERANCE:
        raise SystemExit(f"{name}: logits differ by {error:.2e} of the largest")
    return float((one.tokens == other.tokens).float().mean())


def measure(name: str, args: argparse.Namespace, lines: timing.Lines) -> None:
    """Measure the three in turns, and what the patches counted."""
    model = made(name)
    layers = inspect_model(model).layers
    shapes = [layer.shape for layer in layers]
    modes: dict[str, ModeName | None] = {
        "gathered": "paged", "mapped": "virtual", "dynamic_cache": None
    }  # fmt: skip
    works = {which: Contender(model, shapes, mode, args) for which, mode in modes.items()}
    times = timing.turns(
        works, args.repeats, seconds=args.seconds, clock=lambda contender: contender()
    )
    case = f"mapped_{name}_b{args.rows}_{args.context}"
    for which, each in times.items():
        lines.add(f"{case}_{which}_ms", statistics.median(each) * 1e3, "ms/token")
    mapped = works["mapped"]
    stats = mapped.patch.stats()
    for other in ("gathered", "dynamic_cache"):
        lines.add(
            f"{case}_vs_{other}",
            timing.ratio(times, other, "mapped"),
            "ratio",
            same_tokens=round(require_same(case, mapped, works[other]), 4),
            gathers=stats.gathers,
            turns=len(times["mapped"]),
        )


def main() -> None:
    """Measure each model and context."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="NAME", help="models whose name contains it")
    parser.add_argument("--rows", type=int, default=8, help="default: 8")
    parser.add_argument("--contexts", type=numbers, default=(2048,), help="default: 2048")
    parser.add_argument("--new", type=int, default=17, help="tokens per turn (default: 17)")
    parser.add_argument("--repeats", type=int, default=7, help="turns (default: 7)")
    parser.add_argument("--seconds", type=float, default=40, help="end a case after this")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    lines = timing.Lines()
    timing.describe()
    for context in args.contexts:
        for name in (each for each in MODELS if args.only in each):
            measure(name, argparse.Namespace(**vars(args) | {"context": context}), lines)


if __name__ == "__main__":
    main()

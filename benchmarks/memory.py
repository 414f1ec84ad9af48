"""Memory of a batch's KV cache: kvpager beside DynamicCache and StaticCache.

    python benchmarks/memory.py                                  # a minute or two
    python benchmarks/memory.py --plot docs/images/memory.svg    # the same, and a plot
    python benchmarks/memory.py --quick                          # shorter rows, a few seconds

A batch has 16 left-padded rows. The longest row always has the same length; the sum of the lengths
grows from batch to batch. A Llama of 2 layers with random weights generates 16 tokens with each
cache. The bytes are exact and the same on every machine: the tensors of DynamicCache and
StaticCache, the peak of held blocks (`held`), and the pool (`reserved`). All caches have to give
the same tokens.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Cache, LlamaConfig, LlamaForCausalLM

# As a file of its own, too: `python benchmarks/memory.py`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import kvpager
from benchmarks import timing
from kvpager.bench import plots
from kvpager.integrations.huggingface.releases import cache_of

ROWS, SHORTEST, NEW, VOCAB = 16, 32, 16, 4096
MIB = 1 << 20
# The series of the plot: label, line, colour, width.
SERIES = {
    "static_cache": ("StaticCache", "-", "lightgray", 8),  # wide: DynamicCache may lie on it
    "dynamic_cache": ("DynamicCache", "s-.", "tab:red", 1.5),
    "kvpager_reserved": ("kvpager, reserved", "^--", "tab:blue", 1.5),
    "kvpager_held": ("kvpager, held", "o-", "tab:blue", 1.5),
}
Figures = dict[str, dict[str, float]]


def batches(longest: int) -> dict[str, list[int]]:
    """Return the lengths of the rows of each batch, from the smallest sum to the largest."""
    spread = [round(float(n)) for n in torch.linspace(SHORTEST, longest, ROWS)]
    # As in practice, half of the prompts are shorter than a tenth of the longest.
    normal = torch.distributions.Normal(math.log(longest / 10), 1.0)
    shares = [(row + 0.5) / ROWS for row in range(ROWS - 1)]
    usual = [round(math.exp(float(normal.icdf(torch.tensor(share))))) for share in shares]
    return {
        "one_long": [longest] + [SHORTEST] * (ROWS - 1),
        "log_normal": [longest] + [min(max(length, SHORTEST), longest) for length in usual],
        "uniform": spread,
        "three_quarters_long": [longest] * (ROWS * 3 // 4) + [SHORTEST] * (ROWS // 4),
        "all_long": [longest] * ROWS,
    }


def small_llama(longest: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=longest + NEW,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    # Every cache has to hold the same number of tokens.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def padded(lengths: list[int]) -> dict[str, torch.Tensor]:
    longest = max(lengths)
    numbers = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCAB, (len(lengths), longest), generator=numbers)
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def run(model: LlamaForCausalLM, lengths: list[int], **options: Any) -> tuple[torch.Tensor, Cache]:
    """The tokens of all rows, and the cache they were written with."""
    result = model.generate(
        **padded(lengths), max_new_tokens=NEW + 1, do_sample=False,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    return result.sequences, cache_of(result)


def tensor_bytes(cache: Cache) -> int:
    """Bytes of the tensors that the cache holds: there to be counted, not worked out."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def measure(model: LlamaForCausalLM, lengths: list[int]) -> dict[str, int]:
    """Bytes by cache, for one batch. Raises `AssertionError` if their tokens differ."""
    expected, dense = run(model, lengths)
    tokens, static = run(model, lengths, cache_implementation="static")
    assert torch.equal(tokens, expected), "StaticCache: other tokens"
    with kvpager.patch(model) as patch:
        # The cache is kept until its pool has been looked at: it would take it along.
        tokens, cache = run(model, lengths)
        stats = patch.stats()
        del cache
    assert torch.equal(tokens, expected), "kvpager: other tokens"
    return {
        "kvpager_held": stats.peak_held_bytes,
        "kvpager_reserved": stats.reserved_bytes,
        "dynamic_cache": tensor_bytes(dense),
        "static_cache": tensor_bytes(static),
    }


def draw(file: Path, figures: Figures, title: str) -> None:
    """Plot the bytes over the sum of the lengths, as .svg or .png."""
    with plots.saved(file, (7.5, 4.5)) as figure:
        axes = figure.subplots()
        for series, (label, line, colour, width) in SERIES.items():
            points = [(each["tokens"], each[series] / MIB) for each in figures.values()]
            axes.plot(*zip(*points, strict=True), line, color=colour, label=label, linewidth=width)
        for name, each in figures.items():
            place = (each["tokens"], each["kvpager_held"] / MIB)
            axes.annotate(name.replace("_", " "), place, (6, -12), textcoords="offset points")
        axes.set(xlabel="tokens in the batch, prompts and replies", ylabel="KV cache, MiB")
        axes.set_ylim(bottom=0)
        axes.margins(x=0.12)
        axes.legend(loc="upper left", bbox_to_anchor=(0.02, 0.75))
        plots.titles(figure, title, "Llama of 2 layers; the bytes are the same on every machine")


def plot_file(text: str) -> Path:
    """Return the file to draw into. Raises before the measurement if it cannot be written."""
    file = Path(text)
    if file.suffix not in (".svg", ".png") or not file.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"{text}: expected a .png or .svg file in a folder that exists."
        )
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise argparse.ArgumentTypeError(
            f"{text}: matplotlib is not installed. Run: pip install 'kvpager[plot]'"
        ) from None
    return file


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="rows of up to 128 tokens")
    parser.add_argument("--longest", type=int, help="tokens (default: 2048, quick 128)")
    parser.add_argument("--plot", type=plot_file, metavar="FILE", help="an .svg or .png to draw")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    options = parser.parse_args()
    options.longest = options.longest or (128 if options.quick else 2048)
    if options.longest <= SHORTEST:
        parser.error(f"--longest {options.longest}: expected more than {SHORTEST}")
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    lines = timing.Lines()
    timing.describe()
    model, figures = small_llama(options.longest), Figures()
    for name, lengths in timing.progress(list(batches(options.longest).items()), "memory"):
        found = measure(model, lengths)
        tokens = sum(lengths) + NEW * ROWS
        figures[name] = {"tokens": tokens, **found}
        for series, num_bytes in found.items():
            lines.add(f"memory_{name}_{series}_bytes", num_bytes, "bytes", tokens=tokens)
        ratio = found["dynamic_cache"] / found["kvpager_held"]
        lines.add(f"memory_{name}_vs_dynamic_cache", ratio, "ratio", tokens=tokens)
    if options.plot is not None:
        draw(
            options.plot, figures, f"{ROWS} rows, the longest prompt of {options.longest:,} tokens"
        )


if __name__ == "__main__":
    main()

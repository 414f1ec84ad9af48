"""The parts of `gpu.py` that check results and measure an engine."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

import torch

from benchmarks import timing
from benchmarks.gpu_rig import Pool, Rig, require_close
from kvpager.kernels import reference
from kvpager.ops import AttentionArgs


def correctness(rig: Rig) -> None:
    """Compare decode, shared prefixes and prefill with plain torch, for every kind of cache."""
    checked = 0
    sizes = itertools.product((None, "int8", "fp8_e4m3"), (16, 64))
    for kv_cache_dtype, block_size in sizes:
        case = f"{kv_cache_dtype or 'bf16'}_block{block_size}"
        if rig.over(f"correctness {case}"):
            return
        shared = 2 * block_size
        for rows, length in ((2, 96), (4, 192)) if rig.dry else ((2, 1000), (16, 4096)):
            pool = Pool(
                rig, rows, length, block_size=block_size, kv_cache_dtype=kv_cache_dtype,
                shared=shared, layers_max=1,
            )  # fmt: skip
            pool.check(f"{case} decode", pool.call(0))
            pool.check(f"{case} each row alone", pool.call(0, share=False))
            _check_prefill(pool, f"{case} prefill", 16)
            checked += 3
    rig.row("correctness", "attention", checked=checked)


def _check_prefill(pool: Pool, case: str, new: int) -> None:
    rows, heads = len(pool.block_tables), pool.query.shape[1]
    device = pool.rig.device
    pool.query = torch.randn(rows * new, heads, pool.head_dim, device=device).bfloat16()
    starts = torch.arange(rows + 1, dtype=torch.int32, device=device) * new
    tensors = (pool.query, *pool.storage.layer(0))
    args = AttentionArgs(pool.block_tables, pool.seq_lens, starts)
    expected = reference.paged_attention(*tensors, args, scales=pool.storage.scales(0))
    require_close(case, pool.call(0, cu_seqlens_q=starts)(), expected)


def engine(rig: Rig) -> None:
    """Measure `Engine` beside transformers' `generate_batch`: a Llama of random weights, greedy."""
    try:
        from kvpager.bench import models
        from kvpager.bench.throughput import comparison
        from kvpager.bench.throughput.systems import Options
        from kvpager.bench.throughput.workload import synthetic
    except ImportError as error:
        rig.remark(f"engine: skipped, {error}")
        return
    model = _model(rig)
    for count in (2,) if rig.dry else (1, 16, 64):
        if rig.over(f"engine {count} requests"):
            return
        prompts, new = ((8, 16), 4) if rig.dry else ((128, 512), 128)
        work = synthetic(count, prompts, new, vocabulary=models.vocabulary(model))
        runs = 1 if rig.dry else 3
        names = ["kvpager", "generate_batch"]
        found = comparison.measure(names, model, work, Options(), repeats=runs)
        rates = [[run.tokens_per_second for run in each.runs] for each in found]
        ours, theirs = map(statistics.median, rates)
        figures: dict[str, Any] = {"tokens_per_s": ours, "generate_batch_tokens_per_s": theirs}
        pairs = zip(*rates, strict=True)
        figures["vs_generate_batch"] = statistics.median(one / two for one, two in pairs)
        rig.row("engine", f"{count}_requests", **figures)


def _model(rig: Rig) -> Any:
    """Return a Llama of 1.2 billion parameters in bfloat16; in a dry run, a tiny one."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    sizes = (64, 128, 2, 4, 2) if rig.dry else (2048, 8192, 16, 32, 8)
    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads",
    )  # fmt: skip
    config = LlamaConfig(
        vocab_size=4096, max_position_embeddings=4096, bos_token_id=None, eos_token_id=None,
        **dict(zip(names, sizes, strict=True)),
    )  # fmt: skip
    timing.note(f"engine: a Llama of {sizes[2]} layers")
    with torch.device(rig.device), torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    return model.eval()

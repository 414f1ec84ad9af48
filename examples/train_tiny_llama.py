"""Train the tiny byte-level Llama that `kvpager.testing` bundles. No network needed.

The text comes with every Python: the reference pages behind `help("with")` and the docstrings of
the standard library. Tokens are UTF-8 bytes (`ByT5Tokenizer`, no vocabulary file).

    python examples/train_tiny_llama.py --out tiny_llama

The default run takes about 15 minutes on two free CPU cores.
"""

from __future__ import annotations

import argparse
import ast
import math
import random
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tqdm import tqdm
from transformers import ByT5Tokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

PAD, EOS, FIRST_BYTE = 0, 1, 3
DOCSTRING_BYTES_MIN = 200
HELD_OUT_EVERY = 25
TOPICS_SHARE = 0.65
# Share of the steps, then the length they train at: long texts come last, when they cost least.
LENGTHS = ((0.75, 512), (0.15, 1024), (0.10, 2048))
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages"}


@dataclass(frozen=True)
class Source:
    """One kind of text as a stream of tokens, documents separated by EOS."""

    train: torch.Tensor
    held_out: torch.Tensor


def encode(documents: Iterable[str]) -> torch.Tensor:
    """Return the documents as one token stream; EOS opens and ends every document. O(bytes)."""
    tokens = [EOS]
    for document in documents:
        tokens += [byte + FIRST_BYTE for byte in document.encode("utf-8")]
        tokens.append(EOS)
    return torch.tensor(tokens)


def split(documents: list[str], seed: int) -> Source:
    """Shuffle the documents, and hold out every 25th."""
    shuffled = sorted(set(documents))
    random.Random(seed).shuffle(shuffled)
    held_out = shuffled[::HELD_OUT_EVERY]
    return Source(encode(text for text in shuffled if text not in held_out), encode(held_out))


def docstrings() -> list[str]:
    """Return every longer docstring of the standard library, without importing it."""
    root = Path(sysconfig.get_path("stdlib"))
    found: list[str] = []
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS.intersection(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text) >= DOCSTRING_BYTES_MIN:
                    found.append(text)
    return found


def build_model() -> LlamaForCausalLM:
    """Make a Llama of 1.14 million parameters with every feature of the large ones."""
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=352,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=PAD,
        bos_token_id=EOS,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config)


def length_at(progress: float) -> int:
    """Return the length of training texts after `progress` (0 to 1) of the steps."""
    for share, length in LENGTHS:
        if progress < share:
            return length
        progress -= share
    return LENGTHS[-1][1]


def rate_at(step: int, steps: int, warmup_steps: int) -> float:
    """Return the factor of the learning rate: warm-up, then a cosine down to a fiftieth."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def sample_batch(sources: list[Source], tokens: int, length: int) -> torch.Tensor:
    """Return random windows of `length` tokens, `tokens` in all; topics are overrepresented."""
    rows = []
    for _ in range(max(1, tokens // length)):
        stream = sources[0 if random.random() < TOPICS_SHARE else 1].train
        start = random.randrange(len(stream) - length)
        rows.append(stream[start : start + length])
    return torch.stack(rows)


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, stream: torch.Tensor, length: int = 1024) -> float:
    """Return the mean loss over the whole stream in bits, in windows of `length` tokens."""
    model.eval()
    nats, predicted = 0.0, 0
    for window in stream.split(length):
        if len(window) > 1:
            loss = model(input_ids=window[None], labels=window[None], use_cache=False).loss
            nats += loss.item() * (len(window) - 1)
            predicted += len(window) - 1
    model.train()
    return nats / predicted / math.log(2)


def build_optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Make optimizers: Muon for the layers' matrices, AdamW for the embedding and the norms."""
    # After 350 steps its loss was 0.25 bits per byte below AdamW alone, for 7 % more time.
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    matrix_ids = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in matrix_ids]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(model: LlamaForCausalLM, sources: list[Source], args: argparse.Namespace) -> None:
    """Warm up, then follow the cosine down, `--steps` steps in all."""
    optimizers = build_optimizers(model, args.lr)
    warmup_steps = min(100, args.steps // 10 + 1)
    mean_bits = 0.0
    progress_bar = tqdm(range(args.steps), unit="step", mininterval=2.0)
    for step in progress_bar:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * rate_at(step, args.steps, warmup_steps)
        batch = sample_batch(sources, args.batch_tokens, length_at(step / args.steps))
        # Weights stay fp32; on CPUs with bf16 instructions this is 10-40 % faster.
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        bits = loss.item() / math.log(2)
        mean_bits = bits if step == 0 else 0.98 * mean_bits + 0.02 * bits
        progress_bar.set_postfix(
            bits_per_byte=f"{mean_bits:.3f}", length=batch.shape[1], refresh=False
        )


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write the model in bfloat16 beside its tokenizer."""
    model.generation_config = GenerationConfig(
        do_sample=False, pad_token_id=PAD, bos_token_id=EOS, eos_token_id=EOS
    )
    model.bfloat16()
    model.save_pretrained(folder)
    # The messages of a chat are joined: the model was trained on text without roles.
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer = ByT5Tokenizer(extra_ids=0, model_max_length=4096, chat_template=template)
    tokenizer.save_pretrained(folder, save_jinja_files=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=3400, help="optimizer steps")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens per step")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same model on one machine")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 arithmetic"
    )
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    sources = [split(list(topics.values()), args.seed), split(docstrings(), args.seed)]
    model = build_model()
    train(model, sources, args)
    save(model, args.out)

    saved = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    for name, source in zip(("topics", "docstrings"), sources, strict=True):
        print(f"held-out {name}: {bits_per_byte(saved, source.held_out):.3f} bits per byte")


if __name__ == "__main__":
    main()

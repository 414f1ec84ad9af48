"""Text comes in whole characters, and joined it is what the tokenizer makes of all tokens."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import (  # noqa: E402
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from kvpager import Engine  # noqa: E402
from kvpager.engine.detokenizer import Detokenizer  # noqa: E402
from kvpager.errors import RequestCancelled, RequestFailed  # noqa: E402
from kvpager.testing import tiny_llama_path  # noqa: E402

TEXT = "The clause’s end, it is 😀😀 a “test” — naïve café 日本語 👨‍👩‍👧 done."
CORPUS = [TEXT, "the end is a test that is done, a clause is naïve"] * 20
SPECIAL = ["<pad>", "</s>", "<unk>"]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return tokenizer


def sentence_piece() -> Tokenizer:
    """Words begin with a space, that of the text is stripped, and rare characters are bytes."""
    vocabulary = {name: number for number, name in enumerate(SPECIAL)}
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *sorted(set("Thelausndi,tv."))]
    for piece in [*pieces, "▁t", "▁th", "▁the"]:
        vocabulary[piece] = len(vocabulary)
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL, show_progress=False),
    )
    return tokenizer


def tokenizer_of(kind: str) -> Any:
    if kind == "bytes":  # a tokenizer in Python, which drops bytes that spell nothing
        return AutoTokenizer.from_pretrained(tiny_llama_path())
    made = {"byte level": byte_level, "sentence piece": sentence_piece, "word piece": word_piece}
    return PreTrainedTokenizerFast(
        tokenizer_object=made[kind](), eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


KINDS = ["bytes", "byte level", "sentence piece", "word piece"]


def pieces_of(tokenizer: Any, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.add(token) for token in ids), detokenizer.end()]


def ids_of(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def decoded(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_whole_characters_and_joined_the_text(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids = ids_of(tokenizer, TEXT)
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == decoded(tokenizer, ids)
    assert not any("\ufffd" in piece for piece in pieces)
    if kind != "word piece":
        assert "".join(pieces) == TEXT
        assert sum(map(bool, pieces)) > 20  # as they come, not at the end


@pytest.mark.parametrize("kind", ["bytes", "byte level", "word piece"])
def test_a_text_may_begin_and_end_anywhere(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids = ids_of(tokenizer, TEXT)
    for start in range(len(ids)):
        for stop in range(start, min(start + 9, len(ids) + 1)):
            part = ids[start:stop]
            assert "".join(pieces_of(tokenizer, part)) == decoded(tokenizer, part)


def test_an_incomplete_byte_sequence_keeps_its_whole_characters() -> None:
    """The tokenizer itself replaces every byte of the run, those of whole characters as well."""
    tokenizer = tokenizer_of("sentence piece")
    ids = ids_of(tokenizer, TEXT)
    for stop in range(len(ids) + 1):
        found = "".join(pieces_of(tokenizer, ids[:stop]))
        assert TEXT.startswith(found.rstrip("\ufffd"))
        assert len(found.rstrip("\ufffd")) >= len(decoded(tokenizer, ids[:stop]).rstrip("\ufffd"))


@pytest.mark.parametrize("kind", ["bytes", "byte level", "word piece"])
@pytest.mark.parametrize("seed", range(20))
def test_any_tokens_give_what_the_tokenizer_makes_of_them(kind: str, seed: int) -> None:
    tokenizer = tokenizer_of(kind)
    source = random.Random(seed)
    ids = [source.randrange(len(tokenizer)) for _ in range(source.randrange(120))]
    assert "".join(pieces_of(tokenizer, ids)) == decoded(tokenizer, ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", ["special", "bytes", "text"])
def test_a_token_costs_the_same_however_long_the_text_is(kind: str, tokens: str) -> None:
    tokenizer = tokenizer_of(kind)
    longest = 0

    class Counting:
        all_special_ids = tokenizer.all_special_ids

        def decode(self, ids: list[int], **options: Any) -> str:
            nonlocal longest
            longest = max(longest, len(ids))
            return str(tokenizer.decode(ids, **options))

    some = {"special": [1], "bytes": [0xC3, 0xC4], "text": ids_of(tokenizer, TEXT)}[tokens]
    ids = [token for token in some * 300 if token < len(tokenizer)]
    detokenizer = Detokenizer(Counting())
    for token in ids:
        detokenizer.add(token)
    assert longest <= 40


# -------------------------------------------------------------------- of an engine


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tokenizer_of("bytes")


def saying(engine: Engine, tokens: list[int], **options: Any) -> Any:
    """Settings that have every request generate `tokens`, whatever its prompt is."""

    def only(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -float("inf"))
        forced[:, tokens[min(ids.shape[1] - 2, len(tokens) - 1)]] = 0
        return forced

    return engine.sampling_settings(max_new_tokens=len(tokens), logits_processor=[only], **options)


def test_an_engine_with_a_tokenizer_gives_texts(
    tiny_llama: PreTrainedModel, tokenizer: Any
) -> None:
    ids = ids_of(tokenizer, TEXT)
    with Engine(tiny_llama, tokenizer=tokenizer, memory="8MiB") as engine:
        stream = engine.submit([5, 6], sampling_settings=saying(engine, [*ids, 1]))
        pieces = list(stream.text())
        output = stream.result()
        assert "".join(pieces) == output.text == output.samples[0].text == TEXT
        assert "’" in pieces
        assert "😀" in pieces

        async def read() -> list[str]:
            return [
                piece async for piece in engine.submit([5, 6], sampling_settings=settings).text()
            ]

        settings = saying(engine, ids)
        assert asyncio.run(read()) == pieces


def test_text_goes_on_where_reading_stopped(tiny_llama: PreTrainedModel, tokenizer: Any) -> None:
    with Engine(tiny_llama, tokenizer=tokenizer, memory="8MiB") as engine:
        stream = engine.submit([5, 6], sampling_settings=saying(engine, ids_of(tokenizer, TEXT)))
        first = next(iter(stream.text()))
        assert first + "".join(stream.text()) == TEXT


def test_half_a_character_at_the_end_is_decoded_anyway(
    tiny_llama: PreTrainedModel,
) -> None:
    fast = tokenizer_of("byte level")
    ids = fast.convert_tokens_to_ids(["a", "ð", "Ł"])  # bytes F0 9F, of an emoji's four
    with Engine(tiny_llama, tokenizer=fast, memory="8MiB") as engine:
        stream = engine.submit([5, 6], sampling_settings=saying(engine, ids))
        assert list(stream.text()) == ["a", "\ufffd"]
        assert stream.result().text == "a\ufffd"


def test_samples_have_texts_of_their_own(tiny_llama: PreTrainedModel, tokenizer: Any) -> None:
    settings: dict[str, Any] = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 8}
    with Engine(tiny_llama, tokenizer=tokenizer, memory="8MiB") as engine:
        stream = engine.submit([5, 6], **settings)
        with pytest.raises(ValueError, match="3 samples"):
            stream.text()
        for sample in stream.result().samples:
            assert sample.text == decoded(tokenizer, sample.token_ids)


def test_stop_strings_need_no_sampling_settings(
    tiny_llama: PreTrainedModel, tokenizer: Any
) -> None:
    prompt = ids_of(tokenizer, "The with statement ")
    with Engine(tiny_llama, tokenizer=tokenizer, memory="8MiB") as engine:
        whole = engine.generate([prompt], max_new_tokens=30, do_sample=False)[0].text
        stop = whole[4:7]
        stream = engine.submit(prompt, max_new_tokens=30, do_sample=False, stop_strings=stop)
        text = "".join(stream.text())
    assert text == whole[: whole.index(stop) + len(stop)] == stream.result().text
    sample = stream.result().samples[0]
    assert (sample.finish_reason, sample.stop_reason) == ("stop", stop)


def test_the_stop_reason_is_the_stop_string_that_was_found(
    tiny_llama: PreTrainedModel, tokenizer: Any
) -> None:
    prompt = ids_of(tokenizer, "The with statement ")
    with Engine(tiny_llama, tokenizer=tokenizer, memory="8MiB") as engine:
        whole = engine.generate([prompt], max_new_tokens=30, do_sample=False)[0].text
        stops = ["never said", whole[4:7]]
        (output,) = engine.generate(
            [prompt], max_new_tokens=30, do_sample=False, stop_strings=stops
        )
    assert (output.samples[0].finish_reason, output.samples[0].stop_reason) == ("stop", whole[4:7])


def test_a_failed_request_yields_its_text_then_its_error(
    tiny_llama: PreTrainedModel, tokenizer: Any
) -> None:
    with Engine(tiny_llama, tokenizer=tokenizer, memory="8MiB") as engine:
        stream = engine.submit(
            [5, 6], sampling_settings=saying(engine, ids_of(tokenizer, TEXT) * 20)
        )
        pieces = iter(stream.text())
        found = [next(pieces)]
        stream.cancel()
        with pytest.raises(RequestCancelled):
            found.extend(pieces)
        assert "".join(found) == stream.partial().samples[0].text


@pytest.mark.parametrize("kind", [ZeroDivisionError, SystemExit])
def test_a_tokenizer_that_raises_ends_its_own_request(
    tiny_llama: PreTrainedModel, kind: type[BaseException]
) -> None:
    class Broken:
        all_special_ids: tuple[int, ...] = ()

        def decode(self, ids: list[int], **options: Any) -> str:
            if 7 in ids:
                raise kind("of the tokenizer")
            return "text"

    with Engine(tiny_llama, tokenizer=Broken(), memory="8MiB") as engine:
        bad = engine.submit([5, 6], sampling_settings=saying(engine, [6, 7]))
        good = engine.submit([5, 6], sampling_settings=saying(engine, [6, 8]))
        with pytest.raises(RequestFailed, match="of the tokenizer"):
            bad.result(timeout=60)
        assert good.result(timeout=60).text == "text"


def test_without_a_tokenizer_text_says_how_to_have_it(tiny_llama: PreTrainedModel) -> None:
    with Engine(tiny_llama, memory="8MiB") as engine:
        stream = engine.submit([5, 6], max_new_tokens=2)
        with pytest.raises(ValueError, match="tokenizer=tokenizer"):
            stream.text()
        with pytest.raises(ValueError, match="tokenizer=tokenizer"):
            _ = stream.result().text
    with pytest.raises(TypeError, match="AutoTokenizer"):
        Engine(tiny_llama, tokenizer="gpt2", memory="8MiB")


def test_stop_strings_without_a_tokenizer_say_how_to_have_it(tiny_llama: PreTrainedModel) -> None:
    with Engine(tiny_llama, memory="8MiB") as engine:
        with pytest.raises(ValueError, match=r"^stop_strings='x': .* Engine\(model, tokenizer="):
            engine.submit([5, 6], stop_strings="x")
        with pytest.raises(ValueError, match=r"^stop_strings=\['x'\]: .* tokenizer="):
            engine.submit([5, 6], GenerationConfig(stop_strings=["x"]))

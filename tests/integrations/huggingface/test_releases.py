"""One kvpager serves the releases of transformers that call the cache by either name."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaForCausalLM

import kvpager
from kvpager.bench.environment import SUPPORTED
from kvpager.errors import KVPagerError, UntestedReleaseWarning
from kvpager.integrations.huggingface import releases
from kvpager.integrations.huggingface.model_state import row_independence
from tests.support import tiny_models
from tests.support.cache_name import NAME, cache_of, passing

ROOT = Path(__file__).resolve().parents[3]
OTHER = "past_key_values" if NAME == "cache" else "cache"
PROMPT = tiny_models.prompts([19])
NEXT = tiny_models.prompts([7], seed=1)


def text(model: Any, inputs: dict[str, Any] = PROMPT, **options: Any) -> list[list[int]]:
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, **options}
    return model.generate(**inputs, **options).tolist()


class OtherName(LlamaForCausalLM):
    """A model whose code calls the cache as the installed transformers does not."""

    if OTHER == "cache":

        def forward(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, **k):
            told = {"attention_mask": attention_mask, "position_ids": position_ids}
            return super().forward(input_ids, **told, **passing(cache), **k)

    else:

        def forward(
            self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **k
        ):
            told = {"attention_mask": attention_mask, "position_ids": position_ids}
            return super().forward(input_ids, **told, **passing(past_key_values), **k)

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **options):
        options["attention_mask"] = attention_mask
        prepared = LlamaForCausalLM.prepare_inputs_for_generation(self, input_ids, **options)
        return {OTHER if name == NAME else name: value for name, value in prepared.items()}


class OtherNameUnsaid(LlamaForCausalLM):
    """A model that takes the other name, without it in the signature of `forward`."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **options):
        told = {"attention_mask": attention_mask, "position_ids": position_ids}
        options.pop(NAME, None)
        return super().forward(input_ids, **told, **passing(options.pop(OTHER, None)), **options)

    prepare_inputs_for_generation = OtherName.prepare_inputs_for_generation


class NameUnsaid(LlamaForCausalLM):
    """A model that takes the release's name, without it in the signature of `forward`."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **options):
        told = {"attention_mask": attention_mask, "position_ids": position_ids}
        return super().forward(input_ids, **told, **options)


class Deaf(LlamaForCausalLM):
    """Its forward takes no cache by either name, and makes one of its own in each pass."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **options):
        told = {"attention_mask": attention_mask, "position_ids": position_ids}
        options = {name: value for name, value in options.items() if name not in (NAME, OTHER)}
        return super().forward(input_ids, **told, **options)


FOREIGN = [OtherName, OtherNameUnsaid, NameUnsaid]


@pytest.fixture(autouse=True)
def _classes_of_a_library(monkeypatch):
    """Let the classes above count as a library's: rows and prompts of others are not shared."""
    known = {__name__.partition(".")[0], *row_independence._ROWWISE}
    monkeypatch.setattr(row_independence, "_ROWWISE", known)


def foreign(kind: type[LlamaForCausalLM]) -> Any:
    model = tiny_models.tiny_model("llama")
    made = kind(model.config)
    made.load_state_dict(model.state_dict())
    return made.eval()


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("kind", FOREIGN)
def test_an_engine_passes_the_cache_by_the_models_name(kind):
    expected = text(tiny_models.tiny_model("llama"))
    with kvpager.Engine(foreign(kind)) as engine:
        (output,) = engine.generate(PROMPT["input_ids"].tolist(), max_new_tokens=6, do_sample=False)
    assert PROMPT["input_ids"].tolist()[0] + output.token_ids == expected[0]


def test_an_engine_refuses_a_model_without_a_cache_argument():
    class Neither(LlamaForCausalLM):
        def forward(self, input_ids=None, **options):
            return super().forward(input_ids)

    with pytest.raises(KVPagerError, match="its cache keeps no attention layers"):
        kvpager.Engine(foreign(Neither))


@pytest.mark.mostly_slow(quick=3)
@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefix_cache": True}], ids=str)
def test_a_patched_model_of_either_name_writes_the_same_tokens(kind, options):
    options = dict(options)
    patching = {"prefix_cache": options.pop("prefix_cache", False)}
    model, inputs = foreign(kind), tiny_models.prompts([19, 11])
    plain = [text(model, inputs, **options) for _ in range(2)]
    with kvpager.patch(model, **patching) as paging:
        assert [text(model, inputs, **options) for _ in range(2)] == plain
        assert paging.stats().peak_held_bytes > 0
        assert (paging.stats().prefix_hit_tokens > 0) == patching["prefix_cache"]


@pytest.mark.mostly_slow(quick=4)
@pytest.mark.parametrize("lengths", [[19], [19, 11], [21, 20]], ids=str)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_a_model_that_ignores_the_cache_writes_the_same_tokens(lengths, options, prefix_cache):
    model, inputs = foreign(Deaf), tiny_models.prompts(lengths)
    inputs["input_ids"][:, -19:-3] = inputs["input_ids"][:1, -19:-3]  # computed once for all rows
    options = {"do_sample": options.get("num_return_sequences", 1) > 1, **options}

    def seeded():
        torch.manual_seed(3)
        return text(model, inputs, **options)

    plain = seeded()
    with kvpager.patch(model, prefix_cache=prefix_cache):
        assert [seeded(), seeded()] == [plain, plain]


def test_generate_takes_a_paged_cache_by_the_releases_name():
    model = tiny_models.tiny_model("llama")
    plain = text(model)
    cache = kvpager.PagedCache(model.config)
    assert text(model, **passing(cache)) == plain
    assert cache.get_seq_length() == len(plain[0]) - 1


@pytest.mark.skipif(NAME == "past_key_values", reason="this release knows the old name only")
@pytest.mark.filterwarnings("ignore:.*past_key_values.*is deprecated:FutureWarning")
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_the_old_name_still_works_where_transformers_takes_it(prefix_cache):
    model = tiny_models.tiny_model("llama")
    plain = text(model)
    with kvpager.patch(model, prefix_cache=prefix_cache):
        cache = kvpager.PagedCache(model.config)
        assert text(model, past_key_values=cache) == plain
        assert cache.get_seq_length() == len(plain[0]) - 1
        with torch.no_grad():
            cache = kvpager.PagedCache(model.config)
            model(**PROMPT, past_key_values=cache)
            output = model(NEXT["input_ids"], past_key_values=cache)
        assert cache_of(output) is cache
        assert cache.get_seq_length() == 19 + 7


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_found_and_replaced_by_its_name(name):
    first, second = transformers.DynamicCache(), transformers.DynamicCache()
    given = {name: first, "use_cache": True}
    assert releases.cache_in(given) is first
    assert releases.with_cache(given, second) == {name: second, "use_cache": True}
    assert releases.cache_in({name: "a setting of the model's own"}) is None
    assert releases.cache_in({}) is None


@pytest.fixture
def installed(monkeypatch):
    """Say that another transformers is installed."""
    monkeypatch.setattr(releases, "_looked_at", set())
    return lambda version: monkeypatch.setattr("transformers.__version__", version)


@pytest.mark.parametrize("version", ["5.25.0", "5.25.0.dev0", "6.0.1", "5.100.0"])
def test_an_untested_transformers_release_warns_once(installed, version):
    installed(version)
    model = tiny_models.tiny_model("llama")
    makers = [
        lambda: kvpager.patch(model).undo(),
        lambda: kvpager.PagedCache(model.config),
        lambda: kvpager.Engine(model).close(),
    ]
    for make in makers:
        releases._looked_at.clear()
        with pytest.warns(UntestedReleaseWarning, match=rf"transformers {version}.*up to") as found:
            make()
        assert found[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            make()


@pytest.mark.parametrize("version", ["5.17.0", "5.24.0", "5.24.9", "a build of mine"])
def test_a_tested_transformers_is_not_warned_of(installed, version):
    installed(version)
    with kvpager.patch():
        pass
    kvpager.PagedCache()


def test_a_warning_that_is_an_error_leaves_nothing_patched(installed):
    installed("5.99.0")
    before = transformers.DynamicCache.__init__
    with pytest.raises(UntestedReleaseWarning):  # warnings are errors here
        kvpager.patch()
    assert transformers.DynamicCache.__init__ is before


def test_the_newest_tested_release_is_told_everywhere_alike():
    pinned = re.search(r"^transformers==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned is not None
    assert pinned[1] == releases.NEWEST_TESTED
    readme = (ROOT / "README.md").read_text()
    for name, title in (("python", "Python"), ("torch", "torch"), ("transformers", "transformers")):
        bounds = SUPPORTED[name]
        assert bounds is not None
        assert f"{title} {bounds[0]}-{bounds[1]}" in readme
    assert SUPPORTED["transformers"] == ("5.17", releases.NEWEST_TESTED)


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_a_model_without_attention_keeps_the_cache_that_transformers_made(name):
    model = tiny_models.tiny_model(name)
    plain = text(model)
    with kvpager.patch(model, prefix_cache=True) as paging:
        cache = transformers.DynamicCache(config=model.config)
        assert type(cache) is transformers.DynamicCache
        assert text(model) == plain
        assert "LinearAttentionLayer" in paging.report()


@pytest.mark.skipif(NAME == "past_key_values", reason="this release passes another argument")
def test_a_paged_cache_serves_a_model_without_attention():
    model = tiny_models.tiny_model("mamba")
    plain = text(model)
    with kvpager.patch(model):
        assert text(model, cache=kvpager.PagedCache(model.config)) == plain

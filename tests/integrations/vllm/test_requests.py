"""vLLM itself over kvpager's stores: salts, adapters, aborts, several engines, other models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.valkey_servers import Server, valkey
from tests.support.vllm_runs import Served, cached, check, offloaded, refused, run, tokens

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make vllm"),
]
_LORA = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
ADAPTERS = ["--engine", json.dumps(_LORA), "--scenarios", "adapters"]
# Also on a CPU with AMX, the backend of vLLM that has no prefix cache for latent attention.
LATENT = json.dumps({"attention_config": {"backend": "CPU_MLA"}})
BELOW = "salts_in_stores,stages"
both = pytest.mark.parametrize("synchronous", [False, True], ids=["offload", "connector"])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.vllm_models import save_adapter, save_model

    folder = tmp_path_factory.mktemp("models")
    for name in ("llama", "deepseek", "mamba"):
        save_model(name, folder)
    for seed, name in enumerate(("lora-a", "lora-b")):
        save_adapter(folder / name, seed)
    return folder


@pytest.fixture(scope="module")
def alone(models: Path) -> dict[str, Any]:
    """Return the answers of vLLM without kvpager."""
    names = f"{BELOW},cold_warm_reset,other_prefix"
    answers: dict[str, Any] = run(models / "llama", "--scenarios", names)["answers"]
    return answers


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = valkey(tmp_path_factory.mktemp("valkey"))
    yield server
    server.stop()


@pytest.fixture(params=["disk", "valkey"])
def store(request: pytest.FixtureRequest, tmp_path: Path, server: Server) -> str:
    """Return the URL of an empty store."""
    server.ask(b"FLUSHALL")
    disk = f"disk:{tmp_path / 'kv'}?capacity=1GiB&admit=always"
    return disk if request.param == "disk" else server.url


# ---------------------------------------------------------------- salts and aborts


@both
def test_salts_and_aborts_over_a_store(
    models: Path, alone: dict[str, Any], store: str, synchronous: bool
) -> None:
    found = offloaded(
        models / "llama",
        *("--scenarios", BELOW),
        host_memory="128MiB",
        tiers=[store],
        synchronous=synchronous,
    )
    check(found, alone, at_least=40)
    assert cached(found["answers"], "salts_in_stores") == [0, 0, 576]
    assert cached(found["answers"], "stages") == [0, 1056]


def test_salts_and_aborts_over_a_secondary_tier_of_vllm(
    models: Path, alone: dict[str, Any], store: str
) -> None:
    tier = {"type": "KvpagerSecondaryTier", "module_path": "kvpager.integrations.vllm.secondary"}
    settings = {"cpu_bytes_to_use": 128 << 20, "secondary_tiers": [{**tier, "store": store}]}
    arguments = ["--tiering", json.dumps(settings), "--scenarios", f"{BELOW},cold_warm_reset"]
    found = run(models / "llama", *arguments)
    check(found, alone, at_least=40)
    assert cached(found["answers"], "salts_in_stores") == [0, 0, 576]
    assert cached(found["answers"], "stages") == [0, 1056]
    assert cached(found["answers"], "cold_warm_reset") == [1024] * 3  # the store has the prefix


# ---------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def adapted(models: Path) -> dict[str, Any]:
    """Return the answers of vLLM without kvpager, with adapters."""
    answers: dict[str, Any] = run(models / "llama", *ADAPTERS)["answers"]
    return answers


@both
def test_adapters_find_their_own_prompts_only(
    models: Path, adapted: dict[str, Any], tmp_path: Path, synchronous: bool
) -> None:
    found = offloaded(
        models / "llama",
        *ADAPTERS,
        host_memory="128MiB",
        tiers=[f"disk:{tmp_path / 'kv'}?capacity=1GiB"],
        synchronous=synchronous,
    )
    check(found, adapted, at_least=40)
    assert cached(found["answers"], "adapters") == [0, 0, 0, 576, 576, 576]
    first, a, b, *again = tokens(adapted, "adapters")
    assert len({str(first), str(a), str(b)}) == 3
    assert again == [a, first, b]


# ---------------------------------------------------------------- models that are refused


@pytest.mark.parametrize(
    ("model", "message", "settings"),
    [
        ("mamba", "layers of vLLM's kind MambaSpec", []),
        ("deepseek", "enable_prefix_caching=False", ["--block-size", "16", "--engine", LATENT]),
    ],
)
def test_a_model_that_cannot_be_served_is_one_error_at_the_start(
    models: Path, model: str, message: str, settings: list[str]
) -> None:
    errors = refused(models / model, "--offload", '{"host_memory": "16MiB"}', *settings)
    named = [line for line in errors.splitlines() if "NotImplementedError: " in line]
    assert message in named[0]
    assert len(set(named)) == 1


@both
@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="this CPU has no AMX")
def test_latent_attention_on_matrix_units_loads_what_was_saved(
    models: Path, synchronous: bool
) -> None:
    """vLLM runs it in bfloat16 only, in which rounding changes tokens: bytes are compared."""
    found = offloaded(
        models / "deepseek",
        *("--engine", '{"dtype": "bfloat16"}', "--scenarios", "cold_warm_reset,salts"),
        host_memory="64MiB",
        synchronous=synchronous,
    )
    assert found["compared"] >= 50
    assert found["wrong"] == []
    assert (found["host"][0]["pinned"], found["host"][0]["writing"]) == (0, 0)
    assert cached(found["answers"], "cold_warm_reset") == [0, 1024, 1024]
    assert cached(found["answers"], "salts") == [0, 0, 576]


# ---------------------------------------------------------------- several engines


def test_two_engines_share_a_server_at_once(
    models: Path, alone: dict[str, Any], server: Server, tmp_path: Path
) -> None:
    """Each loads what the other saved, though Python hashes differ in them."""
    server.ask(b"FLUSHALL")
    settings = json.dumps({"host_memory": "128MiB", "tiers": [server.url]})
    files = [tmp_path / name for name in ("one", "other")]
    one, other = engines = [
        Served(
            models / "llama",
            *("--offload", settings, "--digests", str(file)),
            PYTHONHASHSEED=str(seed),
        )
        for seed, file in enumerate(files)
    ]
    try:
        first = one.ask("cold_warm_reset")
        again = other.ask("prefix_again")
        assert cached(again, "prefix_again") == [1056]
        assert tokens(again, "prefix_again") == tokens(first, "cold_warm_reset")[2:]
        assert cached(other.ask("other_prefix"), "other_prefix") == [0]
        back = one.ask("other_prefix")
        assert cached(back, "other_prefix") == [800]
        assert tokens(back, "other_prefix") == tokens(alone, "other_prefix")
        found = [engine.end() for engine in engines]
    finally:
        for engine in engines:
            engine.kill()
    saved = [json.loads(file.read_text()) for file in files]
    for each, theirs in zip(found, reversed(saved), strict=True):
        assert len(each["wrong"]) >= 24  # blocks that the other saved
        assert all(theirs[name] == digest for name, digest in each["wrong"])
        assert (each["host"][0]["pinned"], each["host"][0]["writing"]) == (0, 0)

"""transformers' continuous batching, on a patched model: the same calls, the same outputs."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import GenerationConfig, PreTrainedModel  # noqa: E402
from transformers.generation.configuration_utils import ContinuousBatchingConfig  # noqa: E402
from transformers.generation.continuous_batching import (  # noqa: E402
    ContinuousBatchingManager,
    ContinuousMixin,
)
from transformers.generation.continuous_batching.requests import (  # noqa: E402
    GenerationOutput,
    RequestStatus,
)

import kvpager  # noqa: E402
from kvpager.errors import KVPagerError  # noqa: E402
from kvpager.integrations.huggingface import Patch  # noqa: E402
from kvpager.integrations.huggingface.continuous_batching import manager as manager_module  # noqa: E402
from kvpager.integrations.huggingface.continuous_batching.manager import PagedBatchingManager  # noqa: E402
from tests.support import tiny_models  # noqa: E402
from tests.support.gates import Gate  # noqa: E402

FINISHED, FAILED, DECODING = (
    RequestStatus.FINISHED,
    RequestStatus.FAILED,
    RequestStatus.DECODING,
)
NEW = 6
SMALL = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64)


def some_prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 60, (n,), generator=generator).tolist() for n in lengths]


PROMPTS = some_prompts(5, 19, 9)


def settings(**options: Any) -> GenerationConfig:
    return GenerationConfig(**{"max_new_tokens": NEW, "do_sample": False, **options})


def one_by_one(model: PreTrainedModel, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    """Return the tokens that greedy search of `generate` adds to each prompt."""
    options = {"do_sample": False, "max_new_tokens": NEW, **options}
    found = []
    for prompt in prompts:
        ids = model.generate(torch.tensor([prompt]), **options)[0].tolist()
        found.append(ids[1:] if model.config.is_encoder_decoder else ids[len(prompt) :])
    return found


def eos_of(model: PreTrainedModel) -> Any:
    """Return the model's eos token, which transformers does not add to a config."""
    return model.generation_config.eos_token_id


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_models.tiny_model("llama")


@pytest.fixture
def patch(llama: PreTrainedModel) -> Iterator[Patch]:
    with kvpager.patch(llama, memory="1MiB") as made:
        yield made
    assert llama.config._attn_implementation == "sdpa"
    assert not hasattr(llama, "_cached_continuous_batching_manager")


@pytest.fixture
def manager(llama: PreTrainedModel, patch: Patch) -> Iterator[PagedBatchingManager]:
    made = llama.init_continuous_batching(settings())
    yield made
    made.destroy()


# ---------------------------------------------------------------- the same outputs


@pytest.mark.parametrize(
    "name", ["llama", "gemma3", "gpt2", "bloom", "deepseek_v3", "qwen3_next", "t5"]
)
def test_generate_batch_gives_what_generate_gives(name: str) -> None:
    model = tiny_models.tiny_model(name)
    expected = one_by_one(model, PROMPTS)
    with kvpager.patch(model, memory="1MiB"):
        outputs = model.generate_batch(PROMPTS, settings(eos_token_id=eos_of(model)))
    assert [output.generated_tokens for output in outputs.values()] == expected
    assert {output.status for output in outputs.values()} == {FINISHED}


def test_a_patch_of_all_models_batches_encoder_decoders_too() -> None:
    model = tiny_models.tiny_model("t5")
    expected = one_by_one(model, PROMPTS)
    with kvpager.patch(memory="1MiB"):
        outputs = model.generate_batch(PROMPTS, settings(eos_token_id=eos_of(model)))
    assert [output.generated_tokens for output in outputs.values()] == expected


def assert_alike(ours: GenerationOutput, theirs: GenerationOutput) -> None:
    """Equal but for rounding and the clock."""
    assert type(ours) is type(theirs)
    for name, value in vars(theirs).items():
        if name == "logprobs":
            assert ours.logprobs == pytest.approx(value, abs=1e-4)
        elif name not in ("created_time", "lifespan", "timestamps"):
            assert getattr(ours, name) == value, name
    for output in (ours, theirs):
        begun, ended = output.lifespan
        times = [output.created_time, begun, *(output.timestamps or []), ended]
        assert times == sorted(times)
    if theirs.timestamps is None:
        assert ours.timestamps is None
    else:
        assert len(ours.timestamps) == len(theirs.timestamps)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "batching"),
    [
        ({}, {}),
        ({}, {"return_logprobs": True}),
        ({"eos_token_id": 51}, {}),  # the second token of the last text
        ({"eos_token_id": [200, 90, 57]}, {"return_logprobs": True}),
    ],
)
@pytest.mark.parametrize("record_timestamps", [False, True])
def test_outputs_are_those_of_transformers_field_by_field(
    llama: PreTrainedModel,
    options: dict[str, Any],
    batching: dict[str, Any],
    record_timestamps: bool,
) -> None:
    def outputs() -> dict[str, GenerationOutput]:
        found: dict[str, GenerationOutput] = llama.generate_batch(
            PROMPTS,
            settings(**options),
            ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64, **batching),
            record_timestamps=record_timestamps,
        )
        return found

    theirs = outputs()
    with kvpager.patch(llama, memory="1MiB"):
        ours = outputs()
    assert list(ours) == list(theirs)
    for name, output in theirs.items():
        assert_alike(ours[name], output)


def test_samples_have_their_own_tokens_and_names_of_transformers(
    llama: PreTrainedModel,
) -> None:
    def outputs() -> list[GenerationOutput]:
        config = settings(do_sample=True, num_return_sequences=3, max_new_tokens=12)
        with llama.continuous_batching_context_manager(
            config, continuous_batching_config=SMALL
        ) as manager:
            manager.add_request(PROMPTS[0], request_id="x")
            return [manager.get_result() for _ in range(3)]

    theirs = outputs()
    with kvpager.patch(llama, memory="1MiB"):
        ours = outputs()
    assert {output.request_id for output in ours} == {output.request_id for output in theirs}
    assert len({tuple(output.generated_tokens) for output in ours}) == 3


def test_settings_that_a_config_leaves_open_are_not_the_models(llama: PreTrainedModel) -> None:
    def outputs() -> list[list[int]]:
        config = GenerationConfig(max_new_tokens=NEW)
        return [o.generated_tokens for o in llama.generate_batch(PROMPTS, config, SMALL).values()]

    theirs_of_model = llama.generation_config
    llama.generation_config = GenerationConfig(do_sample=True, suppress_tokens=list(range(3, 120)))
    try:
        theirs = outputs()
        with kvpager.patch(llama, memory="1MiB"):
            assert outputs() == theirs
    finally:
        llama.generation_config = theirs_of_model


def test_generate_with_the_paged_cache_of_transformers_is_batched(
    llama: PreTrainedModel, patch: Patch
) -> None:
    inputs = torch.tensor(some_prompts(9, 9))
    options = {"max_new_tokens": NEW, "do_sample": False}
    expected = llama.generate(inputs, **options)
    ids = llama.generate(inputs, cache_implementation="paged", **options)
    assert ids[0].tolist() == expected.tolist()
    assert len(patch.managers) == 1 or not list(patch.managers)  # one was made, and may be gone


def test_nothing_to_do_is_done_at_once(llama: PreTrainedModel, patch: Patch) -> None:
    assert llama.generate_batch([]) == {}


# ---------------------------------------------------------------- who is served


def test_methods_keep_their_signatures_and_undo_restores_them(llama: PreTrainedModel) -> None:
    before = dict(vars(ContinuousMixin))
    with kvpager.patch(llama):
        changed = {name for name, value in vars(ContinuousMixin).items() if before[name] != value}
        assert changed == {"init_continuous_batching", "generate_batch"}
        for name in changed:
            ours = vars(ContinuousMixin)[name]
            assert inspect.signature(ours) == inspect.signature(before[name])
    assert dict(vars(ContinuousMixin)) == before


def test_a_model_without_a_patch_is_left_to_transformers(llama: PreTrainedModel) -> None:
    other = tiny_models.tiny_model("qwen2")
    with kvpager.patch(llama):
        made = other.init_continuous_batching(settings())
    assert type(made) is ContinuousBatchingManager


def test_the_manager_has_every_public_method_of_transformers(
    manager: PagedBatchingManager,
) -> None:
    assert isinstance(manager, ContinuousBatchingManager)
    for name, theirs in inspect.getmembers(ContinuousBatchingManager, inspect.isfunction):
        if name.startswith("_") and name != "__iter__":
            continue
        ours = inspect.getattr_static(type(manager), name)
        assert ours is not theirs, name
        wanted = list(inspect.signature(theirs).parameters)
        assert list(inspect.signature(ours).parameters)[: len(wanted)] == wanted, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "beam search cannot be batched"),
        ({"prompt_lookup_num_tokens": 2}, "prompt lookup cannot be batched"),
    ],
)
def test_ways_to_generate_that_cannot_be_batched_are_refused(
    llama: PreTrainedModel, patch: Patch, options: dict[str, Any], message: str
) -> None:
    threads = _our_threads()
    with pytest.raises(ValueError, match=message):
        llama.init_continuous_batching(settings(**options))
    with pytest.raises(ValueError, match=message):
        llama.generate_batch(PROMPTS, settings(**options))
    assert _our_threads() == threads


def _our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("kvpager")]


@pytest.mark.parametrize("name", ["mamba", "rwkv"])
def test_models_that_cannot_be_batched_are_refused(name: str) -> None:
    if not tiny_models.is_known(name):
        pytest.skip(f"this transformers has no {name}")
    model, threads = tiny_models.tiny_model(name), threading.enumerate()
    with kvpager.patch(model), pytest.raises(KVPagerError, match="cannot be batched continuously"):
        model.generate_batch(PROMPTS, settings())
    assert threading.enumerate() == threads


# ---------------------------------------------------------------- sessions


def test_requests_wait_for_the_start(manager: PagedBatchingManager, llama: Any) -> None:
    names = manager.add_requests(PROMPTS)
    assert (names, manager.is_running()) == (["req_0", "req_1", "req_2"], False)
    assert manager.get_result() is None
    manager.start()
    assert manager.is_running()
    found = {output.request_id: output for output in (manager.get_result() for _ in names)}
    assert [found[name].generated_tokens for name in names] == one_by_one(llama, PROMPTS)


def test_stop_waits_for_requests_whose_outputs_can_be_taken_afterwards(
    manager: PagedBatchingManager,
) -> None:
    manager.start()
    names = manager.add_requests(PROMPTS)
    manager.stop()
    assert not manager.is_running()
    outputs = list(manager)
    assert sorted(output.request_id for output in outputs) == names
    assert {output.status for output in outputs} == {FINISHED}
    assert manager.get_result() is None


def test_a_hard_stop_fails_unfinished_requests_and_loses_no_output(
    manager: PagedBatchingManager, llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager.start()
    with Gate(llama) as gate:
        gate.open_after(monkeypatch, manager.batch_processor._core, "stop")
        with manager.pause():
            names = manager.add_requests(PROMPTS, max_new_tokens=100, streaming=True)
        gate.let(1)
        first = manager.get_result(names[0])
        gate.entered.acquire()
        manager.stop(hard_stop=True)
    last = {output.request_id: output for output in manager}
    assert sorted(last) == names
    assert {output.status for output in last.values()} == {FAILED}
    assert all("closed" in output.error for output in last.values())
    tokens = last[names[0]].generated_tokens
    assert tokens[: len(first.generated_tokens)] == first.generated_tokens


def test_stop_need_not_wait(manager: PagedBatchingManager) -> None:
    manager.start()
    with manager.pause():
        manager.add_requests(PROMPTS)
        stopping = threading.Thread(target=manager.stop, kwargs={"block": False})
        stopping.start()
        stopping.join()
        assert manager.is_running()
        assert manager.add_request(PROMPTS[0]) is None
    manager.join(0.0)
    assert not manager.is_running()
    assert len(list(manager)) == 3


def test_a_manager_can_be_started_again(manager: PagedBatchingManager, llama: Any) -> None:
    for _ in range(2):
        manager.start()
        manager.add_request(PROMPTS[0], request_id="same name")
        manager.stop()
        assert [o.generated_tokens for o in manager] == one_by_one(llama, PROMPTS[:1])


def test_calls_out_of_turn_are_told_off_or_harmless(
    manager: PagedBatchingManager, caplog: pytest.LogCaptureFixture
) -> None:
    manager.stop()
    assert "was not started" in caplog.text
    manager.start()
    manager.start()
    assert "is running already" in caplog.text
    manager.stop()
    assert manager.add_request(PROMPTS[0]) is None
    assert "was refused" in caplog.text


def test_destroy_is_for_good(manager: PagedBatchingManager) -> None:
    manager.add_request(PROMPTS[0])
    manager.warmup()
    manager.destroy()
    manager.destroy()
    assert [(o.status, o.request_id) for o in manager] == [(FAILED, "req_0")]
    with pytest.raises(RuntimeError, match="was destroyed"):
        manager.start()


def test_nothing_is_computed_in_a_pause(manager: PagedBatchingManager) -> None:
    with pytest.raises(RuntimeError, match="no session is running"), manager.pause():
        pass
    manager.start()
    engine = manager.batch_processor
    with manager.pause():
        with manager.pause():
            pass
        before = engine.stats().scheduler.total_steps
        name = manager.add_request(PROMPTS[0])
        assert manager.get_result(name, timeout=0.05) is None
        assert engine.stats().scheduler.total_steps == before
        with pytest.raises(RuntimeError, match="inside pause"):
            manager.stop()
    assert manager.get_result(name).status == FINISHED


def test_a_persistent_manager_is_kept_on_the_model(llama: PreTrainedModel, patch: Patch) -> None:
    llama.generate_batch(PROMPTS[:1], settings(), persistent_manager=True)
    kept = llama._cached_continuous_batching_manager
    outputs = llama.generate_batch(PROMPTS, persistent_manager=True)
    assert [o.generated_tokens for o in outputs.values()] == one_by_one(llama, PROMPTS)
    assert llama.init_continuous_batching() is kept
    llama.destroy_cached_continuous_batching_manager()
    assert not hasattr(llama, "_cached_continuous_batching_manager")
    with pytest.raises(RuntimeError, match="was destroyed"):
        kept.start()


def test_undo_takes_a_kept_manager_from_the_model(llama: PreTrainedModel) -> None:
    with kvpager.patch(llama, memory="1MiB"):
        llama.generate_batch(PROMPTS[:1], settings(), persistent_manager=True)
        assert isinstance(llama._cached_continuous_batching_manager, PagedBatchingManager)
    assert not hasattr(llama, "_cached_continuous_batching_manager")


def test_a_session_survives_undo_and_is_not_kept_after_it(llama: PreTrainedModel) -> None:
    with kvpager.patch(llama, memory="1MiB"):
        manager = llama.init_continuous_batching(settings())
        manager.start()
    manager.add_request(PROMPTS[0])
    assert manager.get_result().generated_tokens == one_by_one(llama, PROMPTS[:1])[0]
    manager.stop(keep_for_next_session=True)
    assert not hasattr(llama, "_cached_continuous_batching_manager")


# ---------------------------------------------------------------- outputs as they come


def test_a_stream_has_an_output_for_every_token(
    manager: PagedBatchingManager, llama: PreTrainedModel
) -> None:
    manager.start()
    other = manager.add_request(PROMPTS[1])
    name = manager.add_request(PROMPTS[0], streaming=True, record_timestamps=True)
    outputs = list(manager.request_id_iter(name))
    (expected,) = one_by_one(llama, PROMPTS[:1])
    assert [o.generated_tokens for o in outputs] == [expected[: n + 1] for n in range(NEW)]
    assert [o.status for o in outputs] == [DECODING] * (NEW - 1) + [FINISHED]
    assert [len(o.timestamps) for o in outputs] == list(range(1, NEW + 1))
    assert manager.get_result(other).request_id == other


def test_iterating_over_a_request_that_is_not_there_ends(manager: PagedBatchingManager) -> None:
    manager.start()
    assert list(manager.request_id_iter("nobody")) == []
    assert manager.get_result("nobody") is None
    assert manager.get_result(timeout=0.01) is None


@pytest.mark.parametrize("is_started", [False, True])
def test_a_cancelled_request_ends_with_what_it_has(
    manager: PagedBatchingManager, llama: Any, is_started: bool
) -> None:
    if is_started:
        manager.start()
    with Gate(llama) as gate:
        name = manager.add_request(PROMPTS[0], max_new_tokens=100, streaming=True)
        if is_started:
            gate.let(1)
            next(manager.request_id_iter(name))
            gate.entered.acquire()
        manager.cancel_request(name)
    manager.cancel_request("nobody")
    if not is_started:
        manager.start()
    *_, last = manager.request_id_iter(name)
    assert (last.status, "was cancelled" in last.error) == (FAILED, True)
    assert (0 < len(last.generated_tokens) < 100) == is_started
    manager.cancel_request(name)
    assert manager.add_request(PROMPTS[0], request_id=name) == name
    assert manager.get_result(name).status == FINISHED


def test_handlers_are_called_on_their_loop_with_all_outputs(manager: PagedBatchingManager) -> None:
    async def listen(name: str) -> list[int]:
        loop, lengths, is_done = asyncio.get_running_loop(), [], asyncio.Event()

        def handle(output: GenerationOutput) -> None:
            assert asyncio.get_running_loop() is loop
            lengths.append(len(output.generated_tokens))
            if output.is_finished():
                is_done.set()

        manager.register_result_handler(name, handle)
        if name == "early":
            manager.add_request(PROMPTS[0], request_id=name, streaming=True)
        await asyncio.wait_for(is_done.wait(), 60)
        return lengths

    async def both() -> list[list[int]]:
        return list(await asyncio.gather(listen("early"), listen("late")))

    manager.start()
    manager.add_request(PROMPTS[1], request_id="late", streaming=True)
    manager.stop()  # all its outputs exist before a handler is registered
    manager.start()
    assert asyncio.run(both()) == [list(range(1, NEW + 1))] * 2
    assert manager.output_router.result_handlers == {}


def test_outputs_of_a_loop_that_is_gone_can_be_taken(manager: PagedBatchingManager) -> None:
    async def register() -> None:
        manager.register_result_handler("x", lambda output: None)

    asyncio.run(register())
    manager.start()
    manager.add_request(PROMPTS[0], request_id="x")
    assert manager.get_result("x").status == FINISHED


# ---------------------------------------------------------------- what goes wrong


def test_an_invalid_request_fails_and_the_others_continue(
    llama: PreTrainedModel, patch: Patch
) -> None:
    config = ContinuousBatchingConfig(num_blocks=1)
    prompts = [PROMPTS[0], [], some_prompts(300)[0], PROMPTS[1]]
    outputs = llama.generate_batch(prompts, settings(), config)
    expected = [FINISHED, FAILED, FAILED, FINISHED]
    assert [output.status for output in outputs.values()] == expected
    empty, long = list(outputs.values())[1:3]
    assert "empty" in empty.error
    assert "blocks" in long.error or "max_length" in long.error


def test_samples_of_a_request_that_fails_fail_all(llama: PreTrainedModel, patch: Patch) -> None:
    config = settings(num_return_sequences=2, do_sample=True)
    with llama.continuous_batching_context_manager(config) as manager:
        manager.add_request([], request_id="x")
        found = [manager.get_result() for _ in range(2)]
    assert [(o.request_id, o.status) for o in found] == [("x", FAILED), ("x__child#0", FAILED)]


def test_a_model_error_fails_the_requests_of_its_step(
    llama: PreTrainedModel, manager: PagedBatchingManager
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("a fault")

    manager.start()
    hook = llama.model.layers[1].register_forward_hook(fail)
    name = manager.add_request(PROMPTS[0])
    output = manager.get_result(name)
    assert (output.status, "a fault" in output.error) == (FAILED, True)
    hook.remove()
    assert manager.background_thread_status.fatal_error is None
    assert manager.get_result(manager.add_request(PROMPTS[0])).status == FINISHED


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_defect_of_the_engine_leaves_nobody_waiting(
    llama: PreTrainedModel, manager: PagedBatchingManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ZeroDivisionError("a defect")

    manager.start()
    with manager.pause():
        monkeypatch.setattr(manager.batch_processor._core.scheduler, "plan", fail)
        manager.add_request(PROMPTS[0])
    assert manager.get_result().status == FAILED
    assert "a defect" in str(manager.background_thread_status.fatal_error)
    assert manager.add_request(PROMPTS[0]) is None
    manager.join(0.0, timeout=60)
    assert not manager.is_running()
    assert llama.config._attn_implementation == "sdpa"
    manager.start()
    assert manager.get_result(manager.add_request(PROMPTS[0])).status == FINISHED


def test_a_name_in_use_is_refused(manager: PagedBatchingManager) -> None:
    manager.add_request(PROMPTS[0], request_id="req_0")
    with pytest.raises(ValueError, match="request_id='req_0': in use"):
        manager.add_request(PROMPTS[1], request_id="req_0")
    assert manager.add_request(PROMPTS[1]) == "req_1"


def test_a_full_queue_makes_callers_wait_then_refuses(
    llama: PreTrainedModel, patch: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    import queue

    monkeypatch.setattr(manager_module, "_QUEUE_SECONDS_MAX", 0.01)
    config = ContinuousBatchingConfig(max_queue_size=1)
    with llama.continuous_batching_context_manager(
        settings(), continuous_batching_config=config
    ) as manager:
        with manager.pause():
            manager.add_request(PROMPTS[0])
            with pytest.raises(queue.Full, match="raise max_queue_size"):
                manager.add_request(PROMPTS[1])
        assert manager.get_result().status == FINISHED
        assert len(manager.add_requests(PROMPTS * 4)) == 12
    assert len(list(manager)) == 12


def test_of_several_threads_that_start_a_manager_one_does(
    llama: PreTrainedModel, patch: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = llama.init_continuous_batching(settings())
    served = []
    monkeypatch.setattr(
        manager, "_serve", lambda engine, serve=manager._serve: served.append(serve(engine))
    )
    together = threading.Barrier(6)

    def start() -> None:
        together.wait()
        manager.start()

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    manager.add_request(PROMPTS[0], request_id="mine")
    output = manager.get_result("mine", timeout=60)
    assert output is not None
    assert [output.generated_tokens] == one_by_one(llama, PROMPTS[:1])
    manager.stop()
    assert len(served) == 1
    assert not [each for each in threading.enumerate() if each.name == "kvpager-batching"]


def test_no_return_sequences_at_all_are_refused(llama: PreTrainedModel, patch: Patch) -> None:
    with pytest.raises(ValueError, match="num_return_sequences"):
        llama.init_continuous_batching(settings(num_return_sequences=0))

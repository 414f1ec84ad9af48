"""A model that changes between the steps of `generate`, or under an engine."""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")


import kvpager  # noqa: E402
from kvpager.integrations.huggingface.model_state import fingerprint  # noqa: E402
from kvpager.integrations.huggingface.model_state.fingerprint import ModelWatch  # noqa: E402
from tests.support.model_changes import (  # noqa: E402
    GREEDY,
    IDS,
    PROMPT,
    Change,
    a_forward_is_replaced,
    a_hooks_variable_changes,
    a_tensor_that_is_no_buffer_changes,
    a_weight_is_written,
    a_weight_is_written_through_data,
    functions_are_replaced,
    global_hooks_come_and_go,
    llama,
    opaque_hook,
    replaced,
    settings_change,
    tokens,
    weights_are_loaded,
)

SEEN = [
    a_weight_is_written,
    a_weight_is_written_through_data,
    weights_are_loaded,
    global_hooks_come_and_go,
    a_hooks_variable_changes,
    a_forward_is_replaced,
    functions_are_replaced,
    settings_change,
    a_tensor_that_is_no_buffer_changes,
]


@pytest.mark.mostly_slow(quick=3)
@pytest.mark.parametrize("change", SEEN, ids=lambda change: change.__name__)
def test_an_engine_reuses_nothing_after_its_model_changes(change: Change) -> None:
    model = llama()
    with contextlib.closing(change(model)) as steps:
        next(steps)
        with kvpager.Engine(model, memory="8MiB") as engine:
            for _ in range(2):
                engine.generate([PROMPT], **GREEDY)
            reused = engine.stats().scheduler.total_reused_tokens
            assert reused > 0
            next(steps)
            (output,) = engine.generate([PROMPT], **GREEDY)
            stats = engine.stats()
        assert stats.scheduler.total_reused_tokens == reused
        assert (stats.model_changes, stats.unshared) == (1, None)
        assert output.token_ids == tokens(model)


def test_an_engine_begins_again_to_share_after_a_change() -> None:
    model = llama()
    with kvpager.Engine(model, memory="8MiB") as engine:
        for _ in range(2):
            with torch.no_grad():
                model.lm_head.weight.mul_(1.05)
            before = engine.stats().scheduler.total_reused_tokens
            for _ in range(2):
                engine.generate([PROMPT], **GREEDY)
            assert engine.stats().scheduler.total_reused_tokens > before


class BetweenSteps:
    """Does something once, after a step of a request."""

    def __init__(self, do: Callable[[], object]) -> None:
        self._do = do
        self.done = threading.Event()

    def __call__(self, record: Any) -> None:
        if not self.done.is_set() and record.stats.scheduler.num_running:
            self._do()
            self.done.set()


class AtSteps(transformers.LogitsProcessor, transformers.StoppingCriteria):
    """A processor, criterion and streamer of the caller's that does something at two steps."""

    def __init__(self, do: Callable[[bool], object], length: int) -> None:
        self._do, self._length = do, length

    def __call__(self, ids: torch.Tensor, scores: Any) -> Any:
        step = ids.shape[1] - self._length
        if step in (3, 4):
            self._do(step == 3)
        return scores if isinstance(scores, torch.Tensor) else torch.zeros(len(ids)).bool()


class StreamsAt(transformers.generation.streamers.BaseStreamer):
    def __init__(self, do: Callable[[bool], object]) -> None:
        self._do, self._steps = do, 0

    def put(self, value: torch.Tensor) -> None:
        self._steps += 1
        if self._steps in (4, 5):
            self._do(self._steps == 4)

    def end(self) -> None:
        pass


def scaled(model: Any, on: bool) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling *= 4 if on else 0.25


def written(model: Any, on: bool) -> None:
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(4 if on else 0.25)


def adapted(model: Any, on: bool) -> None:
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.set_adapter("one" if on else "two")


def with_adapters() -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(llama(), config, adapter_name="one")
    tuned.add_adapter("two", config)
    tuned.set_adapter("two")
    return tuned.eval().get_base_model()


@pytest.mark.mostly_slow(quick=3)
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of PEFT's
@pytest.mark.parametrize("by", ["processor", "criterion", "streamer"])
@pytest.mark.parametrize("switch", [scaled, written, adapted], ids=lambda f: f.__name__)
def test_a_reply_during_which_the_model_changed_is_not_kept(switch: Any, by: str) -> None:
    model = with_adapters() if switch is adapted else llama()
    do = functools.partial(switch, model)
    at_steps = AtSteps(do, IDS.shape[1])
    hooked: dict[str, Any] = {
        "processor": {"logits_processor": transformers.LogitsProcessorList([at_steps])},
        "criterion": {"stopping_criteria": transformers.StoppingCriteriaList([at_steps])},
        "streamer": {"streamer": StreamsAt(do)},
    }[by]
    options = {**GREEDY, "max_new_tokens": 12}
    with kvpager.patch(model, prefix_cache=True, block_size=1) as patch:
        reply = model.generate(IDS, **options, **hooked)
        again = model.generate(reply, **options)
        assert patch.stats().prefix_hit_tokens <= IDS.shape[1]
    assert torch.equal(again, model.generate(reply, **options))


def test_a_switch_that_transformers_makes_for_decoding_keeps_replies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = llama()

    @contextlib.contextmanager
    def optimised(self: Any) -> Iterator[None]:
        with replaced(self.config, "hidden_act", "as on a GPU"):
            yield

    name = "_optimize_model_for_decode"  # which chooses how experts are computed
    monkeypatch.setattr(transformers.GenerationMixin, name, optimised, raising=False)
    with kvpager.patch(model, prefix_cache=True, block_size=1) as patch:
        reply = model.generate(IDS, **GREEDY)
        for turn in (1, 2):
            model.generate(reply, **GREEDY)
            assert patch.stats().prefix_hit_tokens == turn * (reply.shape[1] - 1)


def test_blocks_of_a_request_are_private_after_a_change() -> None:
    model = llama()

    def write() -> None:
        with torch.no_grad():
            model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)

    do = BetweenSteps(write)
    with kvpager.Engine(model, memory="8MiB", on_step=do) as engine:
        (output,) = engine.generate([PROMPT], **{**GREEDY, "max_new_tokens": 40})
        assert do.done.is_set()
        assert len(output.token_ids) == 40  # it goes on
        prompt = PROMPT + output.token_ids
        (after,) = engine.generate([prompt], **GREEDY)
        assert engine.stats().scheduler.total_reused_tokens == 0
        assert engine.stats().model_changes == 1
    expected = model.generate(torch.tensor([prompt]), **GREEDY)[0, len(prompt) :]
    assert after.token_ids == expected.tolist()


def test_an_undone_change_is_noticed_during_a_request() -> None:
    model = llama()
    steps: list[int] = []

    def toggle(record: Any) -> None:
        steps.append(record.tokens)
        if len(steps) in (3, 30):  # there, and back again
            for layer in model.model.layers:
                layer.self_attn.scaling *= 2 if len(steps) == 3 else 0.5

    with kvpager.Engine(model, memory="8MiB", on_step=toggle) as engine:
        (output,) = engine.generate([PROMPT], **{**GREEDY, "max_new_tokens": 60})
        prompt = PROMPT + output.token_ids
        (after,) = engine.generate([prompt], **GREEDY)
        assert engine.stats().scheduler.total_reused_tokens == 0
    expected = model.generate(torch.tensor([prompt]), **GREEDY)[0, len(prompt) :]
    assert after.token_ids == expected.tolist()


def test_a_session_of_generate_batch_notices_a_change() -> None:
    model = llama()
    with kvpager.patch(model, prefix_cache=True) as patch:
        manager = model.init_continuous_batching(
            generation_config=transformers.GenerationConfig(**GREEDY)
        )
        manager.start()
        try:
            replies = []
            for seed in (None, 5):
                if seed is not None:
                    model.load_state_dict(llama(seed=seed).state_dict())
                name = manager.add_request(PROMPT)
                replies.append(manager.get_result(name, timeout=60).generated_tokens)
            opaque_hook(model)
            manager.get_result(manager.add_request(PROMPT), timeout=60)
            reason = "prompts not shared, the model may change undetected (a list_iterator may"
            assert reason in patch.report()
        finally:
            manager.stop(block=True)
        del manager
        assert reason in patch.report()
    assert replies == [tokens(llama()), tokens(llama(seed=5))]


def test_an_engine_notices_an_uncounted_write_while_requests_wait() -> None:
    model, other = llama(), llama(seed=1)

    def write() -> None:
        for weight, new in zip(model.parameters(), other.parameters(), strict=True):
            weight.data.copy_(new)  # which torch does not count

    do = BetweenSteps(write)
    with kvpager.Engine(model, memory="8MiB", max_num_seqs=1, on_step=do) as engine:
        streams = [
            engine.submit(PROMPT, **GREEDY),  # computed before the write, in part
            engine.submit(PROMPT, **GREEDY),
        ]
        _, after = (stream.result().token_ids for stream in streams)
        assert do.done.is_set()
    expected = model.generate(torch.tensor([PROMPT]), **GREEDY)[0, len(PROMPT) :]
    assert after == expected.tolist()


def test_errors_of_signal_handlers_are_not_blamed_on_models() -> None:
    class Late(TimeoutError):
        pass

    def late(*_: object) -> None:
        raise Late

    watch, genuine = ModelWatch(model := llama()), fingerprint._Snapshot.same
    state = watch.look()

    def same(noted: Any, samples: bool) -> bool:
        signal.raise_signal(signal.SIGALRM)
        return genuine(noted, samples)

    before = signal.signal(signal.SIGALRM, late)
    try:
        with replaced(fingerprint._Snapshot, "same", same), pytest.raises(Late):
            watch.look()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert watch.look() == state
    del model

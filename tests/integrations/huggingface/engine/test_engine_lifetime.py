"""Several engines, pauses, dropped engines, and changes of the model in between."""

import pytest
import torch

from kvpager.errors import (
    EngineClosed,
    RequestCancelled,
    RequestExpired,
    RequestFailed,
)
from kvpager.integrations.huggingface.engine import Engine
from tests.support import tiny_models
from tests.support.engines import NEW, alone, assert_nothing_is_held, some_prompts
from tests.support.gates import Gate


@pytest.fixture(scope="module")
def llama():
    return tiny_models.tiny_model("llama")


# -------------------------------------------------------------------- ends


def test_a_request_ends_at_its_deadline(llama):
    with Engine(llama, memory="8MiB") as engine:
        with pytest.raises(RequestExpired, match="deadline"):
            engine.submit([5, 6], max_new_tokens=900, timeout=1e-9).result(timeout=60)
        assert_nothing_is_held(engine)


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("kind", [ZeroDivisionError, SystemExit, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("where", ["logits_processor", "stopping_criteria"])
def test_a_processor_that_raises_ends_its_own_request(llama, where, kind):
    def broken(ids, scores, **kwargs):
        if ids.shape[1] > 6:
            raise kind("of the processor")
        return scores if where == "logits_processor" else torch.tensor([False])

    with Engine(llama, memory="8MiB") as engine:
        bad = engine.submit([5, 6, 7], max_new_tokens=30, **{where: [broken]})
        good = engine.submit([5, 6, 7], max_new_tokens=NEW, do_sample=False)
        with pytest.raises(RequestFailed, match=kind.__name__) as caught:
            bad.result(timeout=60)
        assert isinstance(caught.value.__cause__, kind)
        assert good.result().token_ids == alone(llama, [5, 6, 7])
        assert_nothing_is_held(engine)


def test_closing_ends_what_is_left_and_restores_the_model(monkeypatch):
    model = tiny_models.tiny_model("llama", attention="eager").train()
    engine = Engine(model, memory="8MiB")
    assert model.config._attn_implementation == "kvpager"
    gate = Gate(model)
    gate.open_after(monkeypatch, engine._core, "stop")
    stream = engine.submit([5], max_new_tokens=1000)
    gate.let(1)
    gate.entered.acquire()
    engine.close()
    engine.close()
    with pytest.raises(RequestCancelled):
        stream.result(timeout=60)
    with pytest.raises(EngineClosed, match="Make a new one"):
        engine.submit([5])
    assert model.config._attn_implementation == "eager"
    assert model.training


def test_generate_works_beside_an_open_engine(llama):
    expected = alone(llama, [5, 6, 7])
    with Engine(llama, memory="8MiB") as engine:
        stream = engine.submit([5, 6, 7], max_new_tokens=NEW, do_sample=False)
        assert alone(llama, [5, 6, 7]) == expected
        assert stream.result().token_ids == expected


def test_a_pause_lets_weights_change():
    model = tiny_models.tiny_model("llama")
    prompt = list(range(3, 53))
    with Engine(model, memory="8MiB") as engine:
        before = engine.submit(prompt, max_new_tokens=NEW, do_sample=False).result().token_ids
        with engine.pause():
            waiting = engine.submit(prompt, max_new_tokens=NEW, do_sample=False)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(-0.7)
        after = waiting.result().token_ids
    assert before != after == alone(model, prompt)


# -------------------------------------------------------------------- several at once, and changes


def test_a_pause_separates_the_prompts_before_and_after():
    model = tiny_models.tiny_model("llama")
    prompt = list(range(3, 67))
    with Engine(model, memory="8MiB") as engine:
        running = engine.submit(prompt, max_new_tokens=200)
        for _ in zip(running, range(3), strict=False):
            pass
        with engine.pause():
            waiting = engine.submit(prompt, max_new_tokens=NEW, do_sample=False)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(-0.7)
        later = engine.submit(prompt, max_new_tokens=NEW, do_sample=False)
        expected = alone(model, prompt)
        assert waiting.result().token_ids == later.result().token_ids == expected
        running.cancel()


def test_engines_of_one_model_do_not_disturb_each_other():
    model = tiny_models.tiny_model("llama").train()
    attention = model.config._attn_implementation
    first, second = Engine(model, memory="4MiB"), Engine(model, memory="4MiB")
    first.close()
    found = second.submit([5, 6, 7], max_new_tokens=NEW, do_sample=False).result().token_ids
    assert not model.training
    second.close()
    assert model.training
    assert model.config._attn_implementation == attention
    assert found == alone(model.eval(), [5, 6, 7])


def test_a_dropped_engine_leaves_no_thread_and_restores_the_model():
    model = tiny_models.tiny_model("llama")
    attention = model.config._attn_implementation
    engine = Engine(model, memory="4MiB")
    engine.submit([5], max_new_tokens=2).result()
    threads = [engine._core._thread, engine._core._dispatcher._thread]
    del engine
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert model.config._attn_implementation == attention


def test_the_engine_follows_changes_of_the_models_settings():
    model = tiny_models.tiny_model("llama")
    with Engine(model, memory="8MiB") as engine:
        before = engine.submit([5, 6], max_new_tokens=NEW).result().token_ids
        model.generation_config.suppress_tokens = before
        after = engine.submit([5, 6], max_new_tokens=NEW).result().token_ids
    assert not set(before) & set(after)


# -------------------------------------------------------------------- what it says of itself


def test_the_log_tells_of_starts_preemptions_and_failed_steps(llama, caplog):
    caplog.set_level("INFO", "kvpager")
    with Engine(llama, memory="8MiB", prefix_cache=False) as engine:
        block_bytes = engine.block_bytes
    assert "engine started: <Engine of LlamaForCausalLM: open, packed, " in caplog.text
    caplog.clear()
    with Engine(llama, memory=8 * block_bytes) as engine:
        engine.generate(some_prompts(llama, count=6), max_new_tokens=40)
        assert engine.stats().scheduler.total_preempted_by_recompute > 1
    told = [record for record in caplog.records if "KV cache is full" in record.message]
    assert len(told) == 1  # in a while
    caplog.clear()
    with Engine(llama, memory="8MiB") as engine:
        hook = llama.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(RequestFailed):
            engine.submit([5], request_id="mine").result(timeout=60)
        hook.remove()
    (failed,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "step failed for requests 'mine'" in failed.message
    assert failed.exc_info[0] is ZeroDivisionError


def test_an_engine_and_its_streams_show_what_they_are(llama):
    with Engine(llama, memory="8MiB", host_memory="1MiB") as engine:
        with engine.pause():
            stream = engine.submit([5, 6, 7], request_id="mine", max_new_tokens=4)
            assert "0 running, 1 waiting>" in repr(engine)
            assert repr(stream) == "<Stream of 'mine': waiting, 3 -> 0 tokens>"
        stream.result()
        assert repr(stream) == "<Stream of 'mine': done, 3 -> 4 tokens>"
        pool = engine.stats().pool
        assert f"open, packed, {pool.num_blocks} blocks of 16 tokens (8.0 MiB) and " in repr(engine)
        with engine.pause():
            stream = engine.submit([5], do_sample=True, num_return_sequences=2, max_new_tokens=900)
        next(iter(stream))
        assert "running, 1 -> " in repr(stream)
        stream.cancel()
        with pytest.raises(RequestCancelled):
            stream.result()
        assert ": RequestCancelled, 1 -> " in repr(stream)
    assert "<Engine of LlamaForCausalLM: closed, " in repr(engine)


def test_a_request_too_large_for_memory_says_what_to_raise() -> None:
    model, prompt = tiny_models.tiny_model("llama"), list(range(1, 100))
    with Engine(model, memory="64KiB") as engine:
        with pytest.raises(
            ValueError,
            match=r"a prompt of 99 and 50 new tokens may need 10 blocks of KV cache \(80.0 KiB\), "
            r"memory='64KiB' allows 8\. Raise memory to 80.0 KiB or lower max_new_tokens",
        ):
            engine.submit(prompt, max_new_tokens=50)
        assert len(engine.generate([prompt], max_new_tokens=9)[0].token_ids) == 9
    with Engine(model, memory="80KiB") as engine:
        assert len(engine.generate([prompt], max_new_tokens=50)[0].token_ids) == 50

"""Quotas of an engine: a namespace stays within its quota and delays no other namespace."""

from __future__ import annotations

import pytest

from tests.support.gates import Gate
from tests.support.toy_runner import BLOCK_SIZE, ToyEngine, expected


def test_a_tenant_at_its_quota_waits_while_others_run() -> None:
    most: list[int] = []
    with ToyEngine(64, watermark=0.0, core={"on_step": lambda _: most.append(used())}) as engine:

        def used() -> int:
            return engine.scheduler.manager.quotas.used("acme")  # type: ignore[attr-defined]

        engine.quotas["acme"] = 6
        with engine.pause():
            acme = [engine.ask([i, 5, 6, 7], 16, namespace="acme") for i in range(5)]
            others = [engine.ask([i, 8, 9, 7], 16, namespace="other") for i in range(3)]
        outputs = [stream.result(60) for stream in others]
        last = max(output.finished_time or 0.0 for output in outputs)
        assert last < (acme[-1].result(60).finished_time or 0.0)
        assert [output.token_ids for output in outputs] == [
            expected([i, 8, 9, 7], 16) for i in range(3)
        ]
        for number, stream in enumerate(acme):
            assert stream.result(60).token_ids == expected([number, 5, 6, 7], 16)
        engine.check_idle()
    assert max(most) == 6


def test_a_request_beyond_its_quota_is_refused() -> None:
    with ToyEngine() as engine:
        engine.quotas["acme"] = 5
        with pytest.raises(
            ValueError, match=r"may need 6 blocks, but the quota of its namespace is 5"
        ):
            engine.ask([1, 2, 3, 4], 18, namespace="acme")
        assert len(engine.ask([1, 2, 3, 4], 18).result().token_ids) == 18
        del engine.quotas["acme"]
        assert len(engine.ask([1, 2, 3, 4], 18, namespace="acme").result().token_ids) == 18


def test_quotas_are_a_mapping_in_blocks_or_bytes() -> None:
    with ToyEngine() as engine:  # a block has 1 MiB
        engine.quotas["acme"] = 10
        engine.quotas["other"] = "20.5MiB"
        assert dict(engine.quotas) == {"acme": 10, "other": "20.5MiB"}
        ceiling = engine.scheduler.manager.quotas.ceiling
        assert (ceiling("acme"), ceiling("other")) == (10, 20)
        with pytest.raises(ValueError, match=r"one block takes 1\.0 MiB"):
            engine.quotas["acme"] = "1KiB"
        del engine.quotas["acme"]
        assert dict(engine.quotas) == {"other": "20.5MiB"}
        with pytest.raises(KeyError):
            del engine.quotas["acme"]


def test_a_quota_too_small_for_live_requests_is_refused() -> None:
    with ToyEngine() as engine:
        engine.quotas["acme"] = 12
        with Gate(engine.runner) as gate:
            streams = [
                engine.ask([i] * 2 * BLOCK_SIZE, 4, request_id=f"r{i}", namespace="acme")
                for i in range(3)
            ]
            gate.let(2)  # by now all three have started
            gate.entered.acquire()
            with pytest.raises(ValueError, match=r"request 'r0' may need 3\. Cancel it"):
                engine.quotas["acme"] = 2
            with pytest.raises(
                ValueError, match=r"4 blocks .* its requests and retained prompts hold more"
            ):
                engine.quotas["acme"] = 4
            assert dict(engine.quotas) == {"acme": 12}
        for stream in streams:
            stream.result(60)
        engine.check_idle()
        engine.quotas["acme"] = 2

"""A circuit breaker bypasses a store that fails again and again, and probes it later."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from kvpager.storage.tiers.breaker import CircuitBreaker
from tests.support.clock import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock(100.0)


@pytest.fixture
def breaker(clock: Clock) -> CircuitBreaker:
    return CircuitBreaker(clock)


def fail(breaker: CircuitBreaker, times: int) -> None:
    for _ in range(times):
        assert breaker.allows()
        breaker.failed()


def test_two_failures_leave_the_store_in_use(breaker: CircuitBreaker) -> None:
    fail(breaker, 2)
    assert breaker.allows()
    assert not breaker.open


def test_the_third_failure_within_ten_seconds_bypasses_it(
    breaker: CircuitBreaker, clock: Clock
) -> None:
    fail(breaker, 1)
    clock.now += 9.9
    breaker.succeeded()
    fail(breaker, 2)
    assert breaker.open
    assert not breaker.allows()


def test_failures_further_apart_do_not(breaker: CircuitBreaker, clock: Clock) -> None:
    for _ in range(10):
        fail(breaker, 1)
        clock.now += 5.1
    assert not breaker.open


def test_probes_follow_after_waits_that_double_up_to_a_minute(
    breaker: CircuitBreaker, clock: Clock
) -> None:
    fail(breaker, 3)
    for wait in (1, 2, 4, 8, 16, 32, 60, 60):
        clock.now += wait - 0.01
        assert not breaker.allows()
        clock.now += 0.01
        assert breaker.allows()
        assert not breaker.allows(), "one probe at a time"
        breaker.failed()
    assert breaker.open


def test_a_probe_that_succeeds_puts_the_store_back(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker, 3)
    clock.now += 1
    assert breaker.allows()
    breaker.succeeded()
    assert not breaker.open
    fail(breaker, 2)
    assert not breaker.open, "earlier failures are forgotten"
    fail(breaker, 1)
    clock.now += 1
    assert breaker.allows(), "the first wait is short again"


def test_failures_of_calls_begun_before_are_no_probe(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker, 3)
    breaker.failed()
    breaker.failed()
    clock.now += 1
    assert breaker.allows()


def test_successes_of_calls_begun_before_are_no_probe(
    breaker: CircuitBreaker, clock: Clock
) -> None:
    fail(breaker, 3)
    breaker.succeeded()
    assert breaker.open
    clock.now += 1
    assert breaker.allows()
    with ThreadPoolExecutor(1) as threads:  # their calls end while the probe is under way
        threads.submit(breaker.succeeded).result()
        assert breaker.open
        threads.submit(breaker.failed).result()
    breaker.succeeded()
    assert not breaker.open


def test_a_probe_without_an_end_makes_way_for_another(
    breaker: CircuitBreaker, clock: Clock
) -> None:
    fail(breaker, 3)
    clock.now += 1
    assert breaker.allows()
    clock.now += 1
    assert breaker.allows()

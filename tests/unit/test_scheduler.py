# SPDX-License-Identifier: MIT
"""The scheduler by itself: absolute deadlines, misses counted, no bursts."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kucomms.scheduler import Scheduler, Ticker


def test_no_drift():
    ticker = Ticker(100.0, 0.0)
    now = 0.0
    for index in range(1, 100_001):
        assert ticker.deadline == pytest.approx(index / 100.0, abs=1e-9)
        now = ticker.deadline + 0.004  # always late, never later
        assert ticker.due(now)
        assert not ticker.due(now)
    assert ticker.ticks == 100_000
    assert ticker.missed == 0
    assert ticker.jitter_max == pytest.approx(0.004, abs=1e-6)


def test_missed_ticks_are_counted_and_not_run_in_a_burst():
    ticker = Ticker(100.0, 0.0)
    assert ticker.due(0.0551)  # 5 deadlines have passed: one call, four misses
    assert not ticker.due(0.0551)
    assert (ticker.ticks, ticker.missed) == (1, 4)
    assert ticker.deadline == pytest.approx(0.06)


@given(
    hz=st.floats(0.1, 10_000.0),
    start=st.floats(0, 1e6),
    waits=st.lists(st.floats(0, 1.0), max_size=200),
)
def test_ticks_and_misses_add_up_to_the_time(hz, start, waits):
    ticker = Ticker(hz, start)
    now = start
    for wait in waits:
        now += wait
        ticker.due(now)
        assert ticker.deadline > now
        assert ticker.deadline - now <= ticker.period * (1 + 1e-6) + 1e-6
    assert ticker.ticks <= len(waits)
    assert abs(ticker.ticks + ticker.missed - (now - start) * hz) <= 1.01


@pytest.mark.parametrize("hz", [0, -1, math.nan, math.inf])
def test_rate_must_make_sense(hz):
    with pytest.raises(ValueError, match="rate"):
        Ticker(hz, 0.0)


def test_scheduler_knows_the_nearest_deadline(monkeypatch):
    monkeypatch.setattr("time.monotonic", lambda: 10.0)
    scheduler = Scheduler()
    assert scheduler.next_deadline == math.inf
    assert scheduler.due(1e9) == []
    scheduler.start("slow", 1.0)
    scheduler.start("fast", 100.0)
    scheduler.start("fast", 1.0)  # is there already
    assert scheduler.next_deadline == pytest.approx(10.01)
    assert scheduler.due(10.005) == []
    assert scheduler.due(10.012) == ["fast"]
    assert scheduler.due(11.0) == ["slow", "fast"]
    scheduler.stop()
    assert scheduler.next_deadline == math.inf
    assert scheduler.ticker("fast").missed > 90

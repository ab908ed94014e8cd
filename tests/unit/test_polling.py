# SPDX-License-Identifier: MIT
"""How the budget for polling follows its success."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kucomms.polling import AdaptivePolling

SOON, LATE = 30e-6, 0.01


@pytest.fixture
def polling():
    return AdaptivePolling(400e-6)


def test_never_polls_without_leave():
    polling = AdaptivePolling(0.0)
    for _ in range(10):
        polling.slept(0.0)
        assert polling.budget == 0


def test_short_sleeps_begin_it_and_hits_grow_it(polling):
    assert polling.budget == 0
    polling.slept(SOON)
    assert polling.budget == 50_000
    polling.hit(10)
    assert polling.budget == 100_000
    for _ in range(20):
        polling.hit(10)
    assert polling.budget == 400_000
    assert polling.hits == 21
    assert polling.nanoseconds == 210


def test_a_small_limit_is_kept():
    polling = AdaptivePolling(5e-6)
    polling.slept(SOON)
    assert polling.budget == 5000
    polling.hit(1)
    assert polling.budget == 5000


def test_long_sleeps_end_it(polling):
    polling.slept(SOON)
    for _ in range(10):
        polling.hit(10)
    for _ in range(5):
        polling.slept(LATE)
    assert polling.budget == 0


def test_misses_end_it_and_it_rests_ever_longer(polling):
    """The peer answers soon and never to a poll: as when it runs in this very loop."""
    rests = []
    for _ in range(12):
        while not polling.budget:
            polling.slept(SOON)
            rests[-1:] = [rests[-1] + 1] if rests else []
        while polling.budget:
            polling.missed(polling.budget)
        rests.append(0)
    assert rests[1:-1] == sorted(rests[1:-1])
    assert rests[3] >= 2 * rests[1]
    assert rests[-2] == 257
    assert polling.misses == 12 * 4


def test_a_rest_is_forgotten_after_many_hits(polling):
    for _ in range(8):
        while not polling.budget:
            polling.slept(SOON)
        while polling.budget:
            polling.missed(1)
    while not polling.budget:
        polling.slept(SOON)
    for _ in range(20):
        polling.hit(10)
    while polling.budget:
        polling.missed(1)
    polling.slept(SOON)
    polling.slept(SOON)
    assert polling.budget


def test_moments_in_between_count_as_hits_only(polling):
    polling.slept(SOON)
    polling.spun(0, 100)
    assert (polling.hits, polling.misses, polling.nanoseconds) == (0, 0, 100)
    polling.spun(3, 100)
    assert (polling.hits, polling.misses, polling.nanoseconds) == (3, 0, 200)
    assert polling.budget == 100_000


EVENTS = st.one_of(
    st.tuples(st.just("hit"), st.integers(0, 10**6)),
    st.tuples(st.just("missed"), st.integers(0, 10**6)),
    st.tuples(st.just("slept"), st.floats(0, 1)),
)


@given(st.floats(0, 0.01), st.lists(EVENTS, max_size=300))
def test_the_budget_stays_within_its_limit(limit, events):
    polling = AdaptivePolling(limit)
    for what, amount in events:
        if what != "slept" and not polling.budget:
            continue  # nobody polls then
        getattr(polling, what)(amount)
        assert 0 <= polling.budget <= int(limit * 1e9)

"""Error rates and their intervals, against obvious counting."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biodedup.common.intervals import exact_interval, upper_bound
from biodedup.jobs.evaluation.rates import (
    Rate,
    Resampling,
    bands_of,
    cmc,
    det,
    difference,
    equal_error_rate,
    threshold_at,
)

scores = st.lists(st.integers(0, 12).map(float), min_size=1, max_size=60).map(np.array)


def test_exact_intervals_are_those_of_the_tables():
    # Clopper and Pearson, 95 %: 0 of 10, 1 of 10, 5 of 10, 10 of 10
    assert exact_interval(0, 10) == pytest.approx((0, 0.3085), abs=1e-4)
    assert exact_interval(1, 10) == pytest.approx((0.0025, 0.4450), abs=1e-4)
    assert exact_interval(5, 10) == pytest.approx((0.1871, 0.8129), abs=1e-4)
    assert exact_interval(10, 10) == pytest.approx((0.6915, 1), abs=1e-4)
    assert exact_interval(0, 0) == (0, 1)
    # 95 %, one-sided: three divided by the trials where there is no event
    assert upper_bound(0, 1000) == pytest.approx(0.002991, abs=1e-6)
    assert upper_bound([0, 1], 10) == pytest.approx([0.2589, 0.3942], abs=1e-4)


@given(scores, st.sampled_from([0.5, 0.3, 0.1, 0.05]))
def test_a_threshold_keeps_to_its_rate_and_no_lower_one_does(nonmated, rate):
    threshold = threshold_at(nonmated, rate)
    if threshold is None:
        assert rate * len(nonmated) < 1
        return
    assert np.mean(nonmated >= threshold) <= rate
    below = nonmated[nonmated < threshold]
    if len(below):
        assert np.mean(nonmated >= below.max()) > rate


@pytest.mark.slow
@given(scores, scores)
def test_a_trade_off_states_the_rates_at_each_threshold(mated, nonmated):
    threshold, fmr, fnmr = det(mated, nonmated)
    assert np.allclose(fmr, [np.mean(nonmated >= t) for t in threshold])
    assert np.allclose(fnmr, [np.mean(mated < t) for t in threshold])
    rate, at = equal_error_rate(mated, nonmated)
    gaps = np.abs(fmr - fnmr)
    assert rate == pytest.approx((np.mean(nonmated >= at) + np.mean(mated < at)) / 2)
    assert abs(np.mean(nonmated >= at) - np.mean(mated < at)) == pytest.approx(gaps.min())


def test_a_thinned_trade_off_keeps_both_ends_and_stays_true():
    rng = np.random.default_rng(1)
    mated, nonmated = rng.normal(4, 1, 3000), rng.normal(0, 1, 60_000)
    threshold, fmr, fnmr = det(mated, nonmated, points=100)
    assert 50 <= len(threshold) <= 100
    assert np.allclose(fmr, [np.mean(nonmated >= t) for t in threshold])
    assert np.allclose(fnmr, [np.mean(mated < t) for t in threshold])
    assert np.count_nonzero((fmr > 0) & (fmr < 1e-3)) > 5
    assert np.count_nonzero((fnmr > 0) & (fnmr < 1e-2)) > 5


def test_mates_that_were_not_compared_have_no_rank():
    assert cmc(np.array([1, 1, 3, 0, 9]), 6, 4) == [2, 2, 3, 3]


def test_rates_of_drawn_subjects_are_those_of_counting_each_as_often_as_it_was_drawn():
    rng = np.random.default_rng(5)
    resampling = Resampling(6, 40, np.random.default_rng(3))
    drawn = np.random.default_rng(3).integers(0, 6, (40, 6))
    subject = rng.integers(0, 6, 50)
    events = rng.random(50) < 0.3
    a, b = rng.integers(0, 3, 60), rng.integers(3, 6, 60)
    false = rng.random(60) < 0.4
    rate = resampling.rate(events, subject)
    impostors = resampling.impostor_pairs(a, b).rate(false)
    assert (rate.events, rate.trials) == (events.sum(), 50)
    for replicate in range(40):
        times = [int((drawn[replicate] == s).sum()) for s in range(6)]
        single = [(events[i], times[subject[i]]) for i in range(50)]
        double = [(false[i], times[a[i]] * times[b[i]]) for i in range(60)]
        for found, trials in ((rate, single), (impostors, double)):
            total = sum(n for _, n in trials)
            expected = sum(n for event, n in trials if event) / total if total else np.nan
            assert found.drawn[replicate] == pytest.approx(expected, nan_ok=True)


def test_a_subject_with_many_comparisons_widens_the_interval():
    """Ten subjects of a hundred pairs each, one of whom fails always: exact intervals take a thousand trials for independent."""
    subject = np.repeat(np.arange(10), 100)
    rate = Resampling(10, 500, np.random.default_rng(0)).rate(subject == 3, subject)
    low, high = rate.exact
    assert high - low < 0.04
    assert rate.bootstrap[1] - rate.bootstrap[0] > 0.2
    assert rate.interval == (rate.bootstrap[0], rate.bootstrap[1])


def test_an_interval_without_events_is_the_exact_one():
    rate = Resampling(5, 100, np.random.default_rng(0)).rate(np.zeros(30, bool), np.repeat(np.arange(5), 6))
    assert rate.bootstrap == (0, 0)
    assert rate.interval == exact_interval(0, 30)


def test_a_rate_without_trials_is_unknown():
    empty = Resampling(5, 100, np.random.default_rng(0)).rate(np.zeros(0, bool), np.zeros(0, np.int64))
    assert empty.to_dict() == {
        "events": 0,
        "trials": 0,
        "value": None,
        "interval": None,
        "exact": None,
        "bootstrap": None,
    }
    assert difference(empty, Rate(1, 2))["interval"] is None


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_a_group_of_all_subjects_does_not_differ(seed):
    rng = np.random.default_rng(seed)
    subject = np.repeat(np.arange(8), 5)
    rate = Resampling(8, 50, rng).rate(rng.random(40) < 0.2, subject)
    found = difference(rate, rate)
    assert found["value"] == 0
    assert found["interval"][0] <= 0 <= found["interval"][1]


def test_a_group_that_fails_differs_beyond_its_interval():
    subject = np.repeat(np.arange(60), 5)
    events = subject < 30
    resampling = Resampling(60, 400, np.random.default_rng(1))
    worse = difference(resampling.rate(events[:150], subject[:150]), resampling.rate(events, subject))
    assert worse["value"] == pytest.approx(0.5)
    assert worse["interval"][0] > 0.2


def test_numbers_of_many_kinds_become_four_bands():
    ages = [*range(20, 60), None]
    bands = bands_of(ages)
    assert bands[-1] == "not stated"
    assert list(dict.fromkeys(bands[:-1])) == ["20 to 29", "30 to 39", "40 to 48", "49 to 59"]
    assert bands_of(["f", "m", "", None]) == ["f", "m", "not stated", "not stated"]
    assert bands_of([1, 2, 1]) == ["1", "2", "1"]
    assert bands_of([1.5, float("nan")]) == ["1.5", "not stated"]


@given(st.lists(st.integers(0, 30), min_size=9, max_size=80))
def test_every_number_lies_in_the_band_that_it_is_put_into(numbers):
    for number, band in zip(numbers, bands_of(numbers), strict=True):
        low, _, high = band.partition(" to ")
        assert float(low) <= number <= float(high or low)

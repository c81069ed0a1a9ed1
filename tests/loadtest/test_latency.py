"""Histograms: exact to three digits, mergeable, the same after writing and reading."""

from __future__ import annotations

import numpy as np
import pytest

from loadtest.latency import Histogram

PERCENTS = (50, 90, 99, 99.9, 99.99)


def test_percentiles_are_those_of_the_samples() -> None:
    samples = np.random.default_rng(0).exponential(0.4e6, 200_000).astype(np.int64)
    histogram = Histogram(samples)
    for percent in PERCENTS:
        exact = float(np.percentile(samples, percent, method="inverted_cdf")) / 1e6
        assert histogram.percentile(percent) == pytest.approx(exact, rel=0.001, abs=0.001)
    assert histogram.mean == pytest.approx(samples.mean() / 1e6, rel=0.001)
    assert histogram.max == pytest.approx(samples.max() / 1e6, rel=0.001)
    assert histogram.at_most(0.5) == pytest.approx((samples <= 0.5e6).sum(), rel=0.002)


def test_figures_are_those_of_hdrh_itself() -> None:
    histogram = Histogram(np.random.default_rng(3).lognormal(15, 1.5, 20_000).astype(np.int64))
    for percent in (0.1, 1, 25, *PERCENTS, 100):
        assert histogram.percentile(percent) * 1000 == histogram._hdr.get_value_at_percentile(percent)
    assert histogram.mean * 1000 == pytest.approx(histogram._hdr.get_mean_value(), rel=0.001)


def test_a_third_of_a_millisecond_is_that() -> None:
    assert Histogram(np.full(1000, 330_000)).percentile(50) == pytest.approx(0.33, abs=0.001)


def test_merged_is_as_if_counted_together() -> None:
    samples = np.random.default_rng(1).gamma(2, 3e6, 50_000).astype(np.int64)
    parts = [Histogram(part) for part in np.array_split(samples, 7)]
    whole = Histogram()
    for part in parts:
        whole.add(part)
    assert [whole.percentile(p) for p in PERCENTS] == [Histogram(samples).percentile(p) for p in PERCENTS]
    assert whole.count == 50_000


def test_written_and_read_it_is_the_same() -> None:
    histogram = Histogram(np.random.default_rng(2).exponential(8e6, 10_000).astype(np.int64))
    again = Histogram.decode(histogram.encode())
    assert [again.percentile(p) for p in PERCENTS] == [histogram.percentile(p) for p in PERCENTS]
    assert again.count == histogram.count
    values, counts = again.counts()
    assert counts.sum() == 10_000
    assert values.max() == pytest.approx(histogram.max, rel=0.002)


def test_of_nothing_all_is_zero() -> None:
    empty = Histogram(np.zeros(0, np.int64))
    assert (empty.count, empty.mean, empty.max, empty.percentile(99)) == (0, 0, 0, 0)
    assert Histogram.decode(empty.encode()).count == 0

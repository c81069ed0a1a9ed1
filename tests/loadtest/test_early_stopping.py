"""MLPerf's rule: what a sample of a size may claim of a percentile."""

from __future__ import annotations

import numpy as np
import pytest

from loadtest.early_stopping import misses_allowed, samples_needed, tail_probability, upper_bound
from loadtest.latency import Histogram


@pytest.mark.parametrize(
    ("percent", "misses", "needed"),
    [
        # Of MLPerf's own table, and FACTS.
        (99.0, 0, 459), (99.0, 1, 662), (99.0, 5, 1307),
        (99.9, 0, 4603), (99.9, 1, 6636), (99.9, 5, 13105),
        (90.0, 0, 44), (90.0, 1, 64),
    ],
)  # fmt: skip
def test_sample_sizes_are_those_of_mlperf(percent: float, misses: int, needed: int) -> None:
    assert samples_needed(percent, misses) == needed
    assert misses_allowed(needed, percent) == misses
    assert misses_allowed(needed - 1, percent) == misses - 1


def test_the_tail_is_the_binomials() -> None:
    random = np.random.default_rng(0)
    drawn = random.binomial(2000, 0.01, 200_000)
    for most in (8, 15, 20, 30):
        assert tail_probability(2000, most, 0.01) == pytest.approx((drawn <= most).mean(), abs=0.004)


def test_the_bound_holds_as_often_as_it_says() -> None:
    """Of samples from a known distribution, the true percentile is beyond the bound in at most 1 %."""
    random = np.random.default_rng(1)
    true, runs = -np.log(0.01) * 5, 2000
    samples = (random.exponential(5e6, 1500).astype(np.int64) for _ in range(runs))
    beyond = sum((upper_bound(Histogram(sample), 99.0) or 0.0) < true for sample in samples)
    assert beyond <= runs * 0.01 + 3 * (runs * 0.01) ** 0.5
    assert beyond >= 1  # not by being far too large, either


def test_too_small_a_sample_claims_nothing() -> None:
    assert upper_bound(Histogram(np.full(458, 10**6)), 99.0) is None
    assert upper_bound(Histogram(np.full(459, 10**6)), 99.0) == pytest.approx(1, rel=0.001)
    assert upper_bound(Histogram(), 50.0) is None

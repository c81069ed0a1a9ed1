"""How sure a percentile is: MLPerf's early-stopping rule.

Of n requests, a share of 1 - p may take longer than the p-th percentile. Seen from the requests: which
latency is it that the true percentile exceeds with a probability of at most 1 %? The number of requests
beyond the true percentile is binomial, so some of the largest are set aside, as many as a sample of this size
allows, and the next one is the answer. A sample that allows none to be set aside says nothing of this
percentile.

MLPerf Inference rules, section "Early Stopping Criterion": https://github.com/mlcommons/inference_policies
"""

from __future__ import annotations

from functools import lru_cache
from math import log, log1p
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from loadtest.latency import Histogram

CONFIDENCE = 0.99


def tail_probability(count: int, most: int, share: float) -> float:
    """The probability that of `count` requests at most `most` are beyond a limit that a `share` is beyond."""
    log_share, log_rest = log(share), log1p(-share)
    k = np.arange(most)
    terms = np.concatenate([[0.0], np.cumsum(np.log((count - k) / (k + 1)) + log_share - log_rest)])
    largest = terms.max()
    return float(min(1.0, np.exp(count * log_rest + largest + np.log(np.exp(terms - largest).sum()))))


@lru_cache(maxsize=256)
def misses_allowed(count: int, percent: float, confidence: float = CONFIDENCE) -> int:
    """How many of the slowest requests may be set aside; -1: the sample is too small for any claim."""
    share = 1 - percent / 100
    if count < 1 or tail_probability(count, 0, share) > 1 - confidence:
        return -1
    # No more than the expected number, which is beyond the answer for any confidence over a half.
    low, high = 0, max(1, int(count * share) + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if tail_probability(count, middle, share) <= 1 - confidence:
            low = middle
        else:
            high = middle
    return low


@lru_cache(maxsize=256)
def samples_needed(percent: float, misses: int = 0, confidence: float = CONFIDENCE) -> int:
    """How many requests it takes to claim a percentile when so many are beyond it."""
    low = high = misses + 1
    while misses_allowed(high, percent, confidence) < misses:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        if misses_allowed(middle, percent, confidence) < misses:
            low = middle
        else:
            high = middle
    return high


def upper_bound(histogram: Histogram, percent: float, confidence: float = CONFIDENCE) -> float | None:
    """The milliseconds that the true percentile does not exceed, so sure; None: too few requests."""
    misses = misses_allowed(histogram.count, percent, confidence)
    if misses < 0:
        return None
    return histogram.percentile(100 * (histogram.count - misses) / histogram.count)

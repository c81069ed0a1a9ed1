"""Conditions on a run's figures, as a user writes them: `p99<20ms`, `errors>0`, `gpt:ttft_p99<200ms`."""

from __future__ import annotations

import math
import operator
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loadtest.figures import Figures
    from loadtest.latency import Histogram

_FORM = re.compile(
    r"(?:(?P<model>[^<>=]+):)?(?P<metric>[a-z_]*(?:p\d+(?:\.\d+)?|[a-z_]+))\s*(?P<sign><=|>=|<|>)\s*"
    r"(?P<value>\d+(?:\.\d+)?(?:e\d+)?)\s*(?P<unit>us|ms|s|%|/s|tokens/s|)"
)
_SIGNS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_MILLISECONDS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
_TIMES = {
    "": "latency",
    "latency": "latency",
    "service": "service",
    "lag": "lag",
    "ttft": "ttft",
    "itl": "itl",
}
_COUNTS = ("errors", "answered", "throughput", "goodput", "tokens_per_second")
# Of scenarios: overload's goodput as a share of capacity; reload's; soak's, in MB.
# What a load generator that is late, or busy, can't be the cause of.
OF_SERVER = ("errors", "failed_reloads", "memory_growth")
EXTRAS = ("goodput_ratio", "reloads", "failed_reloads", "memory_growth")
_METRICS = (
    "p50, p90, p99, p99.9 (any percentile), mean, max, the same of service_, ttft_, itl_ and lag_, errors, "
    "answered, throughput, goodput, tokens_per_second, goodput_ratio, reloads, failed_reloads, memory_growth"
)


class ConditionError(Exception):
    """A condition that can't be read, or not be asked of this run; the message says why."""


@dataclass(frozen=True)
class Condition:
    """A comparison of a figure with a number.

    Attributes:
        text: as the user wrote it.
        model: whose figure; empty: all models'.
        metric: its name.
        sign: of the comparison.
        value: in milliseconds for times, else plain; a share from 0 to 1 for percents.
        unit: that the user gave.
    """

    text: str
    model: str
    metric: str
    sign: str
    value: float
    unit: str

    @property
    def limit_ms(self) -> float | None:
        """The latency that an answer must have to be a good one; None: the condition is on something else."""
        return self.value if time_of(self.metric) is not None and self.unit in _MILLISECONDS else None

    def met_by(self, value: float) -> bool:
        """Whether a figure is as the condition says."""
        met: bool = _SIGNS[self.sign](value, self.value)
        return met


def time_of(metric: str) -> tuple[str, str] | None:
    """(whose distribution, which statistic of it) that a metric names; None: it is no time."""
    of, _, statistic = metric.rpartition("_")
    if of not in _TIMES or not (statistic in ("mean", "max", "min") or statistic.startswith("p")):
        return None
    return _TIMES[of], statistic


def parse_condition(text: str) -> Condition:
    """Read a condition.

    Raises:
        ConditionError: it has another form, an unknown metric, or the wrong unit.
    """
    found = _FORM.fullmatch(text.strip())
    if not found:
        raise ConditionError(
            f"'{text}': expected METRIC<VALUE or METRIC>VALUE, such as 'p99>20ms' or 'errors>0'"
        )
    metric, unit, value = found["metric"], found["unit"], float(found["value"])
    is_time = time_of(metric) is not None
    if not is_time and metric not in (*_COUNTS, *EXTRAS):
        raise ConditionError(f"'{text}': no metric '{metric}', only {_METRICS}")
    if is_time != (unit in _MILLISECONDS):
        wanted = "a time with its unit: us, ms or s" if is_time else "a number, or % for errors"
        raise ConditionError(f"'{text}': expected {wanted}")
    if is_time and not 0 < _percent(metric) <= 100:  # noqa: PLR2004 - percent
        raise ConditionError(f"'{text}': a percentile is above 0 and up to 100")
    value *= _MILLISECONDS.get(unit, 0.01 if unit == "%" else 1.0)
    return Condition(text.strip(), found["model"] or "", metric, found["sign"], value, unit)


def _percent(metric: str) -> float:
    statistic = metric.rpartition("_")[2]
    return float(statistic[1:]) if statistic.startswith("p") else 100.0


def value_of(condition: Condition, total: Figures, per_model: Mapping[str, Figures]) -> float:
    """The figure that a condition is about; infinity for the latency of nothing.

    Raises:
        ConditionError: the run had no such model, or no such figure.
    """
    if condition.model and condition.model not in per_model:
        raise ConditionError(f"'{condition.text}': no model '{condition.model}', only {', '.join(per_model)}")
    if condition.metric in EXTRAS:
        raise ConditionError(f"'{condition.text}': this scenario has no {condition.metric}")
    figures = per_model[condition.model] if condition.model else total
    time = time_of(condition.metric)
    if time is not None:
        return _time(figures, *time)
    if condition.metric == "errors":
        return figures.failed / max(1, figures.offered) if condition.unit == "%" else figures.failed
    if condition.metric == "tokens_per_second":
        return figures.stream.tokens_per_second if figures.stream else 0.0
    return float(figures.answered if condition.metric == "answered" else figures.throughput)


def _time(figures: Figures, of: str, statistic: str) -> float:
    histogram: Histogram | None
    if of in ("ttft", "itl"):
        stream = figures.stream
        histogram = (stream.first_token if of == "ttft" else stream.inter_token) if stream else None
    else:
        histogram = getattr(figures, of)
    if histogram is None or not histogram.count:
        return math.inf
    if statistic in ("mean", "max", "min"):
        return float(getattr(histogram, statistic))
    return histogram.percentile(float(statistic[1:]))

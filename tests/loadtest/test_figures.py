"""What samples come to, whether they can be believed, and what conditions say of them."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest

from loadtest.conditions import ConditionError, parse_condition, value_of
from loadtest.figures import figures_of, slices_of
from loadtest.report.csv_file import write_csv
from loadtest.report.terminal import report
from loadtest.result import Checked, ResultError, read_result, write_result
from loadtest.samples import IN_STREAM, UNSENT, Samples, merge
from loadtest.validity import judge
from tests.loadtest.recordings import recording_of, result_of, samples_of

if TYPE_CHECKING:
    from pathlib import Path

MS = 1_000_000
EVERY_10_MS = np.arange(1000, dtype=np.int64) * 10 * MS


def test_latency_counts_from_the_schedule_and_service_from_the_sending() -> None:
    figures = figures_of(samples_of(EVERY_10_MS, np.full(1000, 5 * MS), lag=2 * MS), 10.0)
    assert figures.latency.percentile(50) == pytest.approx(5, rel=0.001)
    assert figures.service.percentile(50) == pytest.approx(3, rel=0.001)
    assert figures.lag.percentile(50) == pytest.approx(2, rel=0.001)
    assert (figures.offered, figures.answered, figures.failed) == (1000, 1000, 0)
    assert figures.throughput == pytest.approx(100, rel=0.001)


def test_failures_are_counted_by_status_and_are_no_latencies() -> None:
    status = np.zeros(1000, np.int64)
    status[:10] = grpc.StatusCode.UNAVAILABLE.value[0]
    status[10:13] = UNSENT
    status[13] = IN_STREAM
    took = np.where(status, 1, 5 * MS)
    figures = figures_of(samples_of(EVERY_10_MS, took, status=status.tolist()), 10.0)
    assert figures.failures == {"UNAVAILABLE": 10, "UNSENT": 3, "ERROR_IN_STREAM": 1}
    assert figures.latency.min > 4
    assert figures.throughput == pytest.approx(98.6, rel=0.001)


def test_answers_after_the_end_are_no_throughput() -> None:
    figures = figures_of(samples_of(EVERY_10_MS, np.full(1000, 5000 * MS)), 10.0)
    assert figures.throughput == pytest.approx(1000 / 14.99, rel=0.001)


def test_goodput_is_what_came_in_time() -> None:
    took = np.where(np.arange(1000) % 4 == 0, 50 * MS, 5 * MS)
    figures = figures_of(samples_of(EVERY_10_MS, took), 10.0)
    assert figures.goodput(20.0) == pytest.approx(0.75 * figures.throughput, rel=0.001)
    assert figures.goodput(None) == figures.throughput


def test_slices_belong_to_the_schedule() -> None:
    took = np.where(EVERY_10_MS >= 5e9, 300 * MS, 5 * MS)
    slices = slices_of(samples_of(EVERY_10_MS, took), 10.0, 10)
    assert [part.offered for part in slices] == [100] * 10
    assert [round(part.latency.percentile(50)) for part in slices] == [5] * 5 + [300] * 5
    assert [part.under_way for part in slices[5:]] == [30, 30, 30, 30, 29]


def test_merging_keeps_the_order_of_the_schedule() -> None:
    whole = samples_of(EVERY_10_MS, np.arange(1000) * 1000)
    parts = [whole.where(np.arange(1000) % 3 == n) for n in range(3)]
    assert np.array_equal(merge(parts).done, whole.done)
    assert len(merge([])) == 0


@pytest.mark.parametrize("lag", [0, 1 * MS])
def test_a_run_that_keeps_up_is_valid(lag: int) -> None:
    samples = samples_of(EVERY_10_MS, np.full(1000, 800 * MS), lag=lag)
    assert judge(recording_of(samples, 10.0), open_loop=True).reasons == ()


def test_a_generator_that_lags_is_named() -> None:
    late = samples_of(EVERY_10_MS, np.full(1000, 30 * MS), lag=3 * MS)
    validity = judge(recording_of(late, 10.0), open_loop=True)
    assert "lagged" in validity.reasons[0]
    assert validity.generator_limited
    # A tenth of the target is allowed: 3 ms don't matter to 100.
    assert judge(recording_of(late, 10.0), 100.0, open_loop=True).valid


def test_a_busy_generator_is_named() -> None:
    validity = judge(recording_of(samples_of(EVERY_10_MS, EVERY_10_MS * 0), 10.0, cpu=0.81), open_loop=True)
    assert "81% of a core" in validity.reasons[0]


@pytest.mark.parametrize(("capacity", "valid"), [(102, True), (98, False), (50, False)])
def test_a_server_that_does_not_keep_up_is_named(*, capacity: float, valid: bool) -> None:
    """100 requests/s for 100 s: each starts when the one before has ended."""
    scheduled = np.arange(10_000, dtype=np.int64) * 10 * MS
    service = int(1e9 / capacity)
    done = np.zeros(10_000, np.int64)
    free = 0
    for n, at in enumerate(scheduled.tolist()):
        free = max(free, at) + service
        done[n] = free
    samples = samples_of(scheduled, done - scheduled)
    validity = judge(recording_of(samples, 100.0), open_loop=True)
    assert validity.valid is valid
    assert valid or "achieved" in validity.reasons[0]
    assert judge(recording_of(samples, 100.0), open_loop=True, overload=True).valid


def test_a_run_without_requests_and_one_that_was_interrupted_are_invalid() -> None:
    assert judge(recording_of(Samples(), 1.0), open_loop=True).reasons == ("no request was sent",)
    cut = replace(recording_of(samples_of(EVERY_10_MS, EVERY_10_MS * 0), 10.0), interrupted=True)
    assert "it was interrupted" in judge(cut, open_loop=True).reasons


@pytest.mark.parametrize(
    ("text", "value", "met"),
    [
        ("p99<20ms", 5, True), ("p99>20ms", 5, False), ("p50>0.004s", 5, True), ("p99.9>=5000us", 5, True),
        ("mean<10ms", 5, True), ("max > 10 ms", 5, False), ("service_p99<4ms", 3, True),
        ("lag_p99>1ms", 2, True), ("errors>0", 0, False), ("errors<=0.1%", 0, True),
        ("throughput<500", 100, True), ("m:p99>20ms", 5, False),
        ("answered<10", 1000, False), ("tokens_per_second<1", 0, True), ("ttft_p50>1ms", math.inf, True),
    ],
)  # fmt: skip
def test_conditions_are_asked_of_the_figures(*, text: str, value: float, met: bool) -> None:
    figures = figures_of(samples_of(EVERY_10_MS, np.full(1000, 5 * MS), lag=2 * MS), 10.0)
    condition = parse_condition(text)
    found = value_of(condition, figures, {"m": figures})
    assert found == pytest.approx(value, rel=0.01)
    assert condition.met_by(found) is met


@pytest.mark.parametrize(
    "text",
    [
        "p99",
        "p99<20",
        "p99=20ms",
        "errors>1ms",
        "latency<1ms",
        "p0<1ms",
        "p101<1ms",
        "p99<ms",
        "rubbish>1",
    ],
)
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(ConditionError, match=re.escape(text)):
        parse_condition(text)


def test_a_condition_on_another_model_is_refused() -> None:
    figures = figures_of(samples_of(EVERY_10_MS, EVERY_10_MS * 0), 10.0)
    with pytest.raises(ConditionError, match="no model 'other', only m"):
        value_of(parse_condition("other:p99>1ms"), figures, {"m": figures})


def test_no_answers_fail_every_latency() -> None:
    figures = figures_of(samples_of(EVERY_10_MS, EVERY_10_MS * 0, status=14), 10.0)
    condition = parse_condition("p99>20ms")
    assert condition.met_by(value_of(condition, figures, {}))


def test_a_result_is_the_same_after_writing_and_reading(tmp_path: Path) -> None:
    samples = samples_of(EVERY_10_MS, np.random.default_rng(0).integers(1, 50 * MS, 1000), lag=1000)
    result = result_of(samples, 10.0)
    result.conditions = [Checked("p99>20ms", 49.0, failed=True)]
    write_result(result, tmp_path / "a" / "result.json")
    again = read_result(tmp_path / "a" / "result.json")
    assert again.as_json() == result.as_json()
    assert report(again) == report(result)
    assert (again.verdict, "FAILED" in report(again)) == ("failed", True)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1}'])
def test_what_is_no_result_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(ResultError, match=r"result\.json"):
        read_result(path)


def test_csv_is_appended_with_one_header(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    for _ in range(2):
        write_csv(result_of(samples_of(EVERY_10_MS, np.full(1000, 5 * MS)), 10.0), path)
    lines = [line.split(",") for line in path.read_text().splitlines()]
    assert [len(lines), *(line[3] for line in lines)] == [5, "model", "(all)", "m", "(all)", "m"]
    assert {line[lines[0].index("latency_p99_ms")] for line in lines[1:]} == {"5.003"}


def test_the_verdict_of_a_run_that_can_not_be_believed_is_none() -> None:
    late = result_of(samples_of(EVERY_10_MS, np.full(1000, 30 * MS), lag=3 * MS), 10.0)
    assert late.verdict == "invalid"
    late.conditions = [Checked("p99>50ms", 30.0, failed=False)]
    assert late.verdict == "invalid"
    late.conditions = [Checked("p99>20ms", 30.0, failed=True)]
    assert late.verdict == "invalid"  # the generator was 3 ms late itself
    late.conditions = [Checked("errors>0", 1.0, failed=True, of_server=True)]
    assert late.verdict == "failed"
    assert result_of(Samples(), 10.0).verdict == "invalid"
    good = result_of(samples_of(EVERY_10_MS, np.full(1000, 30 * MS)), 10.0)
    assert good.verdict == "passed"
    good.conditions = [Checked("p99>20ms", 30.0, failed=True)]
    assert good.verdict == "failed"


def test_errors_fail_a_run_unless_a_condition_says_how_many_may_be() -> None:
    status = [14 if n % 4 else 0 for n in range(1000)]  # as of a server that was killed
    result = result_of(samples_of(EVERY_10_MS, np.full(1000, 5 * MS), status=status), 10.0)
    result.conditions = [Checked("p99>20ms", 5.0, failed=False)]
    assert result.verdict == "failed"
    result.conditions.append(Checked("errors>90%", 0.75, failed=False, of_server=True))
    assert result.verdict == "passed"

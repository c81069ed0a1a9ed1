"""The page of HTML: what it says of real and of made-up runs, and that nothing can be smuggled into it."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import grpc
import numpy as np
import pytest

from loadtest.early_stopping import samples_needed, upper_bound
from loadtest.figures import figures_of
from loadtest.latency import Histogram
from loadtest.report.html import page, write_html
from loadtest.report.page.axis import latencies, linear, logarithmic, percentiles, seconds, whole
from loadtest.report.page.distribution import curve
from loadtest.report.page.quantities import exact, percent, significant
from loadtest.report.page.server_share import times_of
from loadtest.result import Checked, RunResult, read_result
from loadtest.samples import Samples
from loadtest.server_side import ModelSide, ServerSide
from loadtest.validity import Validity
from tests.loadtest.conftest import loadtest
from tests.loadtest.recordings import result_of, samples_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from loadtest.report.page.axis import Axis
    from tests.conftest import RunningServer

MS = 1_000_000
EVERY_10_MS = np.arange(1000, dtype=np.int64) * 10 * MS
# Attributes that make a browser load something.
LOADING = ("src", "srcset", "href", "xlink:href", "data", "poster", "action", "formaction", "background")
HOSTILE = "<script>alert('1')</script>&\"><img src=https://evil.example/x onerror=alert(2)>\x00\ud800\x1b[31m"
HARMLESS = HOSTILE.replace("\x00", "\ufffd").replace("\ud800", "\ufffd").replace("\x1b", "\ufffd")


class Tags(HTMLParser):
    """Every element with its attributes, as a browser's parser finds them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def parsed(text: str) -> ET.Element:
    """The page as XML, which fails on whatever isn't closed or escaped."""
    start, _, rest = text.partition("\n")
    assert start == "<!doctype html>"
    return ET.fromstring(rest)  # noqa: S314 - of our own making


def sections(text: str) -> dict[str, str]:
    """Heading to all text below it, without what is only in plots."""
    found = {}
    for section in parsed(text).iter("section"):
        heading, *rest = section
        found[str(heading.text)] = plain(said for part in rest for said in visible(part))
    return found


def plain(texts: Iterable[str]) -> str:
    """As one text, whatever its spaces are."""
    return " ".join(" ".join(texts).split())


def visible(part: ET.Element) -> Iterator[str]:
    if part.tag != "svg":
        yield from filter(None, (part.text,))
        for child in part:
            yield from visible(child)
            yield from filter(None, (child.tail,))


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the tables below a heading."""
    section = next(part for part in parsed(text).iter("section") if part[0].text == heading)
    return [[plain(visible(cell)) for cell in row] for row in section.iter("tr")]


def badges(text: str) -> list[str]:
    found = (part for part in parsed(text).iter("span") if (part.get("class") or "").startswith("badge"))
    return [plain(part.itertext()) for part in found]


def answered(took_ms: float = 5, lag_ms: int = 1) -> RunResult:
    """Ten seconds of an open loop; every hundredth request takes ten times as long."""
    took = np.where(np.arange(1000) % 100 == 99, 10 * took_ms, took_ms) * MS
    result = result_of(samples_of(EVERY_10_MS, took.astype(np.int64), lag=lag_ms * MS), 10.0)
    result.bounds = {f"{p:g}": upper_bound(result.total.latency, p) for p in (50.0, 90.0, 99.0, 99.9)}
    return result


def streamed() -> RunResult:
    """The same, token by token: the first after 2 ms, the others 1 ms apart."""
    samples = samples_of(EVERY_10_MS, np.full(1000, 6 * MS))
    gaps = np.full(4000, MS, np.int64)
    samples = replace(
        samples, first=EVERY_10_MS + 2 * MS, tokens=np.full(1000, 5, np.int64), gap=gaps,
        gap_model=np.zeros(4000, np.int64),
    )  # fmt: skip
    return result_of(samples, 10.0)


def refused() -> RunResult:
    """The same, and not one answer."""
    status = np.full(1000, grpc.StatusCode.UNAVAILABLE.value[0])
    status[:10] = grpc.StatusCode.INTERNAL.value[0]
    result = result_of(samples_of(EVERY_10_MS, np.full(1000, MS), status=status.tolist()), 10.0)
    result.messages = {"UNAVAILABLE": "too many\n requests", "INTERNAL": "the graph broke"}
    return result


def hostile() -> RunResult:
    """Names and messages of a server, and words of a command line, that would like to be markup."""
    made, bad = refused(), HOSTILE
    figures = {bad: streamed().total, f"2{bad}": answered().total}
    return replace(
        made, scenario=bad, load=f"open loop {bad}", command=[bad], started=bad, notes=[bad],
        versions={bad: bad},
        target=dict.fromkeys(("url", "server", "version", "tls"), bad), machine={bad: bad}, per_model=figures,
        models=[{**made.models[0], "name": bad, "version": bad}], messages={"UNAVAILABLE": bad},
        extras={bad: 1.0}, conditions=[Checked(bad, 1.0, failed=True)],
        validity=Validity((bad,), 1.0, 0.1, 1.0),
        server=ServerSide(
            {bad: ModelSide(requests=1, executions=1, compute_infer=0.1, batch_sizes={"1": 1, "2": 1})},
            {bad: [0.0, 1.0]}, [bad],
        ),
    )  # fmt: skip


MADE_UP: dict[str, Callable[[], RunResult]] = {
    "answered": answered, "streamed": streamed, "refused": refused, "hostile": hostile,
    "one": lambda: result_of(samples_of(EVERY_10_MS[:1], np.full(1, 3 * MS)), 10.0),
    "none": lambda: result_of(Samples(), 10.0),
}  # fmt: skip


@cache
def page_of(kind: str) -> str:
    return page(MADE_UP[kind]())


@pytest.mark.parametrize("kind", MADE_UP)
def test_the_page_is_whole_and_loads_nothing(kind: str) -> None:
    text = page_of(kind)
    parsed(text)
    for tag, attributes in Tags(text).found:
        assert tag not in ("script", "img", "iframe", "object", "embed", "base", "form")
        assert [name for name in attributes if name.startswith("on") or name == "style"] == []
        assert {attributes[name] for name in attributes if name in LOADING} <= {"data:,"}
    style = text[text.index("<style>") : text.index("</style>")]
    assert not re.search(r"url\(|@import|//|expression", style)
    policy = next(part for part in parsed(text).iter("meta") if part.get("http-equiv"))
    assert str(policy.get("content")).startswith("default-src 'none'; style-src")


def test_hostile_text_is_shown_as_it_is() -> None:
    text = page_of("hostile")
    # Everywhere that it was put, and once as the title of the page.
    assert "".join(parsed(text).itertext()).count(HARMLESS) > 20
    assert "<script" not in text
    assert "<img" not in text


def test_it_can_be_written_whatever_the_server_said(tmp_path: Path) -> None:
    write_html(hostile(), tmp_path / "new" / "report.html")
    assert (tmp_path / "new" / "report.html").read_text(encoding="utf-8") == page_of("hostile")


def test_a_real_run(tmp_path: Path, target: RunningServer) -> None:
    files = tmp_path / "result.json", tmp_path / "report.html"
    done = loadtest(
        "--model=tiny=3", "--model=slow=1", "--rate=80", "--duration=1", "--warmup=0.2", "--seed=7",
        "--quiet",
        f"--url={target.url}", f"--metrics-url=http://127.0.0.1:{target.metrics_port}/metrics",
        "--fail-on=errors>0", "--fail-on=p99>20s", f"--json={files[0]}", f"--html={files[1]}",
    )  # fmt: skip
    assert done.returncode in (0, 3), done.stdout + done.stderr
    result, text = read_result(files[0]), files[1].read_text(encoding="utf-8")
    found = sections(text)
    assert badges(text)[0].startswith(result.verdict)
    assert badges(text)[1].startswith("valid" if result.validity.valid else "invalid")
    assert significant(result.total.throughput) in found["Key numbers"]
    by_percentile = {row[0]: row for row in rows(text, "Percentiles")}
    assert by_percentile["p99"][1:4] == [
        f"{histogram.percentile(99):.3f}"
        for histogram in (result.total.latency, result.total.service, result.total.lag)
    ]
    assert [row[0] for row in rows(text, "Per model")[1:]] == ["tiny", "slow"]
    assert [row[:2] for row in rows(text, "Within the server")[1:]] == [
        [name, str(result.per_model[name].answered)] for name in ("tiny", "slow")
    ]
    series = 'nv_inference_request_success{model="tiny",version="1"}'
    assert next(row for row in rows(text, "Server's metrics") if row[0] == series)[3] == str(
        result.per_model["tiny"].answered
    )
    assert re.search(r"seed\s+7\b", found["Environment"])
    assert "python -m loadtest --model=tiny=3 " in found["Environment"]
    assert f"onnxedge {result.target['version']}" in found["Environment"]
    assert result.versions["grpcio"] in found["Environment"]


def test_the_key_numbers_and_how_sure_they_are() -> None:
    text = page_of("answered")
    said = sections(text)["Key numbers"]
    assert "throughput 99.6 requests/s 1 000 of 1 000 answered" in said
    # 5 ms from the schedule; every hundredth request 50 ms, so that p99 is just short of them.
    assert "latency p50 5.00 ms at most 5.00 ms, 99 % sure latency p99 5.00 ms at most 50.0 ms" in said
    needed = f"{samples_needed(99.9):,}".replace(",", " ")
    assert f"latency p99.9 50.0 ms too few requests to be sure: {needed} needed" in said
    table = {row[0]: row[1:] for row in rows(text, "Percentiles")}
    assert table["p99"] == ["5.003", "4.001", "1.000", "50.015"]
    assert table["p99.9"][3] == f"too few requests: {needed} needed"


def test_why_the_figures_are_invalid_comes_before_them() -> None:
    result = answered()
    assert "valid figures" in badges(page_of("answered"))
    result.validity = Validity(("the generator lagged",), 30.0, 0.9, 0.5, generator_limited=True)
    text = page(result)
    assert "invalid figures: see why below" in badges(text)
    assert text.index("the generator lagged") < text.index("Key numbers")
    said = sections(text)["Validity"]
    assert "INVALID" in said
    assert "lag p99 30 ms behind the schedule busiest process 90.0 % of a core (at most 80 %)" in said
    assert "achieved 50.0 % of the offered rate" in said


@pytest.mark.parametrize(
    ("conditions", "valid", "expected"),
    [
        ((), True, "no conditions were asked; all requests were answered"),
        ((Checked("p99>60ms", 5.0, failed=False),), True, "passed 1 condition asked"),
        ((Checked("p99>60ms", 5.0, failed=False),), False, "invalid verdict: no condition fails it"),
        ((Checked("p99>1ms", 5.0, failed=True), Checked("errors>0", 0, failed=False)), True,
         "failed by 1 of 2 conditions"),
    ],
)  # fmt: skip
def test_the_verdict_is_the_runs(conditions: tuple[Checked, ...], expected: str, *, valid: bool) -> None:
    result = replace(answered(), conditions=list(conditions))
    if not valid:
        result.validity = Validity(("late",), 3.0, 0.1, 1.0, generator_limited=True)
    assert badges(page(result))[0].startswith(expected)


def test_a_conditions_figure_has_its_unit() -> None:
    checked = [
        Checked("p99>60ms", 5.003, failed=False), Checked("errors>1%", 0.025, failed=True),
        Checked("throughput<50/s", 99.95, failed=False), Checked("ttft_p99>1s", float("inf"), failed=True),
    ]  # fmt: skip
    found = rows(page(replace(answered(), conditions=checked)), "Conditions")[1:]
    assert [row[1] for row in found] == ["5.00 ms", "2.50 %", "100", "∞ ms"]
    assert [row[2] for row in found] == ["ok", "failed", "ok", "failed"]


def test_errors_by_status_with_what_the_server_said() -> None:
    text = page_of("refused")
    assert rows(text, "Errors")[1:] == [
        ["UNAVAILABLE", "990", "99.0 %", "too many requests"], ["INTERNAL", "10", "1.0 %", "the graph broke"],
    ]  # fmt: skip
    assert badges(text)[0] == "failed no request was answered"
    assert {"Latency", "Percentiles", "Streams", "Within the server", "Conditions"} & sections(
        text
    ).keys() == set()


def test_what_there_is_nothing_of_is_left_out() -> None:
    assert "Errors" not in sections(page_of("answered"))
    assert "Over time" not in sections(page_of("none"))
    assert "Streams" in sections(page_of("streamed"))
    closed = page(replace(answered(), load="closed loop, 4 users, for 10 s"))
    assert rows(closed, "Percentiles")[0] == ["ms", "latency", "latency at most, 99 % sure"]
    assert "too kind" in sections(closed)["Validity"]


def test_streams_have_their_times_and_tokens() -> None:
    found = rows(page_of("streamed"), "Streams")
    assert found[1][:3] == ["m", "5 000", "500.0"]
    assert [float(cell) for cell in found[1][3:]] == pytest.approx([2, 2, 2, 1, 1, 1], rel=0.001)


def test_failures_stand_on_answers_over_time() -> None:
    # Nothing fails in the first half, every fifth request in the second: 5 of the 25 of a slice.
    fails = (np.arange(1000) >= 500) & (np.arange(1000) % 5 == 0)
    status = np.where(fails, grpc.StatusCode.UNAVAILABLE.value[0], 0)
    result = result_of(samples_of(EVERY_10_MS, np.full(1000, MS), status=status.tolist()), 10.0)
    section = next(part for part in parsed(page(result)).iter("section") if part[0].text == "Over time")
    drawn = {
        style: [
            (float(rect.get("y") or 0), float(rect.get("height") or 0))
            for rect in next(section.iter("figure")).iter("rect")
            if rect.get("class") == style
        ][1:]  # without the legend's
        for style in ("answered", "failed")
    }
    assert [len(columns) for columns in drawn.values()] == [40, 20]
    for (top, height), (failed_top, failed_height) in zip(
        drawn["answered"][20:], drawn["failed"], strict=True
    ):
        assert failed_top + failed_height == pytest.approx(top, abs=0.11)
        assert height == pytest.approx(4 * failed_height, rel=0.01)
        assert height + failed_height == pytest.approx(drawn["answered"][0][1], abs=0.11)


def test_the_curves_whiskers_are_the_bounds() -> None:
    bounds = answered().bounds
    section = next(part for part in parsed(page_of("answered")).iter("section") if part[0].text == "Latency")
    caps = [rect for rect in section.iter("rect") if (rect.get("class") or "").startswith("cap")]
    assert len(caps) - 1 == sum(bound is not None for bound in bounds.values()) == 3


def test_the_curve_is_the_percentiles() -> None:
    histogram = Histogram(np.random.default_rng(0).exponential(3 * MS, 5000).astype(np.int64))
    points = curve(histogram, percentiles(5000, ""))
    assert points[0] == (0.0, histogram.min)
    assert points[-1][1] == histogram.max
    for share, value in points[:: len(points) // 20]:
        assert value == pytest.approx(histogram.percentile(100 * share), rel=1e-6)


AXES = [
    linear(0.0, ""), linear(0.037, ""), linear(4.2e7, ""), whole(1, ""), whole(7, ""), seconds(0.3, ""),
    seconds(600, ""), logarithmic(0.0, 0.0, "", 180), logarithmic(0.9, 1.1, "", 180),
    logarithmic(0.001, 3.6e6, "", 260), percentiles(1, ""), percentiles(10**9, ""),
    latencies([], 0.0, "", 180), latencies([1, 2], 1.5, "", 180), latencies([0.0, 900], 1, "", 180),
]  # fmt: skip


@pytest.mark.parametrize("axis", AXES)
def test_ticks_lie_on_their_axis_and_apart(axis: Axis) -> None:
    assert axis.at(axis.low) == 0
    assert axis.at(axis.high) == pytest.approx(1.0)
    assert axis.at(axis.high * 2 + 1) == pytest.approx(1.0)
    places = [axis.at(value) for value, _ in axis.ticks]
    assert places == sorted(places)
    labels = [label for _, label in axis.ticks]
    assert 2 <= len(set(labels)) == len(labels) <= 18
    assert all(axis.low <= value <= axis.high * (1 + 1e-9) for value, _ in axis.ticks)


def test_an_axis_is_logarithmic_for_a_long_tail_only() -> None:
    assert latencies([1.0, 5.0], 2.0, "", 180).low == 0
    long = latencies([1.0, 50.0], 2.0, "", 180)
    assert [label for _, label in long.ticks] == ["1", "2", "5", "10", "20", "50"]
    assert long.at(10) - long.at(1) == pytest.approx(long.at(50) - long.at(5))


def test_each_nine_has_the_same_room() -> None:
    axis = percentiles(100_000, "")
    assert [label for _, label in axis.ticks] == [
        f"{percentile}\u00a0%" for percentile in ("0", "50", "90", "99", "99.9", "99.99", "99.999")
    ]
    places = [axis.at(value) for value, _ in axis.ticks if value != 0.5]
    assert np.diff(places) == pytest.approx([places[1]] * 5)


def test_what_the_stages_leave_is_transport_and_client() -> None:
    side = ModelSide(queue=1.0, compute_input=0.5, compute_infer=3.0, compute_output=0.25)
    assert times_of(side, 6.0)["rest"] == pytest.approx(1.25)
    # A server may count requests of which the client saw no end.
    assert times_of(side, 2.0)["rest"] == 0


def test_numbers_keep_the_digits_that_say_something() -> None:
    said = [significant(value) for value in (0.0521, 8.327, 251.8, 16975.2, 6.0, 0.0, -10.18, float("inf"))]
    assert said == ["0.0521", "8.33", "252", "16\u202f975", "6", "0", "\N{MINUS SIGN}10.2", "∞"]
    assert [percent(share) for share in (0.0, 1e-6, 0.5, 0.99999, 1.0)] == [
        f"{share}\u00a0%" for share in ("0", "<0.1", "50.0", ">99.9", "100.0")
    ]
    assert [exact(value) for value in (3.0, 0.365762318, 1234.5)] == ["3", "0.365762", "1\u202f234.5"]


def test_several_models_have_a_curve_and_a_row_each() -> None:
    result = answered()
    fast = figures_of(samples_of(EVERY_10_MS, np.full(1000, MS)), 10.0)
    result.per_model = {f"model {n}": fast for n in range(8)}
    text = page(result)
    assert len(rows(text, "Per model")) == 9
    # As many as there are colours for; the others are named as left out.
    assert "And 2 models more" in sections(text)["Latency"]

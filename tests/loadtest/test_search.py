"""The search for the highest rate, on servers that are made up, and on a stub of known capacity."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING

import pytest

from loadtest.search import Probe, Search
from tests.loadtest.conftest import loadtest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def server_of(capacity: float, *, luck: float = 0.0, generator: float = 1e9) -> Callable[[float, int], Probe]:
    """A server that keeps the target up to a rate, and by bad luck sometimes not."""
    draw = random.Random(0)  # noqa: S311 - luck

    def probe(rate: float, _seed: int) -> Probe:
        limited = rate > generator
        return Probe(rate, rate <= capacity and not limited and draw.random() >= luck, limited)

    return probe


@pytest.mark.parametrize("capacity", [0.7, 3, 99, 100, 101, 512, 4321])
@pytest.mark.parametrize("start", [1, 100, 3000])
def test_the_capacity_is_found_and_confirmed(capacity: float, start: float) -> None:
    found = Search(server_of(capacity)).run(start, 1e6)
    assert capacity * 0.985 <= found.rate <= capacity
    assert (found.confirmations, found.limit) == (3, "server")
    assert [probe.kept for probe in found.probes[-3:]] == [True] * 3


def test_bad_luck_is_no_limit() -> None:
    found = Search(server_of(1000, luck=0.1), confirmations=3).run(10, 1e6)
    assert 900 <= found.rate <= 1000


def test_a_generator_that_can_send_no_more_is_the_limit() -> None:
    found = Search(server_of(1000, generator=300)).run(10, 1e6)
    assert 295 <= found.rate <= 300
    assert found.limit == "generator"
    assert all(probe.rate <= 300 for probe in found.curve)


def test_a_bound_is_kept() -> None:
    found = Search(server_of(1000)).run(10, 200)
    assert (found.rate, found.limit, found.confirmations) == (200, "bound", 3)


def test_no_rate_at_all_is_said() -> None:
    found = Search(server_of(0)).run(10, 1e6)
    assert (found.rate, found.confirmations) == (0, 0)
    assert min(probe.rate for probe in found.probes) < 0.2


@pytest.mark.timeout(600)
def test_the_capacity_of_a_stub_is_found(start_stub: Callable[..., str], tmp_path: Path) -> None:
    """2 ms for each request, one after the other, are 500 requests/s.

    What else this machine does can only take from that, so the search may try again.
    """
    url = start_stub("--service-ms=2")
    for _attempt in range(3):
        done = loadtest(
            "search", "--model=stub", f"--url={url}", "--target=p99<40ms", "--arrivals=constant",
            "--start=300", "--duration=3", "--warmup=0.3", f"--json={tmp_path / 'curve.json'}",
            f"--html={tmp_path / 'curve.html'}",
        )  # fmt: skip
        print(done.stdout)
        assert done.returncode == 0, done.stderr
        found = json.loads((tmp_path / "curve.json").read_text())
        if found["rate"] >= 485:
            break
    assert found["rate"] == pytest.approx(500, rel=0.03)
    assert (found["confirmations"], found["limit"]) == (3, "server")
    kept = [probe for probe in found["probes"] if probe["kept"]]
    assert max(probe["p99"] for probe in kept) < 40
    assert all(probe["goodput"] == pytest.approx(probe["rate"], rel=0.02) for probe in kept)
    assert "confirmed 3 times; a higher rate misses the target" in done.stdout
    page = (tmp_path / "curve.html").read_text()
    assert (page.count("<svg"), f"{found['rate']:.1f} requests per second keep p99&lt;40ms" in page) >= (
        2,
        True,
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--target=p99<20",), "expected a time with its unit"),
        (("--target=p99<20ms", "--precision=2"), "--precision is between 0 and 1"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(flags: tuple[str, ...], message: str) -> None:
    done = loadtest("search", "--model=stub", *flags)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr

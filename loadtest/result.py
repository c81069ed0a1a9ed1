"""A run's result: what was measured, of what, whether it can be believed; as JSON and read again."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from loadtest.figures import Figures, Slice, StreamFigures
from loadtest.latency import Histogram
from loadtest.server_side import ModelSide, ServerSide
from loadtest.validity import Validity

if TYPE_CHECKING:
    from pathlib import Path

FORMAT = 1
_PLAIN = (
    "scenario", "load", "command", "seed", "started", "target", "models", "machine", "versions", "bounds",
    "extras", "notes", "messages",
)  # fmt: skip


class ResultError(Exception):
    """A file that is no result; the message says why."""


@dataclass(frozen=True)
class Checked:
    """A condition that fails a run, and the figure that it was asked of.

    Attributes:
        text: the condition.
        value: the figure, in milliseconds if it is a time.
        failed: whether it was met, which fails the run.
        of_server: whether the figure is the server's alone, as a count of errors is; a latency is the load
            generator's, too.
    """

    text: str
    value: float
    failed: bool
    of_server: bool = False


@dataclass
class RunResult:
    """Everything that a report needs, and that makes a run repeatable.

    Attributes:
        scenario: its name.
        load: what was sent, in words.
        command: that did it.
        seed: of the schedule and the requests.
        started: UTC, ISO 8601.
        target: url, server, version, tls.
        models: name, version, weight, batch_size, request_bytes, streams of each.
        machine, versions: of the load generator.
        total, per_model: the figures.
        slices: the run in parts of equal length.
        validity: of the figures.
        bounds: percentile to the latency that the true one does not exceed with 99 % confidence, in
            milliseconds; None: the run was too short to say.
        server: what the server counted meanwhile.
        extras: figures of the scenario's own.
        notes: what a reader has to know.
        messages: what the server said with the first failure of each status.
        conditions: those that were asked for.
    """

    scenario: str
    load: str
    command: list[str]
    seed: int
    started: str
    target: dict[str, str]
    models: list[dict[str, Any]]
    machine: dict[str, str]
    versions: dict[str, str]
    total: Figures
    per_model: dict[str, Figures]
    slices: list[Slice]
    validity: Validity
    bounds: dict[str, float | None]
    server: ServerSide = field(default_factory=ServerSide)
    extras: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    messages: dict[str, str] = field(default_factory=dict)
    conditions: list[Checked] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """`failed`, `invalid` (nothing can be said) or `passed`.

        Errors fail a run unless a condition says how many may be; those of an overload are its purpose.
        """
        if not self.total.offered:
            return "invalid"
        named = any("errors" in checked.text for checked in self.conditions) or self.scenario == "overload"
        if not self.total.answered or (self.total.failed and not named):
            return "failed"
        failed = [checked for checked in self.conditions if checked.failed]
        if any(checked.of_server or not self.validity.generator_limited for checked in failed):
            return "failed"
        return "passed" if self.validity.valid else "invalid"

    def as_json(self) -> dict[str, Any]:
        """As plain values; times are milliseconds."""
        plain = {
            name: getattr(self, name)
            for name in _PLAIN
        }  # fmt: skip
        return {
            "format": FORMAT,
            **plain,
            "verdict": self.verdict,
            "conditions": [asdict(checked) for checked in self.conditions],
            "validity": {"valid": self.validity.valid, **asdict(self.validity)},
            "total": _figures_json(self.total),
            "per_model": {name: _figures_json(figures) for name, figures in self.per_model.items()},
            "slices": [_slice_json(part) for part in self.slices],
            "server": self.server.as_json(),
        }


def _histogram_json(histogram: Histogram) -> dict[str, Any]:
    return {
        "count": histogram.count, "mean": histogram.mean, "min": histogram.min, "max": histogram.max,
        "percentiles": histogram.percentiles(), "hdr": histogram.encode(),
    }  # fmt: skip


def _figures_json(figures: Figures) -> dict[str, Any]:
    plain = {
        name: getattr(figures, name)
        for name in ("offered", "answered", "failed", "failures", "seconds", "throughput")
    }
    times = {name: _histogram_json(getattr(figures, name)) for name in ("latency", "service", "lag")}
    stream = figures.stream
    return plain | times | {"stream": stream and {
        "tokens": stream.tokens, "tokens_per_second": stream.tokens_per_second,
        "first_token": _histogram_json(stream.first_token),
        "inter_token": _histogram_json(stream.inter_token),
    }}  # fmt: skip


def _slice_json(part: Slice) -> dict[str, Any]:
    plain = {
        name: getattr(part, name)
        for name in ("start", "seconds", "offered", "answered", "failed", "under_way")
    }
    return plain | {"latency": _histogram_json(part.latency)}


def write_result(result: RunResult, path: Path) -> None:
    """Write the result as JSON; whole distributions are in HdrHistogram's format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result.as_json(), indent=1, allow_nan=True) + "\n")


def read_result(path: Path) -> RunResult:
    """Read a result again.

    Raises:
        ResultError: the file isn't one.
    """
    try:
        content = json.loads(path.read_text())
        if content.get("format") != FORMAT:
            raise ResultError(f"'{path}' has format {content.get('format')}, expected {FORMAT}")
        return _from_json(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResultError(f"'{path}' is no result of a load test: {type(error).__name__} {error}") from error


def _from_json(content: dict[str, Any]) -> RunResult:
    server, validity = content["server"], content["validity"]
    return RunResult(
        **{
            name: content[name]
            for name in _PLAIN
        },
        total=_figures(content["total"]),
        per_model={name: _figures(figures) for name, figures in content["per_model"].items()},
        slices=[
            Slice(**{**part, "latency": Histogram.decode(part["latency"]["hdr"])})
            for part in content["slices"]
        ],
        validity=Validity(
            tuple(validity["reasons"]), validity["lag_p99"], validity["busiest_core"], validity["achieved"],
            validity["generator_limited"],
        ),
        server=ServerSide(
            {name: ModelSide(**side) for name, side in server["models"].items()},
            server["metrics"], server["notes"],
        ),
        conditions=[Checked(**checked) for checked in content["conditions"]],
    )  # fmt: skip


def _figures(content: dict[str, Any]) -> Figures:
    stream = content["stream"]
    return Figures(
        offered=content["offered"], answered=content["answered"], failures=Counter(content["failures"]),
        seconds=content["seconds"], throughput=content["throughput"],
        **{name: Histogram.decode(content[name]["hdr"]) for name in ("latency", "service", "lag")},
        stream=stream and StreamFigures(
            Histogram.decode(stream["first_token"]["hdr"]), Histogram.decode(stream["inter_token"]["hdr"]),
            stream["tokens"], stream["tokens_per_second"],
        ),
    )  # fmt: skip

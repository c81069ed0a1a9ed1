"""What the server says of a run, by its statistics and metrics, so that a tail can be placed."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from loadtest.target import TargetError
from serve.pb import grpc_service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from loadtest.target import Questions

_METRICS_SECONDS = 5.0
STAGES = ("queue", "compute_input", "compute_infer", "compute_output")
_LINE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})? (?P<value>\S+)$")
# Triton's and our own counters that grow, and gauges that a run can move.
_COUNTERS = ("nv_inference_", "onnxedge_")
_GAUGES = ("nv_cpu_", "nv_gpu_", "onnxedge_model_memory_bytes", "onnxedge_queue_depth", "process_resident")


@dataclass
class ModelSide:
    """A model's share of a run, as the server counted it: means per request, in milliseconds.

    Attributes:
        requests: answered.
        failed: refused, or failed.
        inferences: rows.
        executions: runs of the graph.
        total: from the request to the answer, within the server.
        queue, compute_input, compute_infer, compute_output: its parts.
        batch_sizes: rows of a run to how many there were.
    """

    requests: int = 0
    failed: int = 0
    inferences: int = 0
    executions: int = 0
    total: float = 0.0
    queue: float = 0.0
    compute_input: float = 0.0
    compute_infer: float = 0.0
    compute_output: float = 0.0
    batch_sizes: dict[str, int] = field(default_factory=dict)

    @property
    def rows_per_run(self) -> float:
        """The mean of the batch sizes; of token generation, whose requests take many runs, too."""
        runs = sum(self.batch_sizes.values()) or self.executions
        rows = sum(int(size) * count for size, count in self.batch_sizes.items()) or self.inferences
        return rows / runs if runs else 0.0


@dataclass
class ServerSide:
    """What a run did to the server's counters.

    Attributes:
        models: name to what its statistics grew by.
        metrics: a series of the metrics endpoint to [before, after].
        notes: what couldn't be asked, and why.
    """

    models: dict[str, ModelSide] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Snapshot:
    """The server's counters at one time."""

    statistics: Mapping[str, Any]
    metrics: Mapping[str, float]
    notes: tuple[str, ...]


def take_snapshot(questions: Questions, models: Sequence[str], metrics_url: str) -> Snapshot:
    """Ask the server; what it doesn't answer is a note: not every server has statistics or metrics."""
    notes: list[str] = []
    statistics: dict[str, Any] = {}
    for model in models:
        request = pb.ModelStatisticsRequest(name=model)
        try:
            answer = questions.ask("ModelStatistics", request, pb.ModelStatisticsResponse)
        except TargetError as error:
            notes.append(f"statistics of '{model}': {error}")
        else:
            statistics |= {f"{model}/{found.version}": found for found in answer.model_stats}
    try:
        metrics = read_metrics(metrics_url) if metrics_url else {}
    except (OSError, ValueError) as error:
        metrics = {}
        notes.append(f"metrics at {metrics_url}: {error}")
    return Snapshot(statistics, metrics, tuple(notes))


def read_metrics(url: str) -> dict[str, float]:
    """The series of a Prometheus endpoint that a run can move, with their values.

    Raises:
        OSError: it doesn't answer.
        ValueError: the url is none, or its answer no metrics.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError("expected http://HOST:PORT/metrics")
    with urllib.request.urlopen(url, timeout=_METRICS_SECONDS) as answer:  # noqa: S310 - checked above
        text: str = answer.read().decode()
    found = (_LINE.match(line) for line in text.splitlines() if not line.startswith("#"))
    lines = {
        f"{m['name']}{{{m['labels']}}}" if m["labels"] else m["name"]: float(m["value"]) for m in found if m
    }
    return {series: value for series, value in lines.items() if series.startswith((*_COUNTERS, *_GAUGES))}


def between(before: Snapshot, after: Snapshot) -> ServerSide:
    """What happened between two snapshots; a version that was loaded anew in between counts from 0."""
    models: dict[str, ModelSide] = {}
    for key, now in after.statistics.items():
        name = key.rpartition("/")[0]
        models[name] = _add(models.get(name), now, before.statistics.get(key))
    metrics = {
        series: [before.metrics.get(series, 0.0), value]
        for series, value in after.metrics.items()
        if "_bucket{" not in series and value != before.metrics.get(series, 0.0)
    }
    return ServerSide(models, metrics, list(dict.fromkeys((*before.notes, *after.notes))))


def _grown(now: int, then: int) -> int:
    return now - then if now >= then else now


def _add(side: ModelSide | None, now: Any, then: Any) -> ModelSide:
    then = then if then is not None else pb.ModelStatistics()
    stats, earlier = now.inference_stats, then.inference_stats
    requests = _grown(stats.success.count, earlier.success.count)

    def mean(stage: str) -> float:
        grown = _grown(getattr(stats, stage).ns, getattr(earlier, stage).ns)
        count = _grown(getattr(stats, stage).count, getattr(earlier, stage).count)
        return grown / count / 1e6 if count else 0.0

    sizes = {row.batch_size: row.compute_infer.count for row in then.batch_stats}
    batches = {
        str(row.batch_size): grown
        for row in now.batch_stats
        if (grown := _grown(row.compute_infer.count, sizes.get(row.batch_size, 0)))
    }
    made = ModelSide(
        requests=requests,
        failed=_grown(stats.fail.count, earlier.fail.count),
        inferences=_grown(now.inference_count, then.inference_count),
        executions=_grown(now.execution_count, then.execution_count),
        total=mean("success"),
        batch_sizes=batches,
        **{stage: mean(stage) for stage in STAGES},
    )
    return made if side is None or made.requests >= side.requests else side

"""Prometheus metrics under Triton's names, written from the exact statistics when they are asked for.

The text is written here, not by prometheus-client, because that appends `_total` to every counter's name and
Triton's counters have none. What Triton doesn't have is named onnxedge_….
Format: Prometheus text exposition 0.0.4.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from serve.generate.version import GenerationVersion
from serve.model.statistics import FAILURE_REASONS, Counts
from serve.observability.histogram import batch_sizes, latencies

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from serve.core import InferenceCore
    from serve.model.served_version import ServedVersion
    from serve.observability.histogram import Samples
    from serve.observability.system_usage import SystemUsage

# Name, help and value of each counter; durations are kept in nanoseconds and published in microseconds.
_COUNTERS: tuple[tuple[str, str, Callable[[Counts], int]], ...] = (
    ("nv_inference_request_success", "Requests answered", lambda c: c.requests.count),
    ("nv_inference_count", "Batch rows inferred", lambda c: c.inferences),
    ("nv_inference_exec_count", "Runs of the model", lambda c: c.executions),
    ("nv_inference_request_duration_us", "From receipt to answer", lambda c: c.request_ns // 1000),
    ("nv_inference_queue_duration_us", "Waiting for an instance", lambda c: c.queue_ns // 1000),
    (
        "nv_inference_compute_input_duration_us",
        "Decoding and collecting inputs",
        lambda c: c.requests.input_ns // 1000,
    ),
    (
        "nv_inference_compute_infer_duration_us",
        "Running the model",
        lambda c: c.requests.infer_ns // 1000,
    ),
    (
        "nv_inference_compute_output_duration_us",
        "Making outputs",
        lambda c: c.requests.output_ns // 1000,
    ),
)
_GAUGES: tuple[tuple[str, str, Callable[[ServedVersion], int]], ...] = (
    ("nv_inference_pending_request_count", "Requests that wait", lambda v: v.pending),
    ("onnxedge_queue_depth", "Requests that wait", lambda v: v.pending),
    ("onnxedge_model_memory_bytes", "Memory that loading the model took", lambda v: v.memory_bytes),
    ("onnxedge_live_sequences", "Sequences that have a state", lambda v: v.live_sequences),
)
_HISTOGRAMS: tuple[tuple[str, str, Callable[[Counts], Samples]], ...] = (
    ("onnxedge_batch_size", "Batch rows of the model's runs", lambda c: batch_sizes(c.batches)),
    (
        "onnxedge_request_duration_seconds",
        "From receipt to answer, seconds",
        lambda c: latencies(c.latency, c.request_ns),
    ),
)
_GENERATION_GAUGES: tuple[tuple[str, str, Callable[[GenerationVersion], float]], ...] = (
    ("onnxedge_num_requests_running", "Sequences that have a place in the cache", lambda v: v.running),
    ("onnxedge_num_requests_waiting", "Sequences that wait for one", lambda v: v.pending),
    ("onnxedge_kv_cache_usage_perc", "Share of the cache in use, 0 to 1", lambda v: v.cache_usage),
)
# Labels of ours, which a tag of a config.pbtxt can't take.
_OWN_LABELS = frozenset({"model", "version", "reason", "provider", "le"})


def exposition(core: InferenceCore, usage: SystemUsage) -> str:
    """The metrics of every ready version and of the server as Prometheus text."""
    versions = [(version, version.statistics.snapshot()) for version in core.repository]
    lines = [*_model_metrics(versions), *_placement_metrics([version for version, _ in versions])]
    lines += _generation_metrics([v for v, _ in versions if isinstance(v, GenerationVersion)])
    lines += _server_metrics(core, usage)
    return "\n".join(lines) + "\n"


def _model_metrics(versions: Sequence[tuple[ServedVersion, Counts]]) -> list[str]:
    lines: list[str] = []
    for name, text, count in _COUNTERS:
        unit = ", cumulative microseconds" if name.endswith("_us") else ""
        lines += _family(name, "counter", text + unit, [(_labels(v), count(c)) for v, c in versions])
    failures = [
        (_labels(version, reason=reason), counts.failure[reason])
        for version, counts in versions
        for reason in FAILURE_REASONS
    ]
    lines += _family("nv_inference_request_failure", "counter", "Requests that failed, by reason", failures)
    for name, text, gauge in _GAUGES:
        lines += _family(name, "gauge", text, [(_labels(v), gauge(v)) for v, _ in versions])
    for name, text, samples in _HISTOGRAMS:
        lines += _head(name, "histogram", text)
        for version, counts in versions:
            lines += _samples(name, version, samples(counts))
    return lines


def _generation_metrics(versions: Sequence[GenerationVersion]) -> list[str]:
    if not versions:
        return []
    lines: list[str] = []
    for name, text, gauge in _GENERATION_GAUGES:
        lines += _family(name, "gauge", text, [(_labels(v), gauge(v)) for v in versions])
    measured = [(version, version.metrics.families()) for version in versions]
    for name, (kind, text, _) in measured[0][1].items():
        lines += _head(f"onnxedge_{name}", kind, text)
        for version, families in measured:
            lines += _samples(f"onnxedge_{name}", version, families[name][2])
    return lines


def _placement_metrics(versions: Sequence[ServedVersion]) -> list[str]:
    providers = [(_labels(v, provider=provider), 1) for v in versions for provider in v.providers]
    nodes = [(_labels(v, provider=name), count) for v in versions for name, count in v.placement.items()]
    return [
        *_family("onnxedge_model_provider_info", "gauge", "Execution providers of the model", providers),
        *_family("onnxedge_model_nodes", "gauge", "Nodes of the graph by where they run", nodes),
    ]


def _server_metrics(core: InferenceCore, usage: SystemUsage) -> list[str]:
    total, used = usage.memory_bytes()
    lost_lines = core.access_log.dropped if core.access_log else 0
    values: tuple[tuple[str, str, str, float], ...] = (
        ("nv_cpu_utilization", "gauge", "Busy share of the machine's cores, 0 to 1", usage.cpu_utilization()),
        ("nv_cpu_memory_total_bytes", "gauge", "Memory of the machine", total),
        ("nv_cpu_memory_used_bytes", "gauge", "Memory of the machine in use", used),
        ("onnxedge_inflight_requests", "gauge", "Requests in the server", core.admission.inflight),
        (
            "onnxedge_inflight_bytes",
            "gauge",
            "Bytes of the requests in the server",
            core.admission.inflight_bytes,
        ),
        (
            "onnxedge_refused_requests_total",
            "counter",
            "Requests not let in: the server was full, or stopped",
            core.admission.refused,
        ),
        ("onnxedge_dropped_access_log_lines_total", "counter", "Lines of the access log lost", lost_lines),
        ("onnxedge_dropped_traces_total", "counter", "Traces lost", core.tracer.dropped),
    )
    return [
        line for name, kind, text, value in values for line in (*_head(name, kind, text), f"{name} {value}")
    ]


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


def _family(name: str, kind: str, text: str, samples: Iterable[tuple[str, float]]) -> list[str]:
    return [*_head(name, kind, text), *(f"{name}{{{labels}}} {value}" for labels, value in samples)]


def _samples(name: str, version: ServedVersion, samples: Samples) -> list[str]:
    return [
        f"{name}{suffix}{{{_labels(version, **({'le': bound} if bound else {}))}}} {value}"
        for suffix, bound, value in samples
    ]


def _labels(version: ServedVersion, **more: str) -> str:
    pairs = {"model": version.name, "version": str(version.version)}
    for tag, value in sorted(version.config.message.metric_tags.items()):
        name = _label_name(tag)
        if name not in _OWN_LABELS:
            pairs[name] = value
    pairs |= more
    return ",".join(f'{key}="{_escape(value)}"' for key, value in pairs.items())


def _label_name(tag: str) -> str:
    """A tag as Prometheus takes a label's name: letters, digits and underscores, no digit first."""
    name = re.sub(r"[^a-zA-Z0-9_]", "_", tag).lstrip("_") or "tag"
    return f"tag_{name}" if name[0].isdigit() else name


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

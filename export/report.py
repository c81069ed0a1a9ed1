"""`report.json` and `report.md`: where an exported model comes from and what was measured of its graphs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime

from export.metric_gate import figure, is_percentage
from export.recipes import graph_file
from export.session import CPU, INTRA_OP_THREADS
from export.targets import processor, provider
from train.checkpoint import current_versions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from export.recipes import Precision
    from export.settings import ExportSettings
    from export.variants import Variant, Variants
    from train.family import ServingGraph

    Report = Mapping[str, Any]


UNBATCHED = "does not batch requests (max_batch_size 0)"


def make_report(
    name: str,
    graph: ServingGraph,
    variants: Variants,
    *,
    settings: ExportSettings,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """Put the figures together, JSON values only.

    Args:
        name: the entry's name.
        graph: what was exported.
        variants: its graphs.
        settings: what was asked for.
        provenance: where the network comes from.
    """
    metric = graph.metric
    return {
        "name": name,
        "version": settings.version,
        "target": settings.target,
        "generates_text": graph.generation is not None,
        "default": variants.written[0],
        "file": graph_file(variants.written[0]),
        **provenance,
        "versions": {
            **current_versions(),
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            "numpy": np.__version__,
        },
        "options": {
            "precisions": list(settings.precisions),
            "tolerance": settings.tolerance,
            "calibration": settings.method,
            "max_batch_size": settings.max_batch_size,
            **asdict(settings.options),
        },
        "metric": {
            "name": metric.name,
            "rows": len(graph.data.targets),
            "percentage": is_percentage(metric),
            "torch": variants.original.score,
        },
        "processor": processor(),
        "threads": INTRA_OP_THREADS,
        "provider": provider(settings.target),
        "variants": {
            precision: _variant(variant, precision, variants)
            for precision, variant in variants.graphs.items()
        },
        "skipped": dict(variants.skipped),
        "notes": list(variants.notes),
    }


def _variant(variant: Variant, precision: Precision, variants: Variants) -> dict[str, Any]:
    fp32 = variants.graphs["fp32"]
    return {
        "file": graph_file(precision) if precision in variants.written else None,
        "made_by": variant.how,
        "passes": dict(variant.changes),
        "rows_independent": not variant.mixes_rows,
        "bytes": len(variant.content),
        "bytes_ratio": len(variant.content) / len(fp32.content),
        "resident_bytes": variant.resident_bytes,
        "latency_ms": {str(batch): median for batch, median in variant.latencies.items()},
        "speedup": {
            str(batch): fp32.latencies[batch] / median for batch, median in variant.latencies.items()
        },
        **asdict(variant.findings),
    }


def table(report: Report) -> str:
    """The report's figures as a Markdown table, a row for each graph, with what to know below it."""
    metric, processor = report["metric"], report["processor"]
    fp32 = report["variants"]["fp32"]
    batches = " | ".join(f"batch {batch}" for batch in fp32["latency_ms"])
    where = f"{report['threads']} thread of {processor['model']} (dot products: {processor['dot_products']})"
    if report["provider"] != CPU:
        where = report["provider"]
    torch = figure(metric["torch"], percentage=metric["percentage"])
    judged = f"{metric['name']} on {metric['rows']} held-out rows (PyTorch: {torch}); latency on {where}."
    lines = [
        f"### {report['name']}, for {report['target']}",
        "",
        f"| graph | {metric['name']} | size | {batches} | memory |",
        f"|---|---|---|{'---|' * len(fp32['latency_ms'])}---|",
        *(_row(report, name, variant) for name, variant in report["variants"].items()),
        "",
        judged,
    ]
    mixed = [name for name, variant in report["variants"].items() if not variant["rows_independent"]]
    notes = [
        f"{name}: {variant['made_by']}" for name, variant in report["variants"].items() if variant["made_by"]
    ]
    consequence = "writes one text at a time (max_num_seqs 1)" if report["generates_text"] else UNBATCHED
    notes += [
        f"{name}: a row's answer depends a little on the others of its request, so a server {consequence}"
        for name in mixed
    ]
    notes += [*report["notes"], *(f"no {name}: {reason}" for name, reason in report["skipped"].items())]
    lines += ["", *(f"- {note}" for note in notes)] if notes else []
    return "\n".join(lines)


def _row(report: Report, name: str, variant: Mapping[str, Any]) -> str:
    where = " (default)" if name == report["default"] else "" if variant["file"] else " (not written)"
    faster = {batch: "" if name == "fp32" else f", {x:.2f} x" for batch, x in variant["speedup"].items()}
    memory = variant["resident_bytes"]
    cells = (
        f"{name}{where}",
        figure(variant["score"], percentage=report["metric"]["percentage"]),
        f"{variant['bytes'] / 1e6:.2f} MB" + ("" if name == "fp32" else f", x {variant['bytes_ratio']:.2f}"),
        *(f"{variant['latency_ms'][batch]:.3f} ms{faster[batch]}" for batch in variant["latency_ms"]),
        "not measured" if memory is None else f"{memory / 1e6:.1f} MB",
    )
    return f"| {' | '.join(cells)} |"

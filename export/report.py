"""`report.json`: where an exported graph comes from and what was measured of it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime

from export.latency import processor
from export.session import INTRA_OP_THREADS
from train.checkpoint import current_versions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from export.quantization import Graphs
    from export.settings import ExportSettings
    from export.verify import Verification
    from train.checkpoint import CheckpointInfo


def make_report(
    name: str,
    settings: ExportSettings,
    info: CheckpointInfo,
    *,
    graphs: Graphs,
    verification: Verification,
    latencies: Mapping[int, Mapping[str, float]],
) -> dict[str, Any]:
    """Put the figures together, JSON values only.

    Args:
        name: the entry's name.
        settings: what was asked for.
        info: the checkpoint's.
        graphs: both graphs.
        verification: what the gates measured.
        latencies: batch size to "fp32" and "int8" to milliseconds.
    """
    sizes = {precision: len(content) for precision, content in graphs.content.items()}
    return {
        "name": name,
        "version": settings.version,
        "precision": "int8",
        "target": settings.target,
        "checkpoint": asdict(info),
        "versions": {
            **current_versions(),
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            "numpy": np.__version__,
        },
        "passes": graphs.passes,
        "metric": {
            "name": verification.metric,
            "rows": verification.rows,
            **verification.scores,
            "tolerance": verification.tolerance,
        },
        "differences": {
            precision: {output: asdict(found) for output, found in outputs.items()}
            for precision, outputs in verification.differences.items()
        },
        "bytes": sizes | {"ratio": sizes["int8"] / sizes["fp32"]},
        "latency_ms": {
            "processor": processor(),
            "threads": INTRA_OP_THREADS,
            "batch": {str(batch): dict(medians) for batch, medians in latencies.items()},
        },
    }

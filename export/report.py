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
        graphs: all precisions.
        verification: what the gates measured.
        latencies: batch size to precision to milliseconds.
    """
    sizes = {kind: len(content) for kind, content in graphs.content.items()}
    precision = list(sizes)[-1]
    return {
        "name": name,
        "version": settings.version,
        "precision": precision,
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
            "name": verification.metric.name,
            "rows": verification.rows,
            **verification.scores,
            "tolerance": verification.tolerance,
        },
        "differences": {
            kind: {output: asdict(found) for output, found in outputs.items()}
            for kind, outputs in verification.differences.items()
        },
        "bytes": sizes | {"ratio": sizes[precision] / sizes["fp32"]},
        "latency_ms": {
            "processor": processor(),
            "threads": INTRA_OP_THREADS,
            "batch": {str(batch): dict(medians) for batch, medians in latencies.items()},
        },
    }

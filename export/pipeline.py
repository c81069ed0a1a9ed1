"""One checkpoint in, its repository entries out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from export.errors import ExportError
from export.graph import export_graph
from export.latency import BATCHES, measure
from export.model_config import LABELS, config_file, labels_file
from export.quantization import PRECISIONS, Precision, quantize
from export.report import make_report
from export.repository import Entry, golden, write_entry
from export.session import Session, rows, take
from export.verify import Verification, verify
from train.checkpoint import load_checkpoint
from train.family import load_family

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from export.settings import ExportSettings
    from train.checkpoint import Checkpoint
    from train.family import ServingData, ServingGraph

GOLDEN_ROWS = 8


@dataclass(frozen=True)
class ExportResult:
    """What came of it.

    Attributes:
        folder: the version folder.
        report: the content of its report.json, without the sha256.
        replaced: whether there was such a version before.
    """

    folder: Path
    report: Mapping[str, Any]
    replaced: bool


def export_checkpoint(settings: ExportSettings, say: Callable[[str], None]) -> list[ExportResult]:
    """Rebuild, translate, quantize, verify, write: an entry for each of the family's graphs.

    Args:
        settings: what to export where.
        say: called with each step's description.

    Raises:
        ExportError: the network can't be exported, or a gate refuses a graph; nothing is written.
        train.checkpoint.CheckpointError: the checkpoint can't be used.
        train.data.download.DataError: the data set can't be read.
        OSError: the disk refused.
    """
    say(f"rebuild the network of {settings.checkpoint}")
    checkpoint = load_checkpoint(settings.checkpoint)
    info = checkpoint.info
    if info.epoch == 0:
        raise ExportError(f"{settings.checkpoint} is untrained: it has no finished epoch; train it first")
    if not any(name.startswith("test_") for name in info.metrics):  # written when a run has ended
        say(f"note: training was cut short, after {info.epoch} of {info.recipe['epochs']} epochs")
    try:
        graphs = load_family(info.family).serving_graphs(checkpoint, settings.data_dir)
    except ValueError as error:
        raise ExportError(f"the data set of {settings.checkpoint} can't be had: {error}") from error
    entries = [make_entry(graph, checkpoint, settings, say) for graph in graphs]
    return [_write(entry, settings, say) for entry in entries]


def make_entry(
    graph: ServingGraph, checkpoint: Checkpoint, settings: ExportSettings, say: Callable[[str], None]
) -> Entry:
    """Translate, quantize and verify one graph.

    Raises:
        ExportError: the graph can't be had, or a gate refuses it.
    """
    name = (settings.name or checkpoint.info.family) + graph.suffix
    precision = PRECISIONS[checkpoint.info.family]
    say(f"translate {name} to ONNX")
    translated = export_graph(graph.module, graph.example)
    if precision == "int8":
        say(f"quantize to int8 for {settings.target}, calibrated with {rows(graph.data.calibration)} rows")
    graphs = quantize(translated, graph.data.calibration, settings.target, precision)

    say(f"verify on {rows(graph.data.held_out)} held-out rows")
    sessions = {kind: Session(content) for kind, content in graphs.content.items()}
    verification = verify(graph, sessions, tolerance=settings.tolerance / 100)
    say("measure latency")
    latencies = {batch: measure(sessions, graph.data.held_out, batch) for batch in BATCHES}

    labels = graph.data.labels
    files = {LABELS: labels_file(labels)} if labels else {}
    return Entry(
        name,
        settings.version,
        entry_files={"config.pbtxt": config_file(name, graphs.served, labels), **files},
        version_files={
            "model.onnx": graphs.content[precision],
            "golden.npz": _golden(graph.data, verification, precision),
            **checkpoint.files,
        },
        report=make_report(
            name, settings, checkpoint.info, graphs=graphs, verification=verification, latencies=latencies
        ),
    )


def _write(entry: Entry, settings: ExportSettings, say: Callable[[str], None]) -> ExportResult:
    folder = settings.repository / entry.name / str(entry.version)
    say(f"write {folder}")
    replaced = folder.exists()
    return ExportResult(write_entry(settings.repository, entry), entry.report, replaced)


def _golden(data: ServingData, verification: Verification, precision: Precision) -> bytes:
    tolerance = {name: found.max_abs for name, found in verification.differences[precision].items()}
    return golden(take(data.held_out, 0, GOLDEN_ROWS), take(verification.original, 0, GOLDEN_ROWS), tolerance)

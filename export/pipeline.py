"""One checkpoint in, one repository entry out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from export.errors import ExportError
from export.graph import export_graph
from export.latency import BATCHES, measure
from export.model_config import LABELS, config_file, labels_file
from export.quantization import quantize
from export.report import make_report
from export.repository import Entry, golden, write_entry
from export.session import Session, rows, take
from export.verify import Verification, verify
from train.checkpoint import load_model
from train.family import ServingData, load_family

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from export.settings import ExportSettings

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


def export_checkpoint(settings: ExportSettings, say: Callable[[str], None]) -> ExportResult:
    """Rebuild, translate, quantize, verify, write.

    Args:
        settings: what to export where.
        say: called with each step's description.

    Raises:
        ExportError: the network can't be exported, or a gate refuses it; nothing is written.
        train.checkpoint.CheckpointError: the checkpoint can't be used.
        train.data.download.DataError: the data set can't be read.
        OSError: the disk refused.
    """
    say(f"rebuild the network of {settings.checkpoint}")
    info, model = load_model(settings.checkpoint)
    family = load_family(info.family)
    if info.epoch == 0:
        raise ExportError(f"{settings.checkpoint} is untrained: it has no finished epoch; train it first")
    if f"test_{family.METRIC}" not in info.metrics:  # written when a run has ended
        say(f"note: training was cut short, after {info.epoch} of {info.recipe['epochs']} epochs")
    try:
        data = family.serving_data(info.recipe, settings.data_dir)
    except ValueError as error:
        raise ExportError(f"the data set of {settings.checkpoint} can't be had: {error}") from error
    module = family.serving_module(model, info.model)

    say("translate to ONNX")
    graph = export_graph(module, family.example_inputs(info.model))
    say(f"quantize to int8 for {settings.target}, calibrated with {rows(data.calibration)} rows")
    graphs = quantize(graph, data.calibration, settings.target)

    say(f"verify on {rows(data.held_out)} held-out rows")
    sessions = {name: Session(content) for name, content in graphs.content.items()}
    verification = verify(module, sessions, data, family, tolerance=settings.tolerance / 100)
    say("measure latency")
    latencies = {batch: measure(sessions, data.held_out, batch) for batch in BATCHES}

    name = settings.name or info.family
    report = make_report(name, settings, info, graphs=graphs, verification=verification, latencies=latencies)
    say(f"write {settings.repository / name / str(settings.version)}")
    files = {LABELS: labels_file(data.labels)} if data.labels else {}
    entry = Entry(
        name,
        settings.version,
        entry_files={"config.pbtxt": config_file(name, graphs.int8, data.labels), **files},
        version_files={"model.onnx": graphs.content["int8"], "golden.npz": _golden(data, verification)},
        report=report,
    )
    replaced = (settings.repository / name / str(settings.version)).exists()
    return ExportResult(write_entry(settings.repository, entry), report, replaced)


def _golden(data: ServingData, verification: Verification) -> bytes:
    tolerance = {name: found.max_abs for name, found in verification.differences["int8"].items()}
    return golden(take(data.held_out, 0, GOLDEN_ROWS), take(verification.original, 0, GOLDEN_ROWS), tolerance)

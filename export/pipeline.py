"""A source in, its repository entries out: the steps, in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from export.errors import ExportError
from export.model_config import (
    LABELS,
    MAX_NUM_SEQS,
    Served,
    config_file,
    generation,
    labels_file,
    parse_config,
    read_config,
    tensors,
)
from export.recipes import graph_file
from export.report import make_report, table
from export.repository import Entry, golden, write_entry
from export.session import take
from export.variants import make_variants

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from export.settings import ExportSettings
    from export.source import Source
    from export.variants import Variant, Variants
    from serve.pb.model_config_pb2 import ModelConfig
    from train.family import ServingData, ServingGraph

GOLDEN_ROWS = 8
GOLDEN_BYTES = 4 << 20


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


def export(source: Source, settings: ExportSettings, say: Callable[[str], None]) -> list[ExportResult]:
    """Translate, quantize, verify, measure, write: an entry for each of the source's graphs.

    Args:
        source: the networks, with rows to judge them by.
        settings: what to export where.
        say: called with each step's description.

    Raises:
        ExportError: a network can't be exported, or a gate refuses a graph; nothing is written.
        OSError: the disk refused.
    """
    if settings.options.encoded_image and not all(graph.image for graph in source.graphs):
        raise ExportError(
            f"--encoded-image: {source.name} has no image input; leave the flag out, or let the network "
            "take UINT8 pixels [batch, height, width, 1 or 3], as --pixels makes it"
        )
    graphs = [graph for graph in source.graphs if _can_be_served(graph, source, settings, say)]
    entries = [make_entry(graph, source, settings, say) for graph in graphs]
    return [_write(entry, settings, say) for entry in entries]


def make_entry(
    graph: ServingGraph, source: Source, settings: ExportSettings, say: Callable[[str], None]
) -> Entry:
    """Everything of one graph but the writing.

    Raises:
        ExportError: the graph can't be had, or a gate refuses it.
    """
    name = _name(graph, source, settings)
    say(f"translate {name} to ONNX")
    variants = make_variants(graph, settings, say)
    report = make_report(name, graph, variants, settings=settings, provenance=source.provenance)
    labels = graph.data.labels
    before = read_config(settings.repository / name / "config.pbtxt")
    served = _served(graph, variants.default, settings)
    if served.generation and served.max_batch_size and _one_at_a_time(before):
        say(f"note: {name}'s config.pbtxt keeps max_num_seqs 1; remove it to have several texts at a time")
    config = config_file(name, variants.default.model, served, before)
    return Entry(
        name,
        settings.version,
        entry_files={
            "config.pbtxt": config,
            **({LABELS: labels_file(labels)} if labels else {}),
        },
        version_files={
            **{graph_file(precision): variants.graphs[precision].content for precision in variants.written},
            "golden.npz": _golden(graph.data, variants),
            "report.md": f"{table(report)}\n".encode(),
            **source.files,
        },
        report=report,
    )


def _name(graph: ServingGraph, source: Source, settings: ExportSettings) -> str:
    return (settings.name or source.name) + graph.suffix


def _can_be_served(
    graph: ServingGraph, source: Source, settings: ExportSettings, say: Callable[[str], None]
) -> bool:
    """Whether the sizes that were asked for leave the graph of use; `say` why not."""
    batch = settings.options.fixed.get("batch", 1)
    if graph.generation is None or batch == 1:
        return True
    say(
        f"note: no {_name(graph, source, settings)}: --fix batch={batch}, but a prompt is read alone and "
        "texts come and go; it takes batch=1, or better an open batch"
    )
    return False


def _served(graph: ServingGraph, default: Variant, settings: ExportSettings) -> Served:
    return Served(
        default=graph_file(default.precision),
        max_batch_size=0 if default.mixes_rows or _fixed_batch(default) else settings.max_batch_size,
        labels=graph.data.labels,
        encoded_image=graph.image if settings.options.encoded_image else None,
        generation=graph.generation,
    )


def _fixed_batch(variant: Variant) -> bool:
    shapes = [value.shape for value in variant.model.graph.inputs]
    return any(shape is not None and isinstance(shape[0], int) for shape in shapes)


def _one_at_a_time(config: ModelConfig) -> bool:
    return MAX_NUM_SEQS in config.parameters and config.parameters[MAX_NUM_SEQS].string_value == "1"


def _write(entry: Entry, settings: ExportSettings, say: Callable[[str], None]) -> ExportResult:
    folder = settings.repository / entry.name / str(entry.version)
    say(f"write {folder}")
    for note in _about_other_versions(folder.parent, entry):
        say(f"note: {note}")
    replaced = folder.exists()
    return ExportResult(write_entry(settings.repository, entry), entry.report, replaced)


def _about_other_versions(folder: Path, entry: Entry) -> Iterator[str]:
    """What config.pbtxt, which all versions share, will no longer say rightly of the others."""
    versions = [
        path for path in folder.glob("*") if path.name.isdecimal() and path.name != str(entry.version)
    ]
    for path in sorted(versions):
        if not (path / entry.report["file"]).exists():
            yield (
                f"version {path.name} has no {entry.report['file']}, which config.pbtxt now names for all "
                f"versions: it can't be served; export it again with --version {path.name}, or remove it"
            )
    config = parse_config(entry.entry_files["config.pbtxt"], "config.pbtxt")
    before = read_config(folder / "config.pbtxt")
    changed = "inputs or outputs" if tensors(before) != tensors(config) else ""
    if not changed and generation(before) != generation(config):
        changed = "cache tensors or another context length"
    if versions and changed:
        yield (
            f"version {entry.version} has other {changed} than config.pbtxt described up to now: "
            f"version {', '.join(sorted(path.name for path in versions))} can't be served beside it"
        )
    if (folder / LABELS).exists() and LABELS not in entry.entry_files:
        yield f"the entry had a {LABELS}, this export has none: name it with --labels to keep it"


def _golden(data: ServingData, variants: Variants) -> bytes:
    """Samples of at most 4 MiB."""
    original = variants.original.outputs
    row = sum(array[:1].nbytes for array in (*data.held_out.values(), *original.values()))
    count = int(np.clip(GOLDEN_BYTES // row, 1, GOLDEN_ROWS))
    tolerances = {
        graph_file(precision): {
            name: found.max_abs or 0.0
            for name, found in variants.graphs[precision].findings.differences.items()
        }
        for precision in variants.written
    }
    return golden(take(data.held_out, 0, count), take(original, 0, count), tolerances)

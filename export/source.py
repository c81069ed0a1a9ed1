"""What can be exported: a checkpoint of `python -m train`, or any module that a Python function returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.entry_point.function import forgotten_function
from export.entry_point.load import EntryPointOptions, is_entry_point, load_entry_point
from export.errors import ExportError
from train.checkpoint import CheckpointError, load_checkpoint
from train.data.download import DataError
from train.family import load_family

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from train.family import ServingGraph

__all__ = ["EntryPointOptions", "Source", "load_source"]


@dataclass(frozen=True)
class Source:
    """Networks to export together.

    Attributes:
        name: what the entry is called unless the command line says otherwise.
        graphs: one for each entry.
        provenance: for the report, JSON values.
        files: name to content of what lies beside the graphs: "tokenizer.json".
    """

    name: str
    graphs: tuple[ServingGraph, ...]
    provenance: Mapping[str, Any]
    files: Mapping[str, bytes] = field(default_factory=dict)


def load_source(
    text: str, data_dir: Path | None, options: EntryPointOptions, say: Callable[[str], None]
) -> Source:
    """Read what the command line names.

    Args:
        text: a checkpoint folder, or `module:function`.
        data_dir: of a checkpoint: folder with its data set's files.
        options: of a function.
        say: called with each step's description.

    Raises:
        ExportError: it can't be had, or its data set can't be read, or a flag is of the other kind of source.
    """
    if is_entry_point(text):
        if data_dir is not None:
            raise ExportError(
                f"--data-dir {data_dir}: is of a checkpoint; {text} returns rows, or takes --data ROWS.npz"
            )
        say(f"call {text}")
        return _entry_point(text, options, say)
    if not Path(text).is_dir() and (message := forgotten_function(text)):
        raise ExportError(message)
    if flags := options.flags():
        raise ExportError(
            f"{', '.join(flags)}: of module:function only; {text} is a checkpoint, whose family has data, "
            "labels and axes: drop the flag"
        )
    try:
        return _checkpoint(Path(text), data_dir, say)
    except (CheckpointError, DataError) as error:
        raise ExportError(str(error)) from error


def _checkpoint(folder: Path, data_dir: Path | None, say: Callable[[str], None]) -> Source:
    say(f"rebuild the network of {folder}")
    checkpoint = load_checkpoint(folder)
    info = checkpoint.info
    if info.epoch == 0:
        raise ExportError(f"{folder} is untrained: it has no finished epoch; train it first")
    if not any(name.startswith("test_") for name in info.metrics):  # written when a run has ended
        say(f"note: training was cut short, after {info.epoch} of {info.recipe['epochs']} epochs")
    try:
        graphs = load_family(info.family).serving_graphs(checkpoint, data_dir)
    except ValueError as error:
        raise ExportError(f"the data set of {folder} can't be had: {error}") from error
    return Source(info.family, graphs, {"checkpoint": asdict(info)}, checkpoint.files)


def _entry_point(text: str, options: EntryPointOptions, say: Callable[[str], None]) -> Source:
    found = load_entry_point(text, options, say)
    return Source(found.name, (found.graph,), found.provenance)

"""What an export is asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from export.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from export.int8.calibration import Method
    from export.recipes import Precision
    from export.targets import Target


# What a folder of the repository may be called: servers skip those that start with a dot.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class GraphOptions:
    """What is put in front of a graph and behind it, and which of its axes stay open.

    Attributes:
        any_size: whether an image graph takes pixels of any size, or of the network's alone.
        encoded_image: whether the server decodes JPEG, PNG or WebP for an image graph.
        top_k: how many best classes a classifier answers beside its logits; 0 leaves them out.
        fixed: name of a dynamic axis to the size that it gets.
    """

    any_size: bool = True
    encoded_image: bool = False
    top_k: int = 0
    fixed: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ExportError: one is not allowed.
        """
        if self.top_k < 0:
            raise ExportError(f"--top-k {self.top_k}: expected at least 0")
        for axis, size in self.fixed.items():
            if size < 1:
                raise ExportError(f"--fix {axis}={size}: expected a size of at least 1")


@dataclass(frozen=True)
class ExportSettings:
    """What to export where.

    Attributes:
        repository: the model repository; made when missing.
        target: what the graphs will run on.
        precisions: of the graphs to write, the default first; empty takes those of `export.recipes`.
        name: the entry's name, of letters, digits, dots, dashes and underscores; None takes the family's.
        version: the version folder's number, at least 1; an existing one is replaced.
        tolerance: how much of the metric may be lost, in points of 100 or per cent; None takes those of
            `export.recipes`.
        method: how the ranges of activations are found.
        max_batch_size: rows that a server may put into one run.
        options: what the graphs begin and end with.
        data_dir: folder with the data set's files; None takes them from where the recipe does.
    """

    repository: Path
    target: Target
    precisions: tuple[Precision, ...] = ()
    name: str | None = None
    version: int = 1
    tolerance: float | None = None
    method: Method = "minmax"
    max_batch_size: int = 8
    options: GraphOptions = field(default_factory=GraphOptions)
    data_dir: Path | None = None

    def __post_init__(self) -> None:
        """Check name and numbers.

        Raises:
            ExportError: one is not allowed.
        """
        if self.name is not None and not NAME.fullmatch(self.name):
            raise ExportError(
                f"--name {self.name!r}: expected letters, digits, '.', '-', '_', the first a letter or digit"
            )
        if self.repository.exists() and not self.repository.is_dir():
            raise ExportError(f"--to {self.repository}: is a file; name a folder of models")
        if self.version < 1:
            raise ExportError(f"--version {self.version}: expected at least 1")
        if self.max_batch_size < 1:
            raise ExportError(f"--max-batch-size {self.max_batch_size}: expected at least 1")
        if self.tolerance is not None and not 0 <= self.tolerance <= 100:  # noqa: PLR2004 - of 100
            raise ExportError(
                f"--tolerance {self.tolerance}: expected points or per cent from 0 to 100; 0.5 lets int8 "
                "lose half a point of accuracy"
            )
        if len(set(self.precisions)) != len(self.precisions):
            raise ExportError(f"--precision {','.join(self.precisions)}: expected each one once")

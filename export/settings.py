"""What an export is asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from export.errors import ExportError

if TYPE_CHECKING:
    from pathlib import Path

    from export.passes.static_int8 import Target


# What a folder of the repository may be called: servers skip those that start with a dot.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class ExportSettings:
    """What to export where.

    Attributes:
        checkpoint: the checkpoint folder.
        repository: the model repository; made when missing.
        target: processor that the int8 graph is for.
        name: the entry's name, of letters, digits, dots, dashes and underscores; None takes the family's.
        version: the version folder's number, at least 1; an existing one is replaced.
        tolerance: how much of the metric int8 may lose, in points of 100.
        data_dir: folder with the data set's files; None takes them from where the recipe does.
    """

    checkpoint: Path
    repository: Path
    target: Target
    name: str | None = None
    version: int = 1
    tolerance: float = 0.5
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
        if not 0 <= self.tolerance <= 100:  # noqa: PLR2004 - points of 100
            raise ExportError(f"--tolerance {self.tolerance}: expected points from 0 to 100")

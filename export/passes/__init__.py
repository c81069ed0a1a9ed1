"""Graph rewrites and quantizations, one small object per file.

A pass is asked first whether it applies (`check`, with the reason when it doesn't), changes the graph it is
given (`apply`) and says what it changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir as ir


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    Attributes:
        model: the graph to go on with, the given one changed in place or a new one.
        changes: what was changed to how often; empty when nothing was.
    """

    model: ir.Model
    changes: Mapping[str, int]


class Pass(Protocol):
    """What every pass has."""

    @property
    def name(self) -> str:
        """Its name in the report."""
        ...

    def check(self, model: ir.Model) -> str | None:
        """Why it can't be applied to this graph; None when it can."""
        ...

    def apply(self, model: ir.Model) -> PassResult:
        """Apply it to a graph that `check` has nothing against; the graph may be changed in place."""
        ...

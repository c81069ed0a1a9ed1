"""The settings that every family's recipe has: what the training loop reads."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args

if TYPE_CHECKING:
    from collections.abc import Mapping

Optimizer = Literal["adamw", "sgd"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a run optimizes. A family's recipe derives from this one and adds its own fields.

    Every field is a command-line flag of `python -m train`; the flag's help stands beside the field's type.
    """

    epochs: Annotated[int, "passes over the training rows"] = 40
    batch_size: Annotated[int, "rows per step"] = 128
    optimizer: Annotated[Optimizer, "update rule; sgd uses Nesterov momentum 0.9"] = "adamw"
    learning_rate: Annotated[float, "peak of the schedule: linear warm-up, then cosine to zero"] = 2e-3
    warmup_fraction: Annotated[float, "part of all steps that warms up"] = 0.05
    weight_decay: Annotated[float, "not applied to norms and biases"] = 0.05
    clip_norm: Annotated[float, "largest gradient norm; 0 turns clipping off"] = 1.0
    label_smoothing: Annotated[float, "probability mass spread over all classes"] = 0.1
    patience: Annotated[int, "epochs without a better validation figure before stopping; 0 never stops"] = 0
    seed: Annotated[
        int, "of weights, shuffling and augmentation; the same seed gives the same weights on a CPU"
    ] = 0

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ValueError: a field is out of range; the message names it, its range and its value.
        """
        self.require("epochs", self.epochs >= 1, "at least 1")
        self.require("batch_size", self.batch_size > 1, "at least 2, which batch norm needs")
        self.require("optimizer", self.optimizer in get_args(Optimizer), "one of adamw, sgd")
        self.require("learning_rate", self.learning_rate > 0, "above 0")
        self.require("warmup_fraction", 0 <= self.warmup_fraction < 1, "from 0 to below 1")
        self.require("weight_decay", self.weight_decay >= 0, "at least 0")
        self.require("clip_norm", self.clip_norm >= 0, "at least 0")
        self.require("label_smoothing", 0 <= self.label_smoothing < 1, "from 0 to below 1")
        self.require("patience", self.patience >= 0, "at least 0")
        self.require("seed", 0 <= self.seed < 2**63, "from 0 to below 2^63")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """The recipe of a checkpoint.

        Raises:
            ValueError: a field is unknown here, or out of range.
        """
        if unknown := set(values) - {field.name for field in fields(cls)}:
            raise ValueError(
                f"recipe fields {', '.join(sorted(unknown))} are unknown; see the checkpoint's versions"
            )
        return cls(**values)

    def require(self, name: str, holds: bool, expected: str) -> None:  # noqa: FBT001 - the condition is the point
        """Refuse a field's value.

        Raises:
            ValueError: `holds` is false.
        """
        if not holds:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag}: expected {expected}, got {getattr(self, name)!r}")

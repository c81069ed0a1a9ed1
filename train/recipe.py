"""The settings that every family's recipe has: what the training loop reads."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from collections.abc import Mapping

Optimizer = Literal["adamw", "muon", "sgd"]
Schedule = Literal["cosine", "linear", "step", "constant"]
Precision = Literal["mixed", "float32"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a run optimizes. A family's recipe derives from this one and adds its own fields.

    Every field is a command-line flag of `python -m train`; the flag's help stands beside the field's type.
    """

    epochs: Annotated[int, "passes over the training rows"] = 40
    batch_size: Annotated[int, "rows per batch"] = 128
    accumulate: Annotated[int, "batches per update: their gradients are averaged"] = 1
    optimizer: Annotated[
        Optimizer, "update rule; muon: of linear layers, adamw for the rest; sgd: Nesterov 0.9"
    ] = "adamw"
    beta2: Annotated[float, "adamw's decay of the squared gradients"] = 0.999
    learning_rate: Annotated[float, "peak of the schedule"] = 2e-3
    schedule: Annotated[
        Schedule, "after a linear warm-up: half a cosine or a line down to the final fraction, steps, or none"
    ] = "cosine"
    warmup_fraction: Annotated[float, "part of all updates that warms up"] = 0.05
    final_fraction: Annotated[float, "of cosine and linear: the last learning rate by the peak"] = 0.0
    step_fraction: Annotated[float, "of step: part of all updates between two steps"] = 0.34
    step_factor: Annotated[float, "of step: each multiplies the learning rate by this"] = 0.1
    weight_decay: Annotated[float, "decoupled with adamw; never on norms and biases"] = 0.05
    l1: Annotated[float, "penalty: this times the sum of absolute weights; never of norms and biases"] = 0.0
    l2: Annotated[float, "penalty: half of this times the sum of squares; with l1 an elastic net"] = 0.0
    clip_norm: Annotated[float, "largest gradient norm; 0 turns clipping off"] = 1.0
    label_smoothing: Annotated[float, "probability mass spread over all classes"] = 0.1
    ema_decay: Annotated[float, "of the running average of weights that is judged and kept; 0 is off"] = 0.0
    patience: Annotated[int, "epochs without a better validation figure before stopping; 0 never stops"] = 0
    precision: Annotated[
        Precision, "mixed: 16-bit products, on a GPU and on a CPU with instructions for bfloat16"
    ] = "mixed"
    compile: Annotated[bool, "torch.compile, on a GPU"] = False
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
        self.require("accumulate", self.accumulate >= 1, "at least 1")
        self.require("learning_rate", self.learning_rate > 0, "above 0")
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            if get_origin(kind := get_args(hint)[0]) is Literal:
                choices = get_args(kind)
                self.require(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        for name in ("beta2", "warmup_fraction", "label_smoothing", "ema_decay"):
            self.require(name, 0 <= getattr(self, name) < 1, "from 0 to below 1")
        for name in ("final_fraction", "step_factor"):
            self.require(name, 0 <= getattr(self, name) <= 1, "from 0 to 1")
        self.require("step_fraction", 0 < self.step_fraction <= 1, "above 0, at most 1")
        for name in ("weight_decay", "l1", "l2", "clip_norm", "patience"):
            self.require(name, getattr(self, name) >= 0, "at least 0")
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

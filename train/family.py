"""What a model family offers to the training loop and to the exporter.

A family is a module of this package (`train.mobilenet`, ...) that satisfies `Family`; nothing is registered
anywhere but in `FAMILIES`, and a family is imported only when it is asked for.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    import numpy as np
    import torch
    from torch import nn

FAMILIES = ("mobilenet",)


@dataclass(frozen=True)
class ExampleInputs:
    """Inputs that trace a serving module's whole graph.

    Attributes:
        tensors: input name to an example tensor, in the order of `forward`'s arguments; batch size 2, so that
            an exporter can't mistake the batch axis for a constant 1.
        dynamic_axes: input name to {axis: symbolic name}; axis 0 is always "batch".
        outputs: output names, in the order of `forward`'s results.
    """

    tensors: Mapping[str, torch.Tensor]
    dynamic_axes: Mapping[str, Mapping[int, str]]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class ServingData:
    """Raw inputs, as a client of the served model sends them.

    Attributes:
        calibration: input name to array [n, ...], rows of the training split, for quantization ranges.
        held_out: input name to array [m, ...], rows of the test split.
        targets: array [m, ...], what `metric` compares the outputs with.
        labels: class names in index order; empty where the family has none.
    """

    calibration: Mapping[str, np.ndarray]
    held_out: Mapping[str, np.ndarray]
    targets: np.ndarray
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """What the training loop needs to know of one run; a family makes it from a recipe.

    Attributes:
        model: the untrained network, on the CPU.
        arguments: what `build_model` makes the same network from; JSON values only.
        dataset: name of the data set, with "(sample)" after it for an offline sample.
        dataset_sha256: sha256 of its rows.
        steps_per_epoch: number of batches that `batches` yields.
        batches: one epoch of tuples of CPU tensors, shuffled and augmented from the generator alone.
        loss: of the model on one such tuple on the model's device, a scalar tensor.
        validate: `Family.METRIC` on rows held out of the training split, of the model on its device.
        test: the same on the test split.
    """

    model: nn.Module
    arguments: Mapping[str, Any]
    dataset: str
    dataset_sha256: str
    steps_per_epoch: int
    batches: Callable[[torch.Generator], Iterator[tuple[torch.Tensor, ...]]]
    loss: Callable[[nn.Module, tuple[torch.Tensor, ...]], torch.Tensor]
    validate: Callable[[nn.Module], float]
    test: Callable[[nn.Module], float]


class Family(Protocol):
    """The members that every family module has at its top level."""

    Recipe: type[Any]
    RECIPES: Mapping[str, Any]
    """Named recipes for `--recipe`; every family has "quick", which needs no network and about a minute."""

    METRIC: str
    """Name of the figure that `metric` returns, "accuracy" for example; higher is better."""

    def build_model(self, arguments: Mapping[str, Any]) -> nn.Module:
        """The untrained network for a checkpoint's model arguments."""
        ...

    def task(self, recipe: Any, data_dir: Path | None) -> Task:
        """A training run of this recipe; `data_dir` holds the data set's files, None takes the recipe's."""
        ...

    def serving_module(self, model: nn.Module, arguments: Mapping[str, Any]) -> nn.Module:
        """The module to export: takes raw inputs (UINT8 pixels, token ids), ends in the network's outputs."""
        ...

    def example_inputs(self, arguments: Mapping[str, Any]) -> ExampleInputs:
        """Example inputs of the serving module."""
        ...

    def serving_data(self, recipe: Mapping[str, Any], data_dir: Path | None) -> ServingData:
        """Calibration and held-out rows of the data set that a checkpoint's recipe names."""
        ...

    def metric(self, outputs: Mapping[str, np.ndarray], targets: np.ndarray) -> float:
        """`METRIC` of the serving module's outputs against the targets."""
        ...


def load_family(name: str) -> Family:
    """Import a family by name.

    Raises:
        ValueError: there is no such family.
    """
    if name not in FAMILIES:
        raise ValueError(f"family {name!r} is not one of {', '.join(FAMILIES)}")
    return cast("Family", importlib.import_module(f"train.{name}"))

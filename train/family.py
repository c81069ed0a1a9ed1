"""What a model family offers to the training loop and to the exporter.

A family is a module of this package (`train.mobilenet`, ...) that satisfies `Family`; nothing is registered
anywhere but in `FAMILIES`, and a family is imported only when it is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import numpy as np
    import torch
    from torch import nn

    from train.checkpoint import Checkpoint

FAMILIES = ("mobilenet", "resnet", "simplecnn", "lstm", "gpt", "bert")

Scores = Mapping[str, float]
"""Name of a figure to its value."""


@dataclass(frozen=True)
class Metric:
    """The figure that decides which weights are best and whether quantization kept them good.

    Attributes:
        name: "accuracy", "loss", "perplexity" or "mse"; checkpoints hold the one that a run was steered by as
            validation_NAME and test_NAME.
        higher_is_better: false for losses and errors.
        score: of a graph's outputs by name, and the targets, both [rows, ...].
        relative: whether a change counts as a part of the figure (an mse, a perplexity) or in points of 100.
    """

    name: str
    higher_is_better: bool
    score: Callable[[Mapping[str, np.ndarray], np.ndarray], float]
    relative: bool = False

    def gain(self, value: float, over: float) -> float:
        """By how much `value` is better than `over`; below zero where it is worse."""
        return value - over if self.higher_is_better else over - value


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
        targets: array [m, ...], what the metric compares the outputs with.
        labels: class names in index order; empty where the family has none.
        other_shapes: some rows each, of other lengths than `held_out` along the dynamic axes (the batch's
            aside), to prove that they are dynamic.
    """

    calibration: Mapping[str, np.ndarray]
    held_out: Mapping[str, np.ndarray]
    targets: np.ndarray
    labels: tuple[str, ...] = ()
    other_shapes: tuple[Mapping[str, np.ndarray], ...] = ()


@dataclass(frozen=True)
class Generation:
    """How a server writes texts with a graph that reads and answers a cache of keys and values.

    The fields have the names of config.pbtxt's parameters.

    Attributes:
        context_length: tokens of a prompt and of what follows it, at most.
        past_length: name of the input INT64 [batch, 1]: how many tokens each row's cache holds.
        past_key_names: of the inputs, FP32 [batch, heads, cache, head width], "%d" standing for the layer.
        past_value_names: of those with the values.
        present_key_names: of the outputs that hold the past's keys and the new ones.
        present_value_names: of those with the values.
        past_present_share_buffer: whether a past and its present may be one buffer, written to in place.
    """

    context_length: int
    past_length: str
    past_key_names: str
    past_value_names: str
    present_key_names: str
    present_value_names: str
    past_present_share_buffer: bool


@dataclass(frozen=True)
class ServingGraph:
    """One graph of a model, and the entry that it becomes.

    Attributes:
        suffix: what the entry's name has after the model's: "" for the graph that most clients want, "_step"
            for a model's stateful step, "_generate" for the one that writes texts.
        module: in evaluation mode; takes raw inputs (UINT8 pixels, token ids), ends in the network's outputs.
        example: inputs that trace it.
        data: rows to calibrate and to judge it with.
        metric: how to judge it.
        image: name of the input that takes UINT8 pixels [batch, height, width, channels], if one does.
        generation: how texts are written with it; None: clients see its own inputs and outputs.
    """

    suffix: str
    module: nn.Module
    example: ExampleInputs
    data: ServingData
    metric: Metric
    image: str | None = None
    generation: Generation | None = None


@dataclass(frozen=True)
class Trivial:
    """What needs no network: the figure of the best answer that doesn't look at the input.

    Attributes:
        name: "majority class", "last value", "unigram".
        validation: the metric on the validation rows.
        test: the metric on the test split.
    """

    name: str
    validation: float
    test: float


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
        first_loss: what `loss` is of a network that knows nothing: log C for C classes.
        metric: its `name` and direction; `validate` and `test` compute it.
        validate: the metric on rows held out of the training split, of the model on its device.
        test: figures on the test split, the metric's under its name.
        trivial: what to be better than.
        references: figures of other models, fitted to the same data and tested on the same split, for the
            record ("dlinear_mse"); computed when the run ends.
        files: name to content of what the checkpoint needs beside the weights ("tokenizer.json").
    """

    model: nn.Module
    arguments: Mapping[str, Any]
    dataset: str
    dataset_sha256: str
    steps_per_epoch: int
    batches: Callable[[torch.Generator], Iterator[tuple[torch.Tensor, ...]]]
    loss: Callable[[nn.Module, tuple[torch.Tensor, ...]], torch.Tensor]
    first_loss: float
    metric: Metric
    validate: Callable[[nn.Module], float]
    test: Callable[[nn.Module], Scores]
    trivial: Trivial
    references: Callable[[], Scores] = dict
    files: Mapping[str, bytes] = field(default_factory=dict)


class Family(Protocol):
    """The members that every family module has at its top level."""

    Recipe: type[Any]
    RECIPES: Mapping[str, Any]
    """Named recipes for `--recipe`. Every family has "quick" (offline, about a minute on two cores), "cpu"
    (under half an hour on two cores; the default) and "reference" (a GPU)."""

    def build_model(self, arguments: Mapping[str, Any]) -> nn.Module:
        """The untrained network for a checkpoint's model arguments."""
        ...

    def task(self, recipe: Any, data_dir: Path | None) -> Task:
        """A training run of this recipe; `data_dir` holds the data set's files, None takes the recipe's."""
        ...

    def serving_graphs(self, checkpoint: Checkpoint, data_dir: Path | None) -> tuple[ServingGraph, ...]:
        """The graphs to export, the main one first, with rows of the data set that the recipe names."""
        ...


def load_family(name: str) -> Family:
    """Import a family by name.

    Raises:
        ValueError: there is no such family.
    """
    if name not in FAMILIES:
        raise ValueError(f"family {name!r} is not one of {', '.join(FAMILIES)}")
    return cast("Family", importlib.import_module(f"train.{name}"))

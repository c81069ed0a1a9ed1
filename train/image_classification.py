"""What every image classifier shares: its recipe's fields, augmentation, loss, metric and serving inputs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from train.data.download import DataError
from train.data.images import load_image_data
from train.family import ExampleInputs, ServingData, Task
from train.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from train.data.images import ImageData

METRIC = "accuracy"
INPUT = "image"
OUTPUT = "logits"
CALIBRATION_ROWS = 512
EVALUATION_BATCH = 500

DataSet = Literal["fashion_mnist", "mnist", "cifar10"]


@dataclass(frozen=True, kw_only=True)
class ImageRecipe(Recipe):
    """The fields that every image classifier's recipe has."""

    data: Annotated[DataSet, "data set"] = "fashion_mnist"
    sample: Annotated[bool, "use the small offline sample instead of downloading"] = False
    train_rows: Annotated[int, "use only so many training rows; 0 is all"] = 0
    validation_fraction: Annotated[float, "part of the training rows held out to choose the best epoch"] = 0.1
    shift: Annotated[int, "augmentation: move by up to so many pixels each way; 0 is off"] = 2
    flip: Annotated[bool, "augmentation: mirror half of the rows, where that keeps their class"] = True

    def __post_init__(self) -> None:
        """Check every field; see `train.recipe.Recipe`."""
        super().__post_init__()
        self.require("data", self.data in get_args(DataSet), f"one of {', '.join(get_args(DataSet))}")
        self.require(
            "train_rows", self.train_rows == 0 or self.train_rows >= self.batch_size, "0 or at least a batch"
        )
        self.require("validation_fraction", 0 < self.validation_fraction < 1, "between 0 and 1")
        self.require("shift", self.shift >= 0, "at least 0")


class PixelInput(nn.Module):
    """A classifier behind the pixels that a client sends: normalizes and reorders inside the graph."""

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, model: nn.Module, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        # On the scale of the bytes, so that the graph gets one subtraction and one multiplication.
        self.register_buffer("mean", torch.tensor(arguments["mean"]) * 255)
        self.register_buffer("scale", 1 / (torch.tensor(arguments["std"]) * 255))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """UINT8 [batch, height, width, channels] to logits FP32 [batch, classes]."""
        pixels = (image.to(torch.float32) - self.mean) * self.scale
        logits: torch.Tensor = self.model(pixels.permute(0, 3, 1, 2))
        return logits


def image_arguments(data: ImageData) -> dict[str, Any]:
    """The model arguments that follow from the data; mean and std are per channel, of pixels from 0 to 1."""
    pixels = data.train_images
    return {
        "classes": len(data.labels),
        "channels": pixels.shape[3],
        "image_size": pixels.shape[1],
        "mean": [round(float(value) / 255, 4) for value in pixels.mean(axis=(0, 1, 2))],
        "std": [round(float(value) / 255, 4) for value in pixels.std(axis=(0, 1, 2))],
    }


def serving_module(model: nn.Module, arguments: Mapping[str, Any]) -> nn.Module:
    """The module to export: UINT8 pixels [batch, h, w, c] to logits FP32 [batch, classes]."""
    return PixelInput(model, arguments).eval()


def example_inputs(arguments: Mapping[str, Any]) -> ExampleInputs:
    """Two random images, UINT8 [2, h, w, c]."""
    size, channels = arguments["image_size"], arguments["channels"]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, size, size, channels), dtype=torch.uint8, generator=generator)
    return ExampleInputs({INPUT: pixels}, {INPUT: {0: "batch"}}, (OUTPUT,))


def metric(outputs: Mapping[str, np.ndarray], targets: np.ndarray) -> float:
    """Accuracy of logits [n, classes] against class indices [n]."""
    return float((outputs[OUTPUT].argmax(axis=1) == targets).mean())


def serving_data(recipe: Mapping[str, Any], data_dir: Path | None) -> ServingData:
    """Rows for calibration, from those the network was fitted on, and the whole test split.

    Returns:
        "image" UINT8 [n, h, w, c] to calibrate, n at most 512, and [m, h, w, c] held out; targets INT64 [m].

    Raises:
        ValueError: a field of the recipe is out of range.
        DataError: the data set can't be read.
    """
    names = {field.name for field in fields(ImageRecipe)}
    settings = ImageRecipe(**{name: value for name, value in recipe.items() if name in names})
    data = load_image_data(settings.data, data_dir=data_dir, sample=settings.sample)
    fitted, _ = split_rows(len(data.train_images), settings)
    return ServingData(
        calibration={INPUT: data.train_images[fitted[:CALIBRATION_ROWS]]},
        held_out={INPUT: data.test_images},
        targets=data.test_labels,
        labels=data.labels,
    )


def split_rows(rows: int, recipe: ImageRecipe) -> tuple[np.ndarray, np.ndarray]:
    """Split training rows into those to fit and those to validate on.

    The split doesn't depend on the run's seed: runs stay comparable, and an exporter finds the same rows.

    Returns:
        Row indices INT64 [n] and [m], disjoint.
    """
    order = np.random.default_rng(0).permutation(rows)
    held_out = max(1, round(rows * recipe.validation_fraction))
    return order[held_out:][: recipe.train_rows or None], order[:held_out]


def image_task(recipe: ImageRecipe, data: ImageData, arguments: Mapping[str, Any], model: nn.Module) -> Task:
    """A run that fits `model` to `data`.

    Raises:
        DataError: the data has fewer training rows than a batch.
    """
    fitted, held_out = split_rows(len(data.train_images), recipe)
    images = torch.from_numpy(data.train_images[fitted])
    labels = torch.from_numpy(data.train_labels[fitted])
    flip = recipe.flip and data.flip_keeps_label
    # The last, smaller batch is dropped: batch norm's statistics of a few rows are noise.
    steps = len(images) // recipe.batch_size
    if steps == 0:
        raise DataError(
            f"--batch-size: expected at most {len(images)}, the training rows, got {recipe.batch_size}"
        )

    def batches(generator: torch.Generator) -> Iterator[tuple[torch.Tensor, ...]]:
        order = torch.randperm(len(images), generator=generator)
        for step in range(steps):
            rows = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
            yield augment(images[rows], shift=recipe.shift, flip=flip, generator=generator), labels[rows]

    def loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        image, label = batch
        logits = PixelInput(model, arguments).to(image.device)(image)
        return functional.cross_entropy(logits, label, label_smoothing=recipe.label_smoothing)

    return Task(
        model=model,
        arguments=arguments,
        dataset=data.name,
        dataset_sha256=data.sha256(),
        steps_per_epoch=steps,
        batches=batches,
        loss=loss,
        validate=lambda model: accuracy(
            model, arguments, data.train_images[held_out], data.train_labels[held_out]
        ),
        test=lambda model: accuracy(model, arguments, data.test_images, data.test_labels),
    )


def augment(images: torch.Tensor, *, shift: int, flip: bool, generator: torch.Generator) -> torch.Tensor:
    """Move each image by up to `shift` pixels both ways, zeros coming in, and mirror half of them.

    Args:
        images: UINT8 [n, h, w, c].
        shift: largest move in pixels.
        flip: mirror left to right with probability one half.
        generator: the only source of randomness.

    Returns:
        UINT8 [n, h, w, c].
    """
    count, height, width, _ = images.shape
    if shift:
        padded = functional.pad(images, (0, 0, shift, shift, shift, shift))
        offsets = torch.randint(0, 2 * shift + 1, (2, count, 1), generator=generator)
        rows = offsets[0] + torch.arange(height)
        columns = offsets[1] + torch.arange(width)
        images = padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    if flip:
        mirrored = torch.rand(count, generator=generator) < 0.5  # noqa: PLR2004 - one half
        images = torch.where(mirrored[:, None, None, None], images.flip(2), images)
    return images


@torch.no_grad()
def accuracy(model: nn.Module, arguments: Mapping[str, Any], images: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy on UINT8 images [n, h, w, c] with labels INT64 [n]; the model is left in eval mode."""
    device = next(model.parameters()).device
    serving = serving_module(model, arguments).to(device)
    right = 0
    for start in range(0, len(images), EVALUATION_BATCH):
        pixels = torch.from_numpy(images[start : start + EVALUATION_BATCH]).to(device)
        expected = torch.from_numpy(labels[start : start + EVALUATION_BATCH]).to(device)
        right += int((serving(pixels).argmax(dim=1) == expected).sum())
    return right / len(images)

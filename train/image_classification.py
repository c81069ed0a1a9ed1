"""What every image classifier shares: its recipe's fields, loss, metric and serving graph."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from train.augmentation import augmented_batches
from train.classification import ACCURACY, OUTPUT, majority_class
from train.data.download import DataError
from train.data.images import ImageDataSet, load_image_data
from train.family import ExampleInputs, ServingData, ServingGraph, Task
from train.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from train.checkpoint import Checkpoint
    from train.data.images import ImageData

INPUT = "image"
CALIBRATION_ROWS = 512
STATISTICS_BATCH = 64
EVALUATION_BATCH = 500
EVALUATION_PIXELS = 2_000_000  # of larger images fewer at once


@dataclass(frozen=True, kw_only=True)
class ImageRecipe(Recipe):
    """The fields that every image classifier's recipe has."""

    data: Annotated[ImageDataSet, "data set; folder takes --data-dir with a folder of images per class"] = (
        "fashion_mnist"
    )
    sample: Annotated[bool, "use the small offline sample instead of downloading"] = False
    image_size: Annotated[
        int, "of --data folder: images are resized and cropped to so many pixels square"
    ] = 224
    train_rows: Annotated[int, "use only so many training rows; 0 is all"] = 0
    validation_fraction: Annotated[float, "part of the training rows held out to choose the best epoch"] = 0.1
    shift: Annotated[int, "augmentation: move by up to so many pixels each way; 0 is off"] = 2
    flip: Annotated[bool, "augmentation: mirror half of the rows, where that keeps their class"] = True
    erase: Annotated[int, "augmentation: blacken a square of so many pixels a side; 0 is off"] = 0

    def __post_init__(self) -> None:
        """Check every field; see `train.recipe.Recipe`."""
        super().__post_init__()
        self.require("image_size", self.image_size >= 8, "at least 8")  # noqa: PLR2004 - networks halve thrice
        self.require(
            "train_rows", self.train_rows == 0 or self.train_rows >= self.batch_size, "0 or at least a batch"
        )
        self.require("validation_fraction", 0 < self.validation_fraction < 1, "between 0 and 1")
        self.require("shift", self.shift >= 0, "at least 0")
        self.require("erase", self.erase >= 0, "at least 0")


class Normalize(nn.Module):
    """UINT8 [batch, height, width, channels] to FP32 [batch, channels, height, width], mean 0, variance 1."""

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        # On the scale of the bytes, so that the graph gets one subtraction and one multiplication.
        self.register_buffer("mean", torch.tensor(arguments["mean"]) * 255)
        self.register_buffer("scale", 1 / (torch.tensor(arguments["std"]) * 255))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """See the class."""
        pixels = (image.to(torch.float32) - self.mean) * self.scale
        return pixels.permute(0, 3, 1, 2)


class PixelInput(nn.Module):
    """A classifier behind the pixels that a client sends: normalizes and reorders inside the graph."""

    def __init__(self, model: nn.Module, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.normalize = Normalize(arguments)
        self.model = model

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """UINT8 [batch, height, width, channels] to logits FP32 [batch, classes]."""
        logits: torch.Tensor = self.model(self.normalize(image))
        return logits


def serving_graphs(checkpoint: Checkpoint, data_dir: Path | None) -> tuple[ServingGraph, ...]:
    """The one graph of a classifier: UINT8 pixels [batch, h, w, c] to logits FP32 [batch, classes].

    Raises:
        ValueError: a field of the checkpoint's recipe is out of range.
        DataError: the data set can't be read.
    """
    arguments = checkpoint.info.model
    return (
        ServingGraph(
            suffix="",
            module=PixelInput(checkpoint.model, arguments).eval(),
            example=example_inputs(arguments),
            data=serving_data(checkpoint.info.recipe, data_dir),
            metric=ACCURACY,
            image=INPUT,
        ),
    )


def example_inputs(arguments: Mapping[str, Any]) -> ExampleInputs:
    """Two random images, UINT8 [2, h, w, c]."""
    size, channels = arguments["image_size"], arguments["channels"]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, size, size, channels), dtype=torch.uint8, generator=generator)
    return ExampleInputs({INPUT: pixels}, {INPUT: {0: "batch"}}, (OUTPUT,))


def serving_data(recipe: Mapping[str, Any], data_dir: Path | None) -> ServingData:
    """Rows for calibration, from those the network was fitted on, and the whole test split.

    Args:
        recipe: fields of any image family's recipe.
        data_dir: see `load_image_data`.

    Returns:
        "image" UINT8 [n, h, w, c] to calibrate, n at most 512, and [m, h, w, c] held out; targets INT64 [m].

    Raises:
        ValueError: a field of the recipe is out of range.
        DataError: the data set can't be read.
    """
    names = {field.name for field in fields(ImageRecipe)}
    settings = ImageRecipe(**{name: value for name, value in recipe.items() if name in names})
    data = _load(settings, data_dir)
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


def image_arguments(data: ImageData) -> dict[str, Any]:
    """The model arguments that follow from the data; mean and std are per channel, of pixels from 0 to 1."""
    pixels = data.train_images
    sums = np.zeros((2, pixels.shape[3]))
    # By parts, because floats of all pixels would take eight times their memory.
    for start in range(0, len(pixels), STATISTICS_BATCH):
        part = pixels[start : start + STATISTICS_BATCH].reshape(-1, pixels.shape[3]) / 255
        sums += part.sum(axis=0), (part * part).sum(axis=0)
    mean, square = sums / (pixels.size / pixels.shape[3])
    # A channel without contrast carries nothing; 1 / 255 keeps it from becoming a division by zero.
    std = np.sqrt(np.maximum(square - mean**2, 255.0**-2))
    return {
        "classes": len(data.labels),
        "channels": pixels.shape[3],
        "image_size": pixels.shape[1],
        "mean": [round(float(value), 4) for value in mean],
        "std": [round(float(value), 4) for value in std],
    }


def image_task(
    recipe: ImageRecipe,
    data_dir: Path | None,
    build_model: Callable[[Mapping[str, Any]], nn.Module],
    **arguments: Any,
) -> Task:
    """A run that fits a classifier, its first weights drawn from the recipe's seed.

    Args:
        recipe: the family's.
        data_dir: see `load_image_data`.
        build_model: the family's; gets `image_arguments` and `arguments`.
        arguments: what the network depends on beside the data.

    Raises:
        DataError: the data set can't be read, or has fewer training rows than a batch.
    """
    data = _load(recipe, data_dir)
    fitted, held_out = split_rows(len(data.train_images), recipe)
    if len(fitted) < recipe.batch_size:
        raise DataError(
            f"--batch-size: expected at most {len(fitted)}, the training rows, got {recipe.batch_size}"
        )
    arguments = {**image_arguments(data), **arguments}
    torch.manual_seed(recipe.seed)
    # Channels last is how oneDNN and cuDNN filter fastest: a step of ResNet-20, batch 128, on one CPU thread
    # takes 302 ms without, 244 ms with, 133 ms with it and bfloat16.
    model = build_model(arguments).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it alone
    normalize = Normalize(arguments)

    def loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        image, label = batch
        logits = model(normalize.to(image.device)(image)).float()
        return functional.cross_entropy(logits, label, label_smoothing=recipe.label_smoothing)

    def right(model: nn.Module, rows: np.ndarray | slice, split: str) -> float:
        images, labels = getattr(data, f"{split}_images"), getattr(data, f"{split}_labels")
        return accuracy(model, arguments, images[rows], labels[rows])

    return Task(
        model=model,
        arguments=arguments,
        dataset=data.name,
        dataset_sha256=data.sha256(),
        # The last, smaller batch is dropped: batch norm's statistics of a few rows are noise.
        steps_per_epoch=len(fitted) // recipe.batch_size,
        batches=lambda generator: augmented_batches(data, fitted, recipe, generator),
        loss=loss,
        first_loss=math.log(len(data.labels)),
        metric=ACCURACY,
        validate=lambda model: right(model, held_out, "train"),
        test=lambda model: {ACCURACY.name: right(model, slice(None), "test")},
        trivial=majority_class(
            data.train_labels[fitted], validation=data.train_labels[held_out], test=data.test_labels
        ),
    )


@torch.no_grad()
def accuracy(model: nn.Module, arguments: Mapping[str, Any], images: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy on UINT8 images [n, h, w, c] with labels INT64 [n]; the model is left in eval mode."""
    device = next(model.parameters()).device
    serving = PixelInput(model, arguments).to(device).eval()
    batch = max(1, min(EVALUATION_BATCH, EVALUATION_PIXELS // math.prod(images.shape[1:3])))
    right = 0
    for start in range(0, len(images), batch):
        pixels = torch.from_numpy(images[start : start + batch]).to(device)
        expected = torch.from_numpy(labels[start : start + batch]).to(device)
        right += int((serving(pixels).argmax(dim=1) == expected).sum())
    return right / len(images)


def _load(recipe: ImageRecipe, data_dir: Path | None) -> ImageData:
    return load_image_data(recipe.data, data_dir=data_dir, sample=recipe.sample, image_size=recipe.image_size)

"""A small convolutional network for digits: two convolutions, two linear layers.

The plan of LeNet-5 (LeCun et al., "Gradient-based learning applied to document recognition", Proc. IEEE
86(11), 1998) with what came later: ReLU, batch norm (Ioffe, Szegedy, arXiv:1502.03167), dropout (Srivastava
et al., JMLR 15, 2014).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import nn

from train.image_classification import ImageRecipe, image_task, serving_graphs
from train.initialization import he_normal, xavier_uniform

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from train.family import Task

__all__ = ["RECIPES", "Recipe", "build_model", "serving_graphs", "task"]


@dataclass(frozen=True, kw_only=True)
class Recipe(ImageRecipe):
    """How to train the small network."""

    channels: Annotated[int, "of the first convolution; the second has twice as many"] = 32
    hidden: Annotated[int, "units of the first linear layer"] = 128
    dropout: Annotated[float, "before each linear layer"] = 0.3

    def __post_init__(self) -> None:
        """Check every field; see `train.recipe.Recipe`."""
        super().__post_init__()
        self.require("channels", self.channels >= 1, "at least 1")
        self.require("hidden", self.hidden >= 1, "at least 1")
        self.require("dropout", 0 <= self.dropout < 1, "from 0 to below 1")


RECIPES = {
    "quick": Recipe(sample=True, epochs=10, batch_size=64, warmup_fraction=0.1, shift=0),
    "cpu": Recipe(
        data="mnist", epochs=12, warmup_fraction=0.1, label_smoothing=0.05, validation_fraction=0.05
    ),
    "reference": Recipe(
        data="mnist",
        epochs=60,
        warmup_fraction=0.1,
        label_smoothing=0.05,
        channels=64,
        hidden=256,
        dropout=0.4,
        compile=True,
    ),
}


class SimpleCnn(nn.Module):
    """Normalized pixels FP32 [batch, channels, size, size] to logits FP32 [batch, classes]."""

    def __init__(
        self, *, classes: int, inputs: int, size: int, channels: int, hidden: int, dropout: float
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(*stage(inputs, channels), *stage(channels, 2 * channels))
        self.hidden = nn.Sequential(
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(2 * channels * (size // 4) ** 2, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
        )
        self.output = nn.Linear(hidden, classes)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits FP32 [batch, classes]."""
        logits: torch.Tensor = self.output(self.hidden(self.features(pixels)))
        return logits


def stage(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    """A 5 x 5 convolution that keeps the resolution, batch norm, ReLU, and pooling that halves it."""
    return (
        nn.Conv2d(inputs, outputs, kernel_size=5, padding=2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )


def build_model(arguments: Mapping[str, Any]) -> nn.Module:
    """The untrained network for a checkpoint's model arguments, initialized from torch's global generator."""
    model = SimpleCnn(
        classes=arguments["classes"],
        inputs=arguments["channels"],
        size=arguments["image_size"],
        channels=arguments["width"],
        hidden=arguments["hidden"],
        dropout=arguments["dropout"],
    )
    he_normal(model)
    xavier_uniform(model)
    # All classes are about equally likely at first; as drawn above, the loss would begin at 5.4, not log 10.
    nn.init.normal_(model.output.weight, std=0.01)
    return model


def task(recipe: Recipe, data_dir: Path | None) -> Task:
    """A training run of this recipe.

    Raises:
        train.data.download.DataError: the data set can't be read.
    """
    return image_task(
        recipe, data_dir, build_model, width=recipe.channels, hidden=recipe.hidden, dropout=recipe.dropout
    )

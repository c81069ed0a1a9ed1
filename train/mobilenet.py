"""MobileNetV2: inverted residuals with linear bottlenecks, for images of any size.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, arXiv:1801.04381.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args

import torch
from torch import nn

from train.data.images import load_image_data
from train.image_classification import (
    METRIC,
    ImageRecipe,
    example_inputs,
    image_arguments,
    image_task,
    metric,
    serving_data,
    serving_module,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from train.family import Task

__all__ = [
    "METRIC",
    "RECIPES",
    "Recipe",
    "build_model",
    "example_inputs",
    "metric",
    "serving_data",
    "serving_module",
    "task",
]

Stem = Literal["imagenet", "small"]


class Stage(NamedTuple):
    """A row of the paper's table 2: `repeats` blocks, the first of which has the stride."""

    expansion: int
    channels: int
    repeats: int


STAGES = (
    Stage(1, 16, 1),
    Stage(6, 24, 2),
    Stage(6, 32, 3),
    Stage(6, 64, 4),
    Stage(6, 96, 3),
    Stage(6, 160, 3),
    Stage(6, 320, 1),
)
STRIDES: Mapping[str, tuple[int, ...]] = {
    # The first convolution's stride, then one per stage.
    "imagenet": (2, 1, 2, 2, 2, 1, 2, 1),
    # 28 pixels: the first convolution sees all of them, the wide stages work at 14, 7 and 4.
    "small": (1, 2, 1, 2, 2, 1, 1, 1),
}


@dataclass(frozen=True, kw_only=True)
class Recipe(ImageRecipe):
    """How to train a MobileNetV2."""

    width: Annotated[float, "multiplier of every layer's channels"] = 1.0
    stem: Annotated[Stem, "where the resolution is halved: imagenet is the paper's, for 224 pixels"] = "small"
    dropout: Annotated[float, "before the last layer"] = 0.2

    def __post_init__(self) -> None:
        """Check every field; see `train.recipe.Recipe`."""
        super().__post_init__()
        self.require("width", self.width > 0, "above 0")
        self.require("stem", self.stem in get_args(Stem), f"one of {', '.join(get_args(Stem))}")
        self.require("dropout", 0 <= self.dropout < 1, "from 0 to below 1")


RECIPES = {
    "full": Recipe(),
    # Ten epochs are too few for augmentation to pay: at width 0.5 validation is 0.878 without, 0.844 with.
    "quick": Recipe(
        sample=True,
        epochs=10,
        batch_size=64,
        learning_rate=5e-3,
        warmup_fraction=0.1,
        shift=0,
        flip=False,
        width=0.35,
        dropout=0.0,
    ),
}


class MobileNetV2(nn.Module):
    """Normalized pixels FP32 [batch, channels, height, width] to logits FP32 [batch, classes]."""

    def __init__(self, classes: int, channels: int, width: float, stem: str, dropout: float) -> None:
        super().__init__()
        first, *strides = STRIDES[stem]
        inputs = scaled(32, width)
        blocks: list[nn.Module] = [ConvNormRelu(channels, inputs, kernel=3, stride=first)]
        for stage, stride in zip(STAGES, strides, strict=True):
            outputs = scaled(stage.channels, width)
            for index in range(stage.repeats):
                step = stride if index == 0 else 1
                blocks.append(InvertedResidual(inputs, outputs, step, stage.expansion))
                inputs = outputs
        # The paper widens the last convolution for width > 1 but never narrows it.
        features = scaled(1280, max(1.0, width))
        blocks.append(ConvNormRelu(inputs, features, kernel=1))
        self.features = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(features, classes))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits FP32 [batch, classes]."""
        logits: torch.Tensor = self.classifier(self.pool(self.features(pixels)).flatten(1))
        return logits


class InvertedResidual(nn.Module):
    """Expand, filter each channel by itself, project without activation; add the input where shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [ConvNormRelu(inputs, hidden, kernel=1)] if expansion != 1 else []
        self.layers = nn.Sequential(
            *expand,
            ConvNormRelu(hidden, hidden, kernel=3, stride=stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """FP32 [batch, inputs, h, w] to FP32 [batch, outputs, h / stride, w / stride]."""
        projected: torch.Tensor = self.layers(features)
        return features + projected if self.residual else projected


class ConvNormRelu(nn.Sequential):
    """Convolution, batch norm and ReLU6, whose bounded range suits 8-bit quantization."""

    def __init__(self, inputs: int, outputs: int, *, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU6(),
        )


def scaled(channels: int, width: float) -> int:
    """Channels times width, rounded to a multiple of 8 and never more than 10 % below the exact value."""
    exact = channels * width
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * exact else rounded + 8


def build_model(arguments: Mapping[str, Any]) -> nn.Module:
    """The untrained network for a checkpoint's model arguments, initialized from torch's global generator."""
    model = MobileNetV2(
        arguments["classes"],
        arguments["channels"],
        arguments["width"],
        arguments["stem"],
        arguments["dropout"],
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
    return model


def task(recipe: Recipe, data_dir: Path | None) -> Task:
    """A training run of this recipe, its first weights drawn from the recipe's seed.

    Raises:
        train.data.download.DataError: the data set can't be read.
    """
    data = load_image_data(recipe.data, data_dir=data_dir, sample=recipe.sample)
    arguments = {
        **image_arguments(data),
        "width": recipe.width,
        "stem": recipe.stem,
        "dropout": recipe.dropout,
    }
    torch.manual_seed(recipe.seed)
    return image_task(recipe, data, arguments, build_model(arguments))

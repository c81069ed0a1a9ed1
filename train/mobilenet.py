"""MobileNetV2 and V3-small: inverted residuals with linear bottlenecks, for images of any size.

V2: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, arXiv:1801.04381.
V3: Howard et al., "Searching for MobileNetV3", ICCV 2019, arXiv:1905.02244.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import torch
from torch import nn

from train.image_classification import ImageRecipe, image_task, serving_graphs
from train.initialization import he_normal

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from train.family import Task

__all__ = ["RECIPES", "Recipe", "build_model", "serving_graphs", "task"]

Version = Literal["v2", "v3-small"]
Stem = Literal["imagenet", "small", "fine"]


class Stage(NamedTuple):
    """A row of the V2 paper's table 2: `repeats` blocks, the first of which has the stride."""

    expansion: int
    channels: int
    repeats: int


V2_STAGES = (
    Stage(1, 16, 1),
    Stage(6, 24, 2),
    Stage(6, 32, 3),
    Stage(6, 64, 4),
    Stage(6, 96, 3),
    Stage(6, 160, 3),
    Stage(6, 320, 1),
)
V2_STRIDES: Mapping[str, tuple[int, ...]] = {
    # The first convolution's stride, then one per stage.
    "imagenet": (2, 1, 2, 2, 2, 1, 2, 1),
    # 28 pixels: the first convolution sees all of them, the wide stages work at 14, 7 and 4.
    "small": (1, 2, 1, 2, 2, 1, 1, 1),
    # The same with the first three stages at full resolution, for accuracy.
    "fine": (1, 1, 1, 2, 2, 1, 2, 1),
}


class Row(NamedTuple):
    """A row of the V3 paper's table 2, one block."""

    kernel: int
    hidden: int
    channels: int
    squeeze: bool
    activation: type[nn.Module]


V3_SMALL_ROWS = (
    Row(3, 16, 16, squeeze=True, activation=nn.ReLU),
    Row(3, 72, 24, squeeze=False, activation=nn.ReLU),
    Row(3, 88, 24, squeeze=False, activation=nn.ReLU),
    Row(5, 96, 40, squeeze=True, activation=nn.Hardswish),
    Row(5, 240, 40, squeeze=True, activation=nn.Hardswish),
    Row(5, 240, 40, squeeze=True, activation=nn.Hardswish),
    Row(5, 120, 48, squeeze=True, activation=nn.Hardswish),
    Row(5, 144, 48, squeeze=True, activation=nn.Hardswish),
    Row(5, 288, 96, squeeze=True, activation=nn.Hardswish),
    Row(5, 576, 96, squeeze=True, activation=nn.Hardswish),
    Row(5, 576, 96, squeeze=True, activation=nn.Hardswish),
)
V3_SMALL_STRIDES: Mapping[str, tuple[int, ...]] = {
    "imagenet": (2, 2, 2, 1, 2, 1, 1, 1, 1, 2, 1, 1),
    "small": (1, 2, 1, 1, 2, 1, 1, 1, 1, 2, 1, 1),  # ends at 4 pixels of 28, as V2 does
    "fine": (1, 1, 2, 1, 2, 1, 1, 1, 1, 2, 1, 1),
}


@dataclass(frozen=True, kw_only=True)
class Recipe(ImageRecipe):
    """How to train a MobileNet."""

    version: Annotated[Version, "v3-small is faster, with squeeze-and-excitation and hard-swish"] = "v2"
    width: Annotated[float, "multiplier of every layer's channels"] = 1.0
    stem: Annotated[
        Stem,
        "where resolution is halved: imagenet as in the papers, for 224 pixels; small for 28; fine latest",
    ] = "small"
    dropout: Annotated[float, "before the last layer"] = 0.2

    def __post_init__(self) -> None:
        """Check every field; see `train.recipe.Recipe`."""
        super().__post_init__()
        self.require("width", self.width > 0, "above 0")
        self.require("dropout", 0 <= self.dropout < 1, "from 0 to below 1")


# On a CPU the convolutions that filter each channel by itself are slower in bfloat16: a step of batch 128 at
# width 0.5 takes 168 ms in float32, 214 ms mixed, on one thread.
RECIPES = {
    # Ten epochs are too few for augmentation to pay: at width 0.5 validation is 0.878 without, 0.844 with.
    "quick": Recipe(
        sample=True,
        epochs=10,
        batch_size=64,
        learning_rate=5e-3,
        warmup_fraction=0.1,
        precision="float32",
        shift=0,
        flip=False,
        width=0.35,
        dropout=0.0,
    ),
    "cpu": Recipe(
        epochs=14,
        learning_rate=4e-3,
        warmup_fraction=0.1,
        label_smoothing=0.05,
        precision="float32",
        validation_fraction=0.05,
        shift=1,
        width=0.5,
        dropout=0.1,
    ),
    "reference": Recipe(
        data="cifar10",
        epochs=200,
        optimizer="sgd",
        learning_rate=0.1,
        weight_decay=5e-4,
        clip_norm=0.0,
        label_smoothing=0.0,
        validation_fraction=0.02,
        shift=4,
        stem="fine",
        compile=True,
    ),
}


class MobileNet(nn.Module):
    """Normalized pixels FP32 [batch, channels, height, width] to logits FP32 [batch, classes].

    Args:
        features: pixels to FP32 [batch, pooled, h, w].
        head: between pooling and dropout, FP32 [batch, pooled] to FP32 [batch, hidden].
        hidden: inputs of the last layer.
        classes: outputs of the last layer.
        dropout: before the last layer.
    """

    def __init__(
        self, features: nn.Module, head: nn.Module, *, hidden: int, classes: int, dropout: float
    ) -> None:
        super().__init__()
        self.features = features
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = head
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden, classes)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits FP32 [batch, classes]."""
        pooled = self.pool(self.features(pixels)).flatten(1)
        logits: torch.Tensor = self.output(self.dropout(self.head(pooled)))
        return logits


class MobileNetV2(MobileNet):
    """The V2 paper's table 2."""

    def __init__(self, classes: int, channels: int, width: float, stem: str, dropout: float) -> None:
        first, *strides = V2_STRIDES[stem]
        inputs = scaled(32, width)
        blocks: list[nn.Module] = [ConvNormActivation(channels, inputs, kernel=3, stride=first)]
        for stage, stride in zip(V2_STAGES, strides, strict=True):
            outputs = scaled(stage.channels, width)
            for index in range(stage.repeats):
                step = stride if index == 0 else 1
                blocks.append(InvertedResidual(inputs, inputs * stage.expansion, outputs, stride=step))
                inputs = outputs
        # The paper widens the last convolution for width > 1 but never narrows it.
        hidden = scaled(1280, max(1.0, width))
        blocks.append(ConvNormActivation(inputs, hidden, kernel=1))
        features = nn.Sequential(*blocks)
        super().__init__(features, nn.Identity(), hidden=hidden, classes=classes, dropout=dropout)


class MobileNetV3Small(MobileNet):
    """The V3 paper's table 2."""

    def __init__(self, classes: int, channels: int, width: float, stem: str, dropout: float) -> None:
        first, *strides = V3_SMALL_STRIDES[stem]
        inputs = scaled(16, width)
        blocks: list[nn.Module] = [
            ConvNormActivation(channels, inputs, kernel=3, stride=first, activation=nn.Hardswish)
        ]
        for row, stride in zip(V3_SMALL_ROWS, strides, strict=True):
            outputs = scaled(row.channels, width)
            blocks.append(
                InvertedResidual(
                    inputs,
                    scaled(row.hidden, width),
                    outputs,
                    kernel=row.kernel,
                    stride=stride,
                    activation=row.activation,
                    squeeze=row.squeeze,
                )
            )
            inputs = outputs
        pooled, hidden = scaled(576, width), scaled(1024, max(1.0, width))
        blocks.append(ConvNormActivation(inputs, pooled, kernel=1, activation=nn.Hardswish))
        head = nn.Sequential(nn.Linear(pooled, hidden), nn.Hardswish())
        super().__init__(nn.Sequential(*blocks), head, hidden=hidden, classes=classes, dropout=dropout)


class InvertedResidual(nn.Module):
    """Expand, filter each channel by itself, project without activation; add the input where shapes allow."""

    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int,
        *,
        kernel: int = 3,
        stride: int = 1,
        activation: type[nn.Module] = nn.ReLU6,
        squeeze: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if hidden != inputs:
            layers.append(ConvNormActivation(inputs, hidden, kernel=1, activation=activation))
        layers.append(
            ConvNormActivation(
                hidden, hidden, kernel=kernel, stride=stride, groups=hidden, activation=activation
            )
        )
        if squeeze:
            layers.append(SqueezeExcitation(hidden))
        layers += [nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """FP32 [batch, inputs, h, w] to FP32 [batch, outputs, h / stride, w / stride]."""
        projected: torch.Tensor = self.layers(features)
        return features + projected if self.residual else projected


class SqueezeExcitation(nn.Module):
    """Weigh each channel by what the means of all say: Hu et al., CVPR 2018, arXiv:1709.01507.

    The V3 paper has a hard sigmoid, and a quarter of the channels inside.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inside = scaled(channels // 4, 1.0)
        self.weigh = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, inside, 1),
            nn.ReLU(),
            nn.Conv2d(inside, channels, 1),
            nn.Hardsigmoid(),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """FP32 [batch, channels, h, w] to the same shape."""
        weighed: torch.Tensor = features * self.weigh(features)
        return weighed


class ConvNormActivation(nn.Sequential):
    """Convolution, batch norm and V2's ReLU6, whose bounded range suits 8-bit quantization, or another."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        activation: type[nn.Module] = nn.ReLU6,
    ) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            activation(),
        )


def scaled(channels: int, width: float) -> int:
    """Channels times width, rounded to a multiple of 8 and never more than 10 % below the exact value."""
    exact = channels * width
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * exact else rounded + 8


def build_model(arguments: Mapping[str, Any]) -> nn.Module:
    """The untrained network for a checkpoint's model arguments, initialized from torch's global generator.

    Without "version" it is V2.
    """
    network = MobileNetV3Small if arguments.get("version") == "v3-small" else MobileNetV2
    model = network(
        classes=arguments["classes"],
        channels=arguments["channels"],
        width=arguments["width"],
        stem=arguments["stem"],
        dropout=arguments["dropout"],
    )
    he_normal(model)
    nn.init.normal_(model.output.weight, std=0.01)
    nn.init.zeros_(model.output.bias)
    return model


def task(recipe: Recipe, data_dir: Path | None) -> Task:
    """A training run of this recipe.

    Raises:
        train.data.download.DataError: the data set can't be read.
    """
    return image_task(
        recipe,
        data_dir,
        build_model,
        version=recipe.version,
        width=recipe.width,
        stem=recipe.stem,
        dropout=recipe.dropout,
    )

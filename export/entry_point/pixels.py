"""`--pixels`: a network of normalized floats, channels first, behind the UINT8 pixels that clients send."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from export.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# What the server decodes image files to, too.
CHANNELS = (1, 3)
_RANK = 4
_WHITE = 255
# Numbers that came from pixels are whole again but for the rounding of FP16: 0.06 at most, at 255.
_NEARLY_WHOLE = 0.1
_FEW = 0.01


@dataclass(frozen=True)
class Scaling:
    """What a network wants its pixels to be: (pixel - mean) / std, of pixels from 0 to 255.

    Attributes:
        name: as the command line says it.
        mean: one number, or one per channel.
        std: as many.
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def check_channels(self, channels: int) -> None:
        """Refuse an image of other channels.

        Raises:
            ExportError: it has.
        """
        if len(self.mean) not in {1, channels}:
            raise ExportError(
                f"--pixels {self.name}: is for {len(self.mean)} channels, the network's image has "
                f"{channels}: give MEAN/STD, {channels} numbers each or one for all"
            )


def _of_unit(name: str, mean: tuple[float, ...], std: tuple[float, ...]) -> Scaling:
    """From numbers for pixels of 0 to 1."""
    return Scaling(name, tuple(_WHITE * number for number in mean), tuple(_WHITE * number for number in std))


# Those that `onnxedge infer --scaling` knows. torchvision's weights expect ImageNet's mean and deviation.
SCALINGS: Mapping[str, Scaling] = {
    "none": Scaling("none", (0.0,), (1.0,)),
    "unit": _of_unit("unit", (0.0,), (1.0,)),
    "inception": _of_unit("inception", (0.5,), (0.5,)),
    "imagenet": _of_unit("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def parse_scaling(text: str) -> Scaling:
    """The scaling that `--pixels` names, or gives as `MEAN/STD` of pixels from 0 to 1.

    Raises:
        ExportError: it is neither.
    """
    if text in SCALINGS:
        return SCALINGS[text]
    try:
        mean, std = (tuple(float(number) for number in part.split(",")) for part in text.split("/"))
    except ValueError:
        raise ExportError(
            f"--pixels {text}: expected {', '.join(SCALINGS)}, or MEAN/STD of pixels from 0 to 1, "
            "0.5,0.5,0.5/0.25,0.25,0.25 for example"
        ) from None
    if len(mean) != len(std) or len(mean) not in CHANNELS:
        raise ExportError(
            f"--pixels {text}: {len(mean)} means and {len(std)} deviations; expected one each, or three"
        )
    # NaN is in no range, either.
    if not (all(0 <= number <= 1 for number in mean) and all(0 < number <= 1 for number in std)):
        raise ExportError(
            f"--pixels {text}: expected means from 0 to 1 and deviations above 0, up to 1, of pixels from 0 "
            "to 1; divide numbers for 0 to 255 by 255"
        )
    return _of_unit(text, mean, std)


def image_input(inputs: Mapping[str, torch.Tensor]) -> str:
    """The one input that holds images, FP32 [n, channels, height, width].

    Raises:
        ExportError: none does, or several.
    """
    found = [
        name
        for name, tensor in inputs.items()
        if tensor.is_floating_point() and tensor.ndim == _RANK and tensor.shape[1] in CHANNELS
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise ExportError(
            f"--pixels: inputs {', '.join(map(repr, found))} may all be images, and only one can become "
            "pixels; return a module that takes UINT8 [n, height, width, channels] and normalizes itself"
        )
    pixels = pixel_input({name: tensor.numpy() for name, tensor in inputs.items()})
    if pixels:
        raise ExportError(f"--pixels: input {pixels!r} takes UINT8 pixels already; drop the flag")
    described = ", ".join(f"{name!r} {tensor.dtype} {list(tensor.shape)}" for name, tensor in inputs.items())
    raise ExportError(
        f"--pixels: no input is FP32 [n, 1 or 3, height, width]: {described}; return normalized images, "
        "channels first, as the example"
    )


def pixel_input(arrays: Mapping[str, np.ndarray]) -> str | None:
    """The one input that is UINT8 pixels [n, height, width, channels]; None where none is, or several."""
    found = [
        name
        for name, array in arrays.items()
        if array.dtype == np.uint8 and array.ndim == _RANK and array.shape[3] in CHANNELS
    ]
    return found[0] if len(found) == 1 else None


def is_normalized(array: np.ndarray, channels: int) -> bool:
    """Whether an array may be images as the network takes them: floats [n, channels, height, width]."""
    return array.dtype.kind == "f" and array.ndim == _RANK and array.shape[1] == channels


def to_pixels(what: str, images: np.ndarray, scaling: Scaling, say: Callable[[str], None]) -> np.ndarray:
    """Normalized images as the pixels that they came from.

    Args:
        what: names the images in messages.
        images: float [n, channels, height, width].
        scaling: with which they were normalized.
        say: called with a note where they can't have come from pixels so.

    Returns:
        UINT8 [n, height, width, channels].

    Raises:
        ExportError: they hold NaN or infinity.
    """
    pixels = np.empty((len(images), *images.shape[2:], images.shape[1]), np.uint8)
    clipped = broken = 0
    for index, image in enumerate(images):
        exact = image.transpose(1, 2, 0).astype(np.float64) * scaling.std + scaling.mean
        if not np.isfinite(exact).all():
            raise ExportError(f"--pixels {scaling.name}: {what} holds NaN or infinity in row {index}")
        whole = np.rint(exact)
        outside = (whole < 0) | (whole > _WHITE)
        clipped += int(outside.sum())
        broken += int((~outside & (np.abs(exact - whole) > _NEARLY_WHOLE)).sum())
        pixels[index] = whole.clip(0, _WHITE)
    _say_how_exact(f"--pixels {scaling.name}: of {what}", clipped / pixels.size, broken / pixels.size, say)
    return pixels


def _say_how_exact(start: str, clipped: float, broken: float, say: Callable[[str], None]) -> None:
    """Mention numbers that no pixel is behind, if they are more than a few."""
    parts = []
    if clipped > _FEW:
        parts.append(f"{clipped:.0%} lie outside of 0 to {_WHITE} and are clipped")
    if broken > _FEW:
        parts.append(f"{broken:.0%} lie between two pixels and are rounded")
    if parts:
        say(
            f"note: {start}, turned back into pixels, {' and '.join(parts)}; if these are real images, they "
            "were resized as floats or normalized in another way"
        )


class Normalize(nn.Module):
    """UINT8 [batch, height, width, channels] to FP32 [batch, channels, height, width], as a network wants it.

    Args:
        scaling: what it wants.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, scaling: Scaling) -> None:
        super().__init__()
        mean, std = np.array(scaling.mean), np.array(scaling.std)
        self._centred, self._scaled = bool(mean.any()), bool((std != 1).any())
        if len(set(zip(scaling.mean, scaling.std, strict=True))) == 1:
            # One number for all needs no broadcast over the last axis, which onnxruntime does slowly.
            mean, std = mean[0], std[0]
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("scale", torch.tensor(1 / std, dtype=torch.float32))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """See the class."""
        pixels = image.to(torch.float32)
        if self._centred:
            pixels = pixels - self.mean
        if self._scaled:
            pixels = pixels * self.scale
        return pixels.permute(0, 3, 1, 2)

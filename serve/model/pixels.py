"""Pixels as models take them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image


def in_8_bits(image: Image.Image) -> Image.Image:
    """The image with its 16-bit grey levels as 8-bit ones; any other as it is.

    Pillow's own conversion clips them, so that nearly every PNG of 16 bits turns white. 65 535 is 257 times
    255.
    """
    if not image.mode.startswith("I"):  # "I;16", and in Pillow before 10 "I"
        return image
    from PIL import Image  # noqa: PLC0415 - an extra that few models need

    return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))

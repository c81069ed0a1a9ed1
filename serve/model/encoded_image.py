"""Image files as input: JPEG, PNG or WebP in, the pixels that a graph takes out.

A model says in its config.pbtxt which input it is, and that the input is BYTES, a file for each row:

    input { name: "image" data_type: TYPE_STRING dims: [ 1 ] }
    parameters { key: "encoded_image" value { string_value: "image" } }

The graph's input of that name is UINT8 [batch, height, width, 1 or 3]. Where height and width are fixed, each
image is resized and centre-cropped to them as in training; where they are not, images go in at their own size
and those of one request must agree in it. Without max_batch_size, dims are [ -1, 1 ].

Triton, to which the parameter says nothing, refuses to load such a model: its graph takes no TYPE_STRING.
"""

from __future__ import annotations

import functools
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from serve.errors import InvalidArgumentError, ModelLoadError
from serve.model.pixels import in_8_bits
from serve.pb import model_config_pb2 as pb
from serve.protocol.datatypes import DATATYPES
from serve.request import Tensor
from serve.runtime.cores import usable_cores

if TYPE_CHECKING:
    from collections.abc import Sequence

    from serve.runtime.session import GraphTensor

PARAMETER = "encoded_image"
FORMATS = ("JPEG", "PNG", "WEBP")
DEFAULT_MAX_PIXELS = 25_000_000  # a camera's 24 megapixels

# Each scan of a progressive JPEG costs a pass over all pixels and next to no bytes; encoders write about ten.
MAX_SCANS = 100
_JPEG_START, _SCAN = b"\xff\xd8", b"\xff\xda"

_MODES = {1: "L", 3: "RGB"}
_IMAGE_RANK = 4


@functools.cache
def decode_pool() -> ThreadPoolExecutor:
    """The threads that decode images, one a core; the transport's and the instances' have other work.

    An image of 25 megapixels takes 100 MB while it is decoded, turned or converted 200: no more of them at
    once than there are cores.
    """
    return ThreadPoolExecutor(usable_cores(), thread_name_prefix="decode")


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """How to turn the files of an input into pixels.

    Attributes:
        name: the input's.
        channels: 1 or 3.
        size: height and width that the graph takes; None: any.
        max_pixels: of one image, or of all in a request where the graph takes any size.
    """

    name: str
    channels: int
    size: tuple[int, int] | None
    max_pixels: int = DEFAULT_MAX_PIXELS

    def decode(self, files: np.ndarray) -> np.ndarray:
        """Decode one image per row, upright.

        Args:
            files: objects of `bytes`, of any shape.

        Returns:
            UINT8 [rows, height, width, channels].

        Raises:
            InvalidArgumentError: a file is no JPEG, PNG or WebP, is damaged or has too many pixels, the
                images differ in size and the graph takes any, or there is none.
        """
        images = []
        for row, data in enumerate(files.reshape(-1)):
            try:
                images.append(self._decode_file(data, files.size))
            except MemoryError:
                raise  # the server's trouble, not the client's
            except Exception as error:  # Pillow raises whatever a damaged file makes it stumble over
                raise InvalidArgumentError(f"input '{self.name}', image {row}: {_reason(error)}") from error
        sizes = sorted({image.shape[:2] for image in images})
        if not sizes:
            raise InvalidArgumentError(f"input '{self.name}': expected at least one image")
        if len(sizes) > 1:
            found = ", ".join(f"{width} x {height}" for height, width in sizes)
            raise InvalidArgumentError(
                f"input '{self.name}': images of one request must agree in size, got {found} pixels: "
                "send each size in a request of its own"
            )
        return np.stack(images)

    def decode_tensors(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """A request's inputs with pixels in the place of image files.

        Raises:
            InvalidArgumentError: see `decode`.
        """
        return tuple(
            Tensor(tensor.name, DATATYPES["UINT8"], self.decode(tensor.array))
            if tensor.name == self.name
            else tensor
            for tensor in inputs
        )

    def _decode_file(self, data: bytes, rows: int) -> np.ndarray:
        """UINT8 [height, width, channels]."""
        from PIL import Image, ImageOps  # noqa: PLC0415 - an extra that few models need

        if data.startswith(_JPEG_START) and data.count(_SCAN) > MAX_SCANS:
            raise ValueError(f"more than {MAX_SCANS} scans in a JPEG")
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size  # the header says so; nothing is decoded yet
            if width * height * (1 if self.size else rows) > self.max_pixels:
                size = f"{width} x {height} pixels" + ("" if self.size or rows == 1 else f", {rows} times")
                raise ValueError(f"{size}: the limit is {self.max_pixels} (--max-image-pixels)")
            ImageOps.exif_transpose(image, in_place=True)
            mode = _MODES[self.channels]
            upright = in_8_bits(image)
            upright = upright if upright.mode == mode else upright.convert(mode)
            if self.size:
                height, width = self.size
                upright = ImageOps.fit(upright, (width, height), Image.Resampling.BILINEAR)
            pixels = np.asarray(upright)
        return pixels[..., None] if self.channels == 1 else pixels


def _reason(error: Exception) -> str:
    from PIL import UnidentifiedImageError  # noqa: PLC0415 - as above

    if isinstance(error, UnidentifiedImageError):  # its text names an object of ours
        return "expected a JPEG, PNG or WebP file"
    return str(error) or type(error).__name__


def declared_image(
    message: pb.ModelConfig, inputs: Sequence[GraphTensor], max_pixels: int
) -> EncodedImage | None:
    """The input that a config declares as image files, if it does.

    Args:
        message: what config.pbtxt says.
        inputs: the graph's.
        max_pixels: see `EncodedImage`.

    Raises:
        ModelLoadError: there is no such input, it takes no pixels, or Pillow is not installed.
    """
    if PARAMETER not in message.parameters:
        return None
    name = message.parameters[PARAMETER].string_value
    tensor = next((tensor for tensor in inputs if tensor.name == name), None)
    if tensor is None:
        raise ModelLoadError(
            f"config.pbtxt: parameter '{PARAMETER}' names input {name!r}, the graph has "
            f"{[tensor.name for tensor in inputs]}"
        )
    for stated in message.input:
        if stated.name == name and stated.data_type not in (pb.TYPE_INVALID, pb.TYPE_STRING):
            raise ModelLoadError(
                f"config.pbtxt: input '{name}' is {pb.DataType.Name(stated.data_type)}, expected "
                f"TYPE_STRING, as parameter '{PARAMETER}' names it"
            )
    encoded = EncodedImage(name, _channels(tensor), _size(tensor), max_pixels)
    _require_pillow(name)
    return encoded


def _channels(tensor: GraphTensor) -> int:
    shape = tensor.shape
    if tensor.onnx_type != "tensor(uint8)" or len(shape) != _IMAGE_RANK or shape[3] not in _MODES:
        raise ModelLoadError(
            f"config.pbtxt: parameter '{PARAMETER}' names input '{tensor.name}', which in the graph is "
            f"{tensor.onnx_type} {list(shape)}; expected tensor(uint8) [batch, height, width, 1 or 3]"
        )
    return shape[3]


def _size(tensor: GraphTensor) -> tuple[int, int] | None:
    height, width = tensor.shape[1:3]
    if (height == -1) != (width == -1):
        raise ModelLoadError(
            f"input '{tensor.name}' has shape {list(tensor.shape)}: for images, height and width are "
            "either both fixed or both of any size"
        )
    return None if height == -1 else (height, width)


def _require_pillow(name: str) -> None:
    """Import Pillow and its readers of the formats; by itself it would import those of all formats."""
    try:
        from PIL import JpegImagePlugin, PngImagePlugin, WebPImagePlugin  # noqa: F401, PLC0415 - an extra
    except ImportError as error:
        raise ModelLoadError(
            f"input '{name}' takes image files, and Pillow is not installed: "
            "pip install 'onnxedge[images]', in a checkout '.[images]'"
        ) from error

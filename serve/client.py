"""`onnxedge infer`: classify an image with any server that speaks the protocol."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np

from serve.client_connection import add_connection_flags, check_connection, describe, open_channel
from serve.model.pixels import in_8_bits
from serve.pb import grpc_service_pb2 as pb
from serve.pb.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from serve.protocol.datatypes import DATATYPES
from serve.protocol.tensor_codec import decode_tensor, encode_tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

# Name to what is subtracted from a pixel (0 to 255) and what the difference is divided by, per channel.
_SCALINGS: dict[str, tuple[Any, Any]] = {
    "none": (0.0, 1.0),
    "unit": (0.0, 255.0),
    "inception": (127.5, 127.5),
    "imagenet": (
        255 * np.array([0.485, 0.456, 0.406]),
        255 * np.array([0.229, 0.224, 0.225]),
    ),
}
_CHANNELS = {1: "L", 3: "RGB"}
# Outputs of a model that sorts its classes itself: scores in falling order, and the classes' indices.
_BEST = ("scores", "classes")
_FLOATS = ("FP16", "FP32", "FP64")
_FLAT = 2  # axes of [batch, classes]
_IMAGE_RANK = 3


class InferError(Exception):
    """The image can't be sent to this model; the message says why."""


def main(arguments: Sequence[str]) -> int:
    """Print the top classes of an image; the exit status."""
    options = _parse(arguments)
    try:
        if options.top < 1:
            raise InferError(f"--top is {options.top}, expected 1 or more")  # noqa: TRY301 - answered as the others
        with open_channel(options) as channel:
            scores = classify_image(GRPCInferenceServiceStub(channel), options)
    except grpc.RpcError as error:
        print(f"onnxedge infer: {describe(error, options)}", file=sys.stderr)
        return 1
    except (InferError, OSError) as error:
        print(f"onnxedge infer: {error}", file=sys.stderr)
        return 1
    lines = (text.decode().split(":", 2) for text in scores)
    print("\n".join(f"{float(score):10.4f}  {label[0] if label else i}" for score, i, *label in lines))
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="onnxedge infer", description=__doc__)
    parser.add_argument("model", help="the model's name")
    parser.add_argument(
        "--image", type=Path, required=True, help="a file that Pillow, or the model itself, reads"
    )
    parser.add_argument("--top", "-c", type=int, default=5, help="classes to print (default: %(default)s)")
    parser.add_argument(
        "--scaling",
        "-s",
        choices=tuple(_SCALINGS),
        help="what a float input wants its pixels to be: as they are, 0 to 1, -1 to 1, ImageNet's mean 0",
    )
    add_connection_flags(parser, timeout=30.0)
    return check_connection(parser, parser.parse_args(arguments))


def classify_image(stub: Any, options: argparse.Namespace) -> list[bytes]:
    """The top classes as the classification extension writes them: "score:index:label".

    Args:
        stub: of GRPCInferenceService.
        options: model, version, image, top, scaling, timeout and header, as `main` parses them.

    Raises:
        InferError: the model has no image input, or the image can't be read.
        grpc.RpcError: the server refused.
    """
    metadata = stub.ModelMetadata(
        pb.ModelMetadataRequest(name=options.model, version=options.version),
        timeout=options.timeout,
        metadata=options.header,
    )
    if len(metadata.inputs) != 1:
        raise InferError(f"model '{options.model}' has {len(metadata.inputs)} inputs, an image fills one")
    spec = metadata.inputs[0]
    read = file_array if spec.datatype == "BYTES" else image_array
    array = read(options.image, spec, options.scaling)
    request = pb.ModelInferRequest(model_name=options.model, model_version=options.version)
    request.inputs.add(name=spec.name, datatype=spec.datatype, shape=array.shape)
    request.raw_input_contents.append(bytes(encode_tensor(DATATYPES[spec.datatype], array)))
    name = _classified_output(stub, options, metadata.outputs)
    if name is None:
        for best_name in _BEST:
            request.outputs.add(name=best_name)
        scores, classes = _outputs(stub.ModelInfer(request, timeout=options.timeout, metadata=options.header))
        best = zip(scores.flat, classes.flat, strict=True)
        return [f"{score}:{index}".encode() for score, index in best][: options.top]
    output = request.outputs.add(name=name)
    output.parameters["classification"].int64_param = options.top
    (best_texts,) = _outputs(stub.ModelInfer(request, timeout=options.timeout, metadata=options.header))
    return list(best_texts.flat)


def _classified_output(stub: Any, options: argparse.Namespace, outputs: Any) -> str | None:
    """The output that the classification extension sorts: the one with labels, else the first [classes].

    Returns:
        Its name; None where there are only classes that the model has sorted itself.
    """
    sorted_itself = {*_BEST} <= {tensor.name for tensor in outputs}
    others = [tensor for tensor in outputs if not (sorted_itself and tensor.name in _BEST)]
    if len(outputs) == 1 or not others:
        return None if sorted_itself else str(outputs[0].name)
    try:
        request = pb.ModelConfigRequest(name=options.model, version=options.version)
        stated = stub.ModelConfig(request, timeout=options.timeout).config.output
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.UNIMPLEMENTED:  # an extension of the protocol
            raise
        stated = ()
    labelled = {output.name for output in stated if output.label_filename}
    found = [tensor.name for tensor in others if tensor.name in labelled]
    found += [tensor.name for tensor in others if tensor.datatype in _FLOATS and len(tensor.shape) <= _FLAT]
    return str(found[0]) if found else None if sorted_itself else str(outputs[0].name)


def _outputs(response: Any) -> list[np.ndarray]:
    raw = zip(response.outputs, response.raw_output_contents, strict=True)
    return [decode_tensor(o.name, DATATYPES[o.datatype], tuple(o.shape), data) for o, data in raw]


def file_array(path: Path, spec: Any, scaling: str | None) -> np.ndarray:
    """A file's content as the one element of a BYTES input, for a model that decodes images itself.

    Raises:
        InferError: the input takes more than one element, or a scaling was named.
        OSError: the file can't be read.
    """
    shape = tuple(spec.shape)
    if any(size not in (-1, 1) for size in shape):
        raise InferError(f"input '{spec.name}' has shape {list(shape)}, an image file fills one element")
    if scaling is not None:
        raise InferError(f"input '{spec.name}' takes the file as it is: leave --scaling out")
    array = np.empty([1] * len(shape), dtype=object)
    array[...] = path.read_bytes()
    return array


def image_array(path: Path, spec: Any, scaling: str | None) -> np.ndarray:
    """An image file as a model's input: [H, W, C] or [C, H, W], with a batch axis of 1 where it has one.

    Raises:
        InferError: the input isn't shaped like an image, is a float and no scaling was named, or the file
            can't be read as an image.
    """
    shape = tuple(spec.shape)
    channels_last = shape[-1:] and shape[-1] in _CHANNELS
    channels = shape[-1] if channels_last else shape[-_IMAGE_RANK] if len(shape) >= _IMAGE_RANK else 0
    if len(shape) not in (_IMAGE_RANK, _IMAGE_RANK + 1) or channels not in _CHANNELS:
        raise InferError(
            f"input '{spec.name}' has shape {list(shape)}, expected [H, W, 1 or 3] or [1 or 3, H, W]"
        )
    if spec.datatype not in ("UINT8", "FP32", "FP16"):
        raise InferError(f"input '{spec.name}' is {spec.datatype}, expected UINT8, FP32 or FP16")
    if spec.datatype == "UINT8" and scaling not in (None, "none"):
        raise InferError(f"input '{spec.name}' is UINT8 and takes pixels as they are: leave --scaling out")
    if spec.datatype != "UINT8" and scaling is None:
        raise InferError(
            f"input '{spec.name}' is {spec.datatype}: name its --scaling, {', '.join(_SCALINGS)}"
        )
    height, width = shape[-3:-1] if channels_last else shape[-2:]
    pixels = _read_pixels(path, _CHANNELS[channels], height, width)
    mean, divisor = _SCALINGS[scaling or "none"]
    array: np.ndarray = ((pixels - mean) / divisor).astype(DATATYPES[spec.datatype].dtype)
    if not channels_last:
        array = array.transpose(2, 0, 1)
    return array[None] if len(shape) > _IMAGE_RANK else array


def _read_pixels(path: Path, mode: str, height: int, width: int) -> np.ndarray:
    """Pixels [H, W, C] from 0 to 255; a height or width of -1 is the image's own."""
    try:
        from PIL import Image, UnidentifiedImageError  # noqa: PLC0415 - an extra that only this command needs
    except ImportError as error:
        raise InferError(
            "Pillow is not installed: pip install 'onnxedge[images]', in a checkout pip install '.[images]'"
        ) from error
    try:
        with Image.open(path) as opened:
            image = in_8_bits(opened).convert(mode)
    except UnidentifiedImageError as error:
        raise InferError(f"{path} is not an image that Pillow reads") from error
    except OSError as error:  # of a truncated file, Pillow's message does not name it
        raise InferError(f"{path}: {error.strerror or error}") from error
    size = (width if width > 0 else image.width, height if height > 0 else image.height)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    return np.asarray(image, dtype=np.float64).reshape(size[1], size[0], -1)

"""A request for any model, made from its metadata."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import numpy as np

from serve.pb import grpc_service_pb2 as pb

if TYPE_CHECKING:
    import grpc

_SERVICE = "/inference.GRPCInferenceService"
INFER_PATH = f"{_SERVICE}/ModelInfer"
_FLOATS = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}
_INTEGERS = {
    **{f"UINT{bits}": f"<u{bits // 8}" for bits in (8, 16, 32, 64)},
    **{f"INT{bits}": f"<i{bits // 8}" for bits in (8, 16, 32, 64)},
}
# Indices into a vocabulary or a set of classes are the usual integers; small ones are legal for most models.
_INTEGER_END = 32


def fetch_metadata(channel: grpc.Channel, model: str, timeout: float = 10.0) -> pb.ModelMetadataResponse:
    """The model's metadata.

    Raises:
        grpc.RpcError: the server isn't there, or doesn't have the model.
    """
    call = channel.unary_unary(
        f"{_SERVICE}/ModelMetadata",
        pb.ModelMetadataRequest.SerializeToString,
        pb.ModelMetadataResponse.FromString,
    )
    return call(pb.ModelMetadataRequest(name=model), timeout=timeout)


def request_bytes(metadata: pb.ModelMetadataResponse, batch: int = 1, seed: int = 0) -> bytes:
    """A serialized ModelInferRequest with random inputs: floats in [0, 1), any pixels, small integers.

    Args:
        metadata: of the model.
        batch: size of a first dimension that is dynamic; other dynamic dimensions become 1.
        seed: of the random numbers.

    Raises:
        ValueError: an input's datatype is none that this can make.
    """
    random = np.random.default_rng(seed)
    request = pb.ModelInferRequest(model_name=metadata.name)
    for spec in metadata.inputs:
        shape = [dim if dim >= 0 else 1 if axis else batch for axis, dim in enumerate(spec.shape)]
        request.inputs.add(name=spec.name, datatype=spec.datatype, shape=shape)
        request.raw_input_contents.append(_random_tensor(random, spec, int(np.prod(shape))))
    return request.SerializeToString()


def _random_tensor(random: np.random.Generator, spec: Any, count: int) -> bytes:
    if spec.datatype in _FLOATS:
        return random.random(count).astype(_FLOATS[spec.datatype]).tobytes()
    if spec.datatype == "UINT8":
        return random.bytes(count)
    if spec.datatype in _INTEGERS:
        return random.integers(0, _INTEGER_END, count).astype(_INTEGERS[spec.datatype]).tobytes()
    if spec.datatype == "BOOL":
        return random.integers(0, 2, count).astype("u1").tobytes()
    if spec.datatype == "BF16":
        return random.random(count).astype("<f4").view("<u2")[1::2].tobytes()
    if spec.datatype == "BYTES":
        return (struct.pack("<I", 4) + b"text") * count
    raise ValueError(f"input '{spec.name}': no random tensor for datatype {spec.datatype}")

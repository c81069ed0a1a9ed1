"""`model_warmup` of a config: samples that are run before the model is ready, as Triton runs them."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import numpy as np

from serve.errors import InvalidArgumentError, ModelLoadError, ServeError
from serve.model.implicit_state import warm_up_inputs
from serve.model.tensor_file import MAX_BYTES, read_file, read_tensor
from serve.pb import model_config_pb2 as pb
from serve.protocol.datatypes import BY_CONFIG_NAME, DATATYPES
from serve.protocol.tensor_codec import decode_tensor

if TYPE_CHECKING:
    from pathlib import Path

    from serve.model.encoded_image import EncodedImage
    from serve.model.model_config import ModelConfig
    from serve.protocol.datatypes import DataType
    from serve.runtime.session import Session

logger = logging.getLogger(__name__)

FOLDER = "warmup"
MAX_COUNT = 10_000

_ANY_IMAGE = (224, 224)  # where the graph takes any size


def run_samples(session: Session, config: ModelConfig, folder: Path) -> dict[str, np.ndarray] | None:
    """Run the samples of a config's `model_warmup`, each as often as it says.

    Args:
        session: the loaded graph.
        config: its `message` has the samples.
        folder: the model's, with their files in `warmup/`.

    Returns:
        one row of the first sample as the graph takes it; None where there is no sample.

    Raises:
        ModelLoadError: a sample doesn't fit the model, or its run fails.
    """
    first: dict[str, np.ndarray] | None = None
    for sample in config.message.model_warmup:
        what = f"config.pbtxt: model_warmup '{sample.name}'"
        if not sample.batch_size:
            logger.info("'%s': model_warmup '%s' has batch_size 0 and is skipped", config.name, sample.name)
            continue
        if sample.batch_size > max(1, config.max_batch_size) or sample.count > MAX_COUNT:
            raise ModelLoadError(
                f"{what}: batch_size is {sample.batch_size} and count {sample.count}, expected at most "
                f"{max(1, config.max_batch_size)} and {MAX_COUNT}"
            )
        feed = _feed(what, sample, session, config, folder)
        for _ in range(max(1, sample.count)):
            try:
                session.run(feed, [output.name for output in session.outputs])
            except ServeError as error:
                raise ModelLoadError(f"{what}: its run failed: {error}") from error
        if first is None:
            first = {name: array[:1] if config.max_batch_size else array for name, array in feed.items()}
    return first


def _feed(
    what: str, sample: pb.ModelWarmup, session: Session, config: ModelConfig, folder: Path
) -> dict[str, np.ndarray]:
    """A sample's inputs, its row repeated."""
    rows = sample.batch_size
    names = {tensor.name for tensor in session.inputs}
    unknown = sample.inputs.keys() - names
    missing = config.inputs.keys() - sample.inputs.keys()
    if unknown or missing:
        raise ModelLoadError(
            f"{what}: expected the inputs {sorted(config.inputs)}, got {sorted(sample.inputs)}"
        )
    feed = warm_up_inputs(config.message, session.inputs, session.outputs, folder, rows)
    for name, stated in sample.inputs.items():
        _check_size(f"{what}: input '{name}'", stated, rows)
        row = _row(f"{what}: input '{name}'", name, stated, config, folder)
        feed[name] = np.repeat(row, rows, axis=0) if config.max_batch_size else row
    return feed


def _row(what: str, name: str, stated: pb.ModelWarmup.Input, config: ModelConfig, folder: Path) -> np.ndarray:
    """One row as the graph takes it, with a batch axis of 1 where the model has one."""
    datatype = BY_CONFIG_NAME.get(pb.DataType.Name(stated.data_type))
    spec = config.inputs.get(name)
    if datatype is None or (spec is not None and datatype is not spec.datatype):
        expected = "a datatype" if spec is None else spec.datatype.config
        raise ModelLoadError(
            f"{what}: data_type is {pb.DataType.Name(stated.data_type)}, expected {expected}"
        )
    encoded = config.encoded_image
    if encoded is not None and encoded.name == name:
        return _image(what, encoded, stated, folder)
    array = _data(what, stated, tuple(stated.dims), datatype, folder)
    if config.max_batch_size:
        array = array[None]
    if spec is None:  # a control input or a state
        return array
    if spec.shape and not _fits(array.shape, spec.shape):
        raise ModelLoadError(f"{what}: dims make {list(array.shape)}, expected {list(spec.shape)}")
    return spec.to_graph(array, batched=config.max_batch_size > 0)


def _check_size(what: str, stated: pb.ModelWarmup.Input, rows: int) -> None:
    """Before anything of that size is made."""
    itemsize = np.float64().itemsize
    if any(size < 0 for size in stated.dims) or math.prod(stated.dims) * itemsize * rows > MAX_BYTES:
        raise ModelLoadError(
            f"{what}: dims are {list(stated.dims)}, expected sizes of 0 or more, of at most "
            f"{MAX_BYTES // itemsize} elements in all {rows} rows"
        )


def _fits(shape: tuple[int, ...], allowed: tuple[int, ...]) -> bool:
    return len(shape) == len(allowed) and all(
        want in (-1, got) for want, got in zip(allowed, shape, strict=True)
    )


def _data(
    what: str, stated: pb.ModelWarmup.Input, shape: tuple[int, ...], datatype: DataType, folder: Path
) -> np.ndarray:
    """A sample's own shape and datatype, without a batch axis."""
    source = stated.WhichOneof("input_data_type")
    if source == "input_data_file":
        field = f"{what}: input_data_file"
        return read_tensor(field, folder / FOLDER, stated.input_data_file, datatype, shape)
    if source is None:
        raise ModelLoadError(f"{what}: expected zero_data, random_data or input_data_file")
    if datatype.name == "BYTES":
        return np.full(shape, "", dtype=object)
    return _random(shape, datatype) if source == "random_data" else np.zeros(shape, datatype.dtype)


def _random(shape: tuple[int, ...], datatype: DataType) -> np.ndarray:
    """Floats in [0, 1), bytes of any value, 0 or 1 of longer integers, which may be places in a table."""
    generator = np.random.default_rng(0)
    if datatype.name == "BF16":
        return (np.asarray(generator.random(shape, np.float32)).view(np.uint32) >> 16).astype(np.uint16)
    if datatype.dtype.kind == "f":
        return np.asarray(generator.random(shape, np.float32)).astype(datatype.dtype)
    highest = np.iinfo(datatype.dtype).max if datatype.name in ("INT8", "UINT8") else 1
    return np.asarray(generator.integers(0, highest, shape, endpoint=True)).astype(datatype.dtype)


def _image(what: str, encoded: EncodedImage, stated: pb.ModelWarmup.Input, folder: Path) -> np.ndarray:
    """Pixels [1, height, width, channels]: of the sample's file, as clients send it, else black ones."""
    if stated.WhichOneof("input_data_type") != "input_data_file":
        height, width = encoded.size or _ANY_IMAGE
        return np.zeros((1, height, width, encoded.channels), np.uint8)
    data = read_file(f"{what}: input_data_file", folder / FOLDER, stated.input_data_file)
    try:
        return encoded.decode(decode_tensor(stated.input_data_file, DATATYPES["BYTES"], (1,), data))
    except InvalidArgumentError as error:
        raise ModelLoadError(f"{what}: {error}") from error

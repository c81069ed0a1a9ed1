"""Made-up inputs for a graph, for runs whose answer nobody reads."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from serve.errors import ModelLoadError
from serve.protocol.datatypes import BY_ONNX_TYPE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from serve.runtime.session import GraphTensor

MAX_ELEMENTS = 1 << 26


def make_inputs(
    inputs: Sequence[GraphTensor], open_size: int = 1, generator: np.random.Generator | None = None
) -> dict[str, np.ndarray]:
    """One row for each input: zeros, or random floats where a generator is given.

    Integers are zero all the same, for they may be the numbers of rows in a table whose length nobody tells;
    text is empty.

    Args:
        inputs: the graph's; the first axis has 1 where the graph leaves it open.
        open_size: of other axes that the graph leaves open.
        generator: source of floats in [0, 1).

    Raises:
        ModelLoadError: an input's type is none that the protocol has, or a row has over 67 million numbers.
    """
    shapes = {tensor.name: _shape(tensor.shape, open_size) for tensor in inputs}
    elements = sum(math.prod(shape) for shape in shapes.values())
    if elements > MAX_ELEMENTS:
        raise ModelLoadError(f"the inputs have {elements} elements in one row, the limit is {MAX_ELEMENTS}")
    return {tensor.name: _array(tensor, shapes[tensor.name], generator) for tensor in inputs}


def _array(tensor: GraphTensor, shape: tuple[int, ...], generator: np.random.Generator | None) -> np.ndarray:
    datatype = BY_ONNX_TYPE.get(tensor.onnx_type)
    if datatype is None:
        raise ModelLoadError(f"input '{tensor.name}' is a {tensor.onnx_type}, which has no datatype")
    if datatype.name == "BYTES":
        return np.full(shape, "", dtype=object)
    if generator is None or datatype.dtype.kind != "f":
        return np.zeros(shape, datatype.dtype)
    return np.asarray(generator.random(shape, np.float32)).astype(datatype.dtype)


def _shape(shape: tuple[int, ...], open_size: int) -> tuple[int, ...]:
    return tuple((open_size if axis else 1) if size == -1 else size for axis, size in enumerate(shape))

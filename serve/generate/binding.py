"""Inputs of a decoder that stay outside its cache, as onnxruntime binds them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from onnxruntime import OrtValue

if TYPE_CHECKING:
    from collections.abc import Mapping

    from serve.generate.decoder_graph import DecoderGraph, Feed


def bind_input(binding: Any, feed: Feed, array: np.ndarray) -> None:
    """Have the next runs of an IOBinding read a copy of an array, in the input's own type."""
    value = OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array, feed.dtype))
    binding.bind_ortvalue_input(feed.name, value)


def constant_values(graph: DecoderGraph) -> Mapping[str, Any]:
    """Name to OrtValue of what every run takes alike."""
    return {name: OrtValue.ortvalue_from_numpy(array) for name, array in graph.constants.items()}

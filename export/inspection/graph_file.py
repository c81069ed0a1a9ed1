"""Find and read the `.onnx` file that a path stands for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx
from google.protobuf.message import DecodeError

from export.errors import ExportError
from export.model_config import read_config

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DEFAULT = "model.onnx"
CONFIG = "config.pbtxt"


def graph_path(path: Path) -> Path:
    """The graph of a file, of a version folder or of a repository's entry.

    Args:
        path: a file stands for itself; an entry for its largest version; a version for the graph that
            `default_model_filename` of the entry's config names, else for model.onnx, else for the only
            `.onnx` file in it.

    Raises:
        ExportError: there is no such file, or the config can't be read.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise ExportError(f"{path}: no such file or folder")
    versions = [folder for folder in path.iterdir() if folder.is_dir() and folder.name.isdecimal()]
    if versions:
        return _in_version(max(versions, key=lambda folder: int(folder.name)), path / CONFIG)
    return _in_version(path, path.resolve().parent / CONFIG)


def _in_version(version: Path, config: Path) -> Path:
    name = read_config(config).default_model_filename or DEFAULT
    if (version / name).is_file():
        return version / name
    graphs = sorted(version.glob("*.onnx"))
    if len(graphs) == 1:
        return graphs[0]
    found = ", ".join(graph.name for graph in graphs) or "no .onnx file"
    raise ExportError(f"{version}: expected {name}, found {found}; name the file itself")


def read_graph(path: Path) -> onnx.ModelProto:
    """Parse a graph's file; external data stays on disk.

    Raises:
        ExportError: it is no ONNX graph.
        OSError: the file can't be read.
    """
    try:
        model = onnx.load(str(path), format="protobuf", load_external_data=False)
    except (DecodeError, UnicodeDecodeError) as error:
        raise ExportError(f"{path}: not an ONNX graph, or a damaged one ({_one_line(error)})") from error
    # What is no UTF-8 comes as bytes from some versions of protobuf, others refuse it above.
    if any(not isinstance(name, str) for name in _names(model)):
        raise ExportError(f"{path}: not an ONNX graph, or a damaged one (a name is no text)")
    if not model.opset_import or not model.graph.output:
        missing = "opset" if not model.opset_import else "output"
        raise ExportError(f"{path}: not an ONNX graph, or a damaged one (it names no {missing})")
    return model


def _names(model: onnx.ModelProto) -> Iterator[str]:
    yield from (model.producer_name, model.producer_version)
    yield from (opset.domain for opset in model.opset_import)
    held = [node for function in model.functions for node in function.node]
    inside = [inner for node in held for body in subgraphs(node) for inner in graphs(body)]
    for inner in (*graphs(model.graph), *inside):
        for value in (*inner.input, *inner.output, *inner.value_info):
            yield value.name
            yield from (axis.dim_param for axis in value.type.tensor_type.shape.dim)
        for tensor in inner.initializer:
            yield tensor.name
            yield from (entry.value for entry in tensor.external_data)
        held.extend(inner.node)
    for function in model.functions:
        yield from (function.name, function.domain, *function.input, *function.output)
    for node in held:
        yield from (*node.input, *node.output, node.op_type, node.domain, node.name)
        yield from (attribute.name for attribute in node.attribute)


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """A graph's nodes, each followed by those of the graphs inside it."""
    for node in graph.node:
        yield node
        for subgraph in subgraphs(node):
            yield from nodes(subgraph)


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and all graphs inside it."""
    yield graph
    for node in graph.node:
        for subgraph in subgraphs(node):
            yield from graphs(subgraph)


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The bodies of a node such as If, Loop and Scan."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

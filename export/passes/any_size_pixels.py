"""An image graph that takes pixels of any size, and makes them its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir
import onnxscript
from onnx_ir.passes import common

from export.passes import PassResult
from export.passes.weights import add_constant

if TYPE_CHECKING:
    from collections.abc import Sequence

OPSET = 20
LEAST_SIZE = 4
DOMAIN = "onnxedge"
op: Any = onnxscript.opset20


@dataclass(frozen=True)
class AnySizePixels:
    """Resize and centre-crop UINT8 pixels [batch, height, width, channels] to the size that the graph takes.

    The shorter side is resized with antialiased bilinear interpolation and the longer one cropped as
    `PIL.ImageOps.fit` does, with which training reads images. Pixels of the graph's own size only get copied.

    For after all other passes, whatever the precision: it leaves the graph behind alone and has no floats
    that another pass could mean to quantize.

    Attributes:
        input: name of a graph input UINT8 [batch, size, size, channels].
    """

    name: ClassVar[str] = "any_size_pixels"

    input: str

    def check(self, model: ir.Model) -> str | None:
        """See `export.passes.Pass`."""
        image = _find(model.graph.inputs, self.input)
        if image is None:
            names = ", ".join(repr(value.name) for value in model.graph.inputs)
            return f"the graph has no input {self.input!r}, it has {names}"
        if image.dtype != ir.DataType.UINT8 or _size_and_channels(image) is None:
            expected = f"UINT8 [batch, size, size, channels], size fixed and {LEAST_SIZE} or more"
            return f"input {self.input!r} is {image.dtype} {image.shape}, expected {expected}"
        if (opset := model.opset_imports.get("", 0)) < OPSET:
            return f"the graph is of opset {opset}, expected {OPSET} or later"
        return None

    def apply(self, model: ir.Model) -> PassResult:
        """See `export.passes.Pass`."""
        graph = model.graph
        image = _find(graph.inputs, self.input)
        assert image is not None
        assert image.shape is not None
        found = _size_and_channels(image)
        assert found is not None
        size, channels = found
        fixed_shape = ir.Shape([image.shape[0], size, size, channels])
        users = tuple(image.uses())
        image.shape = ir.Shape([image.shape[0], "height", "width", channels])

        constants = {"size": [size, size], "shape": [0, size, size, channels]}
        inputs = [
            add_constant(graph, f"{self.input}.{key}", np.array(value, np.int64))
            for key, value in constants.items()
        ]
        fitted = ir.val(f"{self.input}.fitted", dtype=ir.DataType.UINT8, shape=fixed_shape)
        graph.insert_before(graph[0], ir.node(_fit.name, [image, *inputs], domain=DOMAIN, outputs=[fitted]))
        for user, index in users:
            user.replace_input_with(index, fitted)
        _inline(model)
        _declare_shape(graph, fixed_shape)
        return PassResult(model, {"inputs of any size": 1})


def _find(values: Sequence[ir.Value], name: str) -> ir.Value | None:
    return next((value for value in values if value.name == name), None)


def _size_and_channels(image: ir.Value) -> tuple[int, int] | None:
    """Of an input [batch, size, size, channels]; None where it is no such."""
    if image.shape is None or len(image.shape) != 4:  # noqa: PLR2004 - batch, height, width, channels
        return None
    _, height, width, channels = image.shape
    if not isinstance(height, int) or height != width or height < LEAST_SIZE or not isinstance(channels, int):
        return None
    return height, channels


def _inline(model: ir.Model) -> None:
    """Put the nodes of `_fit` in the place of its call."""
    function = ir.from_proto(_fit.to_function_proto())
    for node in tuple(function.all_nodes()):
        # onnxscript has each literal cast to its partner's type, which here is its own.
        if node.op_type == "CastLike":
            assert node.inputs[0] is not None
            assert node.graph is not None
            node.outputs[0].replace_all_uses_with(node.inputs[0])
            node.graph.remove(node, safe=True)
    model.functions[function.identifier()] = function
    model.opset_imports[DOMAIN] = 1
    common.InlinePass()(model)
    del model.opset_imports[DOMAIN]


def _declare_shape(graph: ir.Graph, shape: ir.Shape) -> None:
    """Say the shape that both branches end in, which onnxruntime can't follow through a Slice.

    It would not know that all that comes after has the same batch, and leave additions beside convolutions
    that it can do within them.
    """
    choice = next(node for node in graph if node.op_type == "If")
    for branch in ("then_branch", "else_branch"):
        (output,) = choice.attributes[branch].as_graph().outputs
        output.dtype, output.shape = ir.DataType.UINT8, shape.copy()
    choice.outputs[0].dtype, choice.outputs[0].shape = ir.DataType.UINT8, shape.copy()


@onnxscript.script(onnxscript.values.Opset(DOMAIN, 1), default_opset=op)
def _fit(image, size, shape):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202 - annotations mean attributes here
    """UINT8 [batch, height, width, channels] to UINT8 [batch, size, size, channels].

    Vectors of two hold a figure for the height and one for the width. `size` is INT64 [2]; `shape` INT64 [4],
    of the result, with a 0 for the batch.
    """
    lengths = op.Shape(image, start=1, end=3)
    is_fit = op.Equal(op.ReduceMax(op.Abs(lengths - size), keepdims=0), 0)
    if is_fit:
        pixels = op.Reshape(image, shape)
    else:
        short = op.Max(op.ReduceMin(lengths), 1)
        # The square in the middle may begin in the middle of a pixel; the crop takes that whole.
        length = short + op.Mod(lengths - short, 2)
        # Enlarging, the outermost numbers lie beyond the middle of the outermost pixel, and there is nothing
        # to read outside the crop: one pixel more around it. But the filter is a pixel wide only while there
        # are more numbers than pixels; and where there are as many, onnxruntime copies, whatever the region.
        is_copied = op.And(length == size, short < size)
        margin = op.Where(op.Or(length + 2 < size, is_copied), 1, 0)
        start = op.Max((lengths - length) / 2 - margin, 0)
        crop = op.Slice(image, start, (lengths + length) / 2 + margin, [1, 2])
        padding = op.Where(lengths == length, margin, 0)
        padded = op.Pad(crop, op.Concat(padding, padding, axis=0), None, [1, 2], mode="edge")
        # Where the first and the last number lie, as parts of the way between the outermost pixels: a region
        # and not the crop's own grid, which for half of all sizes is half a pixel beside the middle.
        span = op.Cast(length + 2 * margin - 1, to=1)
        scale = op.Cast(short, to=1) / op.Cast(size, to=1)
        first = (span - scale * op.Cast(size - 1, to=1)) / 2.0
        share = op.Max(first, 0.0) / span
        resized = op.Resize(
            padded,
            op.Concat(share, 1.0 - share, axis=0),
            None,
            size,
            axes=[1, 2],
            antialias=1,
            mode="linear",
            coordinate_transformation_mode="tf_crop_and_resize",
            exclude_outside=1,  # the weights of pixels beyond the edge go to the others, as in Pillow
        )
        pixels = op.Reshape(resized, shape)
    return pixels

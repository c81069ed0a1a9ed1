"""Translation to ONNX: what the graph keeps, what it loses, what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from export.errors import ExportError
from export.graph import check_graph, export_graph, serialize
from export.passes.flatten_normalization import FlattenNormalization
from export.session import Session
from train.family import ExampleInputs

if TYPE_CHECKING:
    from tests.export.conftest import Network


def example(*shape: int, dtype: torch.dtype = torch.float32) -> ExampleInputs:
    return ExampleInputs({"x": torch.ones(shape, dtype=dtype)}, {"x": {0: "batch"}}, ("y",))


def test_keeps_names_and_the_dynamic_batch_axis(network: Network) -> None:
    (image,), (logits,) = network.graph.graph.inputs, network.graph.graph.outputs
    assert (image.name, image.dtype) == ("image", ir.DataType.UINT8)
    assert str(image.shape) == "[batch,28,28,1]"
    assert (logits.name, str(logits.shape)) == ("logits", "[batch,10]")


def test_global_pooling_stays_one_operator(network: Network) -> None:
    operators = [node.op_type for node in network.graph.graph]
    assert operators.count("GlobalAveragePool") == 1
    assert not {"ReduceMean", "Gather", "BatchNormalization"}.intersection(operators)


def test_loses_metadata_and_intermediate_shapes(network: Network) -> None:
    assert all(not node.metadata_props for node in network.graph.graph)
    assert not onnx.load_from_string(serialize(network.graph)).graph.value_info


class Frozen(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(2, -1)


class FrozenBySum(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum(0, keepdim=True)


class Unknown(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = torch.linalg.eigvalsh(x)
        return values


@pytest.mark.parametrize(
    ("module", "inputs", "expected"),
    [
        (Frozen(), example(2, 6), "batch"),
        (FrozenBySum(), example(2, 6), "'y': axis 0 should be dynamic ('batch') but the exporter made it"),
        (Unknown(), example(2, 3, 3), "linalg_eigh"),
        (nn.AdaptiveAvgPool2d(3), example(2, 3, 8, 8), "only where that divides"),
    ],
)
def test_what_cannot_be_translated_is_refused(
    module: nn.Module, inputs: ExampleInputs, expected: str
) -> None:
    with pytest.raises(ExportError) as refused:
        export_graph(module.eval(), inputs)
    assert expected in str(refused.value)


class Normalize(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, scale = torch.tensor([100.0, 110.0, 120.0]), torch.tensor([0.1, 0.2, 0.3])
        return (((x.to(torch.float32) - mean) * 0.5) * scale).permute(0, 3, 1, 2)


def test_flattened_normalization_gives_the_same_numbers() -> None:
    graph = export_graph(Normalize().eval(), example(2, 5, 7, 3, dtype=torch.uint8))
    pixels = {"x": np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), dtype=np.uint8)}
    before = Session(serialize(graph)).run(pixels)["y"]
    rewrite = FlattenNormalization()
    assert rewrite.check(graph) is None
    result = rewrite.apply(graph)
    assert result.changes == {"nodes over whole image rows": 4}
    assert [node.op_type for node in result.model.graph] == [
        "Reshape", "Cast", "Sub", "Mul", "Mul", "Reshape", "Transpose",
    ]  # fmt: skip
    assert np.array_equal(Session(serialize(result.model)).run(pixels)["y"], before)


def test_flattening_has_a_reason_not_to_apply(network: Network) -> None:
    assert "per-channel" in str(FlattenNormalization().check(network.graph))  # gray images


class Pooled(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled: torch.Tensor = self.pool(x)
        return pooled


@pytest.mark.parametrize(("pixels", "size"), [(14, 7), (7, 7), (12, 4)])
def test_pooling_to_several_pixels_is_one_operator(pixels: int, size: int) -> None:
    x = torch.rand(2, 3, pixels, pixels)
    example = ExampleInputs({"x": x}, {"x": {0: "batch"}}, ("y",))
    graph = export_graph(Pooled(size).eval(), example)
    assert [node.op_type for node in graph.graph] == ["AveragePool"]
    found = Session(serialize(graph)).run({"x": x.numpy()})["y"]
    assert found == pytest.approx(Pooled(size)(x).numpy(), abs=1e-6)


def test_more_weights_than_a_file_holds_are_refused(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.graph.LARGEST", 100_000)
    with pytest.raises(ExportError, match=r"GB of weights, and an \.onnx file"):
        check_graph(network.graph)

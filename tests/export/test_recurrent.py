"""Recurrent layers: one operator each, of any batch size and length, with PyTorch's answers."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

from export.errors import ExportError
from export.graph import export_graph, serialize
from export.session import Session
from train.family import ExampleInputs

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

FEATURES, HIDDEN = 5, 11
SHAPES = ((1, 1), (1, 500), (2, 2), (3, 1), (3, 500), (7, 33))
OPERATORS = {"LSTM", "GRU", "RNN"}
LAYERS: dict[str, Callable[..., nn.RNNBase]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *args, **kwargs: nn.RNN(*args, nonlinearity="relu", **kwargs),
}


class Sequence(nn.Module):
    """A layer whose results are all outputs, with the batch in front as clients send it."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self, x: torch.Tensor, h: torch.Tensor | None = None, c: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        state = tuple(part.transpose(0, 1) for part in (h, c) if part is not None)
        before = state if len(state) > 1 else next(iter(state), None)
        x = x if self.layer.batch_first else x.transpose(0, 1)
        y, after = self.layer(x, before)
        after = after if isinstance(after, tuple) else (after,)
        y = y if self.layer.batch_first else y.transpose(0, 1)
        return (y, *(part.transpose(0, 1) for part in after))


def layer(kind: str, layers: int, *, batch_first: bool, bidirectional: bool = False) -> nn.RNNBase:
    torch.manual_seed(layers)
    made = LAYERS[kind](
        FEATURES,
        HIDDEN,
        layers,
        batch_first=batch_first,
        bidirectional=bidirectional,
        dropout=0.1 * (layers > 1),
    )
    return made.eval()


def arrays(of: nn.RNNBase, batch: int, time: int, *, state: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(batch * time)
    shapes: dict[str, tuple[int, ...]] = {"x": (batch, time, FEATURES)}
    for name in ("h", "c")[: state * (2 if isinstance(of, nn.LSTM) else 1)]:
        shapes[name] = (batch, of.num_layers * (1 + of.bidirectional), HIDDEN)
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def example(of: nn.RNNBase, batch: int = 2, time: int = 3, *, state: bool) -> ExampleInputs:
    tensors = {name: torch.from_numpy(array) for name, array in arrays(of, batch, time, state=state).items()}
    outputs = ("y", "h_out", "c_out") if isinstance(of, nn.LSTM) else ("y", "h_out")
    axes = {name: {0: "batch", 1: "time"} if name == "x" and time > 1 else {0: "batch"} for name in tensors}
    return ExampleInputs(tensors, axes, outputs)


def operators(graph: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in graph.graph)


@pytest.mark.parametrize(
    ("kind", "layers", "batch_first", "bidirectional", "state"),
    [
        ("lstm", 1, True, False, False),
        ("lstm", 2, True, True, False),
        ("lstm", 2, False, False, True),
        ("gru", 1, False, False, True),
        ("gru", 2, True, True, True),
        ("tanh", 2, False, True, True),
        ("relu", 1, False, False, True),
        ("relu", 2, True, True, False),
    ],
)
def test_every_shape_gives_what_torch_gives(
    kind: str, layers: int, *, batch_first: bool, bidirectional: bool, state: bool
) -> None:
    recurrent = layer(kind, layers, batch_first=batch_first, bidirectional=bidirectional)
    module = Sequence(recurrent).eval()
    graph = export_graph(module, example(recurrent, state=state))
    found = operators(graph)
    assert sum(found[name] for name in OPERATORS) == layers
    assert not {"Loop", "Scan", "If", "Expand"}.intersection(found)
    for node in graph.graph:
        if node.op_type in OPERATORS:
            assert all(value is not None and value.is_initializer() for value in node.inputs[1:4])
    session = Session(serialize(graph))
    for batch, time in SHAPES:
        inputs = arrays(recurrent, batch, time, state=state)
        with torch.no_grad():
            expected = module(*(torch.from_numpy(array) for array in inputs.values()))
        for value, wanted in zip(session.run(inputs).values(), expected, strict=True):
            np.testing.assert_allclose(value, wanted.numpy(), rtol=1e-4, atol=2e-6)


def test_nodes_dont_grow_with_the_example_and_weights_are_stored_once() -> None:
    recurrent = layer("lstm", 2, batch_first=True)
    graphs = [
        export_graph(Sequence(recurrent).eval(), example(recurrent, batch, time, state=False))
        for batch, time in ((2, 2), (5, 60))
    ]
    assert operators(graphs[0]) == operators(graphs[1])
    assert len(graphs[0].graph) < 12
    weights = sum(parameter.numel() for parameter in recurrent.parameters())
    stored = sum(
        value.const_value.size for value in graphs[0].graph.initializers.values() if value.const_value
    )
    assert weights <= stored < weights + 16


def test_large_weights_are_folded_too() -> None:
    recurrent = nn.GRU(FEATURES, 200, batch_first=True, bidirectional=True).eval()
    graph = export_graph(Sequence(recurrent).eval(), example(recurrent, state=False))
    assert not {"Slice", "Split", "Unsqueeze"}.intersection(operators(graph))


class OwnZeros(nn.Module):
    """The tutorials' way: an initial state of zeros, and a subclass that calls its base."""

    class Layer(nn.LSTM):
        def forward(self, x: torch.Tensor, state: Any = None) -> Any:  # type: ignore[override]
            return super().forward(x * 2, state)

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.layer = self.Layer(FEATURES, HIDDEN, 1, batch_first=True, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(1, x.size(0), HIDDEN)
        y: torch.Tensor = self.layer(x, (zeros, zeros))[0]
        return y[:, -1]


@pytest.mark.parametrize("bias", [True, False])
def test_subclasses_and_states_of_zeros_are_plain_operators(*, bias: bool) -> None:
    module = OwnZeros(bias=bias).eval()
    x = torch.randn(2, 3, FEATURES)
    graph = export_graph(module, ExampleInputs({"x": x}, {"x": {0: "batch", 1: "time"}}, ("y",)))
    (lstm,) = [node for node in graph.graph if node.op_type == "LSTM"]
    assert len(lstm.inputs) == 4 if bias else 3
    assert "Shape" not in operators(graph)
    x = torch.randn(3, 40, FEATURES)
    with torch.no_grad():
        found, wanted = Session(serialize(graph)).run({"x": x.numpy()})["y"], module(x).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_fifty_steps_give_what_the_whole_sequence_gives(kind: str) -> None:
    recurrent = layer(kind, 2, batch_first=True)
    whole = Session(serialize(export_graph(Sequence(recurrent).eval(), example(recurrent, state=False))))
    one = example(recurrent, 2, 1, state=True)
    step = Session(serialize(export_graph(Sequence(recurrent).eval(), one)))
    inputs = arrays(recurrent, 3, 50, state=True)
    x = inputs.pop("x")
    state = {name: np.zeros_like(array) for name, array in inputs.items()}
    for row in range(50):
        outputs = step.run({"x": x[:, row : row + 1], **state})
        state = {name: outputs[f"{name}_out"] for name in state}
    expected = whole.run({"x": x})
    np.testing.assert_allclose(outputs["y"][:, 0], expected["y"][:, -1], rtol=1e-4, atol=2e-6)
    for name, array in state.items():
        np.testing.assert_allclose(array, expected[f"{name}_out"], rtol=1e-4, atol=2e-6)


def test_the_module_is_as_before_and_works_on() -> None:
    recurrent = layer("lstm", 2, batch_first=True)
    module = Sequence(recurrent).eval()
    before = copy.deepcopy(module)
    x = torch.randn(2, 9, FEATURES)
    with torch.no_grad():
        expected = before(x)[0]
        export_graph(module, example(recurrent, state=False))
        assert torch.equal(module(x)[0], expected)
    assert type(module.layer) is nn.LSTM
    assert module.layer.__dict__.keys() == before.layer.__dict__.keys()
    for new, old in itertools.zip_longest(module.parameters(), before.parameters()):
        assert torch.equal(new, old)
    module.train()(x)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(FEATURES, HIDDEN, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lengths = torch.tensor([3, 2])
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        state: torch.Tensor = self.layer(packed)[1]
        return state


@pytest.mark.parametrize(
    ("module", "complaint"),
    [
        (Packed(), "a packed sequence has no ONNX form; pad the rows"),
        (
            Sequence(nn.LSTM(FEATURES, HIDDEN, proj_size=4, batch_first=True)),
            "LSTM: proj_size has no ONNX form",
        ),
        (
            Sequence(nn.GRU(FEATURES, HIDDEN, 2, dropout=0.5, batch_first=True)).train(),
            r"GRU: dropout between the layers is on; call eval\(\)",
        ),
    ],
)
def test_what_has_no_operator_is_refused(module: nn.Module, complaint: str) -> None:
    lstm = nn.LSTM(FEATURES, HIDDEN, batch_first=True)
    with pytest.raises(ExportError, match=f"^{complaint}"):
        export_graph(module, example(lstm, state=False))

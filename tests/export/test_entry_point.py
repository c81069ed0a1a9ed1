"""`module:function`: what may be returned, what becomes of it, and whose fault a failure is."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch

from export.entry_point.data import parse_dynamic, read_labels, read_rows
from export.entry_point.load import EntryPointOptions, is_entry_point, load_entry_point
from export.entry_point.module import tensors_by_name
from export.errors import ExportError
from export.explanation import explain, recorded_guards
from export.graph import export_graph, serialize
from export.original import run_module
from export.session import Session

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from train.family import ServingGraph

HEAD = "import torch\nfrom torch import nn\n"


def make(returned: str) -> str:
    """Code of a function."""
    return f"{HEAD}def make(): return {returned}"


NET = f"""{HEAD}
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3))

    def forward(self, features):
        return self.layers(features)

def make():
    torch.manual_seed(0)
    return Net(), torch.randn(64, 4)

def few():
    return Net().eval(), torch.randn(2, 4)
"""


@pytest.fixture(autouse=True)
def _leave_no_imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", sys.path[:])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("net"):
            del sys.modules[name]


def load(
    folder: Path, code: str, function: str = "make", options: EntryPointOptions | None = None
) -> tuple[ServingGraph, list[str]]:
    (folder / "net.py").write_text(code)
    notes: list[str] = []
    found = load_entry_point(f"{folder}/net.py:{function}", options or EntryPointOptions(), notes.append)
    return found.graph, notes


def graph_answers(graph: ServingGraph, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return Session(serialize(export_graph(graph.module, graph.example))).run_in_batches(inputs)


def expect_refusal(expected: str, folder: Path, code: str, options: EntryPointOptions | None = None) -> None:
    with pytest.raises(ExportError) as refused:
        load(folder, code, options=options)
    assert re.search(expected, str(refused.value)), str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_module_becomes_a_graph_that_answers_the_same(tmp_path: Path) -> None:
    graph, notes = load(tmp_path, NET)
    answers = graph_answers(graph, graph.data.held_out)
    assert answers.keys() == {"output"}
    expected = run_module(graph.module, graph.data.held_out, ["output"])["output"]
    assert answers["output"] == pytest.approx(expected, abs=1e-6)
    assert graph.example.dynamic_axes == {"features": {0: "batch"}}
    assert (graph.metric.name, graph.metric.score(answers, graph.data.targets)) == ("agreement", 1)
    assert graph.metric.score({"output": -answers["output"]}, graph.data.targets) < 0.5
    assert notes == [
        "note: Net was in training mode; set to evaluation (dropout off, batch norm by its averages)"
    ]


def test_a_dotted_module_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netpackage").mkdir()
    (tmp_path / "netpackage/nets.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    found = load_entry_point("netpackage.nets:make", EntryPointOptions(), print)
    assert found.name == "nets"
    assert found.provenance["entry_point"] == "netpackage.nets:make"
    assert found.provenance["parameters"] == 4 * 8 + 8 + 8 * 3 + 3


def test_a_file_imports_its_neighbours_but_shadows_nobody(tmp_path: Path) -> None:
    (tmp_path / "netneighbour.py").write_text(NET)
    (tmp_path / "pydoc_data.py").write_text("raise RuntimeError")
    load(tmp_path, "from netneighbour import make")
    assert sys.path[-1] == str(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("net.py:make", True),
        ("a.b:make", True),
        ("/some/where/net.py:make", True),
        ("runs/mobilenet", False),
        ("net.py", False),
        (":make", False),
        ("net.py:", False),
        ("runs/10:30", False),
    ],
)
def test_what_is_an_entry_point(text: str, *, expected: bool) -> None:
    assert is_entry_point(text) is expected


def test_calibration_and_held_out_rows_are_halves_where_there_are_enough(tmp_path: Path) -> None:
    data = load(tmp_path, NET)[0].data
    assert (len(data.calibration["features"]), len(data.held_out["features"])) == (32, 32)
    assert not np.array_equal(data.calibration["features"], data.held_out["features"])
    data = load(tmp_path, NET, "few")[0].data
    assert (len(data.calibration["features"]), len(data.held_out["features"])) == (0, 2)


NAMED_INPUTS = f"""{HEAD}
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(30, 8)

    def forward(self, input_ids, attention_mask=None, token_types=None, *, scale):
        hidden = self.tokens(input_ids) * scale[:, None, None] + token_types[..., None]
        if attention_mask is not None:
            hidden = hidden * attention_mask[..., None]
        return {{"hidden": hidden, "mean": hidden.mean(1)}}

def make():
    rows = torch.arange(80).reshape(8, 10)
    return Net().eval(), {{"token_types": rows % 2, "input_ids": rows % 30, "scale": torch.linspace(1, 2, 8)}}
"""


def test_named_inputs_may_skip_parameters_and_name_dynamic_axes(tmp_path: Path) -> None:
    options = EntryPointOptions.parse(["input_ids:1=time", "token_types:1=time"])
    graph, _ = load(tmp_path, NAMED_INPUTS, options=options)
    assert graph.example.outputs == ("hidden", "mean")
    assert [other["input_ids"].shape for other in graph.data.other_shapes] == [(8, 5), (8, 20)]
    session = Session(serialize(export_graph(graph.module, graph.example)))
    for inputs in (graph.data.held_out, *graph.data.other_shapes):
        expected = run_module(graph.module, inputs, graph.example.outputs)
        for name, values in session.run(inputs).items():
            assert values == pytest.approx(expected[name], abs=1e-6)


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor | None


@dataclass
class Result:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


T = torch.ones(2)


@pytest.mark.parametrize(
    ("result", "names"),
    [
        (T, ["output"]),
        ((T, None, T), ["output_0", "output_2"]),
        ([T], ["output_0"]),
        ({"a": T, "b": T}, ["a", "b"]),
        (Pair(T, None), ["first"]),
        (Pair(T, T), ["first", "second"]),
        (Result(T), ["logits"]),
    ],
)
def test_outputs_get_the_names_that_they_have(result: Any, names: list[str]) -> None:
    assert list(tensors_by_name(result)) == names


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ((T, (T, T)), "output 'output_1' is a tuple"),
        ({"logits": T, "cache": [T]}, "output 'cache' is a list"),
        ({"loss": 0.5}, "output 'loss' is a float"),
        (3, "returned a int, expected tensors"),
        ({}, "returned an empty dict"),
    ],
)
def test_nested_outputs_are_refused(result: Any, expected: str) -> None:
    with pytest.raises(ExportError, match=expected):
        tensors_by_name(result)


def test_an_input_given_twice_is_two_inputs(tmp_path: Path) -> None:
    code = f"""{HEAD}
class Net(nn.Module):
    def forward(self, a, b):
        return a * 2 + b
def make():
    rows = torch.ones(1, 3).expand(4, 3)
    return Net().eval(), (rows, rows)
"""
    graph, _ = load(tmp_path, code)
    inputs = {"a": np.full((5, 3), 1, np.float32), "b": np.full((5, 3), 10, np.float32)}
    assert graph_answers(graph, inputs)["output"].tolist() == [[12.0] * 3] * 5


@pytest.mark.parametrize(
    ("kind", "name"), [("half", "float16"), ("bfloat16", "bfloat16"), ("double", "float64")]
)
def test_other_floats_become_float32_and_that_is_said(kind: str, name: str, tmp_path: Path) -> None:
    code = NET + f"\ndef make():\n    return Net().eval().{kind}(), torch.randn(4, 4).{kind}()\n"
    graph, notes = load(tmp_path, code)
    assert graph.example.tensors["features"].dtype == torch.float32
    assert notes == [f"note: Net has torch.{name} weights; made float32"]


@pytest.mark.parametrize(("channels", "image"), [(1, "photo"), (3, "photo"), (4, None)])
def test_pixels_are_seen(channels: int, image: str | None, tmp_path: Path) -> None:
    code = f"""{HEAD}
class Net(nn.Module):
    def forward(self, photo):
        return photo.float().mean((1, 2))
def make():
    return Net(), torch.randint(0, 256, (4, 8, 8, {channels}), dtype=torch.uint8)
"""
    assert load(tmp_path, code)[0].image == image


def test_a_serving_graph_is_taken_as_it_is(tmp_path: Path) -> None:
    code = f"""{NET}
from dataclasses import replace
from export.entry_point.load import EntryPointOptions, load_entry_point

def mine():
    found = load_entry_point(__file__ + ":few", EntryPointOptions(), print)
    return replace(found.graph, suffix="_x")
"""
    graph, _ = load(tmp_path, code, "mine")
    assert graph.suffix == "_x"
    with pytest.raises(ExportError, match=r"returned a ServingGraph, which has .* drop --dynamic"):
        load(tmp_path, code, "mine", EntryPointOptions.parse(["features:1=n"]))


RANDOM = f"""{HEAD}
class Net(nn.Module):
    def forward(self, x):
        return x + torch.rand(1)

def make():
    return Net(), torch.ones(2, 4)
"""


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("x = 1 +\n", r"net.py can't be imported: .*net.py:1: SyntaxError: "),
        ("import nothing_of_that_name", r"net.py:1 .*: ModuleNotFoundError: No module named 'nothing_of"),
        ("def f():\n    return 1 / 0\nf()", r"net.py:2 \(`return 1 / 0`\): ZeroDivisionError"),
        ("raise SystemExit(2)", "ends the program; put what a script does under __name__"),
        ("def makes(): pass", "no function 'make' in .*net.py; it has makes"),
        ("", "no function 'make' in .*net.py, nor any other"),
        ("make = 3", "is a int, expected a function"),
        (f"{HEAD}make = nn.ReLU()", "is a ReLU, expected a function that returns it"),
        ("def make(size, *, seed, depth=1): pass", "takes size, seed; it is called without arguments"),
        ("def make():\n    open('/nowhere')", r"failed: .*net.py:2 \(.*FileNotFoundError"),
        ("def make(): return 3", r"returned a int; expected \(module, inputs\)"),
        (make("nn.ReLU()"), r"returned a ReLU; expected \(module, inputs\)"),
        (make("1, 2, 3"), r"returned a tuple of int, int, int; expected"),
        (make("nn.ReLU(), ()"), "no inputs"),
        (make("nn.ReLU(), [[1.0], [2.0]]"), r"inputs\[0\] is a list, expected a tensor"),
        (make("nn.ReLU(), torch.ones(1, 3)"), r"inputs are 'input' \[1, 3\]; .* at least 2"),
        (make("nn.ReLU(), torch.tensor(1.0)"), r"inputs are 'input' \[\]; .* at least 2"),
        (
            make("nn.Bilinear(2, 2, 2), (torch.ones(2, 2), torch.ones(3, 2))"),
            r"'input1' \[2, 2\], 'input2' \[3, 2\]; expected the same number of rows",
        ),
        (make("nn.ReLU(), (torch.ones(2, 2), torch.ones(2, 2))"), "2 inputs, but ReLU.forward"),
        (
            make("nn.Bilinear(2, 2, 2), {'input1': torch.ones(2, 2), 'b': torch.ones(2, 2)}"),
            "inputs 'b': forward takes input1, input2; name the inputs as it does",
        ),
        (make("nn.Linear(3, 2), torch.ones(2, 4)"), "run on its own example: .*multiplied"),
        (make("nn.Flatten(0), torch.ones(2, 4)"), r"'output' has shape \[8\] for 2 rows"),
        (make("nn.Softmax(1), torch.full((2, 4), -torch.inf)"), "NaN or infinity for 2 of 2"),
        (make("nn.Linear(2, 2, device='meta'), torch.ones(2, 2)"), "meta device and has no w"),
        (make("nn.Module(), torch.ones(2, 4)"), "NotImplementedError"),
        (RANDOM, "differs from one run to the next"),
    ],
)  # fmt: skip
def test_what_cannot_be_taken_is_said(code: str, expected: str, tmp_path: Path) -> None:
    expect_refusal(expected, tmp_path, code)


def test_a_missing_module_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text, expected in {
        "no/net.py:make": "no/net.py: no such file",
        "nettles.nothing:make": "no module 'nettles.nothing' in .*; name a file as path/to/net.py:function",
    }.items():
        with pytest.raises(ExportError, match=expected):
            load_entry_point(text, EntryPointOptions(), print)


def test_dynamic_axes_are_parsed() -> None:
    assert parse_dynamic(["a:1=time", "input:0:2=width", "a:2=width"]) == {
        "a": {1: "time", 2: "width"}, "input:0": {2: "width"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("a", "expected INPUT:AXIS=NAME"),
        ("a:time=1", "expected INPUT:AXIS=NAME"),
        ("a:0=rows", "axis 0 is the batch"),
        ("a:-1=time", "axis 0 is the batch"),
        ("a:1=batch", "axis 0 is the batch"),
    ],
)
def test_a_wrong_dynamic_axis_is_refused(word: str, expected: str) -> None:
    with pytest.raises(ExportError, match=f"--dynamic {word}: {expected}"):
        parse_dynamic([word])


@pytest.mark.parametrize(
    ("dynamic", "expected"),
    [
        ("other:1=n", "the inputs are features"),
        ("features:2=n", r"has shape \[64, 4\]"),
        ("features:1=n", "runs with 4 there, but with neither half"),
    ],
)
def test_a_dynamic_axis_that_cannot_be_is_refused(dynamic: str, expected: str, tmp_path: Path) -> None:
    expect_refusal(f"--dynamic {dynamic}: .*{expected}", tmp_path, NET, EntryPointOptions.parse([dynamic]))


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, allow_pickle=False, **arrays)
    return path


def test_rows_and_targets_come_from_a_file(tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(size=(40, 4))  # FP64, as numpy makes them
    expected = run_module(load(tmp_path, NET)[0].module, {"features": features.astype(np.float32)}, ["o"])
    targets = expected["o"].argmax(axis=1)
    targets[20:25] = (targets[20:25] + 1) % 3
    (tmp_path / "labels.txt").write_text("cat\ndog\n bird\n")
    options = EntryPointOptions.parse(
        [],
        data=saved(tmp_path / "rows.npz", features=features, targets=targets),
        labels=tmp_path / "labels.txt",
    )
    graph, _ = load(tmp_path, NET, options=options)
    assert (graph.data.labels, graph.metric.name) == (("cat", "dog", "bird"), "accuracy")
    assert graph.data.calibration["features"] == pytest.approx(features[:20])
    assert graph.data.held_out["features"].dtype == np.float32
    answers = run_module(graph.module, graph.data.held_out, ["output"])
    assert graph.metric.score(answers, graph.data.targets) == 15 / 20


ROWS = np.ones((40, 4), np.float32)


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"x": ROWS}, "--data holds 'x', the network takes 'features'"),
        ({"features": ROWS[:, :3]}, r"'features' has shape \[40, 3\], the network takes \[-1, 4\]"),
        ({"features": ROWS.astype(int)}, "'features' is int64, the network takes float32"),
        ({"features": ROWS[:1]}, "has 1 rows, expected at least 2"),
        (
            {"features": ROWS, "targets": np.zeros(39, int)},
            r"'targets' is int64 \[39\], expected class indices",
        ),
        ({"features": ROWS, "targets": np.zeros(40)}, "'targets' is float64"),
        (
            {"features": ROWS, "targets": np.full(40, 3)},
            "targets are 3 to 3, but output 'output' has 3 classes",
        ),
    ],
)
def test_rows_that_do_not_fit_are_refused(arrays: dict[str, Any], expected: str, tmp_path: Path) -> None:
    options = EntryPointOptions.parse([], data=saved(tmp_path / "rows.npz", **arrays))
    expect_refusal(expected, tmp_path, NET, options)


def test_files_that_are_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("a\n\nb\n")
    with pytest.raises(
        ExportError, match=r"is no \.npz file of plain arrays; expected arrays .* numpy\.savez"
    ):
        read_rows(path)
    with pytest.raises(ExportError, match=r"--data .*nowhere: No such file"):
        read_rows(tmp_path / "nowhere")
    with pytest.raises(ExportError, match=r"--labels .*nowhere: No such file"):
        read_labels(tmp_path / "nowhere")
    with pytest.raises(ExportError, match="line 2 is empty"):
        read_labels(path)
    path.write_bytes(b"caf\xe9")
    with pytest.raises(ExportError, match="is not UTF-8"):
        read_labels(path)
    np.save(path, ROWS)
    with pytest.raises(ExportError, match="one array without a name"):
        read_rows(path.with_suffix(".npy"))


def test_without_classes_the_metric_is_the_lowest_cosine(tmp_path: Path) -> None:
    code = (
        f"{HEAD}class Net(nn.Module):\n"
        "    def forward(self, x):\n        return {'a': x.mean(1), 'b': x * 2, 'c': x > 0}\n"
        "def make(): return Net(), torch.randn(6, 5)\n"
    )
    graph, _ = load(tmp_path, code.replace("x * 2", "x[:, None] * 2"))
    answers = run_module(graph.module, graph.data.held_out, graph.example.outputs)
    assert graph.metric.name == "cosine"
    assert graph.metric.score(answers, graph.data.targets) == pytest.approx(1)
    answers["b"][:3] = 0
    expected = np.sqrt((graph.data.held_out["x"][3:] ** 2).sum() / (graph.data.held_out["x"] ** 2).sum())
    assert graph.metric.score(answers, graph.data.targets) == pytest.approx(expected)
    assert load(tmp_path, code)[0].metric.name == "agreement"  # b is [n, 5] here
    cosine = EntryPointOptions(metric="cosine")
    assert load(tmp_path, code, options=cosine)[0].metric.name == "cosine"


UNTRACEABLE = f"""{HEAD}
class Branch(nn.Module):
    def forward(self, x):
        if x.sum() > 0:  # branch
            return x * 2
        return x

class Loop(nn.Module):
    def forward(self, x):
        for step in range(int(x.max())):  # loop
            x = x + step
        return x

class Rows(nn.Module):
    def forward(self, x):
        return torch.stack([row * 2 for row in x])  # rows

class Operator(nn.Module):
    def forward(self, x):
        return torch.linalg.eigvalsh(x[:, None] * x[:, :, None])  # operator

def branch(): return Branch(), torch.rand(2, 4)
def loop(): return Loop(), torch.rand(2, 4)
def rows(): return Rows(), torch.rand(2, 4)
def operator(): return Operator(), torch.rand(2, 4)
"""


@pytest.mark.filterwarnings("ignore")  # torch's exporter calls what torch deprecates
@pytest.mark.parametrize(
    ("function", "expected", "advice"),
    [
        ("branch", "forward decides in Python by what a tensor holds", "torch.where"),
        ("loop", "forward decides in Python by what a tensor holds", "a fixed number of times"),
        (
            "rows",
            "input 'x': axis 0 should be dynamic, but forward fixes it to the example's 2",
            "whole axis",
        ),
        ("operator", "torch's operator _linalg_eigh has no translation", "return what goes into it"),
    ],
)
def test_what_torch_cannot_trace_is_explained(
    function: str, expected: str, advice: str, tmp_path: Path
) -> None:
    graph, _ = load(tmp_path, UNTRACEABLE, function)
    with recorded_guards() as guards, pytest.raises(torch.onnx.OnnxExporterError) as refused:
        torch.onnx.export(
            graph.module,
            tuple(graph.example.tensors.values()),
            dynamo=True,
            dynamic_shapes=({0: "batch"},),
            verbose=False,
        )
    message = explain(refused.value, guards)
    assert message.startswith(expected)
    assert advice in message
    number = next(n for n, line in enumerate(UNTRACEABLE.splitlines(), 1) if line.endswith(f"# {function}"))
    assert f"net.py:{number}" in message


def test_nothing_is_printed_of_what_torch_records(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    graph, _ = load(tmp_path, UNTRACEABLE, "branch")
    capfd.readouterr()
    with recorded_guards(), pytest.raises(ExportError):
        export_graph(graph.module, graph.example)
    assert capfd.readouterr() == ("", "")

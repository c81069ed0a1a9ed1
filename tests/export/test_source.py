"""What the command line names: flags of the other kind of source, and forgotten functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from export.entry_point.data import EntryPointOptions, other_shapes, serving_data
from export.entry_point.load import load_entry_point
from export.errors import ExportError
from export.source import load_source

if TYPE_CHECKING:
    from pathlib import Path

    from train.family import ServingGraph


NET = """
import torch
from torch import nn

def make(): return nn.Linear(4, 3), torch.randn(64, 4)

def few(): return nn.Linear(4, 3), torch.randn(2, 4)
"""

TWO_LENGTHS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(1, 3)

    def forward(self, ids, mask):
        return self.out((ids * mask).sum(1, keepdim=True))

def make():
    return Net(), {"ids": torch.randn(40, 6), "mask": torch.ones(40, 6)}
"""


def load(folder: Path, code: str) -> ServingGraph:
    (folder / "net.py").write_text(code)
    return load_entry_point(f"{folder}/net.py:make", EntryPointOptions(), lambda _: None).graph


def refused(text: str, data_dir: Path | None = None, **flags: Any) -> str:
    with pytest.raises(ExportError) as caught:
        load_source(text, data_dir, EntryPointOptions(**flags), lambda _: None)
    return str(caught.value)


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ({"metric": "cosine"}, "--metric"),
        ({"labels": ("cat",)}, "--labels"),
        ({"dynamic_axes": {"x": {1: "n"}}}, "--dynamic"),
        ({"rows": {}, "metric": "cosine"}, "--data, --metric"),
    ],
)
def test_flags_of_a_function_are_refused_with_a_checkpoint(
    checkpoint: Path, flags: dict[str, Any], names: str
) -> None:
    message = refused(str(checkpoint), **flags)
    assert message.startswith(f"{names}: of module:function only; {checkpoint} is a checkpoint")


def test_pixels_are_refused_with_a_checkpoint(checkpoint: Path) -> None:
    options = EntryPointOptions.parse([], pixels="unit")
    assert refused(str(checkpoint), pixels=options.pixels).startswith("--pixels: of module:function only")


def test_a_data_folder_is_refused_with_a_function(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    message = refused(f"{tmp_path}/net.py:make", tmp_path)
    assert message.startswith(f"--data-dir {tmp_path}: is of a checkpoint")


def test_a_forgotten_function_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net.py").write_text(
        f"{NET}\ndef _own(): pass\ndef other(path): pass\ndef two(*, a=1): pass\n"
    )
    (tmp_path / "broken.py").write_text("def (")
    expected = f"{tmp_path}/net.py is a Python module: name its function that returns the network, "
    assert refused(f"{tmp_path}/net.py") == f"{expected}{tmp_path}/net.py:function; net.py has make, few, two"
    assert refused(f"{tmp_path}/net.py:") == refused(f"{tmp_path}/net.py")
    assert refused(f"{tmp_path}/broken.py").endswith("broken.py:function")
    assert refused(f"{tmp_path}/nowhere.py") == f"{tmp_path}/nowhere.py: no such file"
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "netsource.py").write_text(NET)
    assert "netsource:function; netsource.py has make, few" in refused("netsource")
    assert "no such checkpoint folder" in refused("no.such.netsource")


def test_another_input_of_the_same_length_is_named(tmp_path: Path) -> None:
    graph = load(tmp_path, TWO_LENGTHS)
    rows = dict(graph.data.held_out)
    with pytest.raises(ExportError, match="'mask' is as long there: name it too, --dynamic mask:1=time"):
        other_shapes(graph.module, rows, graph.example.outputs, {"ids": {1: "time"}})


def test_rows_of_the_right_type_are_not_copied(tmp_path: Path) -> None:
    graph = load(tmp_path, NET)
    rows = {"input": np.ones((40, 4), np.float32)}
    options = EntryPointOptions(rows=rows)
    data, _ = serving_data(graph.module, graph.data.held_out, graph.example.outputs, options)
    assert np.shares_memory(data.held_out["input"], rows["input"])

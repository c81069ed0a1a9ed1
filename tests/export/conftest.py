"""A small trained checkpoint, and its export by the real command line, once per session."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from export.graph import export_graph
from train import mobilenet
from train.checkpoint import load_checkpoint
from train.loop import Trainer

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import nn

    from train.family import ServingData, ServingGraph

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Exported:
    """A model repository that the command line wrote."""

    repository: Path
    printed: str

    @property
    def entry(self) -> Path:
        return self.repository / "mobilenet"

    @property
    def version(self) -> Path:
        return self.entry / "1"


@dataclass(frozen=True)
class Network:
    """A network, its data, and its graph as translated; passes change graphs in place, so clone it first."""

    serving: ServingGraph
    graph: ir.Model

    @property
    def module(self) -> nn.Module:
        return self.serving.module

    @property
    def data(self) -> ServingData:
        return self.serving.data


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MobileNetV2 of width 0.25 after 94 steps, right on about 70 % of the sample's test images."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    recipe = mobilenet.Recipe(
        sample=True, train_rows=1500, epochs=2, batch_size=32, learning_rate=4e-3,
        shift=0, flip=False, label_smoothing=0.0, width=0.25,
    )  # fmt: skip
    threads = torch.get_num_threads()
    # A step takes 0.04 s on one thread, and seconds where several wait for each other on a busy machine.
    torch.set_num_threads(1)
    try:
        task, cpu = mobilenet.task(recipe, None), torch.device("cpu")
        Trainer(task, recipe, folder, family="mobilenet", device=cpu).fit()
    finally:
        torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="session")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    repository = tmp_path_factory.mktemp("export") / "models"
    # Hardly trained, the network is unsure of so many images that int8 turns 3 or 4 % of its answers around.
    flags = ("--to", str(repository), "--target", "x86-vnni", "--tolerance", "1.5")
    command = [sys.executable, "-m", "export", str(checkpoint), *flags]
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    return Exported(repository, done.stdout)


@pytest.fixture(scope="session")
def network(checkpoint: Path) -> Network:
    (serving,) = mobilenet.serving_graphs(load_checkpoint(checkpoint), None)
    return Network(serving, export_graph(serving.module, serving.example))

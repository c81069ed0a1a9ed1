"""`--pixels`: a network of normalized floats, exported as one that takes the pixels of any image."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from PIL import Image, ImageOps
from torch import nn
from torch.nn import functional

from export.__main__ import main
from export.entry_point.load import EntryPointOptions, load_entry_point
from export.entry_point.pixels import SCALINGS, Normalize, parse_scaling, to_pixels
from export.errors import ExportError
from export.graph import export_graph, serialize
from export.original import run_module
from export.session import Session
from serve.client import _SCALINGS
from serve.pb import model_config_pb2
from train.data.images import load_image_data

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from train.family import ServingGraph

SIZE = 32
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

NET = """
from pathlib import Path
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, channels=3):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(),
            nn.MaxPool2d(3), nn.Flatten(),
        )
        self.classifier = nn.Linear(24 * 16, 10)

    def forward(self, x):
        return self.classifier(self.features(x))

def make():
    torch.manual_seed(0)
    net = Net().eval()
    net.classifier.load_state_dict(torch.load(Path(__file__).with_name("classifier.pt")))
    return net, torch.load(Path(__file__).with_name("rows.pt"))

def noise():
    return Net().eval(), torch.full((2, 3, 32, 32), 3.0)

def grey():
    return Net(channels=1).eval(), torch.rand(2, 1, 32, 32)

def wide():
    return nn.Conv2d(3, 4, 3).eval(), torch.zeros(2, 3, 32, 40)

def both():
    return nn.PairwiseDistance(), (torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 32, 32))

class Masked(Net):
    def forward(self, weights, image):
        return super().forward(image) * weights

def masked():
    return Masked().eval(), {"image": torch.zeros(2, 3, 32, 32), "weights": torch.ones(2, 10)}

def last():
    return nn.Flatten(), torch.zeros(2, 32, 32, 3)

def missing():
    return Net().eval(), torch.full((2, 3, 32, 32), torch.nan)

class Bytes(Net):
    def forward(self, photo):
        return super().forward(photo.permute(0, 3, 1, 2) / 255)

def pixels():
    return Bytes().eval(), torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
"""


def coloured(images: np.ndarray) -> list[Image.Image]:
    """The sample's grey pictures, UINT8 [n, 28, 28, 1], in blue to yellow and a size of their own each."""
    sizes = [(28, 28), (45, 37), (64, 90), (120, 100)]
    return [
        ImageOps.colorize(Image.fromarray(image[..., 0]), "navy", "khaki").resize(
            sizes[index % len(sizes)], Image.Resampling.BICUBIC
        )
        for index, image in enumerate(images)
    ]


def fitted(pictures: Sequence[Image.Image]) -> np.ndarray:
    """Resize the shorter side and crop the middle, UINT8 [n, 32, 32, 3]."""
    return np.stack(
        [np.asarray(ImageOps.fit(one, (SIZE, SIZE), Image.Resampling.BILINEAR)) for one in pictures]
    )


def normalized(pixels: np.ndarray) -> torch.Tensor:
    """As torchvision's ToTensor and Normalize do: FP32 [n, 3, height, width]."""
    unit = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (unit - MEAN[:, None, None]) / STD[:, None, None]


@dataclass(frozen=True)
class Trained:
    """The network of a file, and real images that it has not seen."""

    folder: Path
    module: nn.Module
    pictures: list[Image.Image]
    labels: np.ndarray


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Random filters below a layer that is fitted in closed form to 800 images."""
    folder = tmp_path_factory.mktemp("network")
    (folder / "net.py").write_text(NET)
    scope: dict[str, Any] = {"__file__": str(folder / "net.py")}
    exec(NET, scope)  # noqa: S102 - the code above
    data = load_image_data("fashion_mnist", data_dir=None, sample=True)
    rows = normalized(fitted(coloured(data.train_images[:800])))
    torch.manual_seed(0)
    net = scope["Net"]().eval()
    with torch.no_grad():
        features = torch.cat([net.features(rows), torch.ones(800, 1)], dim=1).double()
        wanted = features.T @ functional.one_hot(torch.from_numpy(data.train_labels[:800]), 10).double()
        weights = torch.linalg.solve(features.T @ features + 1e-3 * torch.eye(features.shape[1]), wanted)
    torch.save({"weight": weights[:-1].T.float(), "bias": weights[-1].float()}, folder / "classifier.pt")
    torch.save(rows[:64].clone(), folder / "rows.pt")
    return Trained(folder, scope["make"]()[0], coloured(data.test_images[:120]), data.test_labels[:120])


def load(trained: Trained, function: str, *dynamic: str, **flags: Any) -> tuple[ServingGraph, list[str]]:
    notes: list[str] = []
    options = EntryPointOptions.parse(dynamic, **flags)
    found = load_entry_point(f"{trained.folder}/net.py:{function}", options, notes.append)
    return found.graph, notes


def test_the_scalings_are_those_of_the_client() -> None:
    assert SCALINGS.keys() == _SCALINGS.keys()
    for name, (mean, divisor) in _SCALINGS.items():
        assert np.allclose(SCALINGS[name].mean, mean)
        assert np.allclose(SCALINGS[name].std, divisor)


def test_images_of_any_size_get_torch_s_answers(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--pixels", "imagenet", "--target", "x86-vnni", "--precision", "fp32,int8", "--tolerance", "5")
    assert main([f"{trained.folder}/net.py:make", "--to", str(tmp_path), *flags]) == 0
    assert "turned back" not in capsys.readouterr().out
    version = tmp_path / "net" / "1"
    assert json.loads((version / "report.json").read_text())["pixels"] == "imagenet"
    pixels = fitted(trained.pictures)
    with torch.no_grad():
        expected = trained.module(normalized(pixels)).numpy()
    assert (expected.argmax(axis=1) == trained.labels).mean() > 0.6
    session = Session((version / "model.onnx").read_bytes())
    assert session.run({"x": pixels})["output"] == pytest.approx(expected, abs=1e-4)
    quantized = Session((version / "model_int8.onnx").read_bytes())
    for graph, least in ((session, 1), (quantized, 0.9)):
        answers = [graph.run({"x": np.asarray(one)[None]})["output"][0] for one in trained.pictures]
        assert np.mean(np.argmax(answers, axis=1) == expected.argmax(axis=1)) >= least


@pytest.mark.parametrize("scaling", ["none", "unit", "inception", "imagenet", "0.5,0.4,0.3/0.25,0.2,0.1"])
def test_normalized_images_become_the_pixels_that_they_were(scaling: str) -> None:
    pixels = np.arange(256 * 3, dtype=np.uint8).reshape(1, 16, 16, 3)
    found = parse_scaling(scaling)
    images = Normalize(found)(torch.from_numpy(pixels)).numpy()
    mean, std = (np.array(numbers)[:, None, None] for numbers in (found.mean, found.std))
    assert images == pytest.approx((pixels[0].transpose(2, 0, 1)[None] - mean) / std, abs=1e-5)
    notes: list[str] = []
    assert np.array_equal(to_pixels("x", images, found, notes.append), pixels)
    assert np.array_equal(to_pixels("x", images.astype(np.float16), found, notes.append), pixels)
    assert not notes


def test_the_rows_that_judge_are_pixels(trained: Trained) -> None:
    graph, notes = load(trained, "make", pixels="imagenet")
    rows = torch.load(trained.folder / "rows.pt")
    held_out = graph.data.held_out["x"]
    assert (graph.image, str(held_out.dtype), held_out.shape) == ("x", "uint8", (32, SIZE, SIZE, 3))
    answers = run_module(graph.module, graph.data.held_out, ["output"])["output"]
    with torch.no_grad():
        assert answers == pytest.approx(trained.module(rows[32:]).numpy(), abs=1e-4)
    assert not notes


@pytest.mark.parametrize("normal", [False, True])
def test_rows_of_a_file_may_be_pixels_or_normalized(
    trained: Trained, *, normal: bool, tmp_path: Path
) -> None:
    pixels = fitted(trained.pictures[:40])
    path = tmp_path / "rows.npz"
    np.savez(path, x=normalized(pixels).numpy() if normal else pixels, targets=trained.labels[:40])
    graph, notes = load(trained, "noise", pixels="imagenet", data=path)
    assert np.array_equal(graph.data.held_out["x"], pixels[20:])
    assert (graph.metric.name, notes) == ("accuracy", [])


@pytest.mark.parametrize(
    ("function", "scaling", "expected"),
    [
        ("noise", "imagenet", ["100% lie outside of 0 to 255 and are clipped"]),
        ("make", "inception", ["lie outside of 0 to 255 and are clipped", "lie between two pixels"]),
        ("make", "none", ["lie outside of 0 to 255 and are clipped", "lie between two pixels"]),
        ("wide", "unit", ["32 pixels high and 40 wide", "clients send this size"]),
    ],
)
def test_what_looks_wrong_is_mentioned(
    trained: Trained, function: str, scaling: str, expected: list[str]
) -> None:
    (note,) = load(trained, function, pixels=scaling)[1]
    assert note.startswith("note: ")
    assert all(words in note for words in expected), note


def test_the_image_is_found_among_other_inputs(trained: Trained) -> None:
    graph, _ = load(trained, "masked", pixels="unit")
    assert graph.image == "image"
    white: dict[str, np.ndarray] = {
        "image": np.full((3, SIZE, SIZE, 3), 255, np.uint8),
        "weights": np.full((3, 10), 2, np.float32),
    }
    answers = Session(serialize(export_graph(graph.module, graph.example))).run(white)["output"]
    with torch.no_grad():
        expected = graph.module.module(torch.full((3, 10), 2.0), torch.ones(3, 3, SIZE, SIZE))  # type: ignore[operator]
    assert answers == pytest.approx(expected.numpy(), abs=1e-4)


def test_a_network_of_pixels_needs_no_flag(trained: Trained, tmp_path: Path) -> None:
    command = (f"{trained.folder}/net.py:pixels", "--to", str(tmp_path), "--precision", "fp32")
    assert main(command) == 0
    session = Session((tmp_path / "net/1/model.onnx").read_bytes())
    answers = session.run({"photo": np.asarray(trained.pictures[2])[None]})
    assert answers["output"].shape == (1, 10)
    assert main((*command, "--encoded-image")) == 0
    config = model_config_pb2.ModelConfig()
    text_format.Parse((tmp_path / "net" / "config.pbtxt").read_text(), config)
    assert config.parameters["encoded_image"].string_value == "photo"


@pytest.mark.parametrize(
    ("function", "scaling", "expected"),
    [
        ("both", "unit", "inputs 'x1', 'x2' may all be images, and only one"),
        ("last", "unit", r"no input is FP32 \[n, 1 or 3, height, width\]: 'input' .*32, 32, 3\]"),
        ("pixels", "unit", "input 'photo' takes UINT8 pixels already; drop the flag"),
        ("grey", "imagenet", "is for 3 channels, the network's image has 1: give MEAN/STD, 1 "),
        ("missing", "unit", "the example 'x' holds NaN or infinity in row 0"),
    ],
)
def test_what_cannot_become_pixels_is_refused(
    trained: Trained, function: str, scaling: str, expected: str
) -> None:
    with pytest.raises(ExportError) as refused:
        load(trained, function, pixels=scaling)
    assert re.search(expected, str(refused.value)), str(refused.value)


def test_channels_are_no_dynamic_axis(trained: Trained) -> None:
    with pytest.raises(ExportError, match="--dynamic x:3=width: with --pixels the axes of 'x' are"):
        load(trained, "make", "x:2=height", "x:3=width", pixels="unit")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("torchvision", "expected none, unit, inception, imagenet, or MEAN/STD of pixels from 0 to 1"),
        ("0.5,x/1", "expected none, unit"),
        ("0.5", "expected none, unit"),
        ("0.5,0.5/0.5,0.5", "2 means and 2 deviations; expected one each, or three"),
        ("0.5/0.5,0.5,0.5", "1 means and 3 deviations"),
        ("123.675,116.28,103.53/58.395,57.12,57.375", "divide numbers for 0 to 255 by 255"),
        ("0.5/0", "deviations above 0"),
        ("nan/1", "means from 0 to 1"),
    ],
)
def test_a_wrong_scaling_is_refused(text: str, expected: str) -> None:
    with pytest.raises(ExportError, match=f"^--pixels {re.escape(text)}: .*{expected}"):
        parse_scaling(text)

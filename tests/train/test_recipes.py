"""The recipes for a GPU run end to end on a CPU, with networks of full size and next to no data."""

import lzma
import shlex
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train.__main__ import main
from train.checkpoint import load_checkpoint, load_info
from train.data import ett, tinyshakespeare
from train.family import FAMILIES, load_family

PHOTOS = "--data folder --image-size 32 --batch-size 4"
FLAGS = {
    "mobilenet": PHOTOS,
    "resnet": PHOTOS,
    "simplecnn": PHOTOS,
    "lstm": "--data csv --batch-size 8 --epoch-windows 24",
    "gpt": "--data file --batch-size 2 --steps-per-epoch 3",
    "bert": "--sample --train-rows 16 --batch-size 4 --context 8",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two classes of noise, 2 200 hours of ETTh1 and 10 000 characters of Shakespeare."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 4)):
        for label in ("one", "two"):
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (40, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{number}.png")
    with lzma.open(ett.REPOSITORY_COPY / "ETTh1.csv.xz", "rt") as stream:
        (folder / "hours.csv").write_text("".join(line for line, _ in zip(stream, range(2201), strict=False)))
    text = (tinyshakespeare.SAMPLE / tinyshakespeare.FILE).read_text()
    (folder / "text.txt").write_text(text[:10_000])
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_recipe_runs_for_a_few_steps(family: str, data: Path, tmp_path: Path) -> None:
    given = {
        "lstm": ["--csv", str(data / "hours.csv")],
        "gpt": ["--text-file", str(data / "text.txt")],
        "bert": [],
    }.get(family, ["--data-dir", str(data)])
    command = [family, "--recipe", "reference", "--epochs", "1", *shlex.split(FLAGS[family]), *given]
    assert main([*command, "--device", "cpu", "--out", str(tmp_path / "run")]) == 0
    info = load_info(tmp_path / "run")
    assert info.epoch == 1
    assert any(name.startswith("test_") for name in info.metrics)
    reference = asdict(load_family(family).RECIPES["reference"])
    for field in ("learning_rate", "schedule", "weight_decay", "layers", "width", "hidden", "depth"):
        assert info.recipe.get(field) == reference.get(field), field
    assert load_checkpoint(tmp_path / "run").model is not None

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from train.checkpoint import (
    INFO,
    LOG,
    TOKENIZER,
    TRAINING_STATE,
    WEIGHTS,
    CheckpointError,
    CheckpointInfo,
    current_versions,
    load_checkpoint,
    load_info,
    load_training_state,
    save_checkpoint,
)
from train.family import load_family

ARGUMENTS = {"classes": 3, "channels": 1, "width": 0.1, "stem": "small", "dropout": 0.0}
INFORMATION = CheckpointInfo(
    family="mobilenet",
    model=ARGUMENTS,
    recipe={"epochs": 1},
    metrics={"validation_accuracy": 0.5},
    baselines={"majority class": 0.3},
    dataset="fashion_mnist",
    dataset_sha256="0" * 64,
    seed=0,
    epoch=1,
    versions=current_versions(),
)


OTHERS = {LOG: b"epoch\n1\n", TOKENIZER: b"{}"}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return load_family("mobilenet").build_model(ARGUMENTS)


@pytest.fixture
def folder(tmp_path: Path, model: nn.Module) -> Path:
    """A good checkpoint."""
    save_checkpoint(tmp_path / "run", INFORMATION, model, {"epoch": 1}, OTHERS)
    return tmp_path / "run"


def rewrite(folder: Path, **changes: Any) -> None:
    """Change members of checkpoint.json."""
    document = json.loads((folder / INFO).read_text()) | changes
    (folder / INFO).write_text(json.dumps(document))


def test_what_was_saved_comes_back(folder: Path, model: nn.Module) -> None:
    checkpoint = load_checkpoint(folder)
    loaded = checkpoint.model
    assert checkpoint.info == INFORMATION
    assert checkpoint.files == {TOKENIZER: b"{}"}
    assert not loaded.training
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    assert load_training_state(folder) == {"epoch": 1}
    assert {path.name for path in folder.iterdir()} == {WEIGHTS, TRAINING_STATE, LOG, TOKENIZER, INFO}


def test_saving_again_replaces_and_leaves_nothing_beside(folder: Path, model: nn.Module) -> None:
    save_checkpoint(folder, dataclasses.replace(INFORMATION, epoch=2), model, {"epoch": 2}, {})
    assert load_info(folder).epoch == 2
    assert [path.name for path in folder.parent.iterdir()] == ["run"]


def test_a_save_that_fails_keeps_the_old_checkpoint(folder: Path, model: nn.Module) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(TypeError, match="generator"):  # after weights.pt was written
        save_checkpoint(folder, INFORMATION, model, {"epoch": (number for number in range(3))}, {})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["run"]


def test_a_swap_that_was_killed_half_way_loses_nothing(folder: Path, model: nn.Module) -> None:
    folder.rename(folder.with_name(".run.previous"))  # the state between its two renames
    assert load_checkpoint(folder).info == INFORMATION
    save_checkpoint(folder, dataclasses.replace(INFORMATION, epoch=2), model, {}, {})
    assert load_info(folder).epoch == 2
    assert [path.name for path in folder.parent.iterdir()] == ["run"]


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path, model: nn.Module) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds notes\.txt"):
        save_checkpoint(tmp_path, INFORMATION, model, {}, {})
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent: no such checkpoint folder"):
        load_info(tmp_path / "absent")


@pytest.mark.parametrize("name", [WEIGHTS, TRAINING_STATE, TOKENIZER, INFO])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load_training_state(folder) if name == TRAINING_STATE else load_checkpoint(folder)


def test_a_checkpoint_of_another_family_is_refused(folder: Path) -> None:
    assert load_info(folder, family="mobilenet") == INFORMATION
    with pytest.raises(CheckpointError, match="of family 'mobilenet', expected 'resnet'"):
        load_info(folder, family="resnet")
    rewrite(folder, family="perceptron")
    with pytest.raises(CheckpointError, match="family 'perceptron' is not one of"):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", [WEIGHTS, TRAINING_STATE])
def test_a_flipped_bit_is_found(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{name}: damaged"):
        load_training_state(folder) if name == TRAINING_STATE else load_checkpoint(folder)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected checkpoint format 2, found 'list'"),
        ('{"format": 9}', "expected checkpoint format 2, found 9"),
        ('{"format": 2, "family": "mobilenet"}', "missing model, recipe"),
    ],
)
def test_a_damaged_description_is_refused(folder: Path, text: str, complaint: str) -> None:
    (folder / INFO).write_text(text)
    with pytest.raises(CheckpointError, match=complaint):
        load_info(folder)


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    rewrite(folder, model={**ARGUMENTS, "classes": 4})
    with pytest.raises(CheckpointError, match="don't fit family 'mobilenet'"):
        load_checkpoint(folder)


class Malice:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return shutil.rmtree, (os.fspath(self.victim),)


def test_weights_that_would_run_code_are_refused(folder: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    torch.save({"weight": Malice(victim)}, folder / WEIGHTS)
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    rewrite(folder, sha256={WEIGHTS: digest})
    with pytest.raises(CheckpointError, match="not a file of tensors"):
        load_checkpoint(folder)
    assert victim.is_dir()

"""The checkpoint folder: what a training run leaves behind and `export` reads.

    weights.pt           state dict of the epoch that was best on validation
    checkpoint.json      `CheckpointInfo`, and the sha256 of the other files
    training_state.pt    the last finished epoch in full (weights, optimizer, schedule, random generators)
    log.csv              a line per epoch; curves.png, when the run has ended, the same as a picture
    tokenizer.json       of a language model

Both `.pt` files hold tensors and plain containers only and are read with `weights_only=True`, so that a
checkpoint from a stranger can't run code.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import platform
import re
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from train.family import FAMILIES, load_family

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

VERSION_FILE = Path(__file__).parents[1] / "serve" / "__init__.py"
FORMAT = 2
INFO = "checkpoint.json"
WEIGHTS = "weights.pt"
TRAINING_STATE = "training_state.pt"
LOG = "log.csv"
CURVES = "curves.png"
TOKENIZER = "tokenizer.json"
FILES = (WEIGHTS, TRAINING_STATE, LOG, CURVES, TOKENIZER, INFO)


class CheckpointError(Exception):
    """A checkpoint folder that can't be used; the message names the folder, the file and what to do."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What `checkpoint.json` says about a checkpoint.

    Attributes:
        family: name of the family's module in `train`.
        model: arguments of the family's `build_model`, JSON values only.
        recipe: fields of the family's `Recipe`.
        metrics: name to value, "validation_accuracy" for example; of the epoch that `weights.pt` holds.
        baselines: what needs no such network, name to the metric on the test split: "majority class".
        dataset: name of the data set, with "(sample)" after it where the offline sample was used.
        dataset_sha256: sha256 of the rows.
        seed: the run's seed.
        epoch: finished epochs.
        versions: "torch", "python" and "onnxedge".
    """

    family: str
    model: Mapping[str, Any]
    recipe: Mapping[str, Any]
    metrics: Mapping[str, float]
    baselines: Mapping[str, float]
    dataset: str
    dataset_sha256: str
    seed: int
    epoch: int
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        info: what `checkpoint.json` says.
        model: the network with its best weights, in evaluation mode, on the CPU.
        files: name to content of what the family keeps beside them: `TOKENIZER`.
    """

    info: CheckpointInfo
    model: nn.Module
    files: Mapping[str, bytes]


def current_versions() -> dict[str, str]:
    """Versions of what trains here, for `CheckpointInfo.versions`."""
    # Read, not imported: training must not depend on the server. The build reads it in the same way.
    line = re.search(r'^__version__ = "(.+)"$', VERSION_FILE.read_text(encoding="utf-8"), re.MULTILINE)
    return {
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "onnxedge": line[1] if line else "unknown",
    }


def save_checkpoint(
    folder: Path,
    info: CheckpointInfo,
    model: nn.Module,
    training_state: Mapping[str, Any],
    files: Mapping[str, bytes],
) -> None:
    """Write a checkpoint so that `folder` is at every moment either the old one or the new one, whole.

    Everything is written and synced in a sibling folder, which then takes the place of the old one. Whatever
    fails on the way, the old checkpoint stays.

    Args:
        folder: the checkpoint folder; its parents are made.
        info: what goes into `checkpoint.json`.
        model: the network whose weights an exporter shall find.
        training_state: what an exact resume needs; tensors, numbers, strings and containers of those.
        files: name to content of the others in `FILES`.

    Raises:
        CheckpointError: `folder` holds other files, or the disk refused.
    """
    assert set(files) <= set(FILES)
    folder = folder.resolve()
    require_replaceable(folder)
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)  # of a save that was killed
    try:
        new.mkdir(parents=True)
        contents = {
            WEIGHTS: _tensor_bytes(model.state_dict()),
            TRAINING_STATE: _tensor_bytes(dict(training_state)),
            **files,
        }
        for name, content in contents.items():
            (new / name).write_bytes(content)
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        text = json.dumps({"format": FORMAT, **asdict(info), "sha256": digests}, indent=2, allow_nan=False)
        (new / INFO).write_text(text + "\n", encoding="utf-8")
        for path in new.iterdir():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        _swap(new, folder)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: the checkpoint can't be written: {error.strerror or error}; what was there before is "
            "intact; make room, or name another folder with --out"
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def require_replaceable(folder: Path) -> None:
    """Refuse a folder that a new checkpoint must not take the place of.

    Raises:
        CheckpointError: it holds files that are not a checkpoint's; they would be lost.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file; name a folder for the checkpoint")
    others = sorted({path.name for path in folder.iterdir()} - set(FILES)) if folder.exists() else []
    if others:
        raise CheckpointError(
            f"{folder}: holds {', '.join(others[:3])}, which is no part of a checkpoint and would be lost; "
            "name a folder of its own for the checkpoint"
        )


def load_info(folder: Path, family: str | None = None) -> CheckpointInfo:
    """Read `checkpoint.json`.

    Args:
        folder: the checkpoint folder.
        family: refuse a checkpoint of any other family; None takes all.

    Raises:
        CheckpointError: the folder or the file is missing, the file is not what `save_checkpoint` writes, or
            the family is another one.
    """
    document = _read_document(_present(folder))
    info = CheckpointInfo(**{field.name: document[field.name] for field in fields(CheckpointInfo)})
    if family is not None and info.family != family:
        raise CheckpointError(f"{folder}: a checkpoint of family {info.family!r}, expected {family!r}")
    return info


def load_checkpoint(folder: Path, family: str | None = None) -> Checkpoint:
    """Read a checkpoint and rebuild its network in evaluation mode, on the CPU.

    Args:
        folder: the checkpoint folder.
        family: refuse a checkpoint of any other family; None takes all.

    Raises:
        CheckpointError: a file is missing or damaged, the family is unknown here, or the weights don't fit
            the network that the family builds today.
    """
    info = load_info(folder, family)
    if info.family not in FAMILIES:
        raise CheckpointError(
            f"{folder}: family {info.family!r} is not one of {', '.join(FAMILIES)}; "
            "use the onnxedge version that wrote it, see versions in checkpoint.json"
        )
    model = load_family(info.family).build_model(info.model)
    present = _present(folder)
    weights = _load_tensors(present, WEIGHTS)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"{folder / WEIGHTS}: the weights don't fit family {info.family!r}: {error}"
        ) from error
    kept = [TOKENIZER] if TOKENIZER in _read_document(present)["sha256"] else []
    files = {name: _verified(present, name) for name in kept}
    return Checkpoint(info, model.eval(), files)


def load_training_state(folder: Path) -> dict[str, Any]:
    """Read what an exact resume needs, as it was given to `save_checkpoint`.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    return _load_tensors(_present(folder), TRAINING_STATE)


def _previous(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.previous")


def _swap(new: Path, folder: Path) -> None:
    """Put `new` in the place of `folder`: two renames, between which only `_previous(folder)` is there."""
    previous = _previous(folder)
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
    try:
        new.rename(folder)
    except BaseException:
        previous.rename(folder)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def _present(folder: Path) -> Path:
    """The folder to read: the one a killed `_swap` moved aside when it got no further."""
    if folder.is_dir():
        return folder
    if _previous(folder).is_dir():
        return _previous(folder)
    raise CheckpointError(f"{folder}: no such checkpoint folder; train one with: python -m train")


def _read_document(folder: Path) -> dict[str, Any]:
    path = folder / INFO
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: not a checkpoint, {INFO} is missing") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); train again") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise CheckpointError(f"{path}: expected checkpoint format {FORMAT}, found {found!r}")
    wanted = [field.name for field in fields(CheckpointInfo)] + ["sha256"]
    if missing := [name for name in wanted if name not in document]:
        raise CheckpointError(f"{path}: missing {', '.join(missing)}; the file was changed, train again")
    return document


def _tensor_bytes(tensors: dict[str, Any]) -> bytes:
    # Not straight to the file: on a full disk torch's own writer ends in an error without the disk's reason.
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def _verified(folder: Path, name: str) -> bytes:
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{folder}: not a whole checkpoint, {name} is missing")
    content = path.read_bytes()
    # torch.load skips the archive's own CRC-32, so a flipped bit would go unnoticed without this.
    expected = _read_document(folder)["sha256"].get(name)
    if (found := hashlib.sha256(content).hexdigest()) != expected:
        raise CheckpointError(f"{path}: damaged, sha256 {found} but {INFO} says {expected}; train again")
    return content


def _load_tensors(folder: Path, name: str) -> dict[str, Any]:
    content = io.BytesIO(_verified(folder, name))
    try:
        return cast("dict[str, Any]", torch.load(content, map_location="cpu", weights_only=True))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{folder / name}: not a file of tensors: {error}") from error

"""Models and versions on disk and in memory: Triton's model-repository layout."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from serve.config_pbtxt import DEFAULT_MODEL_FILENAME, instance_settings, read_config, select_versions
from serve.encoded_image import DEFAULT_MAX_PIXELS
from serve.errors import InvalidArgumentError, ModelLoadError, NotFoundError, UnavailableError
from serve.model import ModelVersion
from serve.model_config import resolve
from serve.providers import choose_providers, usable_cores
from serve.session import Session, SessionSettings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from serve.config_pbtxt import InstanceSettings
    from serve.pb import model_config_pb2 as pb

logger = logging.getLogger(__name__)

# Two runs at once keep two cores busy while one request is on its way through gRPC; one instance alone halves
# the throughput on two cores.
DEFAULT_INSTANCES = 2
_MAX_VERSION_DIGITS = 18  # of an int64


@dataclass(slots=True)
class Model:
    """A model of the repository: its ready versions, and why others are not."""

    name: str
    versions: dict[int, ModelVersion] = field(default_factory=dict)
    problems: dict[int | None, str] = field(default_factory=dict)
    """Version to the reason why it isn't ready; None for the model as a whole."""

    @property
    def ready(self) -> bool:
        """Whether a version answers and none that should is missing."""
        return bool(self.versions) and not self.problems


class Repository:
    """The models below one or more repository folders."""

    def __init__(self, folders: Sequence[Path], max_image_pixels: int = DEFAULT_MAX_PIXELS) -> None:
        self._max_image_pixels = max_image_pixels
        self._folders = [folder.resolve() for folder in folders]
        self._models: dict[str, Model] = {}

    @property
    def models(self) -> list[Model]:
        """Every model found, by name, whether it is ready or not."""
        return [self._models[name] for name in sorted(self._models)]

    def load(self) -> None:
        """Load all models; what can't be loaded is recorded and logged, the others go on."""
        for root in self._folders:
            folders = _model_folders(root)
            if not folders:
                logger.warning("no model in %s: expected folders NAME/1/%s", root, DEFAULT_MODEL_FILENAME)
            for folder in folders:
                model = Model(folder.name)
                if folder.name in self._models:
                    problem = "a model of this name is in an earlier model repository too: rename one"
                    self._models[folder.name].problems[None] = problem
                    logger.error("failed to load '%s' of %s: %s", folder.name, root, problem)
                    continue
                self._models[folder.name] = model
                _load_model(model, folder, root, self._max_image_pixels)

    def get(self, name: str, version: str = "") -> ModelVersion:
        """A ready version; "" is the latest.

        Raises:
            NotFoundError: no such model or version, or none is ready.
            UnavailableError: the version is there, but not ready.
            InvalidArgumentError: `version` is no version number.
        """
        number = _parse_version(version)
        model = self._models.get(name)
        if model is None:
            raise NotFoundError(f"Request for unknown model: '{name}' is not found")
        if number is None:
            if not model.versions:
                raise NotFoundError(
                    f"Request for unknown model: '{name}' has no available versions{_reason(model, None)}"
                )
            return model.versions[max(model.versions)]
        if number in model.versions:
            return model.versions[number]
        if number in model.problems:
            raise UnavailableError(
                f"Request for model: '{name}' version {number} is not at ready state{_reason(model, number)}"
            )
        raise NotFoundError(f"Request for unknown model: '{name}' version {number} is not found")

    def find(self, name: str = "", version: str = "") -> list[ModelVersion]:
        """The ready versions of this name, or of all names, and of this number, or of all numbers."""
        number = _parse_version(version)
        return [found for found in self if name in ("", found.name) and number in (None, found.version)]

    def is_ready(self, name: str, version: str = "") -> bool:
        """Whether a version answers requests.

        Raises:
            InvalidArgumentError: `version` is no version number.
        """
        try:
            self.get(name, version)
        except (NotFoundError, UnavailableError):
            return False
        return True

    def __iter__(self) -> Iterator[ModelVersion]:
        """All ready versions."""
        for model in self.models:
            yield from model.versions.values()

    def close(self) -> None:
        """Answer what waits in every version and give the threads back."""
        for version in self:
            version.close()


def _reason(model: Model, number: int | None) -> str:
    reasons = [model.problems.get(number)] if number else list(model.problems.values())
    text = "; ".join(reason for reason in reasons if reason)
    return f": {text}" if text else ""


def _parse_version(text: str) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= _MAX_VERSION_DIGITS):
        raise InvalidArgumentError(f"model version {text[:40]!r} is not a version number; '' is the latest")
    return int(text)


def _model_folders(root: Path) -> list[Path]:
    """The folders that are models; hidden ones (an exporter's unfinished writes, `.git`) are not."""
    if not root.is_dir():
        raise ModelLoadError(f"model repository {root} is not a folder")
    if (root / "config.pbtxt").exists() or any(_version_number(child) for child in root.iterdir()):
        raise ModelLoadError(f"{root} is a model, not a model repository: give its parent, {root.parent}")
    return sorted(child for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))


def _version_number(folder: Path) -> int | None:
    """The version that a folder holds; None for other names, those with a leading zero too, as in Triton."""
    name = folder.name
    is_number = name.isascii() and name.isdecimal() and not name.startswith("0")
    return int(name) if is_number and folder.is_dir() else None


def _load_model(model: Model, folder: Path, root: Path, max_image_pixels: int) -> None:
    try:
        message = read_config(folder)
        available = [number for child in folder.iterdir() if (number := _version_number(child))]
        selected = select_versions(message, available)
    except (ModelLoadError, OSError) as error:
        model.problems[None] = str(error)
        logger.error("failed to load '%s': %s", model.name, error)  # noqa: TRY400 - the message says it all
        return
    for number in selected:
        try:
            model.versions[number] = _load_version(folder, number, message, root, max_image_pixels)
        except (ModelLoadError, OSError) as error:
            model.problems[number] = str(error)
            logger.error("failed to load '%s' version %d: %s", model.name, number, error)  # noqa: TRY400 - the same
        else:
            logger.info("successfully loaded '%s' version %d", model.name, number)


def _load_version(
    folder: Path, number: int, message: pb.ModelConfig, root: Path, max_image_pixels: int
) -> ModelVersion:
    filename = message.default_model_filename or DEFAULT_MODEL_FILENAME
    path = folder / str(number) / filename
    if not path.is_file():
        raise ModelLoadError(f"{folder.name}/{number}/{filename} is missing")
    if not path.resolve().is_relative_to(root):
        raise ModelLoadError(f"{folder.name}/{number}/{filename} leads outside the model repository")
    labels = _read_labels(folder, message, root)
    session, instances = _open_session(path, instance_settings(message))
    config = resolve(
        message, folder.name, session.inputs, session.outputs, labels, max_image_pixels=max_image_pixels
    )
    if not config.message.instance_group:
        config.message.instance_group.add(name=folder.name, kind="KIND_AUTO")
    config.message.instance_group[0].count = instances
    return ModelVersion(number, config, session, instances)


def _open_session(path: Path, wanted: InstanceSettings) -> tuple[Session, int]:
    """The session, and how many runs at once it is given; threads within a run are divided among these."""
    cores = usable_cores()
    instances = wanted.count or min(DEFAULT_INSTANCES, cores)
    settings = SessionSettings(
        choose_providers(wanted.kind),
        wanted.intra_op_threads or max(1, cores // instances),
        wanted.inter_op_threads,
        wanted.graph_level,
    )
    return Session(path, settings), instances


def _read_labels(folder: Path, message: pb.ModelConfig, root: Path) -> dict[str, tuple[str, ...]]:
    labels = {}
    for output in message.output:
        if output.label_filename:
            path = folder / output.label_filename
            if not path.is_file() or not path.resolve().is_relative_to(root):
                raise ModelLoadError(f"label file {folder.name}/{output.label_filename} is missing")
            labels[output.name] = tuple(path.read_text(encoding="utf-8").splitlines())
    return labels

"""The model repository: which models and versions there are, and which of them answer."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from serve.errors import (
    InternalError,
    InvalidArgumentError,
    ModelLoadError,
    NotFoundError,
    ServeError,
    UnavailableError,
)
from serve.model.config_pbtxt import DEFAULT_MODEL_FILENAME
from serve.model_repository.lifecycle import LOADING, READY, ModelState
from serve.model_repository.model_control import MOST_CHANGES, ModelControl
from serve.model_repository.model_folder import check_repository, model_folders, model_names
from serve.model_repository.polling import Poller

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from serve.model.served_version import ServedVersion
    from serve.model_repository.lifecycle import Model
    from serve.model_repository.overrides import Override
    from serve.settings import ServerSettings

__all__ = ["MOST_CHANGES", "Repository"]

logger = logging.getLogger(__name__)

_MAX_VERSION_DIGITS = 18  # of an int64


class Repository:
    """The models of one or more repository folders. Lookups take no lock.

    Raises:
        SettingsError: --backend-config can't be.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._roots = [folder.resolve() for folder in settings.model_repository]
        self._control = ModelControl(settings, self._roots)
        self._poller: Poller | None = None

    @property
    def models(self) -> list[Model]:
        """Every model that was to be loaded, by name, whether it is ready or not."""
        models = self._control.models
        return [models[name] for name in sorted(models)]

    @property
    def on_change(self) -> Callable[[], None]:
        """What is called after each change of a model's state, one call at a time."""
        return self._control.on_change

    @on_change.setter
    def on_change(self, listener: Callable[[], None]) -> None:
        self._control.on_change = listener

    def all_ready(self) -> bool:
        """Whether every model that should answer does."""
        return all(model.ready for model in self._control.models.values())

    def load(self) -> None:
        """Load what the control mode says; what can't be loaded is recorded and logged, the others go on.

        Raises:
            ModelLoadError: a repository folder is none, or can't be read.
        """
        for root in self._roots:
            check_repository(root)
        settings = self._settings
        try:
            if settings.model_control_mode == "poll":
                seconds = settings.repository_poll_secs
                self._poller = Poller(self._roots, seconds, self._load_or_log, self._unload_or_log)
            names = self._on_disk()
        except OSError as error:
            raise ModelLoadError(f"the model repository can't be read: {error}") from error
        if settings.model_control_mode == "explicit":
            wanted = set(settings.load_model)
            names = (names if "*" in wanted else set()) | (wanted - {"*"})
        elif not names:
            roots = ", ".join(str(root) for root in self._roots)
            logger.warning("no model in %s: expected folders NAME/1/%s", roots, DEFAULT_MODEL_FILENAME)
        for name in sorted(names):
            self._load_or_log(name)
        if self._poller is not None:
            self._poller.start()

    def load_model(self, name: str, override: Override | None = None) -> None:
        """Load a model, or load it again where it changed: see `ModelControl.load`."""
        self._control.load(name, override)

    def unload_model(self, name: str) -> None:
        """Take a model out of service: see `ModelControl.unload`."""
        self._control.unload(name)

    def get(self, name: str, version: str = "") -> ServedVersion:
        """A ready version; "" is the latest.

        Raises:
            NotFoundError: no such model or version, or none is ready.
            UnavailableError: the version is there, but not ready, or the server stops.
            InvalidArgumentError: `version` is no version number.
        """
        number = _parse_version(version)
        model = self._control.models.get(name)
        if model is not None:
            versions = model.versions
            if number is None:
                if versions:
                    return versions[max(versions)]
            elif number in versions:
                return versions[number]
        raise self._missing(name, model, number)

    def find(self, name: str = "", version: str = "") -> list[ServedVersion]:
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

    def __iter__(self) -> Iterator[ServedVersion]:
        """All ready versions."""
        for model in self.models:
            yield from model.versions.values()

    def knows(self, name: str) -> bool:
        """Whether a model is loaded, was to be, or lies in a repository folder."""
        return name in self._control.models or bool(model_folders(self._roots, name))

    def index(self, *, ready: bool = False) -> list[ModelState]:
        """Each version's state, and each model on disk that was never loaded; `ready`: only what answers.

        Raises:
            InternalError: a repository folder can't be read.
        """
        models = self._control.models
        if ready:
            return [s for name in sorted(models) for s in models[name].states if s.state == READY]
        try:
            names = sorted(models.keys() | self._on_disk())
        except OSError as error:
            raise InternalError(f"the model repository can't be read: {error.strerror}") from error
        never = ModelState
        return [s for name in names for s in (models[name].states if name in models else [never(name)])]

    def close(self) -> None:
        """Answer what waits in every version and give the threads back."""
        if self._poller is not None:
            self._poller.stop(self._settings.exit_timeout_secs)
        self._control.close()

    def _on_disk(self) -> set[str]:
        return set().union(*(model_names(root) for root in self._roots))

    def _load_or_log(self, name: str) -> None:
        try:
            self._control.load(name)
        except InternalError as error:  # not on disk: nothing else knows of it
            self._control.record(name, str(error))
            logger.error("%s", error)  # noqa: TRY400 - the message says it all
        except ServeError as error:
            logger.error("%s", error)  # noqa: TRY400 - the same

    def _unload_or_log(self, name: str) -> None:
        try:
            self._control.unload(name)
        except ServeError as error:
            logger.error("failed to unload '%s': %s", name, error)  # noqa: TRY400 - the message says it all

    def _missing(self, name: str, model: Model | None, number: int | None) -> ServeError:
        """Why a lookup found nothing."""
        if self._control.closed:
            return UnavailableError("the server is stopping")
        if model is None:
            return NotFoundError(f"Request for unknown model: '{name}' is not found")
        if number is None and LOADING not in model.changing.values():
            return NotFoundError(
                f"Request for unknown model: '{name}' has no available versions{_reasons(model, number)}"
            )
        if number is None or number in {*model.problems, *model.changing, *model.unloaded}:
            version = "" if number is None else f" version {number}"
            return UnavailableError(
                f"Request for model: '{name}'{version} is not at ready state{_reasons(model, number)}"
            )
        return NotFoundError(f"Request for unknown model: '{name}' version {number} is not found")


def _reasons(model: Model, number: int | None) -> str:
    reasons = model.problems.values() if number is None else (model.problems.get(number, ""),)
    text = "; ".join(reason for reason in reasons if reason)
    return f": {text}" if text else ""


def _parse_version(text: str) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= _MAX_VERSION_DIGITS):
        raise InvalidArgumentError(f"model version {text[:40]!r} is not a version number; '' is the latest")
    return int(text)

"""Model control: loads, reloads and unloads models while others, and their own old versions, answer."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from serve.errors import InternalError, InvalidArgumentError, ModelLoadError, UnavailableError
from serve.loading.version_folder import Loader, Source, check_inside
from serve.model.config_pbtxt import check_config, read_config, select_versions
from serve.model_repository.lifecycle import Model
from serve.model_repository.model_folder import is_file_name, model_folders, stamp
from serve.model_repository.retirement import Retirement
from serve.model_repository.turns import Turns
from serve.process import return_freed_memory
from serve.runtime.accelerators import file_parameters

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence

    from serve.model.served_version import ServedVersion
    from serve.model_repository.overrides import Override
    from serve.pb import model_config_pb2 as pb
    from serve.settings import ServerSettings

logger = logging.getLogger(__name__)

MOST_CHANGES = 8
"""Loads and unloads under way or waiting for their turn; each holds a thread of the transport."""

# What a model's earlier versions still have in hand may take this long, then its next load goes on beside it.
_LONGEST_RETIREMENT_SECONDS = 60.0


class ModelControl:
    """The table of models, and its changes.

    Changes of one model follow each other, those of different models go on beside each other. Readers take no
    lock: a change puts a new `Model` into a new table.

    Attributes:
        models: by name; read it once for each lookup.
        closed: whether `close` was called.
        on_change: called after each change of the table, one call at a time.
    """

    def __init__(self, settings: ServerSettings, roots: Sequence[Path]) -> None:
        """Start with no model; `roots` are the repository folders, resolved.

        Raises:
            SettingsError: --backend-config can't be.
        """
        self.models: Mapping[str, Model] = {}
        self.closed = False
        self.on_change: Callable[[], None] = lambda: None
        self._settings = settings
        self._loader = Loader(settings, self.latest)
        self._roots = roots
        self._table_lock = threading.Lock()
        self._turns = Turns(MOST_CHANGES)
        self._retirement = Retirement()

    def latest(self, name: str) -> ServedVersion | None:
        """The latest ready version of a model; None: there is none."""
        model = self.models.get(name)
        return model.versions[max(model.versions)] if model is not None and model.versions else None

    def load(self, name: str, override: Override | None = None) -> None:
        """Load a model, or load it again where its files or its config have changed.

        All of its versions or none: what answered before goes on until all are ready, and beyond if one of
        them fails. Requests that are inside finish on the version that they started on.

        Raises:
            InternalError: no repository folder has the model.
            InvalidArgumentError: it can't be loaded; the message says why.
            UnavailableError: too many changes are under way, or the server stops.
        """
        from_request = override is not None and bool(override.files) and is_file_name(name)
        if not from_request and not model_folders(self._roots, name):
            raise InternalError(f"failed to load '{name}', failed to poll from model repository")
        with self._turns.take(name):
            if not self._retirement.wait(name, _LONGEST_RETIREMENT_SECONDS):
                logger.warning("earlier versions of '%s' are still at work, it is loaded beside them", name)
            try:
                with self._source(name, override) as source:
                    self._load(source)
            except (ModelLoadError, OSError) as error:
                self._fail(name, {None: _text(error)})

    def unload(self, name: str) -> None:
        """Take a model out of service; an unknown or unloaded one stays what it is.

        Requests that are inside finish; then the model's memory is given back.

        Raises:
            UnavailableError: too many changes are under way, or the server stops.
        """
        if name not in self.models:
            return
        with self._turns.take(name):
            model = self.models.get(name, Model(name))
            if model.versions or model.problems:
                self._retire(name, self._replace(name, Model.unloading))

    def record(self, name: str, problem: str) -> None:
        """Note that a model which should be there isn't."""
        self._replace(name, lambda model: model.failed({None: problem}))

    def close(self) -> None:
        """Answer what waits in every version and give the threads back; what is being loaded is dropped."""
        with self._table_lock:
            self.closed = True
            models, self.models = self.models, {}
        for model in models.values():
            for version in model.versions.values():
                version.close()
        self._retirement.wait(None, self._settings.exit_timeout_secs)

    @contextlib.contextmanager
    def _source(self, name: str, override: Override | None) -> Iterator[Source]:
        """Where to load from. Files of a request exist only as long as they are read."""
        if override is not None and override.files:
            _check_foreign(override.config, name)
            with tempfile.TemporaryDirectory(prefix="onnxedge-", ignore_cleanup_errors=True) as temporary:
                root = Path(temporary).resolve()
                folder = root / name
                folder.mkdir()
                override.write(folder)
                yield Source(folder, root, override.config, untrusted=True)
            return
        folder, *others = model_folders(self._roots, name)
        if others:
            raise ModelLoadError(
                f"a model of this name is in an earlier model repository too, {folder.parent}: rename one"
            )
        check_inside(folder.parent, folder / "config.pbtxt", f"{name}/config.pbtxt")
        if override is None:
            config = read_config(folder)
        else:
            config = override.config
            _check_foreign(config, name)
        yield Source(folder, folder.parent, config)

    def _load(self, source: Source) -> None:
        name = source.folder.name
        contents = _contents(source)
        before = self.models.get(name, Model(name))
        kept = {
            number: version
            for number, version in before.versions.items()
            if contents.get(number) == before.contents[number]
        }
        missing = [number for number in contents if number not in kept]
        if missing or before.versions.keys() != kept.keys() or before.problems:
            del before
            self._replace(name, lambda model: model.loading(missing))
            new = self._load_versions(source, missing)
            try:
                versions = {number: (kept | new)[number] for number in contents}
                old = self._replace(name, lambda model: model.loaded(versions, contents))
            except UnavailableError:
                _close(new.values())
                raise
            self._retire(name, [version for version in old if version not in kept.values()])

    def _load_versions(self, source: Source, numbers: Sequence[int]) -> dict[int, ServedVersion]:
        """Load all of these or none.

        Raises:
            InvalidArgumentError: one can't be loaded.
        """
        name = source.folder.name
        new: dict[int, ServedVersion] = {}
        for number in numbers:
            try:
                new[number] = self._loader.load(source, number)
            except Exception as error:
                if not isinstance(error, (ModelLoadError, OSError)):
                    logger.exception("loading '%s' version %d failed in an unforeseen way", name, number)
                _close(new.values())
                new.clear()
                problems: dict[int | None, str] = dict.fromkeys(numbers, f"version {number} can't be loaded")
                self._fail(name, problems | {number: _text(error)})
            logger.info("successfully loaded '%s' version %d", name, number)
        return new

    def _fail(self, name: str, problems: Mapping[int | None, str]) -> NoReturn:
        """Record why a load failed, and tell whoever asked for it."""
        self._replace(name, lambda model: model.failed(problems))
        self._forget(name)
        texts = [
            reason if number is None else f"version {number} is at UNAVAILABLE state: {reason}"
            for number, reason in problems.items()
        ]
        raise InvalidArgumentError(f"load failed for model '{name}': {'; '.join(texts)}")

    def _retire(self, name: str, versions: list[ServedVersion]) -> None:
        numbers = [version.version for version in versions]

        def then() -> None:
            with contextlib.suppress(UnavailableError):  # the server stops: the table is empty already
                self._replace(name, lambda model: model.gone(numbers))
                self._forget(name)
            for number in numbers:
                logger.info("successfully unloaded '%s' version %d", name, number)

        if versions:
            self._retirement.retire(name, versions, then)

    def _replace(self, name: str, change: Callable[[Model], Model]) -> list[ServedVersion]:
        """Put a model's next state into the table; the versions that answered before.

        Raises:
            UnavailableError: the server stops.
        """
        with self._table_lock:
            if self.closed:
                raise UnavailableError("the server is stopping")
            before = self.models.get(name, Model(name))
            self.models = {**self.models, name: change(before)}
            self.on_change()
            return list(before.versions.values())

    def _forget(self, name: str) -> None:
        """Drop a model that neither answers nor lies in a repository folder: names must not pile up."""
        with self._table_lock:
            model = self.models.get(name)
            if model and not (model.versions or model.changing or model_folders(self._roots, name)):
                self.models = {other: model for other, model in self.models.items() if other != name}


def _check_foreign(config: pb.ModelConfig, name: str) -> None:
    """Check a config that came with a request: `check_config`, and no files or libraries of this machine."""
    check_config(config, name)
    named = file_parameters(config)
    if named:
        raise ModelLoadError(
            f"parameters {', '.join(named)} of an execution accelerator name files: only a config.pbtxt may"
        )


def _contents(source: Source) -> dict[int, Hashable]:
    """The versions that the config asks for, each with all that it is made from; equal: nothing changed."""
    found = stamp(source.folder)
    config = source.config.SerializeToString(deterministic=True)
    return {
        number: (str(source.folder), config, found.shared, found.versions.get(number))
        for number in select_versions(source.config, found.versions)
    }


def _close(versions: Iterable[ServedVersion]) -> None:
    """Close versions that never answered."""
    for version in versions:
        version.close()
    return_freed_memory()


def _text(error: Exception) -> str:
    """What clients see of an error: an OSError's own text has the server's folders."""
    if isinstance(error, OSError):
        name = f" '{Path(error.filename).name}'" if error.filename else ""
        return f"a file{name} can't be read or written: {error.strerror or type(error).__name__}"
    return str(error) if isinstance(error, ModelLoadError) else repr(error)

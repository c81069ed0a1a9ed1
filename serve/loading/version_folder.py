"""One version folder → a model version that answers, checked on the way."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from serve.errors import ModelLoadError
from serve.generate.generation_config import is_generation, is_twin
from serve.generate.tokenizer import FILE as TOKENIZER
from serve.generate.twin import TwinVersion
from serve.loading import checksums, golden, isolation
from serve.loading.generation import generation_session, load_generation, one_instance
from serve.loading.graph_file import external_data
from serve.loading.warmup import warm_up
from serve.model.config_pbtxt import DEFAULT_MODEL_FILENAME
from serve.model.model_config import resolve
from serve.model.version import ModelVersion
from serve.pb import model_config_pb2 as pb
from serve.process import resident_bytes, return_freed_memory
from serve.runtime.backend_config import parse_backend_config, session_settings
from serve.runtime.cores import usable_cores
from serve.runtime.session import Session
from serve.scheduling.choice import choose_instances

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from serve.generate.twin import Find
    from serve.model.served_version import ServedVersion
    from serve.runtime.session import SessionSettings
    from serve.settings import ServerSettings

logger = logging.getLogger(__name__)

_WARM_UP_FOLDER = "warmup"
_INITIAL_STATE_FOLDER = "initial_state"


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model comes from.

    Attributes:
        folder: the model's, named as the model is.
        root: nothing outside this folder is read.
        config: config.pbtxt, or what takes its place, checked.
        untrusted: the graphs came over the wire: a throw-away process loads and runs them first.
    """

    folder: Path
    root: Path
    config: pb.ModelConfig
    untrusted: bool = False


class Loader:
    """Loads versions as the server's settings say. May be used by several threads at once.

    Raises:
        SettingsError: --backend-config can't be.
    """

    def __init__(self, settings: ServerSettings, find: Find = lambda _name: None) -> None:
        """Load for a repository, where `find` gives the latest ready version of a model."""
        self._settings = settings
        self._find = find
        self._backend = parse_backend_config(settings.backend_config)

    def load(self, source: Source, number: int) -> ServedVersion:
        """Load one version of a model, from its folder to the first answer.

        Raises:
            ModelLoadError: it can't be served.
            OSError: a file can't be read.
        """
        name, settings = source.folder.name, self._settings
        if is_twin(source.config):
            return TwinVersion(number, source.config, name, self._find)
        if is_generation(source.config):
            source = replace(source, config=one_instance(source.config, name))
        path = _graph_path(source, number)
        checksums.verify(path.parent, path.name, [*external_data(path), TOKENIZER])
        wanted = session_settings(
            source.config, self._backend.defaults, usable_cores(), policy=settings.provider_policy, model=name
        )
        if is_generation(source.config):
            wanted = generation_session(wanted)
        if source.untrusted or settings.untrusted_repository:
            seconds = settings.untrusted_timeout_secs
            limits = isolation.ProbeLimits(settings.untrusted_memory_mb << 20, seconds, seconds)
            isolation.probe(path, wanted, limits, source.config)
        while True:
            try:
                return self._load(source, number, path, wanted)
            except ModelLoadError as error:
                lesser = wanted.demoted()
                if lesser is None:
                    raise
                without = wanted.accelerators[0].name
                logger.warning("'%s' version %d goes on without %s: %s", name, number, without, error)
                wanted = lesser

    def _load(self, source: Source, number: int, path: Path, wanted: SessionSettings) -> ServedVersion:
        before = resident_bytes()
        session = Session(path, wanted)
        try:
            if is_generation(source.config):
                version: ServedVersion = load_generation(number, source.config, session, path)
            else:
                version = self._serve_graph(source, number, path, session)
        except Exception:
            session.close()
            raise
        return_freed_memory()  # what the graph was read into: half of what six graphs of 40 MB took
        growth = resident_bytes() - before
        version.memory_bytes = growth if growth > 0 else session.file_bytes
        return version

    def _serve_graph(self, source: Source, number: int, path: Path, session: Session) -> ModelVersion:
        """A version that runs its graph once for each request, or for several together."""
        settings = self._settings
        config = resolve(
            self._with_default_batch(source.config, session),
            source.folder.name,
            session.inputs,
            session.outputs,
            _read_labels(source),
            max_image_pixels=settings.max_image_pixels,
        )
        golden.check(session, config, path.parent, path.name)
        warmed = warm_up(session, config, source.folder, path.parent)
        instances = choose_instances(source.config, session.settings.instances, warmed)
        if not config.message.instance_group:
            config.message.instance_group.add(name=config.name, kind="KIND_AUTO")
        config.message.instance_group[0].count = instances
        return ModelVersion(
            number,
            config,
            session,
            instances=instances,
            warm_up=warmed,
            settings=settings,
            folder=source.folder,
        )

    def _with_default_batch(self, config: pb.ModelConfig, session: Session) -> pb.ModelConfig:
        """The config with the server's default-max-batch-size, where it leaves the tensors to the graph.

        As Triton completes it: only for a graph whose tensors all have a first dimension of any size.
        """
        default = self._backend.default_max_batch_size
        stated = (
            config.max_batch_size or config.input or config.output or config.HasField("sequence_batching")
        )
        tensors = (*session.inputs, *session.outputs)
        if not default or stated or not all(tensor.shape[:1] == (-1,) for tensor in tensors):
            return config
        completed = pb.ModelConfig()
        completed.CopyFrom(config)
        completed.max_batch_size = default
        return completed


def _graph_path(source: Source, number: int) -> Path:
    """The graph's path, once every file that this version reads is known to lie inside the repository."""
    name = source.folder.name
    filename = source.config.default_model_filename or DEFAULT_MODEL_FILENAME
    path = source.folder / str(number) / filename
    if not path.is_file():
        raise ModelLoadError(f"{name}/{number}/{filename} is missing")
    for file in (*path.parent.iterdir(), *_named_files(source)):
        check_inside(source.root, file, f"{name}/{file.relative_to(source.folder)}")
    return path


def check_inside(root: Path, file: Path, shown: str) -> None:
    """Refuse a file that is elsewhere, by links or by its name.

    Raises:
        ModelLoadError: it is not in `root`; the message calls it `shown`.
    """
    if not file.resolve().is_relative_to(root):
        raise ModelLoadError(f"{shown} leads outside the model repository: copy the file into it")


def _named_files(source: Source) -> Iterator[Path]:
    """The files outside the version's folder that a config names.

    Raises:
        ModelLoadError: a name leads somewhere else.
    """
    config = source.config
    names = [output.label_filename for output in config.output]
    names += [
        f"{_WARM_UP_FOLDER}/{tensor.input_data_file}" if tensor.input_data_file else ""
        for sample in config.model_warmup
        for tensor in sample.inputs.values()
    ]
    names += [
        f"{_INITIAL_STATE_FOLDER}/{initial.data_file}" if initial.data_file else ""
        for state in config.sequence_batching.state
        for initial in state.initial_state
    ]
    for name in filter(None, names):
        if "\0" in name or not {"", ".."}.isdisjoint(name.split("/")):
            raise ModelLoadError(
                f"config.pbtxt: {name!r} leads outside the model's folder, expected a file in it"
            )
        yield source.folder / name


def _read_labels(source: Source) -> dict[str, tuple[str, ...]]:
    labels = {}
    for output in source.config.output:
        if output.label_filename:
            path = source.folder / output.label_filename
            if not path.is_file():
                raise ModelLoadError(f"label file {source.folder.name}/{output.label_filename} is missing")
            labels[output.name] = tuple(path.read_text(encoding="utf-8").splitlines())
    return labels

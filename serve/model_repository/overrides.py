"""What a load request brings along: a config, and files that are served instead of the repository's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from google.protobuf import json_format

from serve.errors import InternalError, InvalidArgumentError
from serve.model_repository.model_folder import is_file_name, version_number
from serve.pb import model_config_pb2

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_FILE_PREFIX = "file:"
# Configs have kilobytes; lists in JSON take 30 times their text when parsed.
_LARGEST_CONFIG = 1 << 20


@dataclass(frozen=True, slots=True)
class Override:
    """A config in place of config.pbtxt, and files in place of the model's folder.

    Attributes:
        config: as it came; not checked yet.
        files: (version, file name) to content; the message limit bounds their total size. Without any the
            repository's files are served with this config.
    """

    config: model_config_pb2.ModelConfig
    files: Mapping[tuple[int, str], bytes] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write the files as a model's folder: VERSION/NAME.

        Raises:
            OSError: the disk refused.
        """
        for (number, name), content in self.files.items():
            path = folder / str(number) / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)


def parse_override(parameters: Mapping[str, Any]) -> Override | None:
    """The override in a RepositoryModelLoad request's parameters; None where there is none.

    Args:
        parameters: name to ModelRepositoryParameter: `config`, a ModelConfig as JSON, and any number of
            `file:VERSION/NAME`, a file's content (Triton's model repository extension).

    Raises:
        InvalidArgumentError: another parameter, a value of the wrong type, or a version or file name that
            can't be.
        InternalError: JSON that is no ModelConfig, or files without a config: Triton's code for both.
    """
    config: model_config_pb2.ModelConfig | None = None
    files: dict[tuple[int, str], bytes] = {}
    for key, value in parameters.items():
        if key == "config":
            config = _parse_config(_value(key, value, "string_param"))
        elif key.startswith(_FILE_PREFIX):
            files[_parse_file_key(key)] = _value(key, value, "bytes_param")
        else:
            raise InvalidArgumentError(
                f"unrecognized load parameter '{key}', expected 'config' or 'file:VERSION/NAME'"
            )
    if config is None:
        if files:
            raise InternalError(
                "load parameter 'config' is missing: files need one, as the model's folder in the repository "
                "isn't looked at"
            )
        return None
    return Override(config, files)


def _value(key: str, parameter: Any, expected: str) -> Any:
    if parameter.WhichOneof("parameter_choice") != expected:
        raise InvalidArgumentError(f"invalid value type for load parameter '{key}', expected {expected}")
    return getattr(parameter, expected)


def _parse_config(text: str) -> model_config_pb2.ModelConfig:
    config = model_config_pb2.ModelConfig()
    what = "load parameter 'config': expected a ModelConfig as JSON"
    if len(text) > _LARGEST_CONFIG:
        raise InternalError(f"{what}, got {len(text)} characters, {_LARGEST_CONFIG} at most can be")
    if not text.lstrip().startswith("{"):  # a list passes for an empty message
        raise InternalError(f"{what}, got {text[:40]!r}")
    try:
        json_format.Parse(text, config)
    except (json_format.ParseError, RecursionError) as error:
        raise InternalError(f"{what}: {error}") from error
    return config


def _parse_file_key(key: str) -> tuple[int, str]:
    version, _, name = key.removeprefix(_FILE_PREFIX).partition("/")
    number = version_number(version)
    if number is None or not is_file_name(name):
        raise InvalidArgumentError(
            f"load parameter {key[:300]!r}: expected 'file:VERSION/NAME' with a version of 1 or more and a "
            "file name without a folder or a leading dot"
        )
    return number, name

"""`ServerSettings`, from flags and environment; flags are spelled as Triton's where Triton has them."""

from __future__ import annotations

import argparse
import difflib
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from serve.encoded_image import DEFAULT_MAX_PIXELS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ENVIRONMENT_PREFIX = "ONNXEDGE_"
_MAX_PORT = 65535
# Nearer than --http-port is to --grpc-port: a flag that is Triton's but not ours is no typing error.
_NEAR = 0.8
_BOOLEANS = {"true": True, "1": True, "on": True, "yes": True, "false": False, "0": False, "off": False}
_BOOLEANS["no"] = False


class SettingsError(ValueError):
    """A setting can't be used; the message names it."""


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Everything that the server can be told from outside.

    Raises:
        SettingsError: a value is out of its range.
    """

    model_repository: tuple[Path, ...] = _setting((), "folder of models; may be given more than once")
    server_id: str = _setting("onnxedge", "name in ServerMetadata (Triton's --id)")
    grpc_address: str = _setting("0.0.0.0", "address the gRPC endpoint binds to")  # noqa: S104 - as Triton's
    grpc_port: int = _setting(8001, "port of the gRPC endpoint; 0 takes a free one")
    reuse_grpc_port: bool = _setting(
        default=False, text="let several servers listen on the same port, for handing over without a gap"
    )
    allow_metrics: bool = _setting(default=True, text="serve Prometheus metrics")
    metrics_address: str = _setting("0.0.0.0", "address the metrics endpoint binds to")  # noqa: S104 - as Triton's
    metrics_port: int = _setting(8002, "port of the metrics endpoint; 0 takes a free one")
    exit_on_error: bool = _setting(
        default=False, text="exit when a model can't be loaded, instead of serving the others"
    )
    strict_readiness: bool = _setting(
        default=True, text="be ready only when every model is, instead of as soon as the server answers"
    )
    exit_timeout_secs: int = _setting(30, "seconds that requests in flight get to finish on SIGTERM")
    max_inflight_requests: int = _setting(
        128, "requests in the server at once, running and waiting; past that they get UNAVAILABLE at once"
    )
    max_request_bytes: int = _setting(
        0, "largest request; 0: the largest batch that a model declares and 1 MiB, 64 MiB at least"
    )
    max_image_pixels: int = _setting(
        DEFAULT_MAX_PIXELS, "largest image that is decoded for models that take image files"
    )
    log_verbose: int = _setting(0, "1 logs every failed request")

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("grpc_port", "metrics_port"):
            if not 0 <= getattr(self, name) <= _MAX_PORT:
                raise SettingsError(f"--{_flag(name)} is {getattr(self, name)}, expected 0 to {_MAX_PORT}")
        least_values = {
            "exit_timeout_secs": 0, "max_inflight_requests": 1, "max_request_bytes": 0, "max_image_pixels": 1,
        }  # fmt: skip
        for name, least in least_values.items():
            if getattr(self, name) < least:
                raise SettingsError(f"--{_flag(name)} is {getattr(self, name)}, expected {least} or more")
        if not self.model_repository:
            raise SettingsError("--model-repository is missing: name the folder that holds the models")
        for folder in self.model_repository:
            if not folder.is_dir():
                raise SettingsError(f"--model-repository {folder} is not a folder")


def _flag(name: str) -> str:
    return "id" if name == "server_id" else name.replace("_", "-")


def _boolean(text: str) -> bool:
    if text.lower() not in _BOOLEANS:
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return _BOOLEANS[text.lower()]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(message)


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Give a parser one flag for each field of `ServerSettings`."""
    for setting in fields(ServerSettings):
        options: dict[str, Any] = {"dest": setting.name, "help": setting.metadata["help"]}
        names = [f"--{_flag(setting.name)}"]
        if setting.name == "model_repository":
            names.append("--model-store")
            options |= {"action": "append", "type": Path, "metavar": "FOLDER"}
        elif setting.type == "bool":
            options |= {"type": _boolean, "nargs": "?", "const": True, "metavar": "BOOL"}
        else:
            options |= {"type": int if setting.type == "int" else str}
        if setting.name != "model_repository":
            options["help"] += f" (default: {str(setting.default).lower()})"
        parser.add_argument(*names, **options)


def parse_server_settings(
    arguments: Sequence[str], environment: Mapping[str, str] = os.environ
) -> ServerSettings:
    """Settings from command-line flags, then ONNXEDGE_… variables, then defaults.

    `--grpc-port` is ONNXEDGE_GRPC_PORT, and so on; ONNXEDGE_MODEL_REPOSITORY takes several folders with the
    platform's path separator between them.

    Raises:
        SettingsError: a flag is unknown, or a value can't be used.
    """
    parser = _Parser(prog="onnxedge serve", allow_abbrev=False)
    add_server_flags(parser)
    given = vars(_parse(parser, [*_environment_arguments(environment), *arguments]))
    values = {name: value for name, value in given.items() if value is not None}
    if "model_repository" in values:
        values["model_repository"] = tuple(values["model_repository"])
    return ServerSettings(**values)


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    namespace, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        flag = unknown[0].split("=")[0]
        known = [name for action in parser._actions for name in action.option_strings]  # noqa: SLF001 - no public list
        near = difflib.get_close_matches(flag, known, 1, _NEAR)
        if not flag.startswith("-"):
            raise SettingsError(f"unexpected {flag!r}: did you mean --model-repository {flag}?")
        hint = f"did you mean {near[0]}?" if near else "onnxedge serve --help lists those that there are"
        raise SettingsError(f"unknown flag {flag}: {hint}")
    return namespace


def _environment_arguments(environment: Mapping[str, str]) -> list[str]:
    arguments = []
    for setting in fields(ServerSettings):
        text = environment.get(ENVIRONMENT_PREFIX + setting.name.upper())
        if text is None:
            continue
        parts = text.split(os.pathsep) if setting.name == "model_repository" else [text]
        arguments += [f"--{_flag(setting.name)}={part}" for part in parts]
    return arguments

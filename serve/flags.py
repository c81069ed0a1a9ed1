"""`ServerSettings` from the command line and the environment."""

from __future__ import annotations

import argparse
import difflib
import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from serve.settings import ServerSettings, SettingsError, flag_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ENVIRONMENT_PREFIX = "ONNXEDGE_"
_STRICT = "strict_model_config"
_NEAR = 0.8
_NEAR_VARIABLE = 0.75
_BOOLEANS = {"true": True, "1": True, "on": True, "yes": True, "false": False, "0": False, "off": False}
_BOOLEANS["no"] = False

_NO_HTTP = "there is no HTTP endpoint"
_NO_GPU_POOL = "onnxruntime allocates GPU memory by itself"
_NO_FIXED_THREADS = "threads follow --max-inflight-requests"

# Triton's flags that change nothing here, so that a command line made for it starts this server: each is
# named in a warning with its reason.
WITHOUT_EFFECT = {
    "--allow-http": _NO_HTTP,
    "--http-address": _NO_HTTP,
    "--http-port": _NO_HTTP,
    "--http-thread-count": _NO_HTTP,
    "--http-header-forward-pattern": _NO_HTTP,
    "--grpc-header-forward-pattern": "headers are not passed on to models",
    "--http-restricted-api": _NO_HTTP,
    "--http-max-input-size": _NO_HTTP,
    "--reuse-http-port": _NO_HTTP,
    "--allow-sagemaker": _NO_HTTP,
    "--allow-vertex-ai": _NO_HTTP,
    "--allow-grpc": "gRPC is always served",
    "--sagemaker-port": _NO_HTTP,
    "--vertex-ai-port": _NO_HTTP,
    "--model-namespacing": "a name in two repositories is served from neither",
    "--model-load-gpu-limit": _NO_GPU_POOL,
    "--repoagent-directory": "there are no repository agents",
    "--response-cache-byte-size": "responses are not cached",
    "--allow-gpu-metrics": "this server reports no GPU's figures",
    "--allow-cpu-metrics": "the process's own CPU and memory are always reported",
    "--metrics-interval-ms": "metrics are made when they are asked for",
    "--metrics-config": "metrics are counters and histograms, always",
    "--grpc-infer-thread-count": _NO_FIXED_THREADS,
    "--grpc-infer-allocation-pool-size": "responses are not pooled",
    "--grpc-max-response-pool-size": "responses are not pooled",
    "--model-load-thread-count": "models are loaded one after another",
    "--model-load-retry-count": "a load that failed is not tried again",
    "--backend-directory": "onnxruntime is built in",
    "--buffer-manager-thread-count": "tensors are not copied by threads of their own",
    "--pinned-memory-pool-byte-size": _NO_GPU_POOL,
    "--cuda-memory-pool-byte-size": _NO_GPU_POOL,
    "--cuda-virtual-address-size": _NO_GPU_POOL,
    "--enable-peer-access": _NO_GPU_POOL,
    "--min-supported-compute-capability": "onnxruntime decides which GPUs it supports",
    "--rate-limit": "instances run when they are free",
    "--rate-limit-resource": "instances run when they are free",
    "--host-policy": "use the operating system's affinity",
    "--cache-config": "responses are not cached",
    "--cache-directory": "responses are not cached",
}


# Triton's old flags, and what to write now.
REPLACED = {
    "--trace-file": "--trace-config=triton,file=FILE",
    "--trace-level": "--trace-config=level=TIMESTAMPS",
    "--trace-rate": "--trace-config=rate=N",
    "--trace-count": "--trace-config=count=N",
    "--trace-log-frequency": "--trace-config=triton,log-frequency=N",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(message)


def _boolean(text: str) -> bool:
    if text.lower() not in _BOOLEANS:
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return _BOOLEANS[text.lower()]


def _level(text: str) -> int:
    """A log level; Triton takes true and false, too."""
    return int(text) if text.isdecimal() else int(_boolean(text))


def _folder(text: str) -> Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text}: object stores are not supported, mount or copy it")
    return Path(text)


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Give a parser one flag for each field of `ServerSettings`, and those without effect, hidden."""
    for setting in fields(ServerSettings):
        options: dict[str, Any] = {"dest": setting.name, "help": setting.metadata["help"]}
        names = [f"--{flag_of(setting.name)}"]
        if setting.name == "model_repository":
            names.append("--model-store")
            options |= {"action": "append", "type": _folder, "metavar": "FOLDER"}
        elif str(setting.type).startswith("tuple"):
            options |= {"action": "append", "metavar": "VALUE"}
        elif setting.type == "bool":
            options |= {"type": _boolean, "nargs": "?", "const": True, "metavar": "BOOL"}
        elif setting.name == "log_verbose":
            options |= {"type": _level, "nargs": "?", "const": 1, "metavar": "LEVEL"}
        else:
            options |= {"type": int if setting.type == "int" else str, "metavar": "VALUE"}
        if not str(setting.type).startswith("tuple"):
            options["help"] += f" (default: {str(setting.default).lower()})"
        options["help"] = options["help"].replace("%", "%%")
        parser.add_argument(*names, **options)
    parser.add_argument(
        "--strict-model-config", dest=_STRICT, type=_boolean, nargs="?", const=True, help=argparse.SUPPRESS
    )
    for name in WITHOUT_EFFECT:
        parser.add_argument(name, dest=name, action="append", nargs="?", const="", help=argparse.SUPPRESS)


def parse_server_settings(
    arguments: Sequence[str], environment: Mapping[str, str] = os.environ
) -> tuple[ServerSettings, list[str]]:
    """Settings from command-line flags, then ONNXEDGE_… variables, then defaults.

    `--grpc-port` is ONNXEDGE_GRPC_PORT, and so on; ONNXEDGE_MODEL_REPOSITORY
    takes several folders with the platform's path separator between them, other variables one value.

    Returns:
        the settings, and a warning for each flag of Triton's that was given and changes nothing here, and for
        each variable that looks like a misspelt one.

    Raises:
        SettingsError: a flag is unknown, or a value can't be used.
    """
    parser = _Parser(prog="onnxedge serve", allow_abbrev=False)
    add_server_flags(parser)
    given = vars(_parse(parser, [*_environment_arguments(environment), *arguments]))
    given = {name: value for name, value in given.items() if value is not None}
    warnings = [
        f"{flag} has no effect: {reason}" for flag, reason in WITHOUT_EFFECT.items() if given.pop(flag, None)
    ]
    warnings += _misspelt(environment)
    if given.pop(_STRICT, False):  # Triton's old name
        given["disable_auto_complete_config"] = True
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items()
    }
    return ServerSettings(**values), warnings


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    namespace, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        flag = unknown[0].split("=")[0]
        known = [name for action in parser._actions for name in action.option_strings]  # noqa: SLF001 - no public list
        near = difflib.get_close_matches(flag, known, 1, _NEAR)
        if not flag.startswith("-"):
            raise SettingsError(f"unexpected {flag!r}: did you mean --model-repository {flag}?")
        hint = f"did you mean {near[0]}?" if near else "onnxedge serve --help lists those that there are"
        hint = f"write {REPLACED[flag]}" if flag in REPLACED else hint
        raise SettingsError(f"unknown flag {flag}: {hint}")
    return namespace


def _environment_arguments(environment: Mapping[str, str]) -> list[str]:
    arguments = []
    for setting in fields(ServerSettings):
        text = environment.get(ENVIRONMENT_PREFIX + setting.name.upper())
        if text is None:
            continue
        parts = text.split(os.pathsep) if setting.name == "model_repository" else [text]
        arguments += [f"--{flag_of(setting.name)}={part}" for part in parts]
    return arguments


def _misspelt(environment: Mapping[str, str]) -> list[str]:
    """What the server doesn't read, though its name is nearly that of a setting's variable."""
    known = [setting.name.upper() for setting in fields(ServerSettings)]
    warnings = []
    for variable in environment:
        name = variable.removeprefix(ENVIRONMENT_PREFIX)
        if name in (variable, *known):
            continue
        if near := difflib.get_close_matches(name, known, 1, _NEAR_VARIABLE):
            warnings.append(f"{variable} has no effect: did you mean {ENVIRONMENT_PREFIX}{near[0]}?")
    return warnings

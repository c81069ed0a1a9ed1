"""The command line's `--trace-config` flags, in Triton's syntax."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from serve.errors import InvalidArgumentError
from serve.observability.trace_settings import (
    OPEN_TELEMETRY,
    SETTINGS,
    TENSORS,
    TIMESTAMPS,
    TRITON,
    TraceConfig,
    TraceScope,
)
from serve.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterable

_OPTIONS = ("url", "resource", "bsp_max_queue_size", "bsp_schedule_delay", "bsp_max_export_batch_size")


def parse_trace_config(flags: Iterable[str]) -> TraceConfig:
    """The flags `--trace-config=[triton|opentelemetry,]NAME=VALUE`.

    Raises:
        SettingsError: a flag is malformed, unknown, or its value can't be used.
    """
    given: dict[str, list[str]] = {}
    flags = list(flags)
    for flag in flags:
        name, value = _split(flag)
        given.setdefault(name, []).append(value)
    prefixes = [flag.partition(",")[0] for flag in flags]
    implied = OPEN_TELEMETRY if OPEN_TELEMETRY in prefixes and TRITON not in prefixes else TRITON
    mode, file = given.pop("mode", [implied])[-1], given.pop("file", [""])[-1]
    if (file or mode == OPEN_TELEMETRY) and "level" not in given and given.get("rate"):
        given["level"] = [TIMESTAMPS]  # whoever says where to and how many wants some
    if mode not in (TRITON, OPEN_TELEMETRY):
        raise SettingsError(f"--trace-config mode={mode}: expected {TRITON} or {OPEN_TELEMETRY}")
    values = {}
    for name, (field, parse) in SETTINGS.items():
        short = name.removeprefix("trace_")
        texts = given.pop(short, None)
        if texts is None:
            continue
        try:
            values[field] = parse(short, texts if short == "level" else texts[-1:])
        except InvalidArgumentError as error:
            raise SettingsError(f"--trace-config {error}") from error
    resource = dict(_pair(text, "resource") for text in given.pop("resource", []))
    options = {name: texts[-1] for name, texts in given.items()}
    config = TraceConfig(mode, file, TraceScope(**values), options, resource)
    _check_config(config)
    return config


def _split(flag: str) -> tuple[str, str]:
    head, comma, rest = flag.partition(",")
    prefixed = bool(comma) and "=" not in head
    if prefixed and head not in (TRITON, OPEN_TELEMETRY):
        raise SettingsError(
            f"--trace-config {flag}: expected mode {TRITON} or {OPEN_TELEMETRY}, got {head!r}"
        )
    name, value = _pair(rest if prefixed else flag, "--trace-config")
    name = name.replace("log-frequency", "log_frequency")
    known = ("mode", "file", *(n.removeprefix("trace_") for n in SETTINGS), *_OPTIONS)
    if name not in known:
        raise SettingsError(f"--trace-config {flag}: unknown setting {name!r}, there are {', '.join(known)}")
    return name, value


def _pair(text: str, what: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise SettingsError(f"{what} {text!r}: expected NAME=VALUE")
    return name, value


def _check_config(config: TraceConfig) -> None:
    if config.mode == OPEN_TELEMETRY and TENSORS in config.defaults.level:
        raise SettingsError(f"--trace-config level={TENSORS} needs mode={TRITON}: spans carry no tensors")
    folder = Path(config.file).absolute().parent
    if config.mode == TRITON and config.file and not folder.is_dir():
        raise SettingsError(f"--trace-config file={config.file}: there is no folder {folder}")

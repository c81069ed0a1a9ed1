"""What is traced: the settings of Triton's trace extension, global and per model.

A model's settings override the global ones key by key, and the global ones those of the command line; a key
that is cleared falls back again. Each change starts the counting of requests anew, as Triton's does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from serve.errors import InvalidArgumentError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

OFF, TIMESTAMPS, TENSORS = "OFF", "TIMESTAMPS", "TENSORS"
TRITON, OPEN_TELEMETRY = "triton", "opentelemetry"
UNLIMITED = -1
_MAX_UINT32 = 2**32 - 1
_MAX_INT32 = 2**31 - 1
_MOST_DIGITS = 10
_SHOWN = 64


@dataclass(slots=True)
class TraceScope:
    """The settings in force for one model, or for all that have none of their own.

    Attributes:
        level: TIMESTAMPS and TENSORS, or neither: OFF.
        rate: every so many requests one is traced; 0: only those that bring a trace of their own.
        count: traces that are left to make; -1: no limit.
        log_frequency: traces per numbered file; 0: one file for all.
        specified: those of these fields that are set here and not taken from the next wider scope.
        seen: requests counted so far.
    """

    level: tuple[str, ...] = ()
    rate: int = 1000
    count: int = UNLIMITED
    log_frequency: int = 0
    specified: frozenset[str] = frozenset()
    seen: int = 0

    def take(self, *, forced: bool) -> bool:
        """Count a request; whether it is to be traced. `forced`: it brings a trace of its own."""
        if not self.level:
            return False
        if self.rate == 0:
            return forced
        self.seen += 1
        hit = self.seen % self.rate == 0 and self.count != 0
        if hit and self.count > 0:
            self.count -= 1
        return hit or forced


@dataclass(frozen=True, slots=True)
class TraceConfig:
    """What the command line says.

    Attributes:
        mode: triton or opentelemetry.
        file: where Triton's mode writes; empty: nowhere, so nothing is traced.
        defaults: the settings that can change while the server runs.
        options: of OpenTelemetry's mode, by Triton's names.
        resource: attributes of this process in OpenTelemetry's mode.
    """

    mode: str
    file: str
    defaults: TraceScope
    options: Mapping[str, str]
    resource: Mapping[str, str]


def _integer(name: str, values: Sequence[str], least: int, largest: int) -> int:
    if len(values) != 1:
        raise InvalidArgumentError(f"expect only 1 value for '{name}', got {len(values)}")
    digits = values[0].removeprefix("-")
    readable = digits.isascii() and digits.isdecimal() and len(digits) <= _MOST_DIGITS
    if not (readable and least <= int(values[0]) <= largest):
        raise InvalidArgumentError(
            f"'{name}': expected a whole number from {least} to {largest}, got {values[0][:_SHOWN]!r}"
        )
    return int(values[0])


def _level(name: str, values: Sequence[str]) -> tuple[str, ...]:
    for value in values:
        if value not in (OFF, TIMESTAMPS, TENSORS):
            raise InvalidArgumentError(
                f"'{name}': expected {OFF}, {TIMESTAMPS} or {TENSORS}, got {value[:_SHOWN]!r}"
            )
    if OFF in values and len(values) > 1:
        raise InvalidArgumentError(f"'{name}': expect only one trace level '{OFF}' is specified")
    return tuple(level for level in (TIMESTAMPS, TENSORS) if level in values)


SETTINGS: dict[str, tuple[str, Callable[[str, Sequence[str]], Any]]] = {
    "trace_level": ("level", _level),
    "trace_rate": ("rate", lambda name, values: _integer(name, values, 0, _MAX_UINT32)),
    "trace_count": ("count", lambda name, values: _integer(name, values, UNLIMITED, _MAX_INT32)),
    "log_frequency": ("log_frequency", lambda name, values: _integer(name, values, 0, _MAX_UINT32)),
}
"""The protocol's names: the field of `TraceScope`, and how its value is read."""


class TraceSettings:
    """All scopes. Not thread-safe: `serve.observability.tracing` has the lock."""

    def __init__(self, config: TraceConfig) -> None:
        self.config = config
        self._models: dict[str, TraceScope] = {}
        self._global = replace(config.defaults)
        self._defaults = replace(config.defaults)
        self.active = self._any_active()

    def scope(self, model: str) -> TraceScope:
        """The settings in force for a model; `""`: the global ones."""
        return self._models.get(model, self._global)

    def take(self, model: str, *, forced: bool) -> TraceScope | None:
        """Count a request of a model; its scope if it is to be traced."""
        scope = self.scope(model)
        if not self._problem(scope) and scope.take(forced=forced):
            if scope.count == 0:
                self.active = self._any_active()
            return scope
        return None

    def update(self, model: str, changes: Mapping[str, Any]) -> None:
        """Change the settings of a model, or the global ones for `""`.

        Args:
            model: one that there is.
            changes: fields of `TraceScope` to values; None: back to the next wider scope's.

        Raises:
            InvalidArgumentError: tracing could not work with them.
        """
        if model:
            self._replace_models({model: self._updated(self._models.get(model), self._global, changes)})
            return
        wider = self._updated(self._global, self._defaults, changes)
        # Models that override some of the keys follow in the others.
        following = {name: self._updated(scope, wider, {}) for name, scope in self._models.items()}
        self._global = wider
        self._replace_models(following)

    def _replace_models(self, scopes: Mapping[str, TraceScope]) -> None:
        self._models |= scopes
        self._models = {name: scope for name, scope in self._models.items() if scope.specified}
        self.active = self._any_active()

    def _updated(
        self, current: TraceScope | None, wider: TraceScope, changes: Mapping[str, Any]
    ) -> TraceScope:
        cleared = {field for field, value in changes.items() if value is None}
        specified = ((current.specified if current else frozenset()) | changes.keys()) - cleared
        values = {
            field: changes[field] if field in changes else getattr(current, field) for field in specified
        }
        scope = replace(wider, **values, specified=frozenset(specified), seen=0)
        problem = self._problem(scope)
        if scope.level and problem:
            raise InvalidArgumentError(f"Attempting to set invalid trace setting: {problem}")
        return scope

    def _problem(self, scope: TraceScope) -> str:
        """Why nothing can be traced; empty: it can."""
        if not scope.level:
            return "tracing is disabled"
        if self.config.mode == OPEN_TELEMETRY:
            return "trace level TENSORS needs trace mode triton" if TENSORS in scope.level else ""
        if scope.rate == 0:
            return "sample rate must be non-zero"
        return "" if self.config.file else "trace file name is not given (--trace-config=triton,file=PATH)"

    def _any_active(self) -> bool:
        forced = self.config.mode == OPEN_TELEMETRY
        scopes = (self._global, *self._models.values())
        return any(not self._problem(scope) and (forced or scope.count != 0) for scope in scopes)


def parse_changes(settings: Mapping[str, Sequence[str]], mode: str) -> dict[str, Any]:
    """A TraceSetting request's settings as fields of `TraceScope`; no values: None, which clears.

    Raises:
        UnsupportedError: the file is named, which no client may choose, or another mode.
        InvalidArgumentError: a setting is unknown, or its value is.
    """
    changes: dict[str, Any] = {}
    for name, values in settings.items():
        if name == "trace_file":
            raise UnsupportedError("trace file location can not be updated through network protocol")
        if name == "trace_mode":
            if list(values) != [mode]:
                raise UnsupportedError("trace mode can not be updated through network protocol")
        elif name in SETTINGS:
            field, parse = SETTINGS[name]
            changes[field] = parse(name, values) if values else None
        else:
            raise InvalidArgumentError(
                f"unknown trace setting {name[:_SHOWN]!r}, there are {', '.join(SETTINGS)}"
            )
    return changes


def describe(scope: TraceScope, config: TraceConfig) -> dict[str, list[str]]:
    """The settings in force by the protocol's names."""
    shown = {
        "trace_level": list(scope.level) or [OFF],
        "trace_rate": [str(scope.rate)],
        "trace_count": [str(scope.count)],
        "trace_mode": [config.mode],
    }
    if config.mode == TRITON:
        return shown | {"log_frequency": [str(scope.log_frequency)], "trace_file": [config.file]}
    return shown | {name: [value] for name, value in config.options.items()}

"""The server's log: which levels, in which of Triton's line formats, where to; changed while it runs."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from logging.handlers import WatchedFileHandler
from typing import TYPE_CHECKING

from serve.errors import InvalidArgumentError, UnsupportedError
from serve.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from serve.settings import ServerSettings

FORMATS = ("default", "ISO8601")
_LOGGER = "serve"
_SECONDS_BETWEEN_COMPLAINTS = 10.0
_SHOWN = 64
_SILENT = logging.CRITICAL + 1


@dataclass(frozen=True, slots=True)
class _Values:
    """The settings by the protocol's names."""

    log_file: str
    log_info: bool
    log_warning: bool
    log_error: bool
    log_verbose_level: int
    log_format: str

    def shows(self, level: int) -> bool:
        """Whether a message of one of logging's levels is written."""
        if level >= logging.ERROR:
            return self.log_error
        if level >= logging.WARNING:
            return self.log_warning
        return self.log_info if level >= logging.INFO else self.log_verbose_level > 0

    def least(self) -> int:
        """The lowest level that is written, so that logging can refuse the others early."""
        levels = (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR)
        return next((level for level in levels if self.shows(level)), _SILENT)


class LogSettings:
    """What is logged; `install` makes it so, and `update` takes effect at once."""

    def __init__(self, settings: ServerSettings) -> None:
        self._values = _Values(
            settings.log_file,
            settings.log_info,
            settings.log_warning,
            settings.log_error,
            settings.log_verbose,
            settings.log_format,
        )
        self._lock = threading.Lock()
        self._handler: logging.Handler | None = None

    def install(self) -> None:
        """Write the log of this process, all its libraries' included, as the settings say.

        Raises:
            SettingsError: the log's file can't be opened.
        """
        handler = _handler(self._values.log_file)
        handler.setFormatter(_Formatter(self))
        handler.addFilter(lambda record: self._values.shows(record.levelno))
        root = logging.getLogger()
        for old in list(root.handlers):
            root.removeHandler(old)
        root.addHandler(handler)
        root.setLevel(logging.WARNING)
        self._handler = handler
        self._apply()

    def update(self, changes: Mapping[str, bool | int | str]) -> None:
        """Change settings, all of them or, where one can't be, none.

        Args:
            changes: by the protocol's names.

        Raises:
            UnsupportedError: the file is named, which no client may choose.
            InvalidArgumentError: a setting is unknown, or its value can't be used.
        """
        with self._lock:
            known = self.describe()
            for name, value in changes.items():
                if name == "log_file":
                    raise UnsupportedError("log file location can not be updated through network protocol")
                if name not in known:
                    raise InvalidArgumentError(
                        f"unknown log setting {name[:_SHOWN]!r}, there are {', '.join(known)}"
                    )
                _check(name, value, type(known[name]))
            self._values = replace(self._values, **changes)  # type: ignore[arg-type] # checked just above
            self._apply()

    def describe(self) -> dict[str, bool | int | str]:
        """The settings by the protocol's names."""
        return asdict(self._values)

    @property
    def line_format(self) -> str:
        """One of `FORMATS`."""
        return self._values.log_format

    def _apply(self) -> None:
        if self._handler is not None:
            logging.getLogger(_LOGGER).setLevel(self._values.least())


def configure_logging(settings: ServerSettings) -> LogSettings:
    """Make a server process log as its settings say.

    Raises:
        SettingsError: the log's file can't be opened.
    """
    log = LogSettings(settings)
    log.install()
    return log


def _check(name: str, value: bool | int | str, kind: type) -> None:  # noqa: FBT001 - the value of a setting
    texts = {bool: "boolean", int: "uint32", str: "string"}
    if type(value) is not kind:
        raise InvalidArgumentError(f"expect {texts[kind]} for '{name}'")
    if name == "log_format" and value not in FORMATS:
        raise InvalidArgumentError(
            f"invalid argument for log_format, expected {' or '.join(FORMATS)}, got: {str(value)[:_SHOWN]!r}"
        )


def _handler(path: str) -> logging.Handler:
    if not path:
        return logging.StreamHandler(sys.stderr)
    try:
        return _LogFile(path, encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"--log-file {path} can't be written: {error.strerror or error}") from error


class _LogFile(WatchedFileHandler):
    """Looks at each line whether the file has been moved away, so rotation needs no signal."""

    _next_complaint = 0.0

    def handleError(self, _record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Say now and then that lines are lost; logging's own way is a traceback for each."""
        now = time.monotonic()
        if now >= self._next_complaint:
            self._next_complaint = now + _SECONDS_BETWEEN_COMPLAINTS
            print(f"{self.baseFilename} can't be written: {sys.exc_info()[1]}", file=sys.stderr)


class _Formatter(logging.Formatter):
    """Triton's two formats; the message is quoted, so that what clients send can't make lines of its own."""

    def __init__(self, log: LogSettings) -> None:
        super().__init__()
        self._log = log

    def format(self, record: logging.LogRecord) -> str:
        """One line, whatever is in the message."""
        level = "E" if record.levelno >= logging.ERROR else "W" if record.levelno >= logging.WARNING else "I"
        at = time.gmtime(record.created)
        if self._log.line_format == "ISO8601":
            head = f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', at)} {level}"
        else:
            microseconds = int(record.created % 1 * 1e6)
            head = f"{level}{time.strftime('%m%d %H:%M:%S', at)}.{microseconds:06d}"
        text = record.getMessage()
        if record.exc_info:
            text = f"{text}\n{self.formatException(record.exc_info)}"
        quoted = json.dumps(text, ensure_ascii=False)
        return f"{head} {record.process} {record.filename}:{record.lineno}] {quoted}"

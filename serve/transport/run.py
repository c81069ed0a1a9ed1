"""`onnxedge serve`: the process around the server, its signals and its end."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from typing import TYPE_CHECKING

from serve.errors import ModelLoadError
from serve.flags import parse_server_settings
from serve.observability.log_settings import configure_logging
from serve.process import take_short_turns
from serve.settings import SettingsError
from serve.transport.server import Server, host_port

if TYPE_CHECKING:
    from collections.abc import Sequence

    from serve.settings import ServerSettings

logger = logging.getLogger(__name__)

_USAGE_ERROR = 2
_LAST_THREADS_SECONDS = 1.0


def main(arguments: Sequence[str]) -> int:
    """Serve until SIGTERM or SIGINT; 0 when every request in flight was answered."""
    try:
        settings, warnings = parse_server_settings(arguments)
        log = configure_logging(settings)
        server = Server(settings, log)
    except SettingsError as error:
        print(f"onnxedge serve: {error}", file=sys.stderr)
        return _USAGE_ERROR
    for warning in warnings:
        logger.warning("%s", warning)
    take_short_turns()
    signals = Signals()
    signal.signal(signal.SIGHUP, lambda *_: server.reopen_logs())
    start = _Start(server, signals)
    signals.wait(start.done)
    if not start.done.is_set():
        logger.warning("stopped while models were being loaded")
        _end(1)
    if not start.succeeded:
        return 1
    _announce(server, settings)
    signals.wait()
    logger.info("stopping: requests in flight get up to %d s", settings.exit_timeout_secs)
    status = 0 if server.stop() else 1
    logger.info("stopped%s", "" if status == 0 else ": not every request was answered in time")
    if _threads_at_work():  # in onnxruntime, which nothing interrupts: a load, or a run past its grace
        _end(status)
    return status


class Signals:
    """SIGTERM and SIGINT: the first is waited for, the second ends the process at once.

    As process 1 of a container, Python would ignore both. The kernel may hand a signal to any thread, and
    Python's handler runs in the main one, which a lock would keep asleep: while metrics were scraped, one
    SIGTERM in four was lost. The wakeup descriptor gets a byte whichever thread it was.
    """

    def __init__(self) -> None:
        self._stopping = False
        self._woken, self._signalled = socket.socketpair()
        self._signalled.setblocking(False)  # noqa: FBT003 - its only parameter
        signal.set_wakeup_fd(self._signalled.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def wait(self, done: threading.Event | None = None) -> None:
        """Wait, in the main thread, for the first signal, or for `done` and a `wake`."""
        while not (self._stopping or (done is not None and done.is_set())):
            self._woken.recv(64)

    def wake(self) -> None:
        """Have `wait` look again."""
        self._signalled.send(b"\0")

    def _stop(self, number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        self._stopping = True


class _Start:
    """The server's start, on a thread of its own: loading a model keeps Python from handling signals."""

    def __init__(self, server: Server, signals: Signals) -> None:
        self.done = threading.Event()
        self.succeeded = False
        self._server = server
        self._signals = signals
        threading.Thread(target=self._run, name="start", daemon=True).start()

    def _run(self) -> None:
        try:
            self._server.start()
        except (ModelLoadError, OSError, RuntimeError) as error:
            logger.error("cannot start: %s", error)  # noqa: TRY400 - the message says it all
        except Exception:
            logger.exception("cannot start")
        else:
            self.succeeded = True
        self.done.set()
        self._signals.wake()


def _threads_at_work() -> bool:
    """Whether a thread of gRPC's pool, which Python would wait for, doesn't end."""
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("grpc")]
    for thread in threads:
        thread.join(_LAST_THREADS_SECONDS / max(1, len(threads)))
    return any(thread.is_alive() for thread in threads)


def _end(status: int) -> None:
    """End the process without waiting for any thread."""
    logging.shutdown()
    os._exit(status)


def _announce(server: Server, settings: ServerSettings) -> None:
    print(server.report(), file=sys.stderr, flush=True)
    if settings.allow_metrics:
        logger.info("metrics at http://%s/metrics", host_port(settings.metrics_address, server.metrics_port))
    logger.info("SERVING: gRPC at %s", host_port(settings.grpc_address, server.grpc_port))

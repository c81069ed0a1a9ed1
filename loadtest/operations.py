"""What is done to a server while it is under load: its models loaded again and again, its memory watched."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Self

from loadtest.server_side import read_metrics
from loadtest.target import Questions, TargetError
from serve.pb import grpc_service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Sequence

_LOAD_SECONDS = 300.0
_MEMORY = ("process_resident_memory_bytes", "nv_cpu_memory_used_bytes")


class Repeating:
    """Does something every so many seconds, beside a run, until its `with` block ends."""

    def __init__(self, every: float) -> None:
        self._every = every
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name=type(self).__name__, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_raised: object) -> None:
        self._over.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._over.wait(self._every):
            self.once()

    def once(self) -> None:
        """One time."""
        raise NotImplementedError


class Reloading(Repeating):
    """Has the server load its models anew, in turn, with RepositoryModelLoad.

    Attributes:
        done, failed: how often it worked, and why it didn't.
    """

    def __init__(self, questions: Questions, models: Sequence[str], every: float) -> None:
        super().__init__(every)
        self._questions = Questions(questions.target, _LOAD_SECONDS)
        self._models = list(models)
        self.done = 0
        self.failed: list[str] = []

    def once(self) -> None:
        """Load the next model."""
        model = self._models[(self.done + len(self.failed)) % len(self._models)]
        request = pb.RepositoryModelLoadRequest(model_name=model)
        try:
            self._questions.ask("RepositoryModelLoad", request, pb.RepositoryModelLoadResponse)
        except TargetError as error:
            self.failed.append(str(error))
        else:
            self.done += 1

    def __exit__(self, *raised: object) -> None:
        super().__exit__(*raised)
        self._questions.__exit__()


class MemoryWatch(Repeating):
    """Reads the server's memory from its metrics.

    Attributes:
        series: the metric that was found; empty: none was.
        megabytes: its values.
    """

    def __init__(self, metrics_url: str, every: float) -> None:
        super().__init__(every)
        self._url = metrics_url
        self.series = ""
        self.megabytes: list[float] = []

    def once(self) -> None:
        """Read it."""
        with contextlib.suppress(OSError, ValueError):
            found = read_metrics(self._url)
            self.series = next(
                (series for name in _MEMORY for series in found if series.startswith(name)), ""
            )
            if self.series:
                self.megabytes.append(found[self.series] / 1e6)

    @property
    def growth(self) -> float:
        """Megabytes from the median of the first quarter to that of the last; 0 of fewer than four values."""
        quarter = len(self.megabytes) // 4
        if not quarter:
            return 0.0
        first, last = (
            sorted(part)[quarter // 2] for part in (self.megabytes[:quarter], self.megabytes[-quarter:])
        )
        return last - first

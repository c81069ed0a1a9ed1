"""Between the loading of a graph and its first request: runs that show how it is to be served."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from serve.errors import ModelLoadError, ServeError
from serve.loading.batching_pays import measure
from serve.loading.golden import read_inputs
from serve.loading.row_independence import are_apart, is_declared_independent
from serve.loading.samples import make_inputs
from serve.loading.warmup_samples import run_samples
from serve.runtime.providers import CPU

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from serve.model.model_config import ModelConfig
    from serve.runtime.session import GraphTensor, Session

    Arrays = Mapping[str, np.ndarray]

logger = logging.getLogger(__name__)

# Sizes for axes that nobody tells the size of: as long as a sentence or a day, or else 1.
_OPEN_SIZES = (64, 1)
_COMPARED_ROWS = 4
_MAX_BATCH_BYTES = 256 << 20
_SLOW_SECONDS = 0.02  # of such a graph only two rows are compared


@dataclass(frozen=True, slots=True)
class WarmUp:
    """What was found.

    Attributes:
        useful_batch_size: rows up to which a run is worth sharing; 1: requests are run one by one.
        rows_independent: False where a row's answer depends on the others of its batch.
        seconds: that all of it took.
        figures: rows of a run to seconds a row, fixed costs included; empty where it was not measured.
        reason: why it was not measured, or why rows are not independent; empty: neither.
    """

    useful_batch_size: int = 1
    rows_independent: bool = True
    seconds: float = 0.0
    figures: Mapping[int, float] = field(default_factory=dict)
    reason: str = ""


def warm_up(session: Session, config: ModelConfig, model_folder: Path, version_folder: Path) -> WarmUp:
    """Run the config's `model_warmup`, then measure whether batches pay.

    Batches are measured on a row of `model_warmup`, else on the golden rows, else on made-up numbers; not for
    sequences, whose batches are made of what is there, nor where the config says how large they shall be.

    Args:
        session: the loaded graph.
        config: the model's, completed.
        model_folder: holds `warmup/`.
        version_folder: holds the graph, and `golden.npz` and `report.json` where there are any.

    Raises:
        ModelLoadError: a sample of `model_warmup` can't be run, or one of the files can't be read.
    """
    started = time.perf_counter()
    sample = run_samples(session, config, model_folder)
    found = WarmUp(reason=f"max_batch_size is {config.max_batch_size}")
    if config.max_batch_size > 1:
        filename = config.message.default_model_filename
        found = _Batches(session, config, version_folder, sample).examine(filename)
    found = replace(found, seconds=time.perf_counter() - started)
    shown = ", ".join(f"{rows}: {seconds * 1e6:.0f}" for rows, seconds in found.figures.items())
    logger.info(
        "'%s': warmed up in %.0f ms; rows in a run: up to %d%s%s",
        config.name,
        found.seconds * 1e3,
        found.useful_batch_size,
        f" (µs a row by rows: {shown})" if shown else "",
        f" ({found.reason})" if found.reason else "",
    )
    return found


class _Batches:
    """Runs of one graph with several rows."""

    def __init__(
        self, session: Session, config: ModelConfig, version_folder: Path, sample: Arrays | None
    ) -> None:
        self._session = session
        self._config = config
        self._folder = version_folder
        self._sample = sample
        self._outputs = [output.name for output in session.outputs]
        self._rows: list[Arrays] = []
        settings = session.settings
        self._is_single = (
            set(session.providers) == {CPU}
            and settings.intra_op_threads == 1
            and not (settings.shared_pool or settings.parallel)
        )

    def examine(self, filename: str) -> WarmUp:
        """Whether rows are independent, and how many in a run pay."""
        independent = is_declared_independent(self._folder, filename)
        if self._config.message.HasField("sequence_batching"):
            return WarmUp(
                1, independent, reason="not measured: runs are made of the sequences that are there"
            )
        if not independent:
            return WarmUp(1, rows_independent=False, reason="it takes ranges over whole batches")
        apart = self._first_runs()
        if not self._rows:
            return WarmUp(1, reason=f"not measured: {apart}")
        if apart:
            return WarmUp(1, rows_independent=False, reason=apart)
        batching = self._config.message.dynamic_batching
        if batching.preferred_batch_size or batching.max_queue_delay_microseconds:
            return WarmUp(
                self._config.max_batch_size, reason="dynamic_batching says how large batches shall be"
            )
        if self._sample is not None:  # of the size that the model is meant for
            self._rows = [self._sample]
        try:
            found = measure(self._time_run, self._largest())
        except ServeError as error:
            return WarmUp(1, reason=f"not measured: {error}")
        return WarmUp(found.useful, figures=found.figures)

    def _first_runs(self) -> str:
        """Find rows that the graph takes, and run some alone and together: what shows that they are mixed.

        Where no rows are found, why the last that were tried didn't run.
        """
        problem = ""
        for rows in self._candidates():
            try:
                problem = self._compare(rows)
            except ServeError as error:
                problem = str(error)
            else:
                self._rows = rows
                return problem
        return problem or "its inputs can't be made up"

    def _compare(self, rows: list[Arrays]) -> str:
        started = time.perf_counter()
        alone = [self._session.run(rows[0], self._outputs)]
        is_slow = time.perf_counter() - started > _SLOW_SECONDS
        count = min(self._config.max_batch_size, 2 if is_slow else _COMPARED_ROWS)
        compared = _cycle(rows, count)
        alone += [self._session.run(row, self._outputs) for row in compared[1:]]
        together = self._session.run(_join(compared), self._outputs)
        return are_apart(together, alone, self._session.providers)

    def _candidates(self) -> Iterator[list[Arrays]]:
        """Rows to run, the likest to a client's first."""
        golden = read_inputs(self._folder)
        count = min((len(array) for array in golden.values()), default=0)
        if golden.keys() == {tensor.name for tensor in self._session.inputs} and count:
            yield [{n: array[row : row + 1] for n, array in golden.items()} for row in range(count)]
        if self._sample is not None:
            yield [self._sample]
        for size in _OPEN_SIZES:
            generator = np.random.default_rng(0)
            try:
                yield [make_inputs(self._inputs(), size, generator) for _ in range(_COMPARED_ROWS)]
            except ModelLoadError as error:
                logger.info("'%s': no rows to measure with: %s", self._config.name, error)

    def _inputs(self) -> list[GraphTensor]:
        """The graph's, with the sizes that the config states."""
        specs = self._config.inputs
        image = self._config.encoded_image
        return [
            replace(tensor, shape=specs[tensor.name].shape)
            if tensor.name in specs
            and specs[tensor.name].reshape is None
            and (image is None or image.name != tensor.name)
            else tensor
            for tensor in self._session.inputs
        ]

    def _largest(self) -> int:
        """Rows that may be run together without filling the memory."""
        row = sum(array.nbytes for array in self._rows[0].values())
        return max(1, min(self._config.max_batch_size, _MAX_BATCH_BYTES // max(1, row)))

    def _time_run(self, count: int) -> tuple[float, float]:
        """Seconds of a run of so many rows, put together first as those of clients are.

        Where this thread does all of it, its processor time is what it costs; else the time that passes.
        """
        rows = _cycle(self._rows, count)
        started, worked = time.perf_counter(), time.thread_time()
        self._session.run(_join(rows) if count > 1 else rows[0], self._outputs)
        worked, passed = time.thread_time() - worked, time.perf_counter() - started
        return passed, worked if self._is_single else passed


def _cycle(rows: list[Arrays], count: int) -> list[Arrays]:
    return [rows[i % len(rows)] for i in range(count)]


def _join(rows: list[Arrays]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

"""Tensors of a run: requests in, one feed, one run of the graph, each request's outputs out. No queues."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from serve.errors import InternalError, InvalidArgumentError
from serve.protocol.classification import classify
from serve.protocol.tensor_codec import as_text
from serve.request import RequestedOutput, Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from serve.model.implicit_state import ImplicitState
    from serve.model.model_config import ModelConfig
    from serve.runtime.session import Session
    from serve.scheduling.scheduler import QueuedRequest


class Runner:
    """Runs requests of one model version, alone or together. May be called from several threads at once."""

    def __init__(self, config: ModelConfig, session: Session, states: ImplicitState | None = None) -> None:
        """Run `session` as `config` says; `states` hold what a sequence leaves for its next request."""
        self._config = config
        self._session = session
        self._states = states
        self._batched = config.max_batch_size > 0
        specs = (*config.inputs.values(), *config.outputs.values())
        self._reshaped = any(spec.reshape is not None for spec in specs)
        self._all_outputs = {name: RequestedOutput(name) for name in config.outputs}

    def run(self, batch: Sequence[QueuedRequest]) -> list[tuple[Tensor, ...]]:
        """Run requests together and set their calls' times.

        Args:
            batch: one request or more, whose inputs differ in their rows alone (or in length, where the model
                has a `Padding`).

        Returns:
            each request's outputs, in the order in which it named them.

        Raises:
            InvalidArgumentError, InternalError: the graph refuses the inputs, or fails.
            CanceledError, DeadlineExceededError: the only request was given up meanwhile.
        """
        if len(batch) == 1 and self._states is None:
            return [self._run_one(batch[0])]
        started = time.monotonic_ns()
        feed = self._feed_one(batch[0]) if len(batch) == 1 else self._feed_many(batch)
        wanted = [self._wanted(queued.request.outputs) for queued in batch]
        names = list(dict.fromkeys(name for names in wanted for name in names))
        if self._states is not None:
            feed |= self._states.feed(batch)
            names += [name for name in self._states.extra_outputs if name not in names]
        ready = time.monotonic_ns()
        arrays = self._session.run(feed, names, batch[0].call if len(batch) == 1 else None)
        ran = time.monotonic_ns()
        by_name = dict(zip(names, arrays, strict=True))
        parts = [by_name] if len(batch) == 1 else self._split(batch, by_name)
        outputs = [self._outputs(w, part) for w, part in zip(wanted, parts, strict=True)]
        if self._states is not None:  # last: what fails above leaves the states as they were
            self._states.store(batch, by_name)
        done = time.monotonic_ns()
        for queued in batch:
            call = queued.call
            call.started_ns, call.ready_ns, call.ran_ns, call.done_ns = started, ready, ran, done
        return outputs

    def _run_one(self, queued: QueuedRequest) -> tuple[Tensor, ...]:
        """As `run`, for the most frequent case, without its lists: 4 of 28 µs of Python for a request."""
        call = queued.call
        call.started_ns = time.monotonic_ns()
        feed = self._feed_one(queued)
        wanted = self._wanted(queued.request.outputs)
        call.ready_ns = time.monotonic_ns()
        arrays = self._session.run(feed, list(wanted), call)
        call.ran_ns = time.monotonic_ns()
        outputs = tuple(map(self._output, wanted.values(), arrays))
        call.done_ns = time.monotonic_ns()
        return outputs

    def _feed_one(self, queued: QueuedRequest) -> dict[str, np.ndarray]:
        if not self._reshaped:
            return {tensor.name: _onnx_array(tensor) for tensor in queued.request.inputs}
        specs = self._config.inputs
        return {
            tensor.name: specs[tensor.name].to_graph(_onnx_array(tensor), batched=self._batched)
            for tensor in queued.request.inputs
        }

    def _feed_many(self, batch: Sequence[QueuedRequest]) -> dict[str, np.ndarray]:
        feeds = [self._feed_one(queued) for queued in batch]
        padding = self._config.padding
        if padding is not None:
            length = max(padding.length(queued.request.inputs) for queued in batch)
            feeds = [{name: padding.pad(name, a, length) for name, a in feed.items()} for feed in feeds]
        return {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}

    def _split(
        self, batch: Sequence[QueuedRequest], arrays: Mapping[str, np.ndarray]
    ) -> list[dict[str, np.ndarray]]:
        """Each request's rows of the outputs, as views."""
        rows = sum(queued.rows for queued in batch)
        for name in self._config.outputs:
            if name in arrays and (not arrays[name].ndim or arrays[name].shape[0] != rows):
                raise InternalError(
                    f"model '{self._config.name}': output '{name}' of a batch of {rows} rows has shape "
                    f"{list(arrays[name].shape)}: set max_batch_size to 0"
                )
        parts = []
        start = 0
        padding = self._config.padding
        for queued in batch:
            end = start + queued.rows
            part = {name: array[start:end] for name, array in arrays.items() if name in self._config.outputs}
            if padding is not None:
                length = padding.length(queued.request.inputs)
                part = {name: padding.cut(name, array, length) for name, array in part.items()}
            parts.append(part)
            start = end
        return parts

    def _wanted(self, requested: Sequence[RequestedOutput]) -> dict[str, RequestedOutput]:
        """The outputs by name, each once; all of them where none is named."""
        return {output.name: output for output in requested} if requested else self._all_outputs

    def _outputs(
        self, wanted: Mapping[str, RequestedOutput], arrays: Mapping[str, np.ndarray]
    ) -> tuple[Tensor, ...]:
        return tuple(self._output(output, arrays[output.name]) for output in wanted.values())

    def _output(self, output: RequestedOutput, array: np.ndarray) -> Tensor:
        spec = self._config.outputs[output.name]
        array = np.asarray(array)
        if self._reshaped:
            array = spec.to_client(array, batched=self._batched)
        tensor = Tensor(spec.name, spec.datatype, array, output.shared_memory)
        if not output.classification:
            return tensor
        return classify(tensor, output.classification, spec.labels, batched=self._batched)


def _onnx_array(tensor: Tensor) -> np.ndarray:
    """The array as onnxruntime takes it: strings are `str` there.

    Raises:
        InvalidArgumentError: a BYTES element is not UTF-8.
    """
    if tensor.datatype.name != "BYTES":
        return tensor.array
    try:
        return as_text(tensor.array)
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"input '{tensor.name}': the model takes UTF-8 text: {error}") from error

"""One loaded model version: check → schedule → run → answer."""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING

import numpy as np

from serve.classification import classify
from serve.datatypes import DATATYPES
from serve.errors import (
    CanceledError,
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    ServeError,
)
from serve.executor import Executor
from serve.request import InferResponse, RequestedOutput, Tensor
from serve.scheduler import QueuedRequest
from serve.statistics import Statistics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from serve.encoded_image import EncodedImage
    from serve.model_config import ModelConfig, TensorSpec
    from serve.request import Call, InferRequest
    from serve.session import Session


class ModelVersion:
    """A model version that answers requests."""

    def __init__(self, version: int, config: ModelConfig, session: Session, instances: int) -> None:
        """Start to serve; at most `instances` runs go on at once."""
        self.name = config.name
        self.version = version
        self.config = config
        self.statistics = Statistics()
        self._session = session
        self._all_outputs = {name: RequestedOutput(name) for name in config.outputs}
        self._executor = Executor(f"{self.name}/{version}", instances, self._answer, self._drop)

    @property
    def pending(self) -> int:
        """How many requests wait for an instance."""
        return self._executor.pending

    @property
    def providers(self) -> tuple[str, ...]:
        """The execution providers in use."""
        return self._session.providers

    def submit(self, request: InferRequest, call: Call, *, inline: bool) -> Future[InferResponse]:
        """Check a request and have it run.

        Args:
            request: decoded, and meant for this version.
            call: its deadline and cancellation.
            inline: the caller will wait for the answer anyway, so its thread may run the graph.

        Raises:
            InvalidArgumentError: the request doesn't fit the model, or an image in it can't be decoded.
        """
        try:
            self._check(request)
            if self.config.encoded_image is not None:
                request.inputs = _decode_images(self.config.encoded_image, request.inputs)
        except InvalidArgumentError:
            self.statistics.record_failure("OTHER", call.received_ns)
            raise
        future: Future[InferResponse] = Future()
        call.future = future
        call.queued_ns = time.monotonic_ns()
        self._executor.submit(QueuedRequest(request, call, future), inline=inline)
        return future

    def close(self) -> None:
        """Answer what waits, then give the threads back."""
        self._executor.close()

    def _check(self, request: InferRequest) -> None:
        specs = self.config.inputs
        for tensor in request.inputs:
            spec = specs.get(tensor.name)
            if spec is None:
                raise InvalidArgumentError(
                    f"unexpected inference input '{tensor.name}' for model '{self.name}', "
                    f"it has {list(specs)}"
                )
            spec.check(tensor)
        if len({tensor.name for tensor in request.inputs}) != len(specs) or len(request.inputs) != len(specs):
            raise InvalidArgumentError(
                f"model '{self.name}' expects each of the inputs {list(specs)} once, "
                f"got {[tensor.name for tensor in request.inputs]}"
            )
        if self.config.max_batch_size:
            self._check_batch(request.inputs)
        for output in request.outputs:
            if output.name not in self.config.outputs:
                raise InvalidArgumentError(
                    f"unexpected inference output '{output.name}' for model '{self.name}', "
                    f"it has {list(self.config.outputs)}"
                )

    def _check_batch(self, inputs: Sequence[Tensor]) -> None:
        sizes = {tensor.name: tensor.array.shape[0] for tensor in inputs}
        batch = next(iter(sizes.values()))
        if any(size != batch for size in sizes.values()):
            raise InvalidArgumentError(f"model '{self.name}': inputs differ in batch size: {sizes}")
        if not 1 <= batch <= self.config.max_batch_size:
            raise InvalidArgumentError(
                f"model '{self.name}': batch size {batch} is not in 1 to {self.config.max_batch_size} "
                "(max_batch_size)"
            )

    def _answer(self, queued: QueuedRequest) -> None:
        """Run a request and settle its future, whatever happens."""
        future = queued.future
        if not future.set_running_or_notify_cancel():
            self.statistics.record_failure("CANCELED", queued.call.received_ns)
            return
        try:
            response = self._run(queued.request, queued.call)
        except CanceledError as error:
            self._fail(queued, "CANCELED", error)
        except InvalidArgumentError as error:
            self._fail(queued, "OTHER", error)
        except ServeError as error:
            self._fail(queued, "BACKEND", error)
        except Exception as error:  # noqa: BLE001 - a waiter must never be left without an answer
            self._fail(queued, "BACKEND", InternalError(f"model '{self.name}': {error!r}"))
        else:
            future.set_result(response)

    def _run(self, request: InferRequest, call: Call) -> InferResponse:
        started = time.monotonic_ns()
        feed = {tensor.name: _onnx_array(tensor) for tensor in request.inputs}
        wanted = self._wanted_outputs(request.outputs)
        ready = time.monotonic_ns()
        arrays = self._session.run(feed, list(wanted), call)
        ran = time.monotonic_ns()
        outputs = tuple(
            self._output(self.config.outputs[output.name], array, output.classification)
            for output, array in zip(wanted.values(), arrays, strict=True)
        )
        rows = request.inputs[0].array.shape[0] if self.config.max_batch_size else 1
        stamps = (call.received_ns, call.queued_ns, started, ready, ran, time.monotonic_ns())
        self.statistics.record_success(rows, stamps)
        return InferResponse(self.name, str(self.version), request.id, outputs)

    def _wanted_outputs(self, requested: Sequence[RequestedOutput]) -> dict[str, RequestedOutput]:
        """The outputs by name, each once; all of them where none is named."""
        return {output.name: output for output in requested} if requested else self._all_outputs

    def _output(self, spec: TensorSpec, array: np.ndarray, classification: int) -> Tensor:
        tensor = Tensor(spec.name, spec.datatype, np.asarray(array))
        if not classification:
            return tensor
        return classify(tensor, classification, spec.labels, batched=self.config.max_batch_size > 0)

    def _drop(self, queued: QueuedRequest) -> None:
        if queued.future.cancelled():
            self.statistics.record_failure("CANCELED", queued.call.received_ns)
        else:
            error = DeadlineExceededError(f"model '{self.name}': the deadline passed in the queue")
            self._fail(queued, "REJECTED", error)

    def _fail(self, queued: QueuedRequest, reason: str, error: ServeError) -> None:
        self.statistics.record_failure(reason, queued.call.received_ns)
        with contextlib.suppress(InvalidStateError):  # cancelled between the check and here
            queued.future.set_exception(error)


def _decode_images(encoded: EncodedImage, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The inputs with pixels in the place of image files, on the thread of the request."""
    return tuple(
        Tensor(tensor.name, DATATYPES["UINT8"], encoded.decode(tensor.array))
        if tensor.name == encoded.name
        else tensor
        for tensor in inputs
    )


def _onnx_array(tensor: Tensor) -> np.ndarray:
    """The array as onnxruntime takes it: strings are `str` there.

    Raises:
        InvalidArgumentError: a BYTES element is not UTF-8, the only text that a graph's string tensor holds.
    """
    if tensor.datatype.name != "BYTES":
        return tensor.array
    try:
        texts = [element.decode() for element in tensor.array.flat]
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"input '{tensor.name}': the model takes UTF-8 text: {error}") from error
    array = np.empty(tensor.array.size, dtype=object)
    array[:] = texts
    return array.reshape(tensor.array.shape)

"""A locust user that calls ModelInfer over gRPC, one request after the other (closed loop).

With locust's web page: locust -f loadtest/locustfile.py --host localhost:8001 --model mobilenet
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, ClassVar

import grpc
import grpc.experimental.gevent as grpc_gevent
from locust import User, constant, events, task
from locust.exception import StopUser

from loadtest.payload import INFER_PATH, fetch_metadata, request_bytes

if TYPE_CHECKING:
    from locust.argument_parser import LocustArgumentParser

logger = logging.getLogger(__name__)

# Before any grpc object is made: without it the C core blocks the greenlets' one thread.
grpc_gevent.init_gevent()


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator] # locust's are not annotated
def add_flags(parser: LocustArgumentParser) -> None:
    """Flags of this file beside locust's own."""
    parser.add_argument("--model", default="mobilenet", help="model to call")
    parser.add_argument("--batch-size", type=int, default=1, help="rows in a request")


class InferUser(User):
    """Sends the same request over a channel that all users of the process share, and waits for its answer."""

    wait_time = constant(0)
    shared: ClassVar[dict[str, Any]] = {}

    def on_start(self) -> None:
        """Make the channel and the request once per process; without a server or model the test is over."""
        if self.shared:
            return
        options, target = self.environment.parsed_options, self.host or "localhost:8001"
        try:
            self.shared.update(prepare(target, options.model, options.batch_size))
        except grpc.RpcError as error:
            logger.error("%s: %s: %s", target, error.code().name, error.details())  # noqa: TRY400 - says it all
            self.environment.process_exit_code = 1
            if self.environment.runner:
                self.environment.runner.quit()
            raise StopUser from error

    @task
    def infer(self) -> None:
        """Call ModelInfer and report how long it took."""
        failure: Exception | None = None
        length = 0
        start = time.perf_counter()
        try:
            length = len(self.shared["call"](self.shared["request"]))
        except grpc.RpcError as error:
            failure = error
        self.environment.events.request.fire(
            request_type="gRPC",
            name=self.shared["model"],
            response_time=(time.perf_counter() - start) * 1000,
            response_length=length,
            exception=failure,
        )


def prepare(target: str, model: str, batch: int) -> dict[str, Any]:
    """A channel's raw-bytes call of ModelInfer, and the request for it.

    Bytes, not messages: the client's protobuf work would be counted as the server's.

    Raises:
        grpc.RpcError: the server isn't there, or doesn't have the model.
    """
    channel = grpc.insecure_channel(
        target.removeprefix("grpc://").removeprefix("http://"),
        options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)],
    )
    request = request_bytes(fetch_metadata(channel, model), batch)
    return {"channel": channel, "call": channel.unary_unary(INFER_PATH), "request": request, "model": model}

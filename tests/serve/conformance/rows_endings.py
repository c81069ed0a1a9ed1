"""Asked last: what stops a server; a stream ended by triton_grpc_error is a Triton 2.51's last one."""

from __future__ import annotations

import os
import signal
from functools import partial
from typing import TYPE_CHECKING, Any

from tests.serve.conformance.rows_streams import gather
from tests.serve.conformance.servers import DEADLINE, eventually, floats, message, occupy, status, stream
from tests.serve.conformance.table import Table

if TYPE_CHECKING:
    from tests.serve.conformance.servers import Servers

TABLE = Table()
row = TABLE.row
GRPC_ERROR = [("triton_grpc_error", "true")]


@row("5", "stream", "triton_grpc_error: what is wrong with a request stays in-band", fact=[True, False])
def _(servers: Servers) -> Any:
    answers = stream(servers, [message("nope"), gather(1, "")], metadata=GRPC_ERROR)
    return [bool(answer.error_message) for answer in answers]


@row("5", "stream", "triton_grpc_error: a model's error becomes the stream's status", "INTERNAL")
def _(servers: Servers) -> Any:
    return stream(servers, [gather(9, ""), gather(1, "")], metadata=GRPC_ERROR)


STOPPING = "differs: 2.51 answers NOT_FOUND, a flaw that sends clients away for good"


@row("7", "sync", "SIGTERM: what runs is answered, a new request is refused", fact=("UNAVAILABLE", "OK"),
     triton=STOPPING)  # fmt: skip
def _(servers: Servers) -> Any:
    client = servers.controlled
    x = floats(values=[[1, 2, 3, 4]])
    client.load_model("slow")
    calls = occupy(client, 40_000)
    os.kill(servers.addresses["controlled"]["pid"], signal.SIGTERM)
    ask = partial(client.infer, "kept", [x], client_timeout=DEADLINE)
    eventually(lambda: status(ask) != "OK")
    return status(ask), calls.next()[1]

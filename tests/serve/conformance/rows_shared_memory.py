"""§5, §7 and §8: shared memory."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import shared_memory

from tests.serve.conformance.servers import EIGHT, eventually, given, message, status, wanted
from tests.serve.conformance.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.serve.conformance.servers import Servers

TABLE = Table()
row = TABLE.row
INVALID = "INVALID_ARGUMENT"
SIZE = 64
_numbers = itertools.count()


@contextmanager
def region(servers: Servers, key: str, *, register: bool = True) -> Iterator[Any]:
    """64 bytes of shared memory, known to the server as `region`."""
    handle = shared_memory.create_shared_memory_region("region", f"{key}_{next(_numbers)}", SIZE)
    try:
        shared_memory.set_shared_memory_region(handle, [np.arange(16, dtype=np.float32)])
        if register:
            servers.client.register_system_shared_memory("region", handle._shm_key, SIZE)
        yield handle
    finally:
        # A Triton refuses it until the last answer that used the region is off its hands.
        eventually(lambda: status(servers.client.unregister_system_shared_memory) == "OK")
        shared_memory.destroy_shared_memory_region(handle)


def _key(servers: Servers) -> str:
    return f"/onnxedge_conformance_{servers.addresses['served']['url'].rsplit(':', 1)[1]}"


def shared_input(byte_size: int = 8, offset: int = 0, name: str = "x") -> Any:
    made = triton.InferInput(name, [1, 2], "FP32")
    made.set_shared_memory("region", byte_size, offset)
    return made


@row("5", "sync", "an input from shared memory, at an offset", fact=[[2.0, 3.0]])
def _(servers: Servers) -> Any:
    with region(servers, _key(servers)):
        return servers.infer("identity_fp32", shared_input(offset=8)).as_numpy("y").tolist()


@row("5", "sync", "an output into shared memory: an empty raw entry, the bytes are in the region",
     fact=(b"", [7.0, 8.0]))  # fmt: skip
def _(servers: Servers) -> Any:
    with region(servers, _key(servers)) as handle:
        output = triton.InferRequestedOutput("y")
        output.set_shared_memory("region", 16, 16)
        x = triton.InferInput("x", [1, 2], "FP32")
        x.set_data_from_numpy(np.array([[7, 8]], np.float32))
        answer = servers.infer("identity_fp32", x, outputs=[output]).get_response()
        found = shared_memory.get_contents_as_numpy(handle, np.float32, [2], 16)
        return answer.raw_output_contents[0], found.tolist()


@row("4.1", "message", "an input in shared memory uses up no raw entry", fact=[-1.0, -1.0, -1.0])
def _(servers: Servers) -> Any:
    with region(servers, _key(servers)):
        a = given("a", shape=[1, 3], shared_memory_region="region", shared_memory_byte_size=12)
        b = np.array([1, 2, 3], np.float32).tobytes()
        answer = servers.send(message("batched", a, given("b", shape=[1, 3]), raw=[b]))
        return triton.InferResult(answer).as_numpy("difference").tolist()[0]


def with_region(servers: Servers, sent: Any) -> Any:
    with region(servers, _key(servers)):
        return servers.send(sent)


IN: dict[str, Any] = {"shared_memory_region": "region", "shared_memory_byte_size": 8}
REFUSED = (
    ("an input in an unknown region", given(**IN | {"shared_memory_region": "nope"}), "NOT_FOUND"),
    ("an input past the region's end", given(**IN, shared_memory_offset=SIZE - 4), INVALID),
    ("an input whose byte size isn't its shape's", given(**IN | {"shared_memory_byte_size": 12}), INVALID),
    ("a negative offset", given(**IN, shared_memory_offset=-8), INVALID),
    ("the region is not given as a text", given(**IN | {"shared_memory_region": 1}), INVALID),
    ("the byte size is missing", given(shared_memory_region="region"), INVALID),
    ("typed contents beside it", given(**IN, contents={"fp32_contents": [1, 2]}), INVALID),
)
for _text, _input, _code in REFUSED:
    row("5", "message", f"shared memory: {_text}", _code)(
        partial(with_region, sent=message("identity_fp32", _input, raw=[]))
    )
OUT = (
    ("an output in an unknown region", wanted("y", **IN | {"shared_memory_region": "nope"}), "NOT_FOUND"),
    (
        "an output larger than what is given to it",
        wanted("y", **IN | {"shared_memory_byte_size": 4}),
        "INTERNAL",
    ),
    ("an output past the region's end", wanted("y", **IN, shared_memory_offset=SIZE - 4), INVALID),
)
for _text, _output, _code in OUT:
    row("5", "message", f"shared memory: {_text}", _code)(
        partial(with_region, sent=message(outputs=[_output], raw=[EIGHT]))
    )


@row("8", "sync", "status of a region says its key, offset and size", fact=(0, SIZE, True))
def _(servers: Servers) -> Any:
    with region(servers, _key(servers)) as handle:
        found = servers.client.get_system_shared_memory_status("region").regions["region"]
        return found.offset, found.byte_size, found.key == handle._shm_key


@row("8", "sync", "status of all regions; none after they are unregistered", fact=(["region"], []))
def _(servers: Servers) -> Any:
    with region(servers, _key(servers)):
        before = list(servers.client.get_system_shared_memory_status().regions)
    return before, list(servers.client.get_system_shared_memory_status().regions)


@row("7", "sync", "status of an unknown region", "NOT_FOUND")
def _(servers: Servers) -> Any:
    return servers.client.get_system_shared_memory_status("nope")


@row("7", "sync", "unregistering an unknown region")
def _(servers: Servers) -> Any:
    servers.client.unregister_system_shared_memory("nope")


@row("7", "sync", "registering a key that isn't there", "INTERNAL")
def _(servers: Servers) -> Any:
    return servers.client.register_system_shared_memory("region", f"{_key(servers)}_nope", SIZE)


@row("7", "sync", "registering a name twice", "ALREADY_EXISTS")
def _(servers: Servers) -> Any:
    with region(servers, _key(servers)) as handle:
        return servers.client.register_system_shared_memory("region", handle._shm_key, SIZE)


@row("7", "sync", "registering more than the file has", INVALID)
def _(servers: Servers) -> Any:
    with region(servers, _key(servers), register=False) as handle:
        return servers.client.register_system_shared_memory("region", handle._shm_key, SIZE * 4096)


@row("7", "sync", "registering a key outside the server's prefix", INVALID,
     triton="differs: takes any key, that of other programs' memory, too")  # fmt: skip
def _(servers: Servers) -> Any:
    with region(servers, "/other", register=False) as handle:
        return servers.client.register_system_shared_memory("region", handle._shm_key, SIZE)


@row("7", "sync", "registering where clients' shared memory isn't allowed", "UNAVAILABLE",
     triton="not asked: 2.51 has no such flag, newer ones refuse by default")  # fmt: skip
def _(servers: Servers) -> Any:
    return servers.controlled.register_system_shared_memory("region", f"{_key(servers)}_nope", SIZE)


CUDA = (
    ("status of all: none", "OK", 0, lambda client: len(client.get_cuda_shared_memory_status().regions)),
    (
        "status of an unknown region",
        "NOT_FOUND",
        None,
        lambda client: client.get_cuda_shared_memory_status("nope"),
    ),
    (
        "unregistering an unknown region",
        "OK",
        None,
        lambda client: client.unregister_cuda_shared_memory("nope"),
    ),
)
for _text, _code, _fact, _act in CUDA:
    row("8", "sync", f"CUDA shared memory without a GPU: {_text}", _code, _fact)(
        partial(lambda servers, act: act(servers.client), act=_act)
    )


@row("8", "message", "CUDA shared memory without a GPU: registering is refused", INVALID)
def _(servers: Servers) -> Any:
    request = triton.service_pb2.CudaSharedMemoryRegisterRequest(name="r", raw_handle=b"0" * 64, byte_size=8)
    return servers.stub().CudaSharedMemoryRegister(request)

"""Shared memory of clients: the regions, requests through them, and what clients may not do."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.core import InferenceCore
from serve.errors import (
    AlreadyExistsError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    ServeError,
    UnavailableError,
)
from serve.model_repository.repository import Repository
from serve.pb import grpc_service_pb2 as pb
from serve.pb import grpc_service_pb2_grpc as rpc
from serve.protocol import shared_memory
from serve.protocol.datatypes import DATATYPES
from serve.protocol.shared_memory import MAX_REGIONS, SharedMemory
from serve.request import Call, InferRequest, RequestedOutput, SharedArea, SharedInput
from serve.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import RunningServer

FOLDER = Path("/dev/shm")  # noqa: S108 - where Linux keeps POSIX shared memory
PREFIX = f"/onnxedge_test_{os.getpid()}"
LENGTH = 4096

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs Linux's shared memory")


@pytest.fixture
def file() -> Iterator[Path]:
    """A shared-memory file as a client makes one, with bytes that tell where they are."""
    path = Path(f"{FOLDER}{PREFIX}")
    path.write_bytes(bytes(i % 251 for i in range(LENGTH)))
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def memory(file: Path) -> SharedMemory:
    assert file.exists()
    return SharedMemory(allow=True, prefix="/onnxedge", byte_limit=1 << 20)


def read(memory: SharedMemory, area: SharedArea) -> bytes:
    shared = SharedInput("x", DATATYPES["UINT8"], (area.byte_size,), area)
    request = InferRequest("m", "", (), shared_inputs=(shared,))
    memory.resolve(request)
    return request.inputs[0].array.tobytes()


def write(memory: SharedMemory, area: SharedArea, data: bytes) -> None:
    memory.resolve(InferRequest("m", "", (), (RequestedOutput("y", 0, area),)))
    assert area.memory is not None
    area.memory.write(area.offset, data)


def open_files() -> int:
    gc.collect()
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum("onnxedge_test" in str(link.readlink()) for link in links)


def test_regions_are_registered_listed_and_forgotten(memory: SharedMemory) -> None:
    memory.register("a", PREFIX, 0, 100)
    memory.register("b", PREFIX, 50, 4046)
    assert [(r.name, r.key, r.offset, r.byte_size) for r in memory.status()] == [
        ("a", PREFIX, 0, 100),
        ("b", PREFIX, 50, 4046),
    ]
    assert [r.name for r in memory.status("b")] == ["b"]
    with pytest.raises(AlreadyExistsError, match="'a'"):
        memory.register("a", PREFIX, 0, 1)
    memory.unregister("a")
    memory.unregister("a")
    with pytest.raises(NotFoundError, match="'a'"):
        memory.status("a")
    memory.register("a", PREFIX, 0, 1)
    memory.unregister("")
    assert memory.status() == []
    assert open_files() == 0


@pytest.mark.parametrize(
    ("key", "offset", "byte_size", "error"),
    [
        (PREFIX, 0, 0, InvalidArgumentError),
        (PREFIX, 0, LENGTH + 1, InvalidArgumentError),
        (PREFIX, LENGTH, 1, InvalidArgumentError),
        (PREFIX, 2**64 - 1, 1, InvalidArgumentError),
        (PREFIX, 2**64 - 1, 2, InvalidArgumentError),
        ("/other", 0, 1, InvalidArgumentError),
        ("", 0, 1, InvalidArgumentError),
        ("/onnxedge_is_not_there", 0, 1, InternalError),
        ("/onnxedge/../../etc/passwd", 0, 1, InternalError),
        (PREFIX + "\0", 0, 1, InternalError),
        ("/onnxedge" + "x" * 300, 0, 1, InternalError),
        ("/onnxedge\ud800", 0, 1, InternalError),
    ],
)
def test_what_can_not_be_a_region_is_refused(
    memory: SharedMemory, key: str, offset: int, byte_size: int, error: type[ServeError]
) -> None:
    with pytest.raises(error):
        memory.register("a", key, offset, byte_size)
    assert memory.status() == []
    assert open_files() == 0


def test_any_prefix_may_be_allowed_but_nothing_outside_of_shared_memory(file: Path, tmp_path: Path) -> None:
    outside = tmp_path / "file"
    outside.write_bytes(b"secret")
    memory = SharedMemory(allow=True, prefix="/")
    memory.register("with", PREFIX, 0, 1)
    memory.register("without", PREFIX.lstrip("/"), 0, 1)
    memory.register("twice", "/" + PREFIX, 0, 1)
    assert file.exists()
    assert len(memory.status()) == 3
    for key in ("/", "", "..", "/.", f"/../..{outside}", str(outside), "/dev/null"):
        with pytest.raises(InternalError, match="Unable to open"):
            memory.register("x", key, 0, 1)


def test_only_files_are_opened(memory: SharedMemory, file: Path) -> None:
    pipe, link = Path(f"{file}_pipe"), Path(f"{file}_link")
    os.mkfifo(pipe)
    link.symlink_to(file)
    try:
        for path in (pipe, link):
            with pytest.raises(InternalError):
                memory.register("x", f"/{path.name}", 0, 1)
    finally:
        pipe.unlink()
        link.unlink()
    assert open_files() == 0


def test_a_region_has_a_name_of_reasonable_length(memory: SharedMemory) -> None:
    memory.register("", PREFIX, 0, 1)
    memory.register("x" * 256, PREFIX, 0, 1)
    with pytest.raises(InvalidArgumentError, match="at most 256 characters"):
        memory.register("x" * 257, PREFIX, 0, 1)


def test_without_the_flag_there_is_no_shared_memory(file: Path) -> None:
    memory = SharedMemory(allow=False, prefix="/onnxedge")
    with pytest.raises(UnavailableError, match="--allow-client-shm"):
        memory.register("a", f"/{file.name}", 0, 1)
    with pytest.raises(UnavailableError, match="--allow-client-shm"):
        read(memory, SharedArea("a", 0, 1))
    assert memory.status() == []
    memory.unregister("a")


def test_regions_are_bounded_in_number_and_bytes(
    memory: SharedMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = SharedMemory(allow=True, prefix="/onnxedge", byte_limit=100)
    small.register("a", PREFIX, 0, 60)
    with pytest.raises(UnavailableError, match="60 bytes"):
        small.register("b", PREFIX, 0, 41)
    small.register("b", PREFIX, 0, 40)
    assert MAX_REGIONS > 2
    monkeypatch.setattr(shared_memory, "MAX_REGIONS", 2)
    memory.register("a", PREFIX, 0, 1)
    memory.register("b", PREFIX, 0, 1)
    with pytest.raises(UnavailableError, match="2 shared memory regions"):
        memory.register("c", PREFIX, 0, 1)


def test_copies_of_inputs_are_bounded_and_given_back(file: Path) -> None:
    memory = SharedMemory(allow=True, prefix="/onnxedge", byte_limit=100)
    memory.register("a", f"/{file.name}", 0, 60)
    requests = []
    for _ in range(2):
        shared = SharedInput("x", DATATYPES["UINT8"], (50,), SharedArea("a", 0, 50))
        requests.append(InferRequest("m", "", (), shared_inputs=(shared,)))
        memory.resolve(requests[-1])
    with pytest.raises(UnavailableError, match="100 bytes, 'x' has 1"):
        read(memory, SharedArea("a", 0, 1))
    kept = requests.pop().inputs[0].array[40:]
    with pytest.raises(UnavailableError, match="100 bytes"):
        read(memory, SharedArea("a", 0, 1))
    del kept
    for _ in range(10):
        read(memory, SharedArea("a", 0, 50))


@given(st.integers(0, 70), st.integers(0, 70), st.integers(0, 70), st.integers(0, 70))
def test_only_the_regions_own_bytes_are_read_and_written(
    start: int, length: int, offset: int, byte_size: int
) -> None:
    path = Path(f"{FOLDER}{PREFIX}_property")
    content = bytes(range(100, 164))
    path.write_bytes(content)
    memory = SharedMemory(allow=True, prefix="/onnxedge")
    area = SharedArea("a", offset, byte_size)
    inside = offset < length and offset + byte_size <= length
    try:
        if not length or start + length > len(content):
            with pytest.raises(InvalidArgumentError):
                memory.register("a", f"/{path.name}", start, length)
            return
        memory.register("a", f"/{path.name}", start, length)
        if not inside:
            with pytest.raises(InvalidArgumentError, match=f"'a' has {length} bytes"):
                read(memory, area)
            return
        first = start + offset
        assert read(memory, area) == content[first : first + byte_size]
        write(memory, area, bytes(byte_size))
        assert path.read_bytes() == content[:first] + bytes(byte_size) + content[first + byte_size :]
    finally:
        path.unlink()


def test_a_file_that_becomes_shorter_harms_nobody(memory: SharedMemory, file: Path) -> None:
    memory.register("a", PREFIX, 0, LENGTH)
    os.truncate(file, 100)
    assert read(memory, SharedArea("a", 0, 100)) == bytes(range(100))
    for offset in (0, 100, 2000):
        with pytest.raises(InvalidArgumentError, match="was shortened"):
            read(memory, SharedArea("a", offset, 101))
        with pytest.raises(InvalidArgumentError, match="was shortened"):
            write(memory, SharedArea("a", offset, 101), bytes(101))
    assert file.stat().st_size == 100


def test_a_region_that_is_unregistered_in_use_stays_until_it_is_no_longer_used(
    memory: SharedMemory, file: Path
) -> None:
    memory.register("a", PREFIX, 0, LENGTH)
    area = SharedArea("a", 8, 4)
    memory.resolve(InferRequest("m", "", (), (RequestedOutput("y", 0, area),)))
    memory.unregister("a")
    file_of_another = file.open("rb")  # would get the file descriptor if it were free
    assert open_files() == 2
    assert area.memory is not None
    area.memory.write(area.offset, b"here")
    assert file.read_bytes()[8:12] == b"here"
    area.memory = None
    file_of_another.close()
    assert open_files() == 0


def test_registering_while_others_read_is_safe(memory: SharedMemory) -> None:
    memory.register("a", PREFIX, 0, LENGTH)
    over = threading.Event()
    problems: list[BaseException] = []

    def use() -> None:
        while not over.is_set():
            try:
                assert read(memory, SharedArea("a", 251, 251)) == bytes(range(251))
            except NotFoundError:
                pass
            except BaseException as error:  # noqa: BLE001 - looked at below
                problems.append(error)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        memory.unregister("a")
        memory.register("a", PREFIX, 0, LENGTH)
    over.set()
    for thread in threads:
        thread.join()
    assert problems == []
    memory.close()
    assert open_files() == 0


# Through the core


@pytest.fixture(scope="module")
def core(repository: Path) -> Iterator[InferenceCore]:
    settings = ServerSettings(model_repository=(repository,), allow_client_shm=True)
    core = InferenceCore(settings, Repository(settings))
    core.repository.load()
    yield core
    core.close()


def test_the_bytes_in_shared_memory_must_make_up_the_tensor(core: InferenceCore, file: Path) -> None:
    core.shared_memory.register("a", f"/{file.name}", 0, LENGTH)
    try:
        for name, shape, byte_size, text in (
            ("FP32", (1, 4), 12, "expected 16 bytes for FP32"),
            ("FP32", (-1, 4), 16, "negative dimension"),
            ("BYTES", (1, 4), 16, "'x'"),
        ):
            shared = SharedInput("x", DATATYPES[name], shape, SharedArea("a", 0, byte_size))
            with pytest.raises(InvalidArgumentError, match=text):
                core.infer(InferRequest("versions", "", (), shared_inputs=(shared,)), Call())
        empty = SharedInput("x", DATATYPES["FP32"], (0, 4), SharedArea("a", 0, 0))
        answer = core.infer(InferRequest("versions", "", (), shared_inputs=(empty,)), Call()).result(30)
        assert answer.outputs[0].array.shape == (0, 4)
    finally:
        core.shared_memory.unregister("")


# Over grpcio, and as tritonclient sees it


def refused(call: Any, request: Any) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(request)
    return caught.value.code().name, str(caught.value.details())


def test_a_server_without_the_flag_refuses_by_name(channel: grpc.Channel, file: Path) -> None:
    stub = rpc.GRPCInferenceServiceStub(channel)
    register = pb.SystemSharedMemoryRegisterRequest(name="a", key=f"/{file.name}", byte_size=4)
    code, text = refused(stub.SystemSharedMemoryRegister, register)
    assert (code, "--allow-client-shm" in text) == ("UNAVAILABLE", True)
    message = pb.ModelInferRequest(model_name="scalar")
    tensor = message.inputs.add(name="x", datatype="FP32")
    tensor.parameters["shared_memory_region"].string_param = "a"
    tensor.parameters["shared_memory_byte_size"].int64_param = 4
    code, text = refused(stub.ModelInfer, message)
    assert (code, "--allow-client-shm" in text) == ("UNAVAILABLE", True)
    assert not stub.SystemSharedMemoryStatus(pb.SystemSharedMemoryStatusRequest()).regions
    stub.SystemSharedMemoryUnregister(pb.SystemSharedMemoryUnregisterRequest())


@pytest.fixture(scope="module")
def shared_server(repository: Path, serve: Callable[..., RunningServer]) -> RunningServer:
    return serve("--model-repository", repository, "--allow-client-shm=true")


def test_a_client_that_shortens_its_file_does_not_kill_the_server(
    shared_server: RunningServer, file: Path
) -> None:
    name = f"/{file.name}"
    message = pb.ModelInferRequest(model_name="identity_fp32")
    tensor = message.inputs.add(name="x", datatype="FP32", shape=[1, LENGTH // 4])
    tensor.parameters["shared_memory_region"].string_param = "a"
    tensor.parameters["shared_memory_byte_size"].int64_param = LENGTH
    with grpc.insecure_channel(shared_server.url) as channel:
        stub = rpc.GRPCInferenceServiceStub(channel)
        stub.SystemSharedMemoryRegister(
            pb.SystemSharedMemoryRegisterRequest(name="a", key=name, byte_size=LENGTH)
        )
        assert stub.ModelInfer(message).raw_output_contents[0] == file.read_bytes()
        os.truncate(file, 0)
        code, text = refused(stub.ModelInfer, message)
        assert (code, "was shortened" in text) == ("INVALID_ARGUMENT", True)
        stub.SystemSharedMemoryUnregister(pb.SystemSharedMemoryUnregisterRequest())
    assert shared_server.process.poll() is None


@pytest.fixture(scope="module")
def seen(shared_server: RunningServer) -> dict[str, Any]:
    command = [
        sys.executable,
        str(Path(__file__).with_name("interop_stream.py")),
        shared_server.url,
        "shared_memory",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    observed: dict[str, Any] = json.loads(done.stdout)
    return observed


def test_tritonclient_sees_what_it_registered(seen: dict[str, Any]) -> None:
    assert (seen["none"], seen["left"]) == ({}, {})
    assert {name: (r["name"], r.get("offset"), r["byte_size"]) for name, r in seen["all"].items()} == {
        "input": ("input", None, "256"),
        "output": ("output", "272", "200"),
    }
    assert seen["one"] == {"output": seen["all"]["output"]}


def test_tritonclient_infers_through_shared_memory(seen: dict[str, Any]) -> None:
    assert seen["sum"] == [[1, 2, 3], [4, 5, 6]]
    assert seen["difference"] == [[-1, 0, 1], [2, 3, 4]]
    assert seen["mixed"] == seen["sum"]
    assert seen["text"] == [True, 0]
    assert seen["response"]["raw_output_contents"] == ["", ""]
    where = [output["parameters"] for output in seen["response"]["outputs"]]
    output, size = {"string_param": "output"}, {"int64_param": "24"}
    assert where == [
        {"shared_memory_region": output, "shared_memory_byte_size": size},
        {
            "shared_memory_region": output,
            "shared_memory_byte_size": size,
            "shared_memory_offset": {"int64_param": "64"},
        },
    ]


def test_tritonclient_is_refused_with_tritons_codes(seen: dict[str, Any]) -> None:
    codes = {what: status.removeprefix("StatusCode.") for what, (status, _) in seen["refused"].items()}
    assert codes == {
        "registered again": "ALREADY_EXISTS",
        "no such file": "INTERNAL",
        "another's file": "INVALID_ARGUMENT",
        "past the file's end": "INVALID_ARGUMENT",
        "unknown status": "NOT_FOUND",
        "unknown region": "NOT_FOUND",
        "past the region's end": "INVALID_ARGUMENT",
        "output too small": "INTERNAL",
        "unregister unknown": "OK",
        "cuda status": "OK",
        "cuda unknown": "NOT_FOUND",
        "cuda register": "INVALID_ARGUMENT",
        "cuda unregister": "OK",
    }
    assert seen["unregistered"][0] == "StatusCode.NOT_FOUND"

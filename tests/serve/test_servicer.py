"""The protocol's table of functions over bytes, without a transport."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.core import InferenceCore
from serve.errors import ServeError
from serve.model_repository.repository import Repository
from serve.pb import grpc_service_pb2 as pb
from serve.protocol import wire
from serve.request import Call
from serve.rpc.servicer import LARGEST, METHODS, RPCS, SERVICE, STREAM
from serve.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import RunningServer


@pytest.fixture(scope="module")
def core(repository: Path) -> Iterator[InferenceCore]:
    settings = ServerSettings(model_repository=(repository,))
    loaded = Repository(settings)
    loaded.load()
    yield InferenceCore(settings, loaded)
    loaded.close()


def answer(core: InferenceCore, name: str, data: bytes) -> bytes:
    method = METHODS[name]
    future = method.handle(core, method.parse(data), Call())
    assert isinstance(future, Future)
    return method.serialize(future.result(30))


REQUESTS = st.builds(
    pb.ModelInferRequest,
    model_name=st.sampled_from(["identity_fp32", "batched", "labelled", "gather", "nope"]),
    model_version=st.sampled_from(["", "1", "2", "x"]),
    inputs=st.lists(
        st.builds(
            pb.ModelInferRequest.InferInputTensor,
            name=st.sampled_from(["x", "a", "b", "z"]),
            datatype=st.sampled_from(["FP32", "INT64", "BYTES", "?"]),
            shape=st.lists(st.integers(-1, 3), max_size=3),
        ),
        max_size=3,
    ),
    outputs=st.lists(
        st.builds(pb.ModelInferRequest.InferRequestedOutputTensor, name=st.sampled_from(["y", "sum", "z"])),
        max_size=2,
    ),
    raw_input_contents=st.lists(st.binary(max_size=24), max_size=3),
)


@pytest.mark.parametrize("name", list(METHODS))
@given(data=st.binary(max_size=100) | REQUESTS.map(lambda message: message.SerializeToString()))
def test_any_bytes_are_answered_or_refused_with_a_code(core: InferenceCore, name: str, data: bytes) -> None:
    try:
        answer(core, name, data)
    except ServeError as error:
        # What a client sends is never the server's fault, but for a graph that fails on its data.
        refusals = {"INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED"}
        switched_off = error.code == "UNAVAILABLE" and name.startswith(("RepositoryModel", "SystemShared"))
        assert error.code in refusals or switched_off or "while running Gather" in str(error)  # noqa: PT017 - either outcome is right


def call(url: str, name: str, data: bytes) -> tuple[str, str]:
    """An RPC's status and its message."""
    with grpc.insecure_channel(url, options=[("grpc.max_send_message_length", -1)]) as channel:
        rpc: Callable[..., bytes] = channel.unary_unary(f"/{SERVICE}/{name}")
        try:
            rpc(data, timeout=30)
        except grpc.RpcError as error:
            return error.code().name, error.details() or ""
    return "OK", ""


@pytest.fixture(scope="module")
def explicit(serve: Callable[..., RunningServer], repository: Path) -> str:
    return serve("--model-repository", repository, "--model-control-mode=explicit").url


@pytest.mark.parametrize("name", list(METHODS))
def test_only_rpcs_that_carry_tensors_or_files_take_large_requests(explicit: str, name: str) -> None:
    unknown = b"\xfa\x07" + wire.write_varint(LARGEST)  # field 127
    code, text = call(explicit, name, unknown + bytes(LARGEST))
    assert (code == "INVALID_ARGUMENT" and text.endswith("expected 1048576 at most")) == (
        name not in {"ModelInfer", "RepositoryModelLoad"}
    )


def test_a_load_has_a_bounded_number_of_fields(explicit: str) -> None:
    code, text = call(explicit, "RepositoryModelLoad", b"\x1a\x00" * 10_000)
    assert (code, "4096 top-level fields" in text) == ("INVALID_ARGUMENT", True)


def test_a_load_that_is_not_allowed_is_refused_unread(
    serve: Callable[..., RunningServer], repository: Path
) -> None:
    code, text = call(serve("--model-repository", repository).url, "RepositoryModelLoad", b"\xff" * 100)
    assert (code, "model control mode is not explicit" in text) == ("UNAVAILABLE", True)


def test_a_load_counts_in_admission_where_it_brings_files() -> None:
    assert METHODS["ModelInfer"].admits(1)
    assert not METHODS["RepositoryModelLoad"].admits(LARGEST)
    assert METHODS["RepositoryModelLoad"].admits(LARGEST + 1)


def test_every_method_of_the_protocol_is_there() -> None:
    assert {*METHODS, STREAM} == set(RPCS)

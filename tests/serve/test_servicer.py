"""The protocol's table of functions over bytes, without a transport."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.core import InferenceCore
from serve.errors import ServeError
from serve.model_repository.repository import Repository
from serve.pb import grpc_service_pb2 as pb
from serve.request import Call
from serve.rpc.servicer import METHODS, RPCS, STREAM
from serve.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


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


def test_every_method_of_the_protocol_is_there() -> None:
    assert {*METHODS, STREAM} == set(RPCS)

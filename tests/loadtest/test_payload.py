"""Requests for any model, as the server's own decoder reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from loadtest.payload import ModelSpec, load_of, request_bytes
from loadtest.target import Questions, Target, TargetError
from loadtest.tensors import RequestError
from serve.pb import grpc_service_pb2 as pb
from serve.protocol.codec import decode_infer_request
from serve.protocol.datatypes import DATATYPES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import RunningServer


@pytest.fixture
def questions(target: RunningServer) -> Iterator[Questions]:
    with Questions(Target(target.url)) as questions:
        yield questions


@pytest.mark.parametrize("datatype", list(DATATYPES))
def test_a_request_can_be_made_for_every_datatype(datatype: str) -> None:
    spec: Any = pb.ModelMetadataResponse.TensorMetadata(name="x", datatype=datatype, shape=[-1, 3, -1])
    metadata = pb.ModelMetadataResponse(name="m", inputs=[spec])
    decoded = decode_infer_request(request_bytes(metadata, batch=4))
    assert decoded.inputs[0].array.shape == (4, 3, 1)
    assert request_bytes(metadata, batch=4) == request_bytes(metadata, batch=4)


def test_a_fixed_first_dimension_is_kept() -> None:
    spec = pb.ModelMetadataResponse.TensorMetadata(name="x", datatype="FP32", shape=[2, 3])
    decoded = decode_infer_request(request_bytes(pb.ModelMetadataResponse(name="m", inputs=[spec]), batch=4))
    assert decoded.inputs[0].array.shape == (2, 3)


def test_requests_differ_and_come_again_from_the_same_seed(questions: Questions) -> None:
    load = load_of(questions, ModelSpec("tiny", batch_size=2))
    assert len(set(load.requests)) == len(load.requests) == 16
    assert load == load_of(questions, ModelSpec("tiny", batch_size=2))
    assert load.requests != load_of(questions, ModelSpec("tiny", batch_size=2), seed=1).requests
    assert (load.version, load.streams) == ("1", False)


@pytest.mark.parametrize("prefix", ["", "input."])
def test_rows_of_a_file_are_sent_in_turn(questions: Questions, tmp_path: Path, prefix: str) -> None:
    rows = np.arange(20, dtype=np.float64).reshape(5, 4)
    extra = {"output.y": np.zeros(3)} if prefix else {}
    np.savez(tmp_path / "rows.npz", **{f"{prefix}x": rows}, **extra)  # type: ignore[arg-type] # numpy's stub
    load = load_of(questions, ModelSpec("tiny", batch_size=2, data=tmp_path / "rows.npz"))
    sent = [decode_infer_request(request).inputs[0].array for request in load.requests[:3]]
    assert [array[:, 0].tolist() for array in sent] == [[0, 4], [8, 12], [16, 0]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"y": np.zeros((2, 4))}, "has no input 'y', only 'x'"),
        ({"x": np.array(["a", "b"])}, "'x' is <U1, the model takes FP32"),
        ({"x": np.zeros(())}, "rows along the first axis"),
        ({"x": np.zeros((0, 4))}, "rows along the first axis"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    questions: Questions, tmp_path: Path, content: dict[str, Any], message: str
) -> None:
    np.savez(tmp_path / "rows.npz", **content)
    with pytest.raises(RequestError, match=message):
        load_of(questions, ModelSpec("tiny", data=tmp_path / "rows.npz"))


def test_a_file_that_is_none_is_refused(questions: Questions, tmp_path: Path) -> None:
    (tmp_path / "rows.npz").write_text("nothing")
    with pytest.raises(RequestError, match=r"rows\.npz"):
        load_of(questions, ModelSpec("tiny", data=tmp_path / "rows.npz"))


def test_open_dimensions_are_the_users() -> None:
    metadata = pb.ModelMetadataResponse(name="m")
    metadata.inputs.add(name="ids", datatype="INT64", shape=[-1, -1])
    metadata.inputs.add(name="image", datatype="FP32", shape=[-1, 3, -1, -1])

    class Answers:
        def metadata(self, *_: str) -> Any:
            return metadata

        def config(self, *_: str) -> Any:
            return pb.ModelConfigResponse().config

    questions: Any = Answers()
    spec = ModelSpec("m", batch_size=2, shapes={"ids": (64,), "image": (1, 3, 8, 8)})
    decoded = decode_infer_request(load_of(questions, spec).requests[0])
    assert [tensor.array.shape for tensor in decoded.inputs] == [(2, 64), (1, 3, 8, 8)]
    with pytest.raises(RequestError, match="doesn't fit"):
        load_of(questions, ModelSpec("m", shapes={"image": (4, 8, 8)}))


def test_a_server_that_is_not_there_is_said(start_stub: Callable[..., str]) -> None:
    url = start_stub()
    with Questions(Target(url)) as questions, pytest.raises(TargetError, match="UNIMPLEMENTED"):
        questions.ask("RepositoryIndex", pb.RepositoryIndexRequest(), pb.RepositoryIndexResponse)
    with Questions(Target("127.0.0.1:1")) as questions, pytest.raises(TargetError, match="UNAVAILABLE"):
        questions.metadata("stub")

"""The codec's properties, over every datatype and shape that the protocol knows."""

from __future__ import annotations

import contextlib
import math
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from serve.errors import InvalidArgumentError
from serve.pb import grpc_service_pb2 as pb
from serve.protocol import codec, tensor_codec, wire
from serve.protocol.datatypes import DATATYPES, DataType
from serve.request import InferResponse, SharedArea, Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
TYPED = [row for row in DATATYPES.values() if row.contents]


@st.composite
def arrays(draw: Callable[..., Any], datatype: DataType) -> np.ndarray:
    elements = st.binary(max_size=9) if datatype.name == "BYTES" else None
    array: np.ndarray = draw(hnp.arrays(datatype.dtype, SHAPES, elements=elements))
    return array


@st.composite
def tensors(draw: Callable[..., Any], rows: list[DataType] | None = None) -> tuple[DataType, np.ndarray]:
    datatype = draw(st.sampled_from(rows or list(DATATYPES.values())))
    return datatype, draw(arrays(datatype))


def request(**fields: Any) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name="m")
    message.inputs.add(name="x", datatype=fields.pop("datatype", "FP32"), shape=fields.pop("shape", [1]))
    for name, value in fields.items():
        getattr(message, name).extend(value)
    return message


@given(tensors())
def test_decode_is_the_inverse_of_encode(tensor: tuple[DataType, np.ndarray]) -> None:
    datatype, array = tensor
    raw = bytes(tensor_codec.encode_tensor(datatype, array))
    decoded = tensor_codec.decode_tensor("x", datatype, array.shape, raw)
    assert decoded.dtype == datatype.dtype
    np.testing.assert_array_equal(decoded, array)


@given(tensors(TYPED))
def test_typed_contents_decode_like_raw_bytes(tensor: tuple[DataType, np.ndarray]) -> None:
    datatype, array = tensor
    contents = pb.InferTensorContents()
    getattr(contents, str(datatype.contents)).extend(array.reshape(-1).tolist())
    decoded = tensor_codec.decode_contents("x", datatype, array.shape, contents)
    assert decoded.dtype == datatype.dtype
    np.testing.assert_array_equal(decoded, array)


@given(st.lists(tensors(), max_size=3), st.sampled_from(["", "id"]))
def test_response_is_what_protobuf_would_write(
    outputs: list[tuple[DataType, np.ndarray]], identity: str
) -> None:
    named = tuple(Tensor(f"y{i}", *tensor) for i, tensor in enumerate(outputs))
    response = InferResponse("m", "1", identity, named)
    data = codec.encode_infer_response(response)
    message = pb.ModelInferResponse.FromString(data)
    assert message.SerializeToString() == data
    assert [o.datatype for o in message.outputs] == [datatype.name for datatype, _ in outputs]
    for (datatype, array), raw in zip(outputs, message.raw_output_contents, strict=True):
        np.testing.assert_array_equal(tensor_codec.decode_tensor("y", datatype, array.shape, raw), array)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_request_or_an_invalid_argument(data: bytes) -> None:
    with contextlib.suppress(InvalidArgumentError):
        codec.decode_infer_request(data)
    assert isinstance(codec.request_id(data), str)


@given(
    st.sampled_from(list(DATATYPES)),
    st.lists(st.integers(-2, 2**62), max_size=70),
    st.binary(max_size=40),
)
def test_any_shape_and_raw_bytes_are_a_tensor_or_an_invalid_argument(
    datatype: str, shape: list[int], raw: bytes
) -> None:
    message = request(datatype=datatype, shape=shape, raw_input_contents=[raw])
    try:
        decoded = codec.decode_infer_request(message.SerializeToString())
    except InvalidArgumentError as error:
        assert "'x'" in str(error)  # noqa: PT017 - either outcome is right, each has its own check
    else:
        assert decoded.inputs[0].array.shape == tuple(shape)


def _fields() -> st.SearchStrategy[pb.ModelInferRequest]:
    names = st.text(max_size=5)
    return st.builds(
        lambda name, version, identity, shapes, raw, flag: pb.ModelInferRequest(
            model_name=name,
            model_version=version,
            id=identity,
            inputs=[pb.ModelInferRequest.InferInputTensor(name="x", shape=shape) for shape in shapes],
            raw_input_contents=raw,
            parameters={"flag": pb.InferParameter(bool_param=flag)},
        ),
        names, names, names,
        st.lists(st.lists(st.integers(0, 2**40), max_size=3), max_size=3),
        st.lists(st.binary(max_size=200), max_size=4),
        st.booleans(),
    )  # fmt: skip


@given(_fields())
def test_splitting_finds_what_protobuf_finds(message: pb.ModelInferRequest) -> None:
    head, raw = wire.split_raw_contents(message.SerializeToString())
    assert [bytes(view) for view in raw] == list(message.raw_input_contents)
    del message.raw_input_contents[:]
    assert pb.ModelInferRequest.FromString(head) == message


@given(st.binary(max_size=200))
def test_splitting_accepts_only_what_protobuf_accepts(data: bytes) -> None:
    try:
        head, _ = wire.split_raw_contents(data)
        codec.parse(pb.ModelInferRequest)(head)
    except InvalidArgumentError:
        return
    pb.ModelInferRequest.FromString(data)


@given(st.integers(0, 2**63 - 1))
def test_varints_round_trip(value: int) -> None:
    data = wire.write_varint(value)
    assert wire.read_varint(data, 0) == (value, len(data))


def test_large_request_takes_the_path_without_copies() -> None:
    array = np.arange(codec.SPLIT_FROM_BYTES, dtype=np.float32)
    message = request(shape=[array.size], raw_input_contents=[array.tobytes()])
    data = message.SerializeToString()
    decoded = codec.decode_infer_request(data).inputs[0].array
    np.testing.assert_array_equal(decoded, array)
    assert np.shares_memory(decoded, np.frombuffer(data, np.uint8))


def test_a_flood_of_empty_submessages_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(InvalidArgumentError, match="4096 top-level fields"):
        codec.decode_infer_request(b"\x2a\x00" * codec.SPLIT_FROM_BYTES)
    with pytest.raises(InvalidArgumentError, match="4096 top-level fields"):
        codec.parse_bounded(pb.RepositoryModelLoadRequest)(b"\x1a\x00" * (wire.MAX_FIELDS + 1))
    assert codec.parse_bounded(pb.RepositoryModelLoadRequest)(b"\x1a\x00" * wire.MAX_FIELDS).parameters


def typed(elements: int) -> bytes:
    """A request with a vector of zeros as typed contents, a byte each."""
    message = request(datatype="INT64", shape=[elements])
    message.inputs[0].contents.int64_contents.extend(bytes(elements))
    return message.SerializeToString()


def test_typed_contents_are_bounded_before_they_are_parsed() -> None:
    fitting = wire.MAX_HEAD_BYTES - 64
    decoded = codec.decode_infer_request(typed(fitting)).inputs[0].array
    assert decoded.shape == (fitting,)
    with pytest.raises(InvalidArgumentError, match="8388608 at most: send tensors as raw_input_contents"):
        codec.decode_infer_request(typed(wire.MAX_HEAD_BYTES))
    assert not codec.request_id(typed(wire.MAX_HEAD_BYTES))


def test_raw_contents_may_be_larger_than_what_is_beside_them() -> None:
    message = request(datatype="UINT8", shape=[wire.MAX_HEAD_BYTES])
    message.raw_input_contents.append(bytes(wire.MAX_HEAD_BYTES))
    decoded = codec.decode_infer_request(message.SerializeToString())
    assert decoded.inputs[0].array.nbytes == wire.MAX_HEAD_BYTES


def test_parameters_of_an_input_are_bounded_before_they_are_parsed() -> None:
    flood = b"\x22\x00" * (wire.MAX_HEAD_BYTES // 2)
    with pytest.raises(InvalidArgumentError, match="beside raw_input_contents"):
        codec.decode_infer_request(b"\x2a" + wire.write_varint(len(flood)) + flood)


@pytest.mark.parametrize("raw", [False, True])
def test_the_elements_of_all_bytes_inputs_together_are_bounded(
    monkeypatch: pytest.MonkeyPatch, *, raw: bool
) -> None:
    monkeypatch.setattr(tensor_codec, "MAX_BYTES_ELEMENTS", 6)

    def texts(*counts: int) -> bytes:
        message = pb.ModelInferRequest(model_name="m")
        for i, count in enumerate(counts):
            tensor = message.inputs.add(name=str(i), datatype="BYTES", shape=[count])
            if raw:
                message.raw_input_contents.append(bytes(4 * count))
            else:
                tensor.contents.bytes_contents.extend([b""] * count)
        return message.SerializeToString()

    assert [t.array.size for t in codec.decode_infer_request(texts(2, 4)).inputs] == [2, 4]
    for counts, name in [((7,), "0"), ((3, 4), "1"), ((2, 2, 2, 1), "3")]:
        with pytest.raises(InvalidArgumentError, match=f"input '{name}': expected 6 BYTES elements at most"):
            codec.decode_infer_request(texts(*counts))


@pytest.mark.parametrize("name", ["INT8", "INT16", "UINT8", "UINT16"])
def test_narrow_types_take_the_low_bytes_of_each_element(name: str) -> None:
    datatype = DATATYPES[name]
    contents = pb.InferTensorContents()
    getattr(contents, str(datatype.contents)).append(0x0102_0384)
    expected = np.array([0x0102_0384], np.uint32).astype(datatype.dtype)
    np.testing.assert_array_equal(tensor_codec.decode_contents("x", datatype, (1,), contents), expected)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (request(datatype="FP31", raw_input_contents=[b"1234"]), "'FP31' is not one of"),
        (request(raw_input_contents=[b"123"]), "expected 4 bytes for FP32 [1], got 3"),
        (request(), "neither raw_input_contents[0] nor contents"),
        (request(shape=[-1], raw_input_contents=[b""]), "negative dimension"),
        (
            request(datatype="BYTES", shape=[2], raw_input_contents=[b"\x02\x00\x00\x00ab\x01\x00"]),
            "element 1 has 2 of its length's 4 bytes",
        ),
        (request(datatype="BYTES", raw_input_contents=[b"\x01\x00"]), "at least 4 bytes, got 2"),
        (request(datatype="BYTES", shape=[2**40, 2**40], raw_input_contents=[bytes(8)]), "at least"),
        (request(shape=[127] * 100_000, raw_input_contents=[b"1234"]), "expected 64 dimensions at most"),
        (request(datatype="BYTES", raw_input_contents=[b"\x05\x00\x00\x00abc"]), "2 bytes past the data"),
        (request(datatype="BYTES", raw_input_contents=[b""]), "expected 1 BYTES elements"),
        (request(datatype="BYTES", raw_input_contents=[bytes(8)]), "got more"),
        (request(shape=[1] * 65, raw_input_contents=[b"1234"]), "can't be served"),
    ],
)  # fmt: skip
def test_a_malformed_tensor_is_named_with_what_is_wrong(message: pb.ModelInferRequest, text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="input 'x'") as caught:
        codec.decode_infer_request(message.SerializeToString())
    assert text in str(caught.value)


@pytest.mark.parametrize("typed", [0, 1])
def test_raw_and_typed_contents_are_not_mixed(typed: int) -> None:
    message = request(raw_input_contents=[struct.pack("<f", 1)])
    message.inputs.add(name="x", datatype="FP32", shape=[1])
    message.inputs[typed].contents.fp32_contents.append(1)
    with pytest.raises(InvalidArgumentError, match="in the same form"):
        codec.decode_infer_request(message.SerializeToString())


def test_contents_in_another_datatypes_field_are_refused() -> None:
    message = request()
    message.inputs[0].contents.fp64_contents.append(1)
    with pytest.raises(InvalidArgumentError, match="FP32 belongs in fp32_contents, got fp64_contents"):
        codec.decode_infer_request(message.SerializeToString())


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("triton_secret", {"bool_param": True}, "reserved"),
        ("sequence_start", {"int64_param": 1}, "expected bool_param, got int64_param"),
        ("priority", {"string_param": "high"}, "expected int64_param or uint64_param"),
        ("timeout", {"uint64_param": 1}, "expected int64_param, got uint64_param"),
        ("priority", {"int64_param": -1}, "expected 0 or more, got -1"),
        (
            "anything",
            {"uint64_param": 1},
            "expected bool_param or int64_param or string_param or double_param",
        ),
        ("anything", {}, "got none"),
    ],
)
def test_bad_parameters_are_refused(name: str, value: dict[str, Any], text: str) -> None:
    message = request(raw_input_contents=[struct.pack("<f", 1)])
    message.parameters[name].CopyFrom(pb.InferParameter(**value))
    with pytest.raises(InvalidArgumentError, match=text):
        codec.decode_infer_request(message.SerializeToString())


def test_parameters_arrive_with_their_types() -> None:
    message = request(raw_input_contents=[struct.pack("<f", 1)])
    message.parameters["a"].double_param = 0.5
    message.parameters["b"].string_param = "text"
    decoded = codec.decode_infer_request(message.SerializeToString())
    assert decoded.parameters == {"a": 0.5, "b": "text"}


def shared(message: Any, **parameters: str | int) -> Any:
    for name, value in parameters.items():
        parameter = message.parameters[f"shared_memory_{name}"]
        setattr(parameter, "string_param" if isinstance(value, str) else "int64_param", value)
    return message


def test_an_input_in_shared_memory_uses_up_no_raw_entry() -> None:
    message = request(raw_input_contents=[struct.pack("<f", 1), struct.pack("<f", 2), b"more than is needed"])
    shared(message.inputs[0], region="r", byte_size=4, offset=8)
    message.inputs.add(name="a", datatype="FP32", shape=[1])
    message.inputs.add(name="b", datatype="FP32", shape=[1])
    decoded = codec.decode_infer_request(message.SerializeToString())
    assert [(tensor.name, tensor.array.tolist()) for tensor in decoded.inputs] == [("a", [1]), ("b", [2])]
    (left,) = decoded.shared_inputs
    assert (left.name, left.datatype.name, left.shape, left.area) == (
        "x",
        "FP32",
        (1,),
        SharedArea("r", 8, 4),
    )


def test_an_output_in_shared_memory_says_where() -> None:
    message = request(raw_input_contents=[struct.pack("<f", 1)])
    shared(message.outputs.add(name="y"), region="r", byte_size=4)
    message.outputs.add(name="z").parameters["anything"].bool_param = True
    decoded = codec.decode_infer_request(message.SerializeToString())
    assert [output.shared_memory for output in decoded.outputs] == [SharedArea("r", 0, 4), None]


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"region": 5, "byte_size": 4}, "shared_memory_region must be a string_param"),
        ({"region": "r"}, "shared_memory_byte_size is missing"),
        ({"region": "r", "byte_size": "4"}, "shared_memory_byte_size must be an int64_param"),
        ({"region": "r", "byte_size": -4}, "shared_memory_byte_size must be an int64_param, 0 or more"),
        ({"region": "r", "byte_size": 4, "offset": -1}, "shared_memory_offset must be an int64_param"),
        ({"byte_size": 4}, "shared_memory_byte_size is there without shared_memory_region"),
        ({"offset": 4}, "shared_memory_offset is there without shared_memory_region"),
    ],
)
@pytest.mark.parametrize("role", ["input", "output"])
def test_bad_shared_memory_parameters_are_refused(
    role: str, parameters: dict[str, str | int], text: str
) -> None:
    message = request(raw_input_contents=[struct.pack("<f", 1)])
    name = "x" if role == "input" else "y"
    shared(message.inputs[0] if role == "input" else message.outputs.add(name="y"), **parameters)
    with pytest.raises(InvalidArgumentError, match=f"{role} '{name}': {text}"):
        codec.decode_infer_request(message.SerializeToString())


def test_typed_contents_beside_shared_memory_are_refused() -> None:
    message = request()
    message.inputs[0].contents.fp32_contents.append(1)
    shared(message.inputs[0], region="r", byte_size=4)
    with pytest.raises(InvalidArgumentError, match="typed contents beside its bytes in shared memory"):
        codec.decode_infer_request(message.SerializeToString())


def test_an_output_is_not_both_classes_and_in_shared_memory() -> None:
    message = request(raw_input_contents=[struct.pack("<f", 1)])
    output = shared(message.outputs.add(name="y"), region="r", byte_size=4)
    output.parameters["classification"].int64_param = 2
    with pytest.raises(InvalidArgumentError, match="exclude each other"):
        codec.decode_infer_request(message.SerializeToString())


@given(
    st.dictionaries(
        st.text(max_size=5),
        st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=9),
    ),
    st.lists(tensors(), max_size=3),
)
def test_a_stream_response_is_what_protobuf_would_write(
    parameters: dict[str, Any], outputs: list[tuple[DataType, np.ndarray]]
) -> None:
    named = tuple(Tensor(f"y{i}", *tensor) for i, tensor in enumerate(outputs))
    response = InferResponse("m", "1", "id", named, parameters)
    message = pb.ModelStreamInferResponse.FromString(codec.encode_stream_response(response))
    inner = message.infer_response
    found = {
        name: getattr(parameter, str(parameter.WhichOneof("parameter_choice")))
        for name, parameter in inner.parameters.items()
    }
    assert found == {**parameters, "triton_final_response": True}
    assert {name: type(value) for name, value in found.items()} == {
        name: type(value) for name, value in {**parameters, "triton_final_response": True}.items()
    }
    assert not message.error_message
    del inner.parameters["triton_final_response"]
    again = pb.ModelInferResponse.FromString(codec.encode_infer_response(response))
    assert inner == again
    assert len(inner.raw_output_contents) == len(outputs)


def test_a_stream_error_says_which_request_failed() -> None:
    message = pb.ModelStreamInferResponse.FromString(codec.encode_stream_error("seven", "it is too long"))
    assert message == pb.ModelStreamInferResponse(
        error_message="it is too long", infer_response=pb.ModelInferResponse(id="seven")
    )
    assert pb.ModelStreamInferResponse.FromString(codec.encode_stream_error("", "")).error_message


@pytest.mark.parametrize("padding", [0, codec.SPLIT_FROM_BYTES])
def test_the_id_of_a_bad_request_is_found(padding: int) -> None:
    message = request(raw_input_contents=[b"123" + bytes(padding)])
    message.id = "seven"
    with pytest.raises(InvalidArgumentError, match="expected 4 bytes"):
        codec.decode_infer_request(message.SerializeToString())
    assert codec.request_id(message.SerializeToString()) == "seven"
    assert not codec.request_id(b"\xff" + message.SerializeToString())


def test_every_datatype_of_the_protocol_is_there() -> None:
    sizes = {name: row.itemsize for name, row in DATATYPES.items()}
    assert len(sizes) == 14
    assert (
        math.prod(size or 1 for size in sizes.values()) == 1 * 1 * 2 * 4 * 8 * 1 * 2 * 4 * 8 * 2 * 2 * 4 * 8
    )

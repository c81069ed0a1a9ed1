"""`onnxedge generate` with servers of others, and what it says of models that can't be asked."""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from serve.generate_client.command import main
from serve.generate_client.messages import Answer
from serve.generate_client.screen import Statistics
from serve.pb import grpc_service_pb2 as pb
from serve.pb.grpc_service_pb2_grpc import (
    GRPCInferenceServiceServicer,
    add_GRPCInferenceServiceServicer_to_server,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


class Foreign(GRPCInferenceServiceServicer):
    """A Triton with models as the vLLM backend has them; `pieces` is what they answer."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.error = ""
        self.requests: list[pb.ModelInferRequest] = []

    def ModelMetadata(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802 - the protocol's
        answer = pb.ModelMetadataResponse(name=request.name)
        if request.name == "gpt":
            answer.inputs.add(name="input_ids", datatype="INT64", shape=[-1, -1])
            answer.outputs.add(name="logits", datatype="FP32", shape=[-1, -1, 65])
        elif request.name in ("gpt_generate", "unary"):
            for name, datatype in (
                ("text_input", "BYTES"),
                ("stream", "BOOL"),
                ("sampling_parameters", "BYTES"),
            ):
                answer.inputs.add(name=name, datatype=datatype, shape=[1])
            answer.outputs.add(name="text_output", datatype="BYTES", shape=[-1])
        else:
            context.abort(
                grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}'\nis not found"
            )
        return answer

    def ModelConfig(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        if request.name == "unary":
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "")
        message = pb.ModelConfigResponse()
        message.config.model_transaction_policy.decoupled = True
        return message

    def ModelReady(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: ARG002, N802
        return pb.ModelReadyResponse(ready=request.name in ("gpt_generate", "other_generate"))

    def ModelInfer(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: ARG002, N802
        return self._response(request, b"".join(self.pieces))

    def ModelStreamInfer(self, requests: Any, context: grpc.ServicerContext) -> Any:  # noqa: ARG002, N802
        for request in requests:
            for piece in self.pieces:
                yield pb.ModelStreamInferResponse(infer_response=self._response(request, piece))
            if self.error:
                yield pb.ModelStreamInferResponse(error_message=self.error)

    def _response(self, request: pb.ModelInferRequest, text: bytes) -> pb.ModelInferResponse:
        self.requests.append(request)
        message = pb.ModelInferResponse(raw_output_contents=[len(text).to_bytes(4, "little") + text])
        message.outputs.add(name="text_output", datatype="BYTES", shape=[1])
        return message


@pytest.fixture
def foreign() -> Iterator[tuple[Foreign, str]]:
    """A server, and the flags that name it."""
    servicer = Foreign()
    server = grpc.server(ThreadPoolExecutor(2))
    add_GRPCInferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"--url=127.0.0.1:{port}"
    server.stop(None).wait(10)


def test_characters_that_a_server_tears_are_put_together(
    foreign: tuple[Foreign, str], capsys: pytest.CaptureFixture[str]
) -> None:
    servicer, url = foreign
    servicer.pieces = [b"gr\xc3", b"\xbc", b"\xc3\x9fe", b"", b"\xf0\x9f"]
    assert main(["gpt_generate", "> ", url, "--stats"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "> grüße\N{REPLACEMENT CHARACTER}\n"
    assert re.fullmatch(r"onnxedge generate: 5 answers in [\d.]+ s: the first .* answers/s\n", captured.err)
    assert [tensor.name for tensor in servicer.requests[0].inputs] == [
        "text_input", "sampling_parameters", "stream",
    ]  # fmt: skip


def test_a_server_that_knows_no_configs_is_asked_once(
    foreign: tuple[Foreign, str], capsys: pytest.CaptureFixture[str]
) -> None:
    servicer, url = foreign
    servicer.pieces = [b"all"]
    assert main(["unary", "> ", url]) == 0
    assert capsys.readouterr().out == "> all\n"
    assert "stream" not in {tensor.name for tensor in servicer.requests[0].inputs}


def test_an_error_in_the_middle_keeps_the_text(
    foreign: tuple[Foreign, str], capsys: pytest.CaptureFixture[str]
) -> None:
    servicer, url = foreign
    servicer.pieces, servicer.error = [b"half"], "the model\nfailed"
    assert main(["gpt_generate", "> ", url]) == 1
    assert capsys.readouterr() == ("> half\n", "onnxedge generate: the model failed\n")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("gpt", "does not generate text, it answers input_ids with logits: did you mean 'gpt_generate'?"),
        ("other", "unknown model: 'other' is not found: did you mean 'other_generate'?"),
        ("nothing", "unknown model: 'nothing' is not found"),
    ],
)
def test_the_model_that_was_meant_is_named(
    foreign: tuple[Foreign, str], capsys: pytest.CaptureFixture[str], model: str, expected: str
) -> None:
    assert main([model, "a", foreign[1]]) == 1
    assert capsys.readouterr().err.endswith(f"{expected}\n")


def test_a_terminal_is_not_told_what_to_do(
    foreign: tuple[Foreign, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    servicer, url = foreign
    servicer.pieces = [b"a\x1b[2Jb\tc\n"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["gpt_generate", "> ", url]) == 0
    assert capsys.readouterr().out == "> a\N{REPLACEMENT CHARACTER}[2Jb\tc\n"


def test_connections_are_made_as_those_of_infer(
    foreign: tuple[Foreign, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gpt_generate", "a", foreign[1], "--ssl", "--timeout", "5"]) == 1
    assert "UNAVAILABLE" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["gpt_generate", "a", foreign[1], "--header", "nonsense"])


def test_nothing_answered_is_no_speed() -> None:
    statistics = Statistics()
    assert str(statistics) == "no answer"
    statistics.add(Answer(ids=(1, 2)))
    assert re.fullmatch(r"2 tokens in [\d.]+ s", str(statistics))

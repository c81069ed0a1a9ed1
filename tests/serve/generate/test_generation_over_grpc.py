"""Generation over gRPC, by a real server: what clients see, and what their leaving costs the others."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf import json_format, text_format
from prometheus_client.parser import text_string_to_metric_families

from serve.pb import grpc_service_pb2 as pb
from serve.pb import model_config_pb2
from tests.serve.generate.conftest import ALPHABET, config
from tests.serve.generate.generation_client import Stream, ask, greedy, is_final, output, stub_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import RunningServer

    Start = Callable[..., RunningServer]

CLIENT = Path(__file__).with_name("interop_generation.py")
PROMPT = "Once upon a time"
ENDLESS = 8000  # tokens: seconds, so that only a cancellation ends it early
RUNNING = 'onnxedge_num_requests_running{model="gpt",version="1"}'


@pytest.fixture(scope="module")
def server(serve: Start, generation_repository: Path) -> RunningServer:
    return serve("--model-repository", generation_repository)


@pytest.fixture
def stub(server: RunningServer) -> Iterator[Any]:
    channel, stub = stub_of(server.url)
    with channel:
        yield stub


def samples(server: RunningServer) -> dict[str, float]:
    text = server.metrics()
    assert list(text_string_to_metric_families(text)), "not Prometheus text"
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {key: float(value) for key, value in (line.rsplit(" ", 1) for line in lines)}


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it never became so"


def encode(text: str) -> list[int]:
    return [ALPHABET.index(character) for character in text]


def decode(ids: list[int]) -> str:
    return "".join(ALPHABET[token] for token in ids)


def refusal(call: Callable[[], Any]) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    return error.code().name, error.details()


# What tritonclient sees


@pytest.fixture(scope="module")
def seen(server: RunningServer) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, CLIENT, server.url, "everything"],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    observed: dict[str, Any] = json.loads(done.stdout)
    return observed


@pytest.fixture(scope="module")
def expected(generation_graph: Path) -> str:
    return decode(greedy(generation_graph, encode(PROMPT), 12))


def test_tokens_come_one_by_one_and_the_last_says_so(seen: dict[str, Any], expected: str) -> None:
    text = [answer for answer in seen["streamed"] if answer["id"] == "text"]
    assert [answer["text"] for answer in text] == list(expected)
    assert [answer["final"] for answer in text] == [False] * 11 + [True]
    assert seen["aio"] == text


def test_ids_without_a_tokenizer(seen: dict[str, Any], generation_graph: Path) -> None:
    answers = [answer for answer in seen["streamed"] if answer["id"] == "ids"]
    ids = [token for answer in answers for token in answer["ids"]]
    assert ids == greedy(generation_graph, [1, 2, 3], 12)
    assert {answer["model"] for answer in answers} == {"ids"}


def test_a_stream_s_request_may_want_one_answer(seen: dict[str, Any], expected: str) -> None:
    (answer,) = [answer for answer in seen["streamed"] if answer["id"] == "together"]
    assert [answer["text"], answer["final"]] == [expected, True]


def test_an_empty_final_response_where_it_is_asked_for(seen: dict[str, Any], expected: str) -> None:
    answers = seen["empty_final"]
    assert "".join(answer["text"] or "" for answer in answers) == expected
    assert [answer["final"] for answer in answers][-2:] == [False, True]


def test_the_twin_answers_once_with_the_same_text(seen: dict[str, Any], expected: str) -> None:
    assert seen["unary"] == ["gpt_unary", expected]
    assert seen["once"] == expected


def test_a_decoupled_model_is_not_for_model_infer(seen: dict[str, Any]) -> None:
    assert seen["decoupled"]
    assert "doesn't support models with decoupled transaction policy" in seen["refused"]
    assert "UNIMPLEMENTED" in seen["refused"]


def test_a_client_that_ends_its_stream_hears_so(seen: dict[str, Any]) -> None:
    assert "cancelled" in seen["cancelled"].lower()


# Limits


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_input": ""}, "the prompt is empty"),
        ({"text_input": "a" * 101}, "100 at most (max_prompt_length)"),
        ({"text_input": "a", "max_tokens": 8192}, "8192 at most (context_length)"),
        ({"text_input": "a", "max_tokens": 0}, "'max_tokens' is 0, expected 1 or more"),
        ({"text_input": "a", "temperature": -1.0}, "temperature"),
        ({"text_input": "a", "top_p": 2.0}, "top_p"),
        ({"input_ids": [256]}, "256"),
        ({}, "either text_input or input_ids"),
    ],
)
def test_limits_are_refused_before_work_starts(stub: Any, fields: dict[str, Any], message: str) -> None:
    with Stream(stub, ask("small", id="7", **fields)) as stream:
        answer = next(stream.call)
    assert message in answer.error_message
    assert answer.infer_response.id == "7"


def test_a_full_queue_is_refused(server: RunningServer, stub: Any) -> None:
    waiting = 'onnxedge_num_requests_waiting{model="small",version="1"}'
    held = ask("small", text_input="a", max_tokens=ENDLESS, stream=True, ignore_eos=True)
    with Stream(stub, held) as first, Stream(stub, held) as second:
        assert next(first.call)
        assert next(second.call)
        with Stream(stub, held):
            eventually(lambda: samples(server)[waiting] == 1)
            with Stream(stub, held) as fourth:
                assert "Exceeds maximum queue size" in next(fourth.call).error_message
    eventually(lambda: samples(server)[RUNNING.replace("gpt", "small")] == 0)


# Texts


def test_a_text_ends_at_the_end_token_at_a_stop_text_or_at_its_length(
    stub: Any, generation_graph: Path
) -> None:
    full = decode(greedy(generation_graph, encode(PROMPT), 40))
    stop = full[10:12]
    request = ask("gpt_unary", text_input=PROMPT, max_tokens=40, stop=[stop], return_finish_reason=True)
    answer = stub.ModelInfer(request)
    assert output(answer, "text_output") == PROMPT + full[: full.index(stop)]
    assert output(answer, "finish_reason") == "stop"
    request = ask("gpt_unary", text_input=PROMPT, max_tokens=40, return_finish_reason=True)
    assert output(stub.ModelInfer(request), "finish_reason") == "length"


def test_no_answer_ends_in_half_a_character(stub: Any) -> None:
    request: dict[str, Any] = {
        "text_input": "naïve ☃",
        "max_tokens": 300,
        "temperature": 1.5,
        "seed": 5,
        "stream": True,
    }
    with Stream(stub, ask("bytes", outputs=("text_output", "output_ids"), **request)) as stream:
        answers = list(stream)
    parts = [output(answer, "text_output") for answer in answers]  # each is valid UTF-8, or this raises
    ids = [token for answer in answers for token in output(answer, "output_ids")]
    assert len(ids) == 300
    whole = stub_bytes(ids)
    assert "".join(parts) == whole.decode(errors="replace")
    assert max(whole) > 127


def stub_bytes(ids: list[int]) -> bytes:
    """What byte-level BPE's 256 tokens stand for: its alphabet, sorted, is GPT-2's table of bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    alphabet = sorted(table)
    return bytes(table[alphabet[token]] for token in ids)


def test_a_seed_repeats_a_text(stub: Any) -> None:
    def text(seed: int) -> str:
        request = ask("gpt_unary", text_input=PROMPT, max_tokens=30, temperature=1.0, seed=seed)
        found: str = output(stub.ModelInfer(request), "text_output")
        return found

    assert text(1) == text(1) != text(2)


# Others come and go


def prompts(count: int) -> list[str]:
    return [f"{'The quick brown fox '[: 3 + 5 * n % 17]}{n}" for n in range(count)]


def test_streams_beside_each_other_get_what_each_would_get_alone(
    server: RunningServer, stub: Any, generation_graph: Path
) -> None:
    """Those that are cancelled, with their stream or by their deadline, change nothing for the others."""
    asked = {text: ask("gpt", text_input=text, max_tokens=400, stream=True) for text in prompts(6)}
    endless = ask("gpt", text_input="gone", max_tokens=ENDLESS, stream=True)
    before = samples(server)
    with Stream(stub, endless) as cancelled, Stream(stub, endless, timeout=0.3) as late:
        assert not next(cancelled.call).error_message
        streams = {text: Stream(stub, request) for text, request in asked.items()}
        assert not next(cancelled.call).error_message
        cancelled.call.cancel()
        texts = {text: stream.text() for text, stream in streams.items()}
        with pytest.raises(grpc.RpcError) as caught:
            list(late)
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    eventually(lambda: samples(server)[RUNNING] == 0)
    assert texts == {text: decode(greedy(generation_graph, encode(text), 400, cache=1024)) for text in asked}
    gone = 'nv_inference_request_failure{model="gpt",version="1",reason="CANCELED"}'
    eventually(lambda: samples(server)[gone] == before[gone] + 2)
    answered = 'nv_inference_request_success{model="gpt",version="1"}'
    assert samples(server)[answered] == before[answered] + 6


def test_a_deadline_ends_a_unary_request(server: RunningServer, stub: Any) -> None:
    request = ask("gpt_unary", text_input=PROMPT, max_tokens=ENDLESS)
    assert refusal(lambda: stub.ModelInfer(request, timeout=0.2))[0] == "DEADLINE_EXCEEDED"
    eventually(lambda: samples(server)[RUNNING] == 0)


def test_a_client_that_is_killed_leaves_its_slot(server: RunningServer) -> None:
    with subprocess.Popen(
        [sys.executable, CLIENT, server.url, "forever"], stdout=subprocess.PIPE, text=True
    ) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "generating\n"
        client.send_signal(signal.SIGKILL)
    eventually(lambda: samples(server)[RUNNING] == 0)


# The server's own changes


@pytest.fixture(scope="module")
def explicit(serve: Start, generation_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server and its repository, to change."""
    root = tmp_path_factory.mktemp("explicit_generation")
    for name in ("gpt", "gpt_unary"):
        shutil.copytree(generation_repository / name, root / name)
    return serve("--model-repository", root, "--model-control-mode=explicit", "--load-model=gpt_unary"), root


def test_a_twin_and_its_model_are_loaded_in_any_order(explicit: Any, generation_graph: Path) -> None:
    server, root = explicit
    channel, stub = stub_of(server.url)
    request = ask("gpt_unary", text_input=PROMPT, max_tokens=3, exclude_input_in_output=True)
    expected = greedy(generation_graph, encode(PROMPT), 600, cache=1024)
    with channel:
        code, message = refusal(lambda: stub.ModelInfer(request))
        assert (code, "'gpt', which is not loaded" in message) == ("UNAVAILABLE", True)
        load(stub, "gpt")
        assert output(stub.ModelInfer(request), "text_output") == decode(expected[:3])
        with Stream(stub, ask("gpt", text_input=PROMPT, max_tokens=600, stream=True)) as stream:
            first = next(stream.call).infer_response
            (root / "gpt" / "config.pbtxt").write_text(
                config("model_transaction_policy { decoupled: true }", "# changed", context=1000)
            )
            load(stub, "gpt")
            assert output(first, "text_output") + stream.text() == decode(expected)
        with Stream(stub, ask("gpt", text_input=PROMPT, max_tokens=600, stream=True)) as stream:
            first = next(stream.call).infer_response
            unload(stub, "gpt")
            assert refusal(lambda: stub.ModelInfer(request))[0] == "UNAVAILABLE"
            assert output(first, "text_output") + stream.text() == decode(expected)
        eventually(lambda: state(stub, "gpt") == "UNAVAILABLE")
        assert state(stub, "gpt_unary") == "READY"


def test_a_model_may_come_with_the_request_that_loads_it(
    explicit: Any, generation_repository: Path, generation_graph: Path
) -> None:
    server, _ = explicit
    folder = generation_repository / "once"
    configured = text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    request = pb.RepositoryModelLoadRequest(model_name="sent")
    request.parameters["config"].string_param = json_format.MessageToJson(configured)
    for name in ("model.onnx", "tokenizer.json"):
        request.parameters[f"file:1/{name}"].bytes_param = (folder / "1" / name).read_bytes()
    channel, stub = stub_of(server.url)
    with channel:
        stub.RepositoryModelLoad(request)
        asked = ask("sent", text_input=PROMPT, max_tokens=3, exclude_input_in_output=True)
        text = output(stub.ModelInfer(asked), "text_output")
    assert text == decode(greedy(generation_graph, encode(PROMPT), 3))


def load(stub: Any, name: str) -> None:
    stub.RepositoryModelLoad(message("RepositoryModelLoadRequest", model_name=name))


def unload(stub: Any, name: str) -> None:
    stub.RepositoryModelUnload(message("RepositoryModelUnloadRequest", model_name=name))


def message(kind: str, **fields: Any) -> Any:
    return getattr(pb, kind)(**fields)


def state(stub: Any, name: str) -> str:
    models = stub.RepositoryIndex(message("RepositoryIndexRequest")).models
    found: str = next(model.state for model in models if model.name == name)
    return found


def test_sigterm_lets_a_text_end(serve: Start, generation_repository: Path, generation_graph: Path) -> None:
    server = serve(
        "--model-repository", generation_repository, "--model-control-mode=explicit", "--load-model=gpt"
    )
    channel, stub = stub_of(server.url)
    with channel, Stream(stub, ask("gpt", text_input=PROMPT, max_tokens=400, stream=True)) as stream:
        first = next(stream.call).infer_response
        server.process.send_signal(signal.SIGTERM)
        text = output(first, "text_output") + stream.text()
    assert text == decode(greedy(generation_graph, encode(PROMPT), 400, cache=1024))
    assert server.wait() == 0
    assert not any("Traceback" in line for line in server.log)


def test_sigterm_does_not_wait_for_a_text_without_end(serve: Start, generation_repository: Path) -> None:
    flags = ("--model-control-mode=explicit", "--load-model=gpt", "--exit-timeout-secs=0")
    server = serve("--model-repository", generation_repository, *flags)
    channel, stub = stub_of(server.url)
    with channel, Stream(stub, ask("gpt", text_input=PROMPT, max_tokens=ENDLESS, stream=True)) as stream:
        assert not is_final(next(stream.call).infer_response)
        assert server.stop() == 1
    assert not any("Traceback" in line for line in server.log)


# What is told about it


def test_metadata_and_config(stub: Any) -> None:
    found = stub.ModelMetadata(message("ModelMetadataRequest", name="gpt"))
    assert found.properties["context_length"] == "8192"
    assert found.properties["kv_cache_layout"] == "in place"
    assert found.properties["max_num_seqs"] == "16"
    assert found.properties["kv_cache_tokens"] == str(16 * 8192)
    twin = stub.ModelMetadata(message("ModelMetadataRequest", name="gpt_unary"))
    assert (twin.inputs, twin.outputs) == (found.inputs, found.outputs)
    assert twin.properties["generation_model"] == "gpt"
    assert {tensor.name: tensor.datatype for tensor in found.inputs}["text_input"] == "BYTES"
    ids = stub.ModelMetadata(message("ModelMetadataRequest", name="ids"))
    assert "text_input" not in {tensor.name for tensor in ids.inputs}
    configured = stub.ModelConfig(message("ModelConfigRequest", name="gpt")).config
    assert configured.model_transaction_policy.decoupled
    assert [group.count for group in configured.instance_group] == [1]


def test_metrics_and_statistics_count_requests_tokens_and_steps(server: RunningServer, stub: Any) -> None:
    labels = '{model="once",version="1"}'
    before = samples(server)
    for _ in range(2):
        stub.ModelInfer(ask("once", text_input=PROMPT, max_tokens=5))
    seen = samples(server)

    def grown(name: str) -> float:
        return seen[name + labels] - before[name + labels]

    assert grown("onnxedge_prompt_tokens_total") == 2 * len(PROMPT)
    assert grown("onnxedge_generation_tokens_total") == 10
    assert grown("onnxedge_prefix_cache_hit_tokens_total") >= len(PROMPT) - 1
    assert grown("onnxedge_time_to_first_token_seconds_count") == 2
    assert grown("onnxedge_time_per_output_token_seconds_count") == 8
    assert grown("onnxedge_request_generation_tokens_sum") == 10
    assert grown("nv_inference_request_success") == grown("nv_inference_count") == 2
    steps = grown("nv_inference_exec_count")
    assert steps == grown("onnxedge_iteration_tokens_total_count") >= 10
    assert seen["onnxedge_num_requests_running" + labels] == 0
    assert 0 <= seen["onnxedge_kv_cache_usage_perc" + labels] <= 1
    parts = ("queue", "compute_input", "compute_infer", "compute_output")
    total = grown("nv_inference_request_duration_us")
    assert total == pytest.approx(sum(grown(f"nv_inference_{part}_duration_us") for part in parts), abs=9)

"""ModelStreamInfer: first without a transport, then over grpcio, then as tritonclient sees it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest

from serve.errors import ServeError, UnavailableError
from serve.pb import grpc_service_pb2 as pb
from serve.pb import grpc_service_pb2_grpc as rpc
from serve.rpc import infer_stream, stream
from serve.rpc.due_messages import MAX_PENDING
from serve.rpc.stream import Streams
from tests.serve.stream_client import (
    GRPC_ERRORS,
    LONG,
    Client,
    eventually,
    gather,
    in_background,
    make_core,
    readers,
    request,
    scaled,
    slow,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from serve.core import InferenceCore
    from tests.conftest import RunningServer


@pytest.fixture(scope="module")
def core(repository: Path) -> Iterator[InferenceCore]:
    core = make_core(repository, max_streams=3)
    yield core
    core.close()


def first_value(answer: pb.ModelStreamInferResponse) -> float:
    return float(np.frombuffer(answer.infer_response.raw_output_contents[0], np.float32)[0])


def ask(core: InferenceCore, *messages: pb.ModelInferRequest | bytes, **options: Any) -> Any:
    client = Client(core, **options)
    client.send(*messages)
    client.half_close()
    return client.rest()


def test_answers_come_in_the_order_of_the_requests_however_long_each_takes(core: InferenceCore) -> None:
    messages = [slow(300, "a"), scaled(1, "b"), slow(1, "c"), *(scaled(i, str(i)) for i in range(60))]
    answers = ask(core, *messages)
    assert [answer.infer_response.id for answer in answers] == [message.id for message in messages]
    assert not any(answer.error_message for answer in answers)
    values = [
        np.frombuffer(answer.infer_response.raw_output_contents[0], np.float32)[0] for answer in answers[3:]
    ]
    assert values == [2 * i for i in range(60)]


def test_every_answer_is_the_final_one_of_its_request(core: InferenceCore) -> None:
    asking = scaled(1)
    asking.parameters["triton_enable_empty_final_response"].bool_param = True
    answers = ask(core, scaled(1), asking, scaled(2))
    assert len(answers) == 3
    for answer in answers:
        parameters = answer.infer_response.parameters
        assert {name: parameters[name].bool_param for name in parameters} == {"triton_final_response": True}


def test_several_requests_of_a_stream_are_in_the_server_at_once(core: InferenceCore) -> None:
    client = Client(core)
    answers = in_background(client.rest)
    client.send(slow(LONG), slow(LONG), slow(LONG))
    eventually(lambda: client.taken == 3 and core.admission.inflight == 3)
    client.vanish()
    assert len(answers.result(30)) <= 1
    eventually(lambda: core.admission.inflight == 0)


def test_errors_come_in_band_with_their_id_and_the_stream_goes_on(core: InferenceCore) -> None:
    nowhere = scaled(1, "b")
    nowhere.model_name = "nowhere"
    short = scaled(1, "c")
    short.raw_input_contents[0] = b"123"
    answers = ask(core, scaled(1, "a"), nowhere, short, b"\xff\xff", gather(9, "d"), scaled(1, "e"))
    assert [bool(answer.error_message) for answer in answers] == [False, True, True, True, True, False]
    assert [answer.infer_response.id for answer in answers] == ["a", "b", "c", "", "d", "e"]
    for answer, text in zip(
        answers[1:5], ["'nowhere'", "expected 16 bytes", "malformed", "Gather"], strict=True
    ):
        assert text in answer.error_message
        failed = pb.ModelInferResponse(id=answer.infer_response.id)
        if failed.id == "d":  # the model had taken it
            failed.model_name = "gather"
            failed.parameters["triton_final_response"].bool_param = True
        assert answer.infer_response == failed


def test_on_demand_a_models_error_ends_the_stream_and_a_bad_request_does_not(core: InferenceCore) -> None:
    client = Client(core, GRPC_ERRORS)
    client.send(b"\xff\xff", scaled(1, "a"), gather(9, "b"), scaled(1, "c"))
    assert "malformed" in client.receive().error_message
    assert client.receive().infer_response.id == "a"
    with pytest.raises(ServeError, match="Gather"):
        client.receive()
    client.vanish()
    eventually(lambda: core.admission.inflight == 0)


def test_a_client_that_does_not_read_is_not_read_from(core: InferenceCore) -> None:
    client = Client(core)
    client.send(*(scaled(i, str(i)) for i in range(3 * MAX_PENDING)))
    client.half_close()
    assert client.receive().infer_response.id == "0"
    eventually(lambda: client.taken == MAX_PENDING)
    eventually(lambda: core.admission.inflight == 0)
    assert client.receive().infer_response.id == "1"
    eventually(lambda: client.taken == MAX_PENDING + 1)
    assert [answer.infer_response.id for answer in client.rest()] == [
        str(i) for i in range(2, 3 * MAX_PENDING)
    ]
    assert core.admission.inflight == 0


def test_a_full_server_says_so_in_band(repository: Path) -> None:
    core = make_core(repository, max_inflight_requests=2)
    busy, client = Client(core), Client(core)
    answers = in_background(busy.rest)
    busy.send(slow(LONG), slow(LONG))
    eventually(lambda: core.admission.inflight == 2)
    client.send(scaled(2, "c"))
    refused = client.receive()
    assert (refused.infer_response.id, "in flight" in refused.error_message) == ("c", True)
    busy.vanish()
    # None where the stream was closed before its thread had come to wait for the first.
    assert all("cancelled" in answer.error_message for answer in answers.result(30))
    eventually(lambda: core.admission.inflight == 0)
    client.send(scaled(2, "d"))
    client.half_close()
    assert not client.rest()[0].error_message
    core.close()


def test_while_many_answers_are_unread_a_stream_takes_one_request_at_a_time(core: InferenceCore) -> None:
    core.streams.unwritten.add(1 << 60)
    client = Client(core)
    client.send(*(scaled(i, str(i)) for i in range(5)))
    client.half_close()
    for i in range(3):
        assert client.receive().infer_response.id == str(i)
        assert client.taken == i + 1
    core.streams.unwritten.add(-(1 << 60))
    assert len(client.rest()) == 2
    assert not core.streams.unwritten.full


def test_what_clients_leave_unread_is_counted_until_it_is_written_or_given_up(repository: Path) -> None:
    unwritten = Streams(1, byte_limit=16).unwritten
    core = make_core(repository)
    core.streams.unwritten = unwritten
    for end in (Client.rest, Client.vanish):
        client = Client(core)
        client.send(scaled(1), scaled(2))
        client.receive()
        eventually(lambda: unwritten.full)  # 16 bytes an answer
        client.half_close()
        end(client)
        eventually(lambda: not unwritten.full and core.admission.inflight == 0)
    core.close()


def test_a_client_that_reads_nothing_for_long_loses_its_stream(
    core: InferenceCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(infer_stream, "LONGEST_WRITE_SECONDS", 0.0)
    monkeypatch.setattr(stream, "WATCH_SECONDS", 0.01)
    idle, unread = Client(core), Client(core)
    answer = in_background(idle.receive)
    unread.send(scaled(1), scaled(2), slow(LONG))
    assert unread.receive().infer_response.model_name == "versions"
    assert unread.cancelled.wait(30)
    eventually(lambda: len(core.streams) == 1 and core.admission.inflight == 0)
    assert unread.rest() == []
    unread.vanish()
    assert not idle.cancelled.is_set()
    idle.send(scaled(3))
    assert first_value(answer.result(30)) == 6
    idle.vanish()
    eventually(lambda: readers() == 0)


def test_a_client_that_vanishes_leaves_nothing_behind(core: InferenceCore) -> None:
    client = Client(core)
    answers = in_background(client.rest)
    client.send(*(slow(LONG) for _ in range(8)))
    version = core.repository.get("slow", "")
    eventually(lambda: client.taken == 8 and version.pending > 0)
    client.vanish()
    answers.result(30)
    eventually(lambda: core.admission.inflight == version.pending == readers() == 0)
    assert len(core.streams) == 0
    assert not ask(core, slow(1))[0].error_message


def test_a_stream_whose_answers_nobody_takes_is_cleaned_up_by_its_end(core: InferenceCore) -> None:
    client = Client(core)
    client.send(scaled(0), scaled(1), slow(LONG))
    client.receive()
    eventually(lambda: client.taken == 3)
    client.vanish()  # while the transport's thread is busy with the first answer
    eventually(lambda: core.admission.inflight == readers() == 0)
    assert client.rest() == []


def test_the_number_of_streams_is_bounded(core: InferenceCore) -> None:
    clients = [Client(core) for _ in range(3)]
    with pytest.raises(UnavailableError, match="--max-streams"):
        Client(core)
    for client in clients:
        client.vanish()
    assert not ask(core, scaled(1))[0].error_message


def test_a_drain_ends_idle_streams_at_once_and_busy_ones_when_they_are_answered(repository: Path) -> None:
    core = make_core(repository)
    idle, busy = Client(core), Client(core)
    ended = in_background(idle.rest)
    busy.send(slow(2000, "a"))
    answer = in_background(busy.receive)
    eventually(lambda: core.admission.inflight == 1 and busy.asked == 2)
    core.streams.drain()
    closed = in_background(lambda: core.admission.close(30))
    with pytest.raises(UnavailableError, match="shutting down"):
        ended.result(30)
    with pytest.raises(UnavailableError, match="shutting down"):
        core.streams.open(core)
    eventually(lambda: core.admission.closed)
    busy.send(scaled(1, "b"))
    assert (answer.result(30).infer_response.id, answer.result().error_message) == ("a", "")
    eventually(lambda: busy.taken == 2)
    refused = busy.receive()
    assert (refused.infer_response.id, "shutting down" in refused.error_message) == ("b", True)
    assert closed.result(30)
    with pytest.raises(UnavailableError, match="shutting down"):
        busy.receive()
    assert not core.streams.wait(0)
    idle.vanish()
    busy.vanish()
    assert core.streams.wait(1)
    core.close()


def test_a_request_that_is_being_taken_when_the_drain_begins_is_answered(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core(repository)
    infer, taken, go_on = core.infer, threading.Event(), threading.Event()

    def held(*arguments: Any, **options: Any) -> Any:
        taken.set()
        go_on.wait(30)
        return infer(*arguments, **options)

    monkeypatch.setattr(core, "infer", held)
    client = Client(core)
    client.send(scaled(1, "a"))
    answer = in_background(client.receive)
    assert taken.wait(30)
    core.streams.drain()
    with pytest.raises(TimeoutError):  # the transport's thread has seen the drain by now
        answer.result(0.05)
    go_on.set()
    assert answer.result(30).infer_response.id == "a"
    with pytest.raises(UnavailableError, match="shutting down"):
        client.receive()
    client.vanish()
    core.close()


def test_each_request_of_a_stream_has_its_line_in_the_access_log(repository: Path, tmp_path: Path) -> None:
    core = make_core(repository, access_log=str(tmp_path / "access.log"))
    ask(core, scaled(1, "a"), gather(9, "b"), b"\xff\xff")
    client = Client(core)
    in_background(client.rest)
    client.send(slow(LONG, "c"))
    eventually(lambda: core.admission.inflight == 1)
    client.vanish()
    core.observer.close()
    core.close()
    lines = [json.loads(line) for line in (tmp_path / "access.log").read_text().splitlines()]
    assert [line["method"] for line in lines] == ["ModelStreamInfer"] * 4
    assert [line["code"] for line in lines] == ["OK", "INTERNAL", "INVALID_ARGUMENT", "CANCELLED"]


# Over grpcio


def once(*messages: pb.ModelInferRequest, forever: threading.Event | None = None) -> Iterator[Any]:
    """Requests, and the half-close only when `forever` is over."""
    yield from messages
    if forever is not None:
        forever.wait(60)


def status_of(answers: Any) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        list(answers)
    return caught.value.code().name, str(caught.value.details())


def test_over_grpc_answers_come_in_order_and_the_stream_ends_well(channel: grpc.Channel) -> None:
    stub = rpc.GRPCInferenceServiceStub(channel)
    call = stub.ModelStreamInfer(once(slow(100, "a"), *(scaled(i, str(i)) for i in range(100))))
    answers = list(call)
    assert [answer.infer_response.id for answer in answers] == ["a", *map(str, range(100))]
    assert [first_value(answer) for answer in answers[1:]] == [2 * i for i in range(100)]
    assert call.code() is grpc.StatusCode.OK


def test_a_stream_of_large_tensors_is_held_back_by_a_client_that_reads_slowly(channel: grpc.Channel) -> None:
    big = np.arange(150_000, dtype=np.float32).reshape(1, -1)
    stub = rpc.GRPCInferenceServiceStub(channel)
    asked = (request("identity_fp32", "x", "FP32", big + i, str(i)) for i in range(100))
    for i, answer in enumerate(stub.ModelStreamInfer(asked)):
        assert answer.infer_response.id == str(i)
        assert first_value(answer) == i


def test_a_deadline_ends_the_stream_and_its_requests(channel: grpc.Channel, server: RunningServer) -> None:
    stub = rpc.GRPCInferenceServiceStub(channel)
    call = stub.ModelStreamInfer(once(slow(LONG), slow(LONG), slow(LONG)), timeout=0.3)
    assert status_of(call)[0] == "DEADLINE_EXCEEDED"
    assert not next(iter(stub.ModelStreamInfer(once(slow(1))))).error_message
    assert server.process.poll() is None


def test_too_many_streams_are_refused_at_once(repository: Path, serve: Callable[..., RunningServer]) -> None:
    server = serve("--model-repository", repository, "--max-streams=2")
    over = threading.Event()
    with grpc.insecure_channel(server.url) as channel:
        stub = rpc.GRPCInferenceServiceStub(channel)
        calls = [stub.ModelStreamInfer(once(scaled(1), forever=over)) for _ in range(2)]
        assert [first_value(next(call)) for call in calls] == [2, 2]
        code, text = status_of(stub.ModelStreamInfer(once(scaled(1), forever=over)))
        assert (code, "--max-streams" in text) == ("UNAVAILABLE", True)
        stub.ModelInfer(scaled(1))
        over.set()
        assert [list(call) for call in calls] == [[], []]
        eventually(lambda: bool(opened(stub)))
    server.stop()


def test_clients_that_do_not_read_keep_nobody_out(
    repository: Path, serve: Callable[..., RunningServer]
) -> None:
    server = serve("--model-repository", repository, "--max-inflight-requests=16", "--exit-timeout-secs=60")
    over = threading.Event()
    asked = [0] * 5

    def requests(i: int) -> Iterator[pb.ModelInferRequest]:
        while not over.is_set():
            asked[i] += 1
            yield request("identity_fp32", "x", "FP32", np.zeros((1, 1000), np.float32))

    def answered() -> bool:
        try:
            stub.ModelInfer(scaled(1), timeout=5)
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE  # noqa: PT017 - any other is a failure
            return False
        return True

    with grpc.insecure_channel(server.url) as channel, contextlib.ExitStack() as channels:
        stub = rpc.GRPCInferenceServiceStub(channel)
        for i in range(5):
            own = grpc.insecure_channel(server.url, [("grpc.use_local_subchannel_pool", 1)])
            unread = rpc.GRPCInferenceServiceStub(channels.enter_context(own))
            call = unread.ModelStreamInfer(requests(i))
            channels.callback(call.cancel)
        eventually(lambda: settled(asked))
        eventually(answered)
        assert all(answered() for _ in range(20))
        over.set()
        started = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - started < 30


def settled(counts: list[int]) -> bool:
    """Whether all of them have begun and none has grown for a while."""
    before = list(counts)
    time.sleep(0.3)
    return min(before) > MAX_PENDING and counts == before


def opened(stub: Any) -> list[Any]:
    try:
        return list(stub.ModelStreamInfer(once(scaled(1))))
    except grpc.RpcError:
        return []


def test_sigterm_is_not_held_up_by_an_idle_stream(
    repository: Path, serve: Callable[..., RunningServer]
) -> None:
    server = serve("--model-repository", repository, "--exit-timeout-secs=60")
    over = threading.Event()
    with grpc.insecure_channel(server.url) as channel:
        stub = rpc.GRPCInferenceServiceStub(channel)
        idle = stub.ModelStreamInfer(once(scaled(1), forever=over))
        busy = stub.ModelStreamInfer(once(slow(3000, "a"), forever=over))
        next(idle)
        eventually(lambda: "onnxedge_inflight_requests 1\n" in server.metrics())
        started = time.monotonic()
        stopped = in_background(server.stop)
        assert status_of(idle)[0] == "UNAVAILABLE"
        assert next(busy).infer_response.id == "a"
        assert status_of(busy)[0] == "UNAVAILABLE"
        over.set()
    assert stopped.result(60) == 0
    assert time.monotonic() - started < 30


KILLED_CLIENT = """
import sys, threading
import grpc
from serve.pb import grpc_service_pb2 as pb, grpc_service_pb2_grpc as rpc

never = threading.Event()
slow = pb.ModelInferRequest(model_name="slow", raw_input_contents=[(1_000_000).to_bytes(8, "little")])
slow.inputs.add(name="n", datatype="INT64")
quick = pb.ModelInferRequest(model_name="scalar", raw_input_contents=[bytes(4)])
quick.inputs.add(name="x", datatype="FP32")

def requests():
    yield quick
    yield slow
    yield slow
    never.wait()

stub = rpc.GRPCInferenceServiceStub(grpc.insecure_channel(sys.argv[1]))
for call in [stub.ModelStreamInfer(requests()) for _ in range(50)]:
    next(call)
print("ready", flush=True)
never.wait()
"""


def process_status(server: RunningServer, field: str) -> int:
    text = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith(f"{field}:")))


def kill_a_client_with_50_streams(server: RunningServer) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KILLED_CLIENT, server.url],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    ) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"ready\n"
        client.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_50_killed_streams_leave_no_thread_and_no_memory(
    repository: Path, serve: Callable[..., RunningServer]
) -> None:
    server = serve("--model-repository", repository)
    seen: list[tuple[int, int]] = []
    with grpc.insecure_channel(server.url) as channel:
        stub = rpc.GRPCInferenceServiceStub(channel)
        for _ in range(4):
            kill_a_client_with_50_streams(server)
            eventually(lambda: "onnxedge_inflight_requests 0\n" in server.metrics())
            assert not next(iter(stub.ModelStreamInfer(once(slow(1))))).error_message
            # The pool keeps its threads and may start some more later; readers would be 50 a round.
            eventually(lambda: not seen or process_status(server, "Threads") < seen[0][0] + 25)
            seen.append((process_status(server, "Threads"), process_status(server, "VmRSS")))
    print("threads and KiB resident after each 50 killed streams:", seen)
    assert seen[-1][1] - seen[1][1] < 8192, seen
    assert server.stop() == 0


# As tritonclient sees it


@pytest.fixture(scope="module")
def seen(server: RunningServer) -> dict[str, Any]:
    client = Path(__file__).with_name("interop_stream.py")
    done = subprocess.run(
        [sys.executable, client, server.url, "streams"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    observed: dict[str, Any] = json.loads(done.stdout)
    return observed


FINAL = {"triton_final_response": True}


@pytest.mark.parametrize("client", ["sync", "aio"])
def test_tritonclient_gets_answers_and_errors_in_order(seen: dict[str, Any], client: str) -> None:
    a, b, c, d, e, f = seen[client]
    assert [a[0], a[2], b, e, f] == ["a", FINAL, ["b", 2, FINAL], ["e", 2, FINAL], ["f", 6, FINAL]]
    assert [c[0], d[0]] == ["None", "None"]
    assert "'nowhere'" in c[1]
    assert "Gather" in d[1]


def test_tritonclient_streams_many_requests(seen: dict[str, Any]) -> None:
    assert [value for _, value, _ in seen["many"]] == [2 * i for i in range(300)]


def test_tritonclient_gets_a_status_where_it_asks_for_one(seen: dict[str, Any]) -> None:
    answered, refused, ended = seen["status"]
    assert answered[0] == "b"
    assert refused[0] == "None"
    assert ended[0] == "StatusCode.INTERNAL"


def test_tritonclient_ends_a_stream_early(seen: dict[str, Any]) -> None:
    assert [status for status, _ in seen["late"]] == ["StatusCode.DEADLINE_EXCEEDED"]
    assert seen["cancelled"] == ["StatusCode.CANCELLED", 8]

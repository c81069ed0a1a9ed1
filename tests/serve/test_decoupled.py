"""ModelStreamInfer of models that answer several times, and when they like."""

from __future__ import annotations

import json
import queue
import random
import shutil
import threading
import time
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from serve.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    ServeError,
    UnavailableError,
    UnsupportedError,
)
from serve.model.answers import give
from serve.model_repository.repository import Repository
from serve.protocol.datatypes import DATATYPES
from serve.request import Call, InferRequest, InferResponse, SharedArea, Tensor
from serve.rpc import infer_stream, stream
from serve.rpc.due_messages import MAX_PENDING
from serve.rpc.servicer import METHODS
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
    from pathlib import Path

    from serve.core import InferenceCore
    from serve.pb import grpc_service_pb2 as pb
    from serve.settings import ServerSettings


class Conversation:
    """A request that the talker answers, and what it says."""

    def __init__(self, identity: str, call: Call, emit: Callable[[InferResponse], None]) -> None:
        self.call = call
        self.emit = emit
        self.future: Future[InferResponse] = Future()
        self._id = identity

    def response(self, value: float, *, final: bool, room: int | None = None) -> InferResponse:
        tensor = Tensor("y", DATATYPES["FP32"], np.full(4, value, np.float32))
        if room is not None:
            tensor.shared_memory = SharedArea("region", 0, room, NotImplemented)
        return InferResponse("talker", "1", self._id, (tensor,), {"triton_final_response": final})


class Talker:
    """A decoupled model with a thread of its own, which says what it is told to, by the requests' ids."""

    name, version, decoupled, shares_runs = "talker", 1, True, False

    def __init__(self) -> None:
        self.open: dict[str, Conversation] = {}
        self._todo: queue.SimpleQueue[tuple[Callable[[], None], Future[None]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def submit(
        self,
        request: InferRequest,
        call: Call,
        *,
        inline: bool,  # noqa: ARG002 - it has its own thread
        emit: Callable[[InferResponse], None] | None = None,
    ) -> Future[InferResponse]:
        if emit is None:
            raise UnsupportedError("ModelInfer RPC doesn't support models with decoupled transaction policy")
        if request.parameters.get("refused"):
            raise InvalidArgumentError("the talker refuses it")
        conversation = Conversation(request.id, call, emit)
        call.future = conversation.future
        if call.cancelled:
            conversation.future.cancel()
        self.open[request.id] = conversation
        if chatty := request.parameters.get("chatty"):
            for value in range(int(chatty)):
                self._later(partial(emit, conversation.response(value, final=False)))
            self._later(partial(give, conversation.future, conversation.response(-1, final=True)))
        return conversation.future

    def say(self, identity: str, *values: float, **options: Any) -> None:
        """Answer, from its thread, and not for the last time."""
        conversation = self._find(identity)
        for value in values:
            answer = conversation.response(value, final=False, **options)
            self._later(partial(conversation.emit, answer)).result(30)

    def end(self, identity: str, value: float) -> None:
        conversation = self._find(identity)
        answer = conversation.response(value, final=True)
        self._later(partial(give, conversation.future, answer)).result(30)

    def fail(self, identity: str, error: ServeError) -> None:
        conversation = self._find(identity)
        self._later(partial(give, conversation.future, error)).result(30)

    def _find(self, identity: str) -> Conversation:
        eventually(lambda: identity in self.open)
        return self.open[identity]

    def _later(self, do: Callable[[], None]) -> Future[None]:
        done: Future[None] = Future()
        self._todo.put((do, done))
        return done

    def _work(self) -> None:
        while True:
            do, done = self._todo.get()
            do()
            done.set_result(None)


class RepositoryWithTalker(Repository):
    """The models on disk, and the talker."""

    def __init__(self, settings: ServerSettings) -> None:
        super().__init__(settings)
        self.talker = Talker()

    def get(self, name: str, version: str = "") -> Any:
        return self.talker if name == "talker" else super().get(name, version)


@pytest.fixture(scope="module")
def few(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models that are asked here alone: they are loaded again and again."""
    root = tmp_path_factory.mktemp("few")
    for name in ("versions", "slow", "gather"):
        shutil.copytree(repository / name, root / name)
    return root


@pytest.fixture(scope="module")
def core(few: Path) -> Iterator[InferenceCore]:
    core = make_core(few, RepositoryWithTalker)
    yield core
    core.close()


@pytest.fixture
def talker(core: InferenceCore) -> Iterator[Talker]:
    talker = talker_of(core)
    yield talker
    eventually(lambda: core.admission.inflight == core.streams.unwritten.bytes == readers() == 0)
    assert all(conversation.future.done() for conversation in talker.open.values())
    talker.open.clear()


def talker_of(core: InferenceCore) -> Talker:
    assert isinstance(core.repository, RepositoryWithTalker)
    return core.repository.talker


def talk(identity: str, **parameters: int) -> pb.ModelInferRequest:
    message = request("talker", "x", "FP32", np.zeros(1, np.float32), identity)
    for name, value in parameters.items():
        message.parameters[name].int64_param = value
    return message


def connected(core: InferenceCore, *arguments: Any, **options: Any) -> Client:
    """A client whose stream has begun to read; the transport still writes the first answer."""
    client = Client(core, *arguments, **options)
    client.send(scaled(0, "hello"))
    assert heard(client.receive()) == ("hello", 0, True)
    return client


def heard(answer: pb.ModelStreamInferResponse) -> tuple[str, Any, bool | None]:
    """An answer's id, its first value or its error, and whether it is its request's last; None: refused."""
    response = answer.infer_response
    parameters = {name: value.bool_param for name, value in response.parameters.items()}
    last = parameters.pop("triton_final_response", None)
    assert not parameters
    if answer.error_message:
        assert not response.outputs
        return response.id, answer.error_message, last
    return response.id, float(np.frombuffer(response.raw_output_contents[0], np.float32)[0]), last


def test_each_answer_is_written_as_it_comes_and_the_last_says_so(core: InferenceCore, talker: Talker) -> None:
    client = connected(core)
    asking = talk("a")
    asking.parameters["triton_enable_empty_final_response"].bool_param = True
    client.send(asking)
    for value in (1, 2, 3):
        talker.say("a", value)
        assert heard(client.receive()) == ("a", value, False)
    talker.end("a", 4)
    client.half_close()
    assert [heard(answer) for answer in client.rest()] == [("a", 4, True)]


def test_one_answer_alone_is_the_last(core: InferenceCore, talker: Talker) -> None:
    client = connected(core)
    client.send(talk("a"))
    client.half_close()
    talker.end("a", 1)
    assert [heard(answer) for answer in client.rest()] == [("a", 1, True)]


def test_answers_overtake_a_slow_request_that_came_before(core: InferenceCore, talker: Talker) -> None:
    client = connected(core)
    client.send(slow(LONG, "slow"), scaled(1, "waits"), talk("a"), talk("refused", refused=1))
    assert heard(client.receive()) == ("refused", "the talker refuses it", None)
    talker.say("a", 1)
    assert heard(client.receive()) == ("a", 1, False)
    talker.end("a", 2)
    assert heard(client.receive()) == ("a", 2, True)
    client.vanish()


def test_other_requests_overtake_one_that_goes_on(core: InferenceCore, talker: Talker) -> None:
    client = connected(core)
    client.send(talk("a"), *(scaled(i, str(i)) for i in range(5)), gather(9, "b"), talk("c"))
    talker.say("a", 1)
    talker.end("c", 2)
    got = [heard(client.receive()) for _ in range(8)]
    assert [each for each in got if each[0].isdigit()] == [(str(i), 2 * i, True) for i in range(5)]
    assert ("a", 1, False) in got
    assert ("c", 2, True) in got
    assert [identity for identity, _, _ in got if identity not in "ac"] == [*"01234", "b"]
    client.half_close()
    talker.end("a", 3)
    assert [heard(answer) for answer in client.rest()] == [("a", 3, True)]


def test_an_error_ends_its_request_and_no_other(core: InferenceCore, talker: Talker) -> None:
    client = connected(core)
    client.send(talk("a"), talk("b"))
    talker.say("a", 1)
    talker.say("b", 1)
    talker.fail("a", InternalError("the graph failed"))
    talker.say("a", 2)  # as no model should
    talker.end("b", 2)
    client.half_close()
    assert [heard(answer) for answer in client.rest()] == [
        ("a", 1, False), ("b", 1, False), ("a", "the graph failed", True), ("b", 2, True),
    ]  # fmt: skip


def test_on_demand_an_error_ends_the_stream_and_a_refusal_does_not(
    core: InferenceCore, talker: Talker
) -> None:
    client = connected(core, GRPC_ERRORS)
    client.send(talk("refused", refused=1), talk("a"), talk("b"))
    assert heard(client.receive()) == ("refused", "the talker refuses it", None)
    talker.say("a", 1)
    assert heard(client.receive()) == ("a", 1, False)
    talker.fail("a", InternalError("the graph failed"))
    with pytest.raises(InternalError, match="the graph failed"):
        client.receive()
    client.vanish()


def test_an_answer_that_does_not_fit_into_shared_memory_ends_its_request(
    core: InferenceCore, talker: Talker
) -> None:
    client = connected(core)
    client.send(talk("a"), talk("b"))
    talker.say("a", 1, room=8)
    identity, error, _ = heard(client.receive())
    assert (identity, "shared_memory_byte_size is 8" in error) == ("a", True)
    assert talker.open["a"].call.cancelled
    talker.say("a", 2)
    talker.end("b", 3)
    client.half_close()
    assert [heard(answer) for answer in client.rest()] == [("b", 3, True)]


def test_a_unary_request_to_it_is_refused(core: InferenceCore) -> None:
    method = METHODS["ModelInfer"]
    with pytest.raises(UnsupportedError, match="doesn't support models with decoupled transaction policy"):
        method.handle(core, method.parse(talk("a").SerializeToString()), Call())


def test_a_client_that_goes_cancels_its_requests(core: InferenceCore, talker: Talker) -> None:
    client = connected(core)
    client.send(talk("a"), talk("b"), scaled(1, "c"), slow(LONG, "d"))
    talker.say("a", 1, 2, 3)
    answers = in_background(client.rest)
    eventually(lambda: "b" in talker.open and core.admission.inflight == 3)
    client.vanish()
    assert all(talker.open[identity].call.cancelled for identity in "ab")
    answers.result(30)
    talker.say("a", 4)
    talker.say("b", 5)
    eventually(lambda: core.admission.inflight == 0)


def test_the_rpcs_deadline_is_each_requests(core: InferenceCore, talker: Talker) -> None:
    deadline = time.monotonic() + 1000
    client = connected(core, deadline=deadline)
    client.send(talk("a"))
    talker.end("a", 1)
    assert talker.open["a"].call.deadline == deadline
    client.half_close()
    client.rest()


def test_a_deadline_that_a_model_sees_pass_is_the_streams_status(core: InferenceCore, talker: Talker) -> None:
    client = Client(core, deadline=time.monotonic())
    client.send(talk("a"), scaled(1, "b"))
    with pytest.raises(DeadlineExceededError):
        client.receive()
    assert talker.open["a"].call.cancelled
    client.vanish()


def test_a_request_that_would_end_too_late_ends_alone(core: InferenceCore, talker: Talker) -> None:
    client = connected(core, deadline=time.monotonic() + 1000)
    client.send(talk("a"), talk("b"))
    talker.fail("a", DeadlineExceededError("it would take an hour"))
    assert heard(client.receive()) == ("a", "it would take an hour", True)
    talker.end("b", 1)
    client.half_close()
    assert [heard(answer) for answer in client.rest()] == [("b", 1, True)]


def test_both_kinds_of_requests_count_as_pending(core: InferenceCore, talker: Talker) -> None:
    client = connected(core)
    client.send(*(talk(f"t{i}") for i in range(MAX_PENDING // 2)))
    client.send(*(slow(LONG, f"s{i}") for i in range(MAX_PENDING // 2)), talk("late"))
    answers = in_background(client.receive)
    eventually(lambda: client.taken == MAX_PENDING + 1)  # with the first, which has been written
    talker.end("t3", 1)
    assert heard(answers.result(30)) == ("t3", 1, True)
    assert client.asked == MAX_PENDING + 1  # it isn't written before the transport wants another
    talker.say("t4", 1)
    client.receive()
    eventually(lambda: "late" in talker.open)
    client.vanish()


def test_a_model_does_not_wait_for_a_client_that_does_not_read(core: InferenceCore, talker: Talker) -> None:
    client = connected(core)
    client.send(talk("a"))
    talker.say("a", *range(500))
    unread = core.streams.unwritten.bytes
    got = [heard(client.receive())[1] for _ in range(250)]
    assert unread // 3 < core.streams.unwritten.bytes < unread * 2 // 3
    talker.end("a", 500)
    client.half_close()
    got += [heard(answer)[1] for answer in client.rest()]
    assert got == list(range(501))


@pytest.mark.parametrize("why", ["long", "much"])
def test_a_client_that_reads_nothing_has_its_requests_cancelled(
    few: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    monkeypatch.setattr(stream, "WATCH_SECONDS", 0.01)
    core = make_core(few, RepositoryWithTalker)
    talker = talker_of(core)
    reads, unread = Client(core), connected(core)
    answer = in_background(reads.receive)
    unread.send(talk("a"), talk("b"))
    eventually(lambda: "b" in talker.open)
    talker.say("a", *range(MAX_PENDING + 2))
    if why == "long":
        monkeypatch.setattr(infer_stream, "LONGEST_WRITE_SECONDS", 0.0)
    else:
        core.streams.unwritten.add(1 << 60)
    assert unread.cancelled.wait(30)
    eventually(lambda: len(core.streams) == 1 and core.admission.inflight == 0)
    eventually(lambda: talker.open["a"].call.cancelled and talker.open["b"].call.cancelled)
    talker.say("a", 99)
    assert core.streams.unwritten.bytes in (0, 1 << 60)
    assert not reads.cancelled.is_set()
    reads.send(scaled(3))
    assert heard(answer.result(30))[1] == 6
    reads.vanish()
    unread.vanish()
    eventually(lambda: readers() == 0)
    core.close()


def test_a_drain_waits_for_the_last_answers(few: Path) -> None:
    core = make_core(few, RepositoryWithTalker)
    talker = talker_of(core)
    client = connected(core)
    client.send(talk("a"))
    talker.say("a", 1)
    core.streams.drain()
    closed = in_background(lambda: core.admission.close(30))
    assert heard(client.receive()) == ("a", 1, False)
    talker.say("a", 2)
    assert heard(client.receive()) == ("a", 2, False)
    assert not closed.done()
    talker.end("a", 3)
    assert heard(client.receive()) == ("a", 3, True)
    assert closed.result(30)
    with pytest.raises(UnavailableError, match="shutting down"):
        client.receive()
    client.vanish()
    assert core.streams.wait(1)
    core.close()


def test_a_request_has_one_line_in_the_access_log_at_its_end(few: Path, tmp_path: Path) -> None:
    core = make_core(few, RepositoryWithTalker, access_log=str(tmp_path / "access.log"))
    talker = talker_of(core)
    client = connected(core)
    client.send(talk("a"), talk("b"), talk("c"))
    talker.say("a", 1, 2)
    talker.say("b", 1)
    talker.end("a", 3)
    talker.fail("b", InternalError("the graph failed"))
    client.send(scaled(0, "hello"))
    got = [client.receive() for _ in range(6)]
    size = sum(answer.ByteSize() for answer in got if answer.infer_response.id == "a")
    client.vanish()
    failing = connected(core, GRPC_ERRORS)
    failing.send(gather(9, "d"))
    with pytest.raises(ServeError, match="Gather"):
        failing.receive()
    failing.vanish()
    core.observer.close()
    core.close()
    lines = [json.loads(line) for line in (tmp_path / "access.log").read_text().splitlines()]
    found = sorted((line["id"], line["code"]) for line in lines if line["id"] != "hello")
    assert found == [("a", "OK"), ("b", "INTERNAL"), ("c", "CANCELLED"), ("d", "INTERNAL")]
    assert [line["response_bytes"] for line in lines if line["id"] == "a"] == [size]


def test_whatever_comes_in_whatever_order_each_request_has_its_answers(core: InferenceCore) -> None:
    chance = random.Random(7)  # noqa: S311 - the same each time
    client = Client(core)
    count = {f"t{i}": chance.randrange(1, 20) for i in range(60)}
    plain = [f"p{i}" for i in range(60)]
    messages = [talk(identity, chatty=n) for identity, n in count.items()]
    messages += [scaled(1, identity) for identity in plain]
    order = [message for _, message in sorted((chance.random(), i) for i, message in enumerate(messages))]
    sent = [messages[i] for i in order]
    client.send(*sent)
    client.half_close()
    got = [heard(answer) for answer in client.rest()]
    asked = [message.id for message in sent if message.id.startswith("p")]
    assert [identity for identity, _, _ in got if identity.startswith("p")] == asked
    for identity, n in count.items():
        answers = [(value, final) for found, value, final in got if found == identity]
        assert answers == [*((value, False) for value in range(n)), (-1, True)]
    eventually(lambda: core.admission.inflight == 0 and core.streams.unwritten.bytes == 0)
    talker_of(core).open.clear()

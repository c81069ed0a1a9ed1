"""§5 and §7: sequences."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from tests.serve.conformance.servers import DEADLINE, Calls, eventually, floats, status
from tests.serve.conformance.table import SAME, Table

if TYPE_CHECKING:
    from tests.serve.conformance.servers import Servers

TABLE = Table()
row = TABLE.row
INVALID = "INVALID_ARGUMENT"


def step(
    servers: Servers, model: str, identity: Any, value: float, *, start: bool = False, end: bool = False
) -> Any:
    """One request of a sequence: the sum so far, and what the graph was told."""
    answer = servers.infer(
        model, floats(values=[[value]]), sequence_id=identity, sequence_start=start, sequence_end=end,
        client_timeout=DEADLINE,
    )  # fmt: skip
    return [answer.as_numpy(name).item() for name in ("y", "first", "last", "who")]


def whole(servers: Servers, model: str, identity: Any) -> Any:
    return [step(servers, model, identity, n, start=n == 1, end=n == 3) for n in (1, 2, 3)]


def expected(identity: Any) -> Any:
    return [[1.0, 1, 0, identity], [3.0, 0, 0, identity], [6.0, 0, 1, identity]]


for _model, _identity, _seen, _triton in (
    ("sum", 700, 700, SAME),
    ("sum_oldest", 701, 701, SAME),
    ("sum_named", "seven", b"seven", "differs: INVALID_ARGUMENT, it miscounts the text that it made itself"),
):
    row("5", "sync", f"a sequence of 3 on '{_model}': state and controls START, END, CORRID",
        fact=expected(_seen), triton=_triton)(partial(whole, model=_model, identity=_identity))  # fmt: skip


@row("5", "sync", "two sequences in turn keep their own state", fact=[1.0, 10.0, 3.0, 30.0])
def _(servers: Servers) -> Any:
    sums = [step(servers, "sum", identity, value, start=True)[0] for identity, value in ((710, 1), (711, 10))]
    for identity, value in ((710, 2), (711, 20)):
        sums.append(step(servers, "sum", identity, value, end=True)[0])
    return sums


@row("5", "sync", "a second start begins the sequence anew", fact=[1.0, 5.0, 6.0])
def _(servers: Servers) -> Any:
    sums = [step(servers, "sum", 712, value, start=True)[0] for value in (1, 5)]
    return [*sums, step(servers, "sum", 712, 1, end=True)[0]]


@row("7", "sync", "no sequence id", INVALID)
def _(servers: Servers) -> Any:
    return servers.infer("sum", floats(values=[[1]]))


@row("7", "sync", "sequence id 0 is none", INVALID)
def _(servers: Servers) -> Any:
    return step(servers, "sum", 0, 1, start=True)


@row("7", "sync", "a first request without start", INVALID)
def _(servers: Servers) -> Any:
    return step(servers, "sum", 720, 1)


@row("7", "sync", "a request after the end", fact=["OK", INVALID])
def _(servers: Servers) -> Any:
    once = status(lambda: step(servers, "sum", 721, 1, start=True, end=True))
    return [once, status(lambda: step(servers, "sum", 721, 1))]


@row("7", "sync", "two rows in one request of a sequence", INVALID)
def _(servers: Servers) -> Any:
    return servers.infer("sum", floats(values=[[1], [2]]), sequence_id=722, sequence_start=True)


@row("7", "sync", "a text as id where the graph takes a number", INVALID,
     triton="differs: the text's bytes become the number")  # fmt: skip
def _(servers: Servers) -> Any:
    return step(servers, "sum", "seven", 1, start=True)


@row("7", "sync", "a number as id where the graph takes a text", INVALID)
def _(servers: Servers) -> Any:
    return step(servers, "sum_named", 723, 1, start=True)


@row("7", "sync", "a control input can't be sent by a client", INVALID)
def _(servers: Servers) -> Any:
    return servers.infer(
        "sum", floats(values=[[1]]), floats("start", [[1]]), sequence_id=724, sequence_start=True
    )


@row(
    "7", "sync", "metadata hides what the server fills and keeps", fact=(["x"], ["y", "first", "last", "who"])
)
def _(servers: Servers) -> Any:
    metadata = servers.client.get_model_metadata("sum")
    return [each.name for each in metadata.inputs], [each.name for each in metadata.outputs]


@row("7", "sync", "a sequence waits for a slot until another one is idle for too long, whose state is gone",
     fact=["OK", "OK", INVALID])  # fmt: skip
def _(servers: Servers) -> Any:
    model = "sum_one_slot"
    first, second = (
        status(partial(step, servers, model, identity, 1, start=True)) for identity in (730, 731)
    )
    return [first, second, status(lambda: step(servers, model, 730, 1))]


@row(
    "7",
    "sync",
    "a sequence that waits for a slot for longer than its parameter `timeout`",
    fact="UNAVAILABLE",
)
def _(servers: Servers) -> Any:
    model = "sum_one_slot"
    step(servers, model, 732, 1, start=True)
    calls = Calls(servers.client)
    calls.send(model, floats(values=[[1]]), sequence_id=733, sequence_start=True, timeout=50_000)
    # Requests keep the slot, so only the timeout can end the wait.
    eventually(lambda: step(servers, model, 732, 1)[0] > 1 and calls.ready)
    step(servers, model, 732, 1, end=True)
    return calls.next()[1]

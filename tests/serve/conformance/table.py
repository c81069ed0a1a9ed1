"""One row per behaviour of the protocol: what is done, what a Triton answers, and how we know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
from tritonclient.utils import InferenceServerException

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.serve.conformance.servers import Servers

SAME = "same"
NO_BACKEND = "not asked: its wheel has no onnxruntime backend"


@dataclass(frozen=True, slots=True)
class Row:
    """One behaviour.

    Attributes:
        section: of the wire contract: 4 tensor data, 5 parameters, 6 streams, 7 status codes, 8 payloads.
        via: sync, aio or stream of tritonclient; message: what its API can't express.
        what: what is done, and what is to be seen.
        act: does it, and returns the fact to compare.
        code: the expected status; in-band errors of streams are facts.
        fact: what `act` must return.
        triton: what a real Triton 2.51 answered; else why it wasn't asked, or why this server differs.
    """

    section: str
    via: str
    what: str
    act: Callable[[Servers], Any]
    code: str
    fact: Any
    triton: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a row."""

    row: Row
    code: str
    fact: Any

    @property
    def as_expected(self) -> bool:
        return self.code == self.row.code and (self.code != "OK" or self.fact == self.row.fact)


class Table:
    """Rows in the order in which they are asked."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def row(
        self, section: str, via: str, what: str, code: str = "OK", fact: Any = None, *, triton: str = SAME
    ) -> Callable[[Callable[[Servers], Any]], Callable[[Servers], Any]]:
        """Make a row of a function."""

        def add(act: Callable[[Servers], Any]) -> Callable[[Servers], Any]:
            self.rows.append(Row(section, via, what, act, code, fact, triton))
            return act

        return add


def ask(row: Row, servers: Servers) -> Outcome:
    try:
        return Outcome(row, "OK", row.act(servers))
    except InferenceServerException as error:
        code = str(error.status() or "no status").removeprefix("StatusCode.")
        return Outcome(row, code, error.message())
    except grpc.RpcError as error:
        return Outcome(row, error.code().name, error.details())
    except Exception as error:  # noqa: BLE001 - the row failed; the others are still asked
        return Outcome(row, "none", repr(error))

"""Ask servers every row of the table; a process of its own: tritonclient's protobuf messages have our names.

Usage: python -m tests.serve.conformance.ask '{"served": {"url": HOST:PORT, "metrics": URL}, …}' [same]

With `same`, only rows that a real Triton answers as this server does: what to ask of one.
"""

from __future__ import annotations

import json
import sys

from tests.serve.conformance import (
    rows_decoupled,
    rows_endings,
    rows_models,
    rows_parameters,
    rows_payloads,
    rows_repository,
    rows_sequences,
    rows_shared_memory,
    rows_status,
    rows_streams,
    rows_tensors,
)
from tests.serve.conformance.servers import Servers
from tests.serve.conformance.table import SAME, ask

ROOMS = (
    rows_tensors, rows_models, rows_parameters, rows_shared_memory, rows_streams, rows_decoupled, rows_status,
    rows_sequences, rows_repository, rows_payloads, rows_endings,
)  # fmt: skip
TABLES = tuple(room.TABLE for room in ROOMS)

if __name__ == "__main__":
    servers = Servers(json.loads(sys.argv[1]))
    rows = [row for table in TABLES for row in table.rows if row.triton == SAME or "same" not in sys.argv]
    for each in rows:
        outcome = ask(each, servers)
        line = {name: getattr(each, name) for name in ("section", "via", "what", "triton")}
        line["expected"] = [each.code, repr(each.fact)]
        line["got"] = [outcome.code, repr(outcome.fact)]
        line["ok"] = outcome.as_expected
        print(json.dumps(line), flush=True)

"""MLPerf LoadGen's system under test: a server, asked with NVIDIA's client. LoadGen schedules and measures.

A process of its own: tritonclient's protobuf messages have our names, and LoadGen is installed apart.
Usage: python loadgen_system.py LOAD.json FOLDER; LoadGen writes its summary and its trace to the folder.
"""

from __future__ import annotations

import importlib
import json
import sys
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton


def tensor(name: str, value: int) -> Any:
    made = triton.InferInput(name, [1], "INT64")
    made.set_data_from_numpy(np.array([value], np.int64))
    return made


def settings(loadgen: Any, load: dict[str, Any]) -> Any:
    made = loadgen.TestSettings()
    made.scenario = loadgen.TestScenario.Server
    made.mode = loadgen.TestMode.PerformanceOnly
    made.server_target_qps = load["rate"]
    made.min_query_count = made.max_query_count = round(load["rate"] * load["seconds"])
    made.min_duration_ms = 0  # the number of queries says when it ends
    made.schedule_rng_seed = load["seed"]
    return made


def main() -> None:
    loadgen: Any = importlib.import_module("mlperf_loadgen")
    load = json.loads(Path(sys.argv[1]).read_text())
    client = triton.InferenceServerClient(load["url"])
    requests = [[tensor(load["input"], value)] for value in load["values"]]
    client.infer(load["model"], requests[0])  # connects
    in_turn = cycle(requests)
    failed: list[str] = []

    def finish(query: int, *, result: Any, error: Any) -> None:
        del result
        if error is not None:
            failed.append(str(error))
        loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(query, 0, 0)])

    def issue(queries: list[Any]) -> None:
        for query in queries:
            # LoadGen's library has one sample: it would draw from several, the others take them in turn.
            client.async_infer(load["model"], next(in_turn), partial(finish, query.id))

    logs = loadgen.LogSettings()
    logs.log_output.outdir = sys.argv[2]
    logs.log_output.copy_summary_to_stdout = False
    logs.enable_trace = True  # for the times of its schedule
    system = loadgen.ConstructSUT(issue, lambda: None)
    library = loadgen.ConstructQSL(1, 1, lambda _: None, lambda _: None)
    loadgen.StartTestWithLogSettings(system, library, settings(loadgen, load), logs)
    loadgen.DestroyQSL(library)
    loadgen.DestroySUT(system)
    if failed:
        sys.exit(f"{len(failed)} requests failed, the first with: {failed[0]}")


if __name__ == "__main__":
    main()

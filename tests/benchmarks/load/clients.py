"""Clients of the benchmarks, in a process of their own on one core: a closed loop, and an open one.

Both on grpc.aio with raw bytes, about 50 µs a call: what they cost is not in the server's figures, but with
both on two cores it bounds the rate.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
import sys
import time
from typing import Any

import grpc
import numpy as np

from loadtest.target import INFER_PATH
from serve.pb import grpc_service_pb2 as pb
from serve.process import keep_large_blocks

Figures = dict[str, float]


def request(model: str, **inputs: np.ndarray) -> bytes:
    """A serialized ModelInferRequest of FP32 and INT64 tensors."""
    message = pb.ModelInferRequest(model_name=model)
    for name, array in inputs.items():
        datatype = {"float32": "FP32", "int64": "INT64", "uint8": "UINT8"}[array.dtype.name]
        message.inputs.add(name=name, datatype=datatype, shape=array.shape)
        message.raw_input_contents.append(array.tobytes())
    return message.SerializeToString()


def run(kind: str, port: int, message: bytes, core: int | None, **settings: float) -> Figures:
    """What clients of a kind ("closed_loop", "open_loop") in a process of its own saw."""
    settings |= {"port": port}
    words = [kind, json.dumps(settings), json.dumps(core), base64.b64encode(message).decode()]
    command = [sys.executable, "-m", "tests.benchmarks.load.clients"]
    done = subprocess.run(command, input="\n".join(words), capture_output=True, text=True, check=True)
    figures: Figures = json.loads(done.stdout)
    return figures


async def closed_loop(message: bytes, *, port: int, clients: int, seconds: float) -> Figures:
    """So many clients, each of which sends when it has its answer: rate per second, latencies in ms."""
    latencies: list[float] = []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call: Any = channel.unary_unary(INFER_PATH)
        await call(message)
        end = time.perf_counter() + seconds

        async def client() -> None:
            while (started := time.perf_counter()) < end:
                await call(message)
                latencies.append(time.perf_counter() - started)

        await asyncio.gather(*(client() for _ in range(clients)))
    return {"rate": len(latencies) / seconds, **percentiles(latencies)}


async def open_loop(message: bytes, *, port: int, rate: float, seconds: float, deadline: float) -> Figures:
    """Requests at random times, so many a second, each with a deadline in seconds.

    Returns:
        answered per second, latencies in ms of those from the time they were meant to be sent, and how many
        a second were refused (UNAVAILABLE) and late (DEADLINE_EXCEEDED).
    """
    latencies: list[float] = []
    refused = {"UNAVAILABLE": 0, "DEADLINE_EXCEEDED": 0}
    times = np.cumsum(np.random.default_rng(0).exponential(1 / rate, int(rate * seconds)))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call: Any = channel.unary_unary(INFER_PATH)
        await call(message)
        started = time.perf_counter() + 0.1

        async def send(at: float) -> None:
            try:
                await call(message, timeout=deadline)
            except grpc.aio.AioRpcError as error:
                refused[error.code().name] += 1
            else:
                latencies.append(time.perf_counter() - started - at)

        tasks = []
        for at in times:
            await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
            tasks.append(asyncio.ensure_future(send(at)))
        await asyncio.gather(*tasks)
    shares = {name.lower(): count / seconds for name, count in refused.items()}
    return {"rate": len(latencies) / seconds, **percentiles(latencies), **shares}


def percentiles(latencies: list[float]) -> Figures:
    p50, p99 = np.percentile(latencies, [50, 99]) * 1e3
    return {"p50": float(p50), "p99": float(p99)}


def main() -> None:
    # grpc is loaded, but nothing of the sizes that count has been allocated yet.
    keep_large_blocks()
    kind, settings, core, message = sys.stdin.read().split("\n")
    if json.loads(core) is not None:
        os.sched_setaffinity(0, {json.loads(core)})
    loop: Any = {"closed_loop": closed_loop, "open_loop": open_loop}[kind]
    print(json.dumps(asyncio.run(loop(base64.b64decode(message), **json.loads(settings)))))


if __name__ == "__main__":
    main()

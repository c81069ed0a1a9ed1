"""Clients that stream over gRPC, in a process of their own: a line of JSON is a load, its answer a trace.

Arguments: the server's port, the model. Every stream is a ModelStreamInfer of its own.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import asdict
from typing import Any

import grpc
import numpy as np

from serve.pb import grpc_service_pb2 as pb
from tests.benchmarks.text_generation.load import Load, Trace

STREAM_PATH = "/inference.GRPCInferenceService/ModelStreamInfer"
LONGEST_SECONDS = 120.0


def request(model: str, prompt: list[int], tokens: int) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name=model)
    message.inputs.add(name="input_ids", datatype="INT64", shape=[len(prompt)])
    message.raw_input_contents.append(np.array(prompt, np.int64).tobytes())
    message.parameters["max_tokens"].int64_param = tokens
    message.parameters["stream"].bool_param = True
    message.parameters["ignore_eos"].bool_param = True
    message.parameters["temperature"].double_param = 0.0  # the likeliest token
    return message


class Stream:
    """One text."""

    def __init__(self, after: int = 0) -> None:
        self.times: list[float] = []
        self.ids: list[int] = []
        self.after = after
        self.reached = asyncio.Event()

    async def generate(self, call: Any, message: pb.ModelInferRequest) -> None:
        async for answer in call([message], timeout=LONGEST_SECONDS):
            if answer.error_message:
                raise RuntimeError(answer.error_message)
            for contents in answer.infer_response.raw_output_contents:
                ids = np.frombuffer(contents, np.int64).tolist()
                self.times += [time.perf_counter()] * len(ids)
                self.ids += ids
            if len(self.times) >= self.after:
                self.reached.set()


async def generate(port: int, model: str, load: Load) -> Trace:
    streams = [Stream(load.after) for _ in load.prompts]
    late = Stream()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        await channel.channel_ready()
        call: Any = channel.stream_stream(
            STREAM_PATH, pb.ModelInferRequest.SerializeToString, pb.ModelStreamInferResponse.FromString
        )
        sent = time.perf_counter()
        tasks = [
            asyncio.ensure_future(stream.generate(call, request(model, prompt, load.tokens)))
            for stream, prompt in zip(streams, load.prompts, strict=True)
        ]
        late_sent = 0.0
        if load.late:
            await streams[0].reached.wait()
            late_sent = time.perf_counter()
            await late.generate(call, request(model, load.late, load.late_tokens))
        await asyncio.gather(*tasks)
    return Trace(sent, [stream.times for stream in streams], late_sent, late.times, streams[0].ids)


def main() -> None:
    port, model = int(sys.argv[1]), sys.argv[2]
    for line in sys.stdin:
        trace = asyncio.run(generate(port, model, Load(**json.loads(line))))
        print(json.dumps(asdict(trace)), flush=True)


if __name__ == "__main__":
    main()

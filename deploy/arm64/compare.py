#!/usr/bin/env python3
"""Does a model repository answer on emulated arm64 what it answers here, and what PyTorch answered?

Two real servers on loopback, this machine's and one in a root of `make_root.sh`, get the golden samples of
each entry through NVIDIA's client, row by row. An answer passes within the tolerance that the exporter wrote
beside the samples, as in the server's own check. Times under emulation say nothing, so none is printed.
"""

from __future__ import annotations

import argparse
import os
import queue
import re
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import np_to_triton_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

HERE = Path(__file__).parent
ROUNDING = 1e-4  # of an output's largest number; serve/loading/golden.py says why
START_SECONDS = 300  # emulated and beside other work; 12 s on two idle cores
SECONDS = 120  # that a request may take
PROMPT, TOKENS = 16, 32  # of a text: tokens given and tokens asked for
DECODER = "past_key_names"  # the parameter that makes a graph a generation model


class Server:
    """`onnxedge serve` of one repository on free ports of loopback, until `stop`."""

    def __init__(self, command: list[str], environment: Mapping[str, str], repository: str) -> None:
        flags = ["--grpc-address=127.0.0.1", "--grpc-port=0", "--allow-metrics=false"]
        self.log: list[str] = []
        self._process = subprocess.Popen(  # noqa: S603 - the project's own program
            [*command, "-m", "serve", "serve", "--model-repository", repository, *flags],
            stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
        )  # fmt: skip
        self._port: queue.Queue[int] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            port = self._port.get(timeout=START_SECONDS)
        except queue.Empty:
            port = 0
        if not port:
            self.stop()
            raise SystemExit(f"no server after {START_SECONDS} s:\n{''.join(self.log)}")
        self.client = triton.InferenceServerClient(f"127.0.0.1:{port}")

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.log.append(line)
            if found := re.search(r"SERVING: gRPC at \S+:(\d+)", line):
                self._port.put(int(found[1]))
        self._port.put(0)

    def stop(self) -> int:
        """Ask it to end; its exit status."""
        self._process.terminate()
        try:
            return self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def run(self, model: str, rows: Mapping[str, np.ndarray], outputs: list[str]) -> dict[str, np.ndarray]:
        """All rows' outputs, asked for one at a time."""
        answers = []
        for row in range(len(next(iter(rows.values())))):
            inputs = [tensor(name, array[row : row + 1]) for name, array in rows.items()]
            answers.append(self.client.infer(model, inputs, client_timeout=SECONDS))
        return {name: np.concatenate([answer.as_numpy(name) for answer in answers]) for name in outputs}

    def write(self, model: str, prompt: np.ndarray) -> list[int]:
        """The most likely tokens after a prompt."""
        answers: queue.Queue[triton.InferResult | Exception] = queue.Queue()
        self.client.start_stream(lambda result, error: answers.put(error or result))
        inputs = [tensor("input_ids", prompt), tensor("max_tokens", np.array([TOKENS], np.int32))]
        inputs.append(tensor("temperature", np.zeros(1, np.float32)))
        self.client.async_stream_infer(model, inputs, request_id="1")
        answer = answers.get(timeout=SECONDS)
        self.client.stop_stream()
        if isinstance(answer, Exception):
            raise answer
        return [int(token) for token in answer.as_numpy("output_ids")][-TOKENS:]


def tensor(name: str, array: np.ndarray) -> triton.InferInput:
    """An array as the client wants it."""
    filled = triton.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
    filled.set_data_from_numpy(np.ascontiguousarray(array))
    return filled


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table: differences are the largest absolute ones of an output."""

    model: str
    graph: str
    output: str
    from_here: float
    from_torch: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Within what the export allows, of both. A NaN is not."""
        return self.from_here <= self.allowed and self.from_torch <= self.allowed

    def __str__(self) -> str:
        """As a line; `equal` where not one bit differs."""
        here = "equal" if self.from_here == 0 else f"{self.from_here:.1e}"
        verdict = "ok" if self.passed else "FAILED"
        return (
            f"{self.model:<15} {self.graph:<22} {self.output:<15} {here:>9} {self.from_torch:>9.1e} "
            f"{self.allowed:>9.1e}  {verdict}"
        )


HEAD = f"{'model':<15} {'graph':<22} {'output':<15} {'from x86':>9} {'PyTorch':>9} {'allowed':>9}"


def compare(here: Server, there: Server, entry: Path) -> Iterator[Row]:
    """One entry's golden samples on both servers, a line for each output."""
    graph = graph_file(entry)
    with np.load(entry / "1" / "golden.npz") as arrays:
        rows = {key.removeprefix("input."): arrays[key] for key in arrays if key.startswith("input.")}
        expected = {key.removeprefix("output."): arrays[key] for key in arrays if key.startswith("output.")}
        tolerances = {name: float(arrays[f"tolerance.{graph}.{name}"]) for name in expected}
    ours, theirs = (server.run(entry.name, rows, list(expected)) for server in (here, there))
    for name, torch in expected.items():
        allowed = tolerances[name] + ROUNDING * float(np.abs(torch).max())
        from_here = float(np.abs(theirs[name] - ours[name]).max())
        from_torch = float(np.abs(theirs[name] - torch).max())
        yield Row(entry.name, graph, name, from_here, from_torch, allowed)


def graph_file(entry: Path) -> str:
    """The graph that an entry serves."""
    found = re.search(r'default_model_filename: "(.+)"', (entry / "config.pbtxt").read_text())
    return found[1] if found else "model.onnx"


def texts(here: Server, there: Server, entry: Path, prompts: np.ndarray) -> str:
    """What both write after the same prompts, as a line: tokens that agree until the first that doesn't."""
    agree = [
        next((n for n, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), TOKENS)
        for pair in (
            tuple(server.write(entry.name, ids[:PROMPT]) for server in (here, there)) for ids in prompts
        )
    ]
    same = sum(count == TOKENS for count in agree)
    return (
        f"{entry.name:<13} {same} of {len(agree)} texts equal; tokens until the first that differs: {agree}"
    )


def add_plain_decoders(models: Path) -> None:
    """A twin of each generation model that is a plain graph, so that its golden samples can be asked."""
    for entry in sorted(models.iterdir()):
        plain = entry.with_name(f"{entry.name}_1")
        if DECODER in (entry / "config.pbtxt").read_text() and not plain.exists():
            (plain / "1").mkdir(parents=True)
            for name in (graph_file(entry), "golden.npz"):
                (plain / "1" / name).write_bytes((entry / "1" / name).read_bytes())
            (plain / "config.pbtxt").write_text(f'default_model_filename: "{graph_file(entry)}"\n')


def main() -> int:
    """Print the table of one CPU; 1 where a line of it failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="made by make_root.sh")
    parser.add_argument("--models", type=Path, required=True, help="repository; gets twins of decoders")
    parser.add_argument("--cpu", required=True, help="one of qemu's, such as cortex-a72")
    parser.add_argument("--board", default="", help="name in the device tree")
    options = parser.parse_args()
    add_plain_decoders(options.models)
    emulated = [str(HERE / "in_root.sh"), str(options.root), options.cpu, options.board]
    here = Server([sys.executable], {}, str(options.models))
    try:
        there = Server(emulated, {"FOLDER": str(options.models.resolve())}, "/srv/models")
        try:
            entries = sorted(options.models.iterdir())
            generating = [e for e in entries if DECODER in (e / "config.pbtxt").read_text()]
            print(HEAD)
            rows = []
            for entry in (entry for entry in entries if entry not in generating):
                for row in compare(here, there, entry):
                    rows.append(row)
                    print(row, flush=True)
            with np.load(options.models / "gpt" / "1" / "golden.npz") as arrays:
                prompts = arrays["input.input_ids"]
            for entry in generating:
                print(texts(here, there, entry, prompts), flush=True)
        finally:
            status = there.stop()
    finally:
        here.stop()
    print(f"{sum(row.passed for row in rows)} of {len(rows)} outputs passed; the server ended with {status}")
    return 0 if rows and status == 0 and all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Token generation: GPT-2's smallest size, random weights, 8 and 4 bits, on as many cores as there are.

How fast one text is written, against what memory bandwidth allows and against onnxruntime-genai on the same
weights; 16 texts at once; 8 texts while a long prompt is read. All in one run, taking turns; without a
network, then over gRPC. onnxruntime-genai runs in a Python that has it: --genai-python, or GENAI_PYTHON in
the environment. Run: make bench.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.passes.weight_only import WeightOnly
from export.targets import processor
from serve.runtime.cores import usable_cores
from tests.benchmarks.server_overhead import start
from tests.benchmarks.text_generation import gpt2
from tests.benchmarks.text_generation.bandwidth import MAIN_MEMORY_BYTES, ones, read_bandwidth
from tests.benchmarks.text_generation.in_process import InProcess
from tests.benchmarks.text_generation.load import (
    Child,
    Load,
    Source,
    Trace,
    intervals,
    tokens_per_second,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

MODEL = "gpt2"
PROMPT, TOKENS = 32, 128
STREAMS = 16
FLUENT, LONG_PROMPT, BEFORE, FLUENT_TOKENS = 8, 1000, 100, 300
ROUNDS = 9  # a multiple of three: see `one_stream`
LONG_ROUNDS = 3  # of what takes seconds
RANDOM = np.random.default_rng(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--genai-python", default=os.environ.get("GENAI_PYTHON", sys.executable))
    parser.add_argument("--bits", type=int, nargs="+", choices=(4, 8), default=(8, 4))
    parser.add_argument("--block", type=int, default=32, help="weights that share a scale")
    options = parser.parse_args()
    cores = usable_cores()
    print(f"{processor()}, {cores} cores; medians of {ROUNDS} rounds")
    serving = gpt2.serving_graph()
    for bits in options.bits:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            settings = WeightOnly(bits, options.block)
            entry = gpt2.write_entry(serving, settings, root / "models" / MODEL, root / "genai")
            gpt2.write_genai_config(root / "genai", cores)
            print(f"{bits} bits, blocks of {options.block}: graph of {entry.file_bytes / 1e6:.0f} MB")
            measure(root, entry, options.genai_python, cores)


def measure(root: Path, entry: gpt2.Entry, python: str, cores: int) -> None:
    """Everything about one graph."""
    with contextlib.ExitStack() as stack:
        here = InProcess(root / "models")
        stack.callback(here.close)
        genai = start_genai(python, root / "genai")
        if genai:
            stack.callback(genai.close)
        one_stream(here, genai, entry, cores)
        many_streams("without a network", here)
        long_prompt("without a network", here)
        prefix_reuse(here)
    with contextlib.ExitStack() as stack:
        flags = [f"--model-repository={root / 'models'}", "--grpc-port=0", "--metrics-port=0"]
        server, port = start(["-m", "serve", "serve", *flags], *sorted(os.sched_getaffinity(0)))
        stack.callback(server.wait)
        stack.callback(server.terminate)
        client = Remote(port)
        stack.callback(client.close)
        client.generate(alone())  # the first one warms up
        many_streams("over gRPC", client)
        long_prompt("over gRPC", client)


class Remote:
    """A server, seen by clients in a process of their own."""

    def __init__(self, port: int) -> None:
        module = "tests.benchmarks.text_generation.client"
        self.child = Child([sys.executable, "-m", module, str(port), MODEL])

    def generate(self, load: Load) -> Trace:
        return Trace(**self.child.ask(vars(load)))

    def close(self) -> None:
        self.child.close()


def start_genai(python: str, folder: Path) -> Child | None:
    """onnxruntime-genai with the model loaded; None, and why on stdout, where it can't be had."""
    child = Child([python, str(Path(gpt2.__file__).with_name("genai.py")), str(folder)])
    try:
        print(f"  onnxruntime-genai {child.read()['version']} has loaded the same weights")
    except RuntimeError as error:
        print(f"  onnxruntime-genai: skipped, {python}: {error}")
        return None
    return child


def prompt(length: int = PROMPT) -> list[int]:
    """Random tokens, so that no prompt begins as another; not the one that ends texts."""
    ids: list[int] = RANDOM.integers(0, gpt2.VOCABULARY - 1, length).tolist()
    return ids


def alone() -> Load:
    return Load([prompt()], TOKENS, [])


def rate(trace: Trace) -> float:
    return tokens_per_second(trace.streams)


def one_stream(here: Source, genai: Child | None, entry: gpt2.Entry, cores: int) -> None:
    """Tokens per second of one stream: plain reads, the server and onnxruntime-genai take turns.

    Another of them begins each round: what comes after the reads is slower, whoever it is.
    """
    main_memory, as_large = ones(MAIN_MEMORY_BYTES), ones(entry.weight_bytes)
    bandwidths, repeated, ours, theirs, same = [], [], [], [], []
    for index in range(-1, ROUNDS):
        load = alone()
        found: dict[str, list[int]] = {}
        for turn in ((0, 1, 2), (1, 2, 0), (2, 0, 1))[index % 3]:
            if turn == 0:
                bandwidths.append(read_bandwidth(main_memory, cores))
                repeated.append(read_bandwidth(as_large, cores, times=8))
            elif turn == 1:
                trace = here.generate(load)
                ours.append(rate(trace))
                found["ours"] = trace.ids
            elif genai:
                answer = genai.ask({"prompt": load.prompts[0], "tokens": load.tokens})
                theirs.append(tokens_per_second([answer["times"]]))
                found["theirs"] = answer["tokens"]
        same.append(found["ours"] == found.get("theirs"))
        if index < 0:  # it warms all up
            for figures in (bandwidths, repeated, ours, theirs, same):
                figures.clear()
    read = entry.weight_bytes + (PROMPT + TOKENS / 2) * gpt2.CACHE_BYTES_PER_TOKEN
    report_bandwidth(entry, read, bandwidths, repeated, ours)
    if genai:
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        print(
            f"  onnxruntime-genai: {statistics.median(theirs):.0f} tokens/s, the same tokens in {sum(same)} "
            f"of {len(same)} texts; ratio {ratio:.2f} ours / theirs (target: at least 1)"
        )


def report_bandwidth(
    entry: gpt2.Entry,
    read: float,
    bandwidths: Sequence[float],
    repeated: Sequence[float],
    ours: Sequence[float],
) -> None:
    best = max(bandwidths)
    allowed = best / read
    single = statistics.median(ours)
    print(
        f"  main memory is read at {best / 1e9:.1f} GB/s at best (median "
        f"{statistics.median(bandwidths) / 1e9:.1f}; {MAIN_MEMORY_BYTES >> 20} MiB, all cores); "
        f"a buffer of the weights' size, over and over, at {statistics.median(repeated) / 1e9:.1f} GB/s"
    )
    print(
        f"  a token reads {read / 1e6:.0f} MB: {entry.weight_bytes / 1e6:.0f} of weights, the rest keys and "
        f"values; main memory allows {allowed:.0f} tokens/s"
    )
    print(
        f"  one stream: {single:.0f} tokens/s, from {min(ours):.0f} to {max(ours):.0f}; ratio "
        f"{single / allowed:.2f} of what main memory allows (target: at least 0.70)"
    )


def many_streams(where: str, source: Source) -> None:
    """Tokens per second of all streams together; one stream alone takes turns with them."""
    one, rates, whole = [], [], []
    for _ in range(LONG_ROUNDS):
        one.append(rate(source.generate(alone())))
        trace = source.generate(Load([prompt() for _ in range(STREAMS)], TOKENS, []))
        rates.append(rate(trace))
        whole.append(STREAMS * TOKENS / (max(times[-1] for times in trace.streams) - trace.sent))
    ratio = statistics.median(many / single for many, single in zip(rates, one, strict=True))
    print(
        f"  {STREAMS} streams {where}: {statistics.median(rates):.0f} tokens/s "
        f"({statistics.median(whole):.0f} with their prompts' time), one stream "
        f"{statistics.median(one):.0f}; ratio {ratio:.2f} (target: at least 3)"
    )


def long_prompt(where: str, source: Source) -> None:
    ratios, first, figures = [], [], []
    for _ in range(LONG_ROUNDS):
        load = Load([prompt() for _ in range(FLUENT)], FLUENT_TOKENS, prompt(LONG_PROMPT), BEFORE)
        trace = source.generate(load)
        begun = max(times[0] for times in trace.streams)
        before = intervals(trace, begun, trace.late_sent)
        during = intervals(trace, trace.late_sent, trace.late[0])
        figures.append([*np.percentile(before, (50, 99)), *np.percentile(during, (50, 99))])
        ratios.append(figures[-1][3] / figures[-1][1])
        first.append(trace.late[0] - trace.late_sent)
    p50, p99, late50, late99 = np.median(figures, axis=0) * 1e3
    print(
        f"  {FLUENT} streams {where}: p50 {p50:.1f}, p99 {p99:.1f} ms between tokens; while a prompt of "
        f"{LONG_PROMPT} is read p50 {late50:.1f}, p99 {late99:.1f} ms; ratio {statistics.median(ratios):.2f} "
        f"of the p99s (target: at most 2.5); its first token after {statistics.median(first):.2f} s"
    )


def prefix_reuse(source: Source) -> None:
    """Time to the first token of a prompt, and of the same one again."""
    firsts = []
    for _ in range(LONG_ROUNDS):
        load = Load([prompt(LONG_PROMPT)], 2, [])
        firsts.append(
            [(trace.streams[0][0] - trace.sent) for trace in (source.generate(load) for _ in (1, 2))]
        )
    first, again = np.median(firsts, axis=0) * 1e3
    print(
        f"  a prompt of {LONG_PROMPT}: first token after {first:.0f} ms; of the same prompt again "
        f"{again:.1f} ms"
    )


if __name__ == "__main__":
    main()

"""How fast a token is decoded in fp32, 8 and 4 bits: GPT-2's smallest size, random weights, one thread.

Batch 1, caches read and written in place. Timings are printed, not judged. Run: make bench.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime

from export.graph import export_graph, serialize
from export.passes.weight_only import WeightOnly
from export.targets import processor
from tests.benchmarks.text_generation.gpt2 import (
    CONTEXT,
    HEADS,
    LAYERS,
    VOCABULARY,
    WIDTH,
    serving_graph,
)

PAST = (32, 512)
TOKENS = 16
ROUNDS = 8


class Decoder:
    """A decode graph whose caches never move."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.binding = self.session.io_binding()
        self.caches = []
        for layer in range(LAYERS):
            for part in ("key", "value"):
                zeros = np.zeros((1, HEADS, CONTEXT, WIDTH // HEADS), np.float32)
                cache = onnxruntime.OrtValue.ortvalue_from_numpy(zeros)
                self.binding.bind_ortvalue_input(f"past_key_values.{layer}.{part}", cache)
                self.binding.bind_ortvalue_output(f"present.{layer}.{part}", cache)
                self.caches.append(cache)

    def run(self, ids: np.ndarray, past: int) -> np.ndarray:
        """Logits FP32 [1, time, vocabulary] of ids INT64 [1, time]."""
        self.binding.bind_cpu_input("input_ids", ids)
        self.binding.bind_cpu_input("past_length", np.array([[past]]))
        self.binding.bind_output("logits")  # anew: it would keep the last run's shape
        self.session.run_with_iobinding(self.binding)
        logits: np.ndarray = self.binding.get_outputs()[-1].numpy()
        return logits


def main() -> None:
    """Export, quantize, let the graphs take turns, print."""
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 4096)
    serving = serving_graph()
    print(f"processor: {processor()}")
    with tempfile.TemporaryDirectory() as folder:
        decoders = {}
        for bits in (32, 8, 4):
            graph = export_graph(serving.module, serving.example)
            start = time.perf_counter()
            if bits != 32:
                graph = WeightOnly(bits).apply(graph).model  # type: ignore[arg-type]  # 8 or 4
            path = Path(folder, f"{bits}.onnx")
            path.write_bytes(serialize(graph))
            seconds, before = time.perf_counter() - start, resident()
            decoders[bits] = Decoder(path)
            decoders[bits].run(ids[None, : max(PAST)], 0)
            size, grown = path.stat().st_size / 1e6, resident() - before
            print(f"{bits} bits: file {size:.0f} MB, resident {grown:.0f} MB, written in {seconds:.0f} s")
        for past in PAST:
            for bits, seconds in take_turns(decoders, ids, past).items():
                print(f"past {past}, {bits} bits: {seconds * 1000:.2f} ms per token")


def take_turns(decoders: dict[int, Decoder], ids: np.ndarray, past: int) -> dict[int, float]:
    """Median seconds per token of each, decoding `TOKENS` tokens a turn."""
    taken: dict[int, list[float]] = {bits: [] for bits in decoders}
    for _ in range(ROUNDS):
        for bits, decoder in decoders.items():
            for token in range(TOKENS):
                start = time.perf_counter()
                decoder.run(ids[None, token : token + 1], past + token)
                taken[bits].append(time.perf_counter() - start)
    return {bits: statistics.median(seconds) for bits, seconds in taken.items()}


def resident() -> float:
    """Memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096 / 1e6


if __name__ == "__main__":
    main()

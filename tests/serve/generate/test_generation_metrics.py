"""What a generation model's metrics count."""

from __future__ import annotations

import threading
from typing import Any, cast

from serve.errors import CanceledError
from serve.generate.generation_metrics import SECONDS, GenerationMetrics
from serve.generate.sequence import Sequence
from serve.model.statistics import Statistics, statistics_message
from serve.request import Call


def sequence(prompt: int, generated: int, reused: int = 0) -> Sequence:
    nobody = cast("Any", None)
    return Sequence([1] * (prompt + generated), prompt, 100, Call(), nobody, nobody, reused=reused)


def value(metrics: GenerationMetrics, name: str, suffix: str = "", bound: str = "") -> float:
    kind, text, samples = metrics.families()[name]
    assert kind == ("counter" if not suffix else "histogram")
    assert text
    return {(suffix, le): number for suffix, le, number in samples}[suffix, bound]


def test_a_text_counts_its_prompt_its_tokens_and_the_times_between_them() -> None:
    metrics = GenerationMetrics(Statistics())
    metrics.first_token(sequence(prompt=7, generated=0, reused=5), 0.2)
    metrics.token(0.004)
    metrics.token(0.5)
    metrics.finished(sequence(prompt=7, generated=3))
    metrics.first_token(sequence(prompt=2, generated=0), 100)
    metrics.failed(sequence(prompt=2, generated=1), CanceledError())
    assert value(metrics, "prompt_tokens_total") == 9
    assert value(metrics, "prefix_cache_hit_tokens_total") == 5
    assert value(metrics, "generation_tokens_total") == 4
    first = "time_to_first_token_seconds"
    assert [value(metrics, first, "_bucket", le) for le in ("0.15", "0.25", "80.0", "+Inf")] == [0, 1, 1, 2]
    assert value(metrics, first, "_sum") == 100.2
    later = "time_per_output_token_seconds"
    assert [value(metrics, later, "_bucket", le) for le in ("0.003", "0.005", "0.5")] == [0, 1, 2]
    assert value(metrics, later, "_count") == 2
    tokens = "request_generation_tokens"
    assert [value(metrics, tokens, "_bucket", le) for le in ("1", "2", "4")] == [1, 1, 2]


def test_steps_are_runs_by_the_sequences_that_go_on() -> None:
    statistics = Statistics()
    metrics = GenerationMetrics(statistics)
    metrics.step(tokens=64, rows=0, seconds=0.5)
    metrics.step(tokens=35, rows=3, seconds=0.25)
    metrics.step(tokens=3, rows=3, seconds=0.125)
    assert value(metrics, "iteration_tokens_total", "_sum") == 102
    assert [value(metrics, "iteration_tokens_total", "_bucket", le) for le in ("2", "4", "64")] == [0, 1, 3]
    message = statistics_message("gpt", 1, statistics.snapshot())
    assert message.execution_count == 3
    runs = {batch.batch_size: batch.compute_infer for batch in message.batch_stats}
    assert {size: (run.count, run.ns) for size, run in runs.items()} == {
        1: (1, 5 * 10**8),
        3: (2, 375 * 10**6),
    }


def test_an_answer_s_times_add_up() -> None:
    statistics, call = Statistics(), Call()
    call.received_ns, call.queued_ns, call.started_ns, call.done_ns = 1000, 1200, 2000, 9000
    statistics.record_answer(call)
    message = statistics_message("gpt", 1, statistics.snapshot())
    found = message.inference_stats
    assert (message.inference_count, message.execution_count) == (1, 0)
    assert [found.success.ns, found.compute_input.ns, found.queue.ns, found.compute_infer.ns] == [
        8000, 200, 800, 7000,
    ]  # fmt: skip


def test_bounds_ascend() -> None:
    assert list(SECONDS) == sorted(set(SECONDS))


def test_read_while_they_are_written() -> None:
    metrics, over = GenerationMetrics(Statistics()), threading.Event()
    torn = []

    def read() -> None:
        while not over.is_set():
            samples = metrics.families()["time_per_output_token_seconds"][2]
            found = {(suffix, le): number for suffix, le, number in samples}
            if not found["_bucket", "0.001"] == found["_bucket", "+Inf"] == found["_count", ""]:
                torn.append(found)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(20_000):
        metrics.token(0.001)
    over.set()
    reader.join()
    assert torn == []
    assert value(metrics, "generation_tokens_total") == 20_000

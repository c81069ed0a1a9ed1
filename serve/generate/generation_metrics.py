"""What one generation model's engine has done, for Prometheus: the families that vLLM has, by its names.

https://docs.vllm.ai/en/stable/design/metrics.html
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from serve.observability.histogram import Histogram

if TYPE_CHECKING:
    from serve.errors import ServeError
    from serve.generate.sequence import Sequence
    from serve.model.statistics import Statistics
    from serve.observability.histogram import Samples

# vLLM's bounds from 1 ms to 10 s, and finer ones between them: a small model's tokens are 1 to 10 ms apart.
# A long prompt takes a small board longer than 10 s.
SECONDS = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15,
    0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

Families = dict[str, tuple[str, str, "Samples"]]
"""Name of a family, without its prefix, to its kind, its help text, and its samples."""


class GenerationMetrics:
    """Counts since the version was loaded.

    Written from the engine's thread, under a µs a token; read from others.
    """

    def __init__(self, statistics: Statistics) -> None:
        """Start at zero; `statistics` are the version's, which count the steps too."""
        self._statistics = statistics
        self._lock = threading.Lock()
        self._first_token = Histogram(SECONDS)
        self._between_tokens = Histogram(SECONDS)
        self._step_tokens = Histogram(TOKENS)
        self._request_tokens = Histogram(TOKENS)
        self._prompt_tokens = self._reused_tokens = self._generated_tokens = 0

    def step(self, tokens: int, rows: int, seconds: float) -> None:
        """One step read `tokens` tokens, of which `rows` were the latest of sequences that generate."""
        # One that only reads a prompt is a run of one row, too.
        self._statistics.record_step(max(1, rows), int(seconds * 1e9))
        with self._lock:
            self._step_tokens.observe(tokens)

    def first_token(self, sequence: Sequence, seconds: float) -> None:
        """A sequence's first token, `seconds` after its request was received."""
        with self._lock:
            self._first_token.observe(seconds)
            self._prompt_tokens += sequence.prompt_length
            self._reused_tokens += sequence.reused
            self._generated_tokens += 1

    def token(self, seconds: float) -> None:
        """A later token, `seconds` after the one before it."""
        with self._lock:
            self._between_tokens.observe(seconds)
            self._generated_tokens += 1

    def finished(self, sequence: Sequence) -> None:
        """A text is complete."""
        with self._lock:
            self._request_tokens.observe(sequence.generated)

    def failed(self, sequence: Sequence, _error: ServeError) -> None:
        """A text won't be completed; why is counted where its request is answered."""
        self.finished(sequence)

    def families(self) -> Families:
        """All that was counted, at one moment."""
        with self._lock:
            return {
                "time_to_first_token_seconds": (
                    "histogram", "From a request's receipt to its first token, seconds",
                    self._first_token.samples(),
                ),
                "time_per_output_token_seconds": (
                    "histogram", "From a sequence's token to its next, seconds",
                    self._between_tokens.samples(),
                ),
                "iteration_tokens_total": (
                    "histogram", "Tokens that a step of the engine read", self._step_tokens.samples(),
                ),
                "request_generation_tokens": (
                    "histogram", "Tokens generated for a request, completed or not",
                    self._request_tokens.samples(),
                ),
                "prompt_tokens_total": ("counter", "Tokens of prompts", _one(self._prompt_tokens)),
                "generation_tokens_total": ("counter", "Tokens generated", _one(self._generated_tokens)),
                "prefix_cache_hit_tokens_total": (
                    "counter", "Tokens of prompts that had been read for another sequence",
                    _one(self._reused_tokens),
                ),
            }  # fmt: skip


def _one(value: float) -> Samples:
    return [("", "", value)]

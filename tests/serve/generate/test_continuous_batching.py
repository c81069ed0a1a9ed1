"""The engine on real graphs: many texts at once, each as if it were alone."""

from __future__ import annotations

import random
import statistics
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from serve.errors import CanceledError, DeadlineExceededError, InternalError
from serve.generate.engine import GenerationEngine
from serve.generate.sampling import SamplingParameters, sampler
from serve.generate.scheduler import GenerationScheduler
from serve.generate.sequence import Sequence
from serve.generate.settings import GenerationSettings
from serve.process import resident_bytes, return_freed_memory
from serve.request import Call
from tests.serve.generate.decoders import (
    CONTEXT,
    GROWING,
    NAMES,
    NEW_TOKENS,
    OURS,
    THIRD_PARTY,
    golden,
    graph_file,
    open_runner,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import numpy as np

    from serve.errors import ServeError
    from serve.generate.runner import Runner
    from serve.generate.step import Step

STREAMS = 16

Texts = list[tuple[list[int], list[int]]]


@dataclass
class Recorder:
    """An output that keeps the tokens; `on_token(count)` is called on the engine's thread."""

    on_token: Callable[[int], None] = lambda _: None
    tokens: list[int] = field(default_factory=list)
    reason: str = ""
    error: ServeError | None = None
    over: threading.Event = field(default_factory=threading.Event)

    def take(self, token: int) -> str | None:
        self.tokens.append(token)
        self.on_token(len(self.tokens))
        return None

    def end(self, reason: str) -> None:
        self.reason = reason
        self.over.set()

    def fail(self, error: ServeError) -> None:
        self.error = error
        self.over.set()

    def wait(self) -> Recorder:
        assert self.over.wait(100), f"no end after {len(self.tokens)} tokens"
        return self


class Silent:
    """Metrics that nobody reads."""

    def step(self, tokens: int, rows: int, seconds: float) -> None: ...
    def first_token(self, sequence: Sequence, seconds: float) -> None: ...
    def token(self, seconds: float) -> None: ...
    def finished(self, sequence: Sequence) -> None: ...
    def failed(self, sequence: Sequence, error: ServeError) -> None: ...


class Watched:
    """A runner that keeps who was read in each step."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.steps: list[set[Sequence]] = []
        self.before: Callable[[Step], None] = lambda _: None

    def run(self, step: Step) -> list[tuple[Sequence, np.ndarray]]:
        self.before(step)
        self.steps.append({*step.decode, *(chunk.sequence for chunk in step.prefill)})
        return self.runner.run(step)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("graphs")
    return {name: graph_file(name, folder) for name in NAMES}


@dataclass
class Setup:
    """An engine on a graph, what it is made of, and prompts with what torch writes after each."""

    texts: Texts
    runner: Watched
    scheduler: GenerationScheduler
    engine: GenerationEngine

    def start(
        self, ids: list[int], count: int, output: Recorder, call: Call | None = None, **sampling: object
    ) -> Sequence:
        parameters = SamplingParameters(**({"temperature": 0.0} | sampling))  # type: ignore[arg-type]  # any field
        sequence = Sequence(list(ids), len(ids), count, call or Call(), sampler(parameters), output)
        self.engine.submit(sequence)
        return sequence

    def generate(self, ids: list[int], count: int) -> list[int]:
        output = Recorder()
        self.start(ids, count, output)
        assert output.wait().reason == "length", output.error
        return output.tokens

    def held(self) -> int:
        """Wait until nothing runs; how many slots a sequence still has."""
        self.engine.close()
        self.scheduler.check()
        return self.scheduler.running + self.scheduler.waiting


@pytest.fixture
def setup(request: pytest.FixtureRequest, graphs: dict[str, Path]) -> Iterator[Setup]:
    """On the graph that the test is parametrized with, else on ours."""
    name = getattr(request, "param", OURS)
    parameters = GROWING if name == OURS else THIRD_PARTY[name].parameters
    runner = open_runner(graphs[name], parameters, CONTEXT, STREAMS)
    settings = GenerationSettings(context_length=CONTEXT, max_prompt_length=CONTEXT - 1, max_num_seqs=STREAMS)
    scheduler = GenerationScheduler(settings, adjacent_rows=runner.adjacent_rows)
    watched = Watched(runner)
    engine = GenerationEngine("engine", scheduler, watched, Silent())
    texts = list(zip(golden(name).prompts, golden(name).tokens, strict=True))
    yield Setup(texts, watched, scheduler, engine)
    engine.close()
    runner.close()


every_graph = pytest.mark.parametrize("setup", NAMES, indirect=True)


@every_graph
def test_alone_a_text_is_torchs_greedy_one(setup: Setup) -> None:
    for prompt, expected in sorted(setup.texts, key=lambda text: len(text[0]))[::5]:
        assert setup.generate(prompt, NEW_TOKENS) == expected


@every_graph
@pytest.mark.parametrize("seed", range(10))
def test_among_others_that_come_and_go_each_text_is_torchs(setup: Setup, seed: int) -> None:
    """16 prompts start when others have so many tokens, and end after random counts, or cancelled."""
    texts = setup.texts
    schedule = random.Random(seed)  # noqa: S311 - a schedule
    picked = [texts[index % len(texts)] for index in range(STREAMS)]
    schedule.shuffle(picked)
    plans = [
        (prompt, expected, schedule.choice((NEW_TOKENS, schedule.randint(1, NEW_TOKENS))), schedule.random())
        for prompt, expected in picked
    ]
    starts = sorted(schedule.randint(0, 40 * STREAMS) for _ in plans)
    starts[0] = 0
    waiting = list(zip(starts, plans, strict=True))
    running: list[tuple[Recorder, list[int], int, bool]] = []
    seen = 0

    def begin() -> None:
        _, (prompt, expected, count, chance) = waiting.pop(0)
        call = Call()
        cancelled_at = count // 2 if chance < 1 / 4 and count > 1 else 0

        def on_token(so_far: int) -> None:
            nonlocal seen
            seen += 1
            if so_far == cancelled_at:
                call.cancel()
            while waiting and waiting[0][0] <= seen:
                begin()

        output = Recorder(on_token)
        running.append((output, expected, count, cancelled_at > 0))
        setup.start(prompt, count, output, call)

    begin()
    for _ in range(STREAMS):
        output, expected, count, cancelled = running.pop(0)
        output.wait()
        if waiting and not running:  # all that run have ended before the next was due
            begin()
        assert isinstance(output.error, CanceledError) == cancelled
        assert output.tokens == expected[: count // 2 if cancelled else count]
    assert setup.held() == 0


@every_graph
@pytest.mark.parametrize("end", ["cancel", "deadline"])
def test_one_that_ends_early_is_out_within_a_step_and_harms_nobody(setup: Setup, end: str) -> None:
    texts = setup.texts[:8]
    call = Call()

    def on_token(count: int) -> None:
        if count == 20:
            ended_at.append(len(setup.runner.steps))
            if end == "cancel":
                call.cancel()
            else:
                call.deadline = time.monotonic()

    ended_at: list[int] = []
    victim = Recorder(on_token)
    sequence = setup.start(texts[0][0], NEW_TOKENS, victim, call)
    others = [(Recorder(), expected) for _, expected in texts[1:]]
    for (output, _), (prompt, _) in zip(others, texts[1:], strict=True):
        setup.start(prompt, NEW_TOKENS, output)
    for output, expected in others:
        assert output.wait().tokens == expected
    assert isinstance(victim.error, CanceledError if end == "cancel" else DeadlineExceededError)
    assert victim.tokens == texts[0][1][:20]
    assert not any(sequence in step for step in setup.runner.steps[ended_at[0] :])
    assert sequence.slot is None
    assert setup.held() == 0


def cancel_at(count: int, call: Call, so_far: int) -> None:
    if so_far == count:
        call.cancel()


@every_graph
def test_a_thousand_requests_leave_the_cache_as_it_was(setup: Setup) -> None:
    """Random lengths, ends and cancels, also of what waits or reads; memory is back where it was."""
    ids = [token for text in setup.texts for token in text[0]]
    schedule = random.Random(0)  # noqa: S311 - a schedule
    sizes: list[int] = []
    for _round in range(5):
        outputs = []
        for _ in range(200):
            start = schedule.randrange(len(ids) - 1)
            prompt = ids[start : start + schedule.randint(1, 100)]
            call = Call()
            cancelled_at = schedule.choice((0, 0, 1, 3))
            output = Recorder(partial(cancel_at, cancelled_at, call))
            outputs.append(output)
            while setup.engine.waiting >= 100:
                outputs[-50].wait()
            setup.start(prompt, schedule.randint(1, 20), output, call)
            if schedule.random() < 0.1:
                call.cancel()
        for output in outputs:
            output.wait()
            assert output.error is None or isinstance(output.error, CanceledError)
        return_freed_memory()
        sizes.append(resident_bytes())
    assert setup.held() == 0
    setup.scheduler.forget_prefixes()
    setup.scheduler.check()
    assert setup.scheduler.cache_usage == 0
    return_freed_memory()
    sizes.append(resident_bytes())
    # A leak grows in every round; one round alone may grow by what the allocator keeps of other work.
    assert statistics.median(after - before for before, after in pairwise(sizes)) < 1 << 19


def test_identical_prompts_are_read_once(setup: Setup) -> None:
    prompt, expected = max(setup.texts, key=lambda text: len(text[0]))
    outputs = [Recorder() for _ in range(8)]
    sequences = [setup.start(prompt, 32, output) for output in outputs]
    for output in outputs:
        assert output.wait().tokens == expected[:32]
    later = Recorder()
    sequences.append(setup.start(prompt, 32, later))
    assert later.wait().tokens == expected[:32]
    assert [sequence.reused for sequence in sequences] == [0] + [len(prompt) - 1] * 8


def test_a_graph_that_fails_ends_its_step_and_no_more(setup: Setup) -> None:

    def fail(step: Step) -> None:
        if step.runs:
            setup.runner.before = lambda _: None
            raise RuntimeError("out of memory")

    setup.runner.before = fail
    prompt, expected = setup.texts[0]
    output = Recorder()
    setup.start(prompt, 5, output)
    assert isinstance(output.wait().error, InternalError)
    assert setup.generate(prompt, 5) == expected[:5]
    assert setup.held() == 0


def test_a_sampler_or_an_output_that_fails_ends_that_text_alone(setup: Setup) -> None:

    def fail(count: int) -> None:
        if count == 3:
            raise ValueError("half a character")

    prompt, expected = setup.texts[0]
    broken, whole = Recorder(fail), Recorder()
    setup.start(prompt, 20, broken)
    setup.start(prompt, 20, whole)
    assert whole.wait().tokens == expected[:20]
    assert "half a character" in str(broken.wait().error)
    assert setup.held() == 0


def test_an_end_that_can_not_be_handed_on_is_a_failure(setup: Setup) -> None:
    class Endless(Recorder):
        def end(self, reason: str) -> None:
            raise ValueError(f"no {reason}")

    output = Endless()
    setup.start(setup.texts[0][0], 2, output)
    assert "no length" in str(output.wait().error)
    assert setup.held() == 0


def test_whoever_hears_of_an_end_finds_its_place_free(setup: Setup) -> None:
    class Leaving(Recorder):
        def end(self, reason: str) -> None:
            found.append(setup.scheduler.running)
            super().end(reason)

    found: list[int] = []
    output = Leaving()
    setup.start(setup.texts[0][0], 2, output)
    output.wait()
    assert found == [0]

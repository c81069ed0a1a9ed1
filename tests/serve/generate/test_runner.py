"""Steps on real graphs: tokens are torch's, alone and together, in chunks, after copies, on reused slots."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np
import pytest

from serve.errors import InternalError
from serve.generate.step import Chunk, Copy, Step
from tests.serve.generate.decoders import NAMES, context, golden, greedy, runner_of
from tests.serve.generate.random_steps import RandomSteps, advance, sequence

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from serve.generate.runner import Runner

IN_PLACE = ("ours", "genai")


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def runner(name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    runner = runner_of(name, tmp_path_factory.mktemp("graph"))
    yield runner
    runner.close()


def test_alone_greedy_tokens_are_torchs(runner: Runner, name: str) -> None:
    texts = golden(name)
    for prompt, tokens in list(zip(texts.prompts, texts.tokens, strict=True))[:3]:
        assert greedy(runner.cache, 3, prompt, len(tokens)) == tokens


@pytest.mark.parametrize("seed", range(3))
def test_together_greedy_tokens_are_torchs(runner: Runner, name: str, seed: int) -> None:
    """16 prompts of different lengths, and some of them again, in chunks; rows join and leave all the time."""
    texts = golden(name)
    rng = random.Random(seed)  # noqa: S311 - a schedule
    order = rng.sample([*range(16), *range(8)], 24)
    sequences = [sequence(texts.prompts[n], len(texts.tokens[n])) for n in order]
    # Some go on with what another has written so far: their prefix is copied.
    for row, n in list(zip(sequences, order, strict=True))[::3]:
        taken = rng.randint(0, 50)
        row.ids += texts.tokens[n][:taken]
        row.prompt_length += taken
        row.max_tokens -= taken
    steps = RandomSteps(runner, seed)
    steps.generate(sequences)
    for row, n in zip(sequences, order, strict=True):
        assert row.ids == texts.prompts[n] + texts.tokens[n]
    for slot in range(runner.slots):
        runner.cache.release(slot)

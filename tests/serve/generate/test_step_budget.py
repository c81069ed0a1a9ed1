"""How many tokens of prompts a step may read, on machines whose costs the test makes up."""

from __future__ import annotations

import random

import pytest

from serve.generate.step_budget import StepBudget


class Machine:
    """Steps cost a pass of the weights for each run, and something for each row and each token."""

    def __init__(self, a_pass: float, a_row: float, a_token: float) -> None:
        self.costs = a_pass, a_row, a_token

    def seconds(self, rows: int, runs: int, tokens: int) -> float:
        a_pass, a_row, a_token = self.costs
        return (bool(rows) + runs) * a_pass + rows * a_row + tokens * a_token

    def slowdown(self, rows: int, tokens: int) -> float:
        return self.seconds(rows, 1, tokens) / self.seconds(rows, 0, 0)

    def observe(self, budget: StepBudget, steps: int, rows: int, *, reading: float, seed: int = 0) -> None:
        """Steps of up to `rows` rows, some with a chunk; a prompt has ten. 5 % noise, some are disturbed."""
        rng = random.Random(seed)  # noqa: S311 - not a secret
        for _ in range(steps):
            beside = rng.randint(max(1, rows - 3), rows)
            tokens = budget.room(beside) if rng.random() < reading else 0
            if tokens and rng.random() < 0.1:
                tokens = rng.randint(2, tokens)  # the prompt's end
            seconds = self.seconds(beside, bool(tokens), tokens) * rng.gauss(1, 0.05)
            budget.ran(beside, int(bool(tokens)), tokens, seconds * (10 if rng.random() < 0.03 else 1))


# Seconds of a pass, a row and a token: a small model, a large one, one of cheap chunks, and a fast one.
MACHINES = [(1.6e-3, 0.7e-3, 0.5e-3), (0.1, 0.05, 0.04), (4e-3, 0.7e-3, 0.2e-3), (1e-5, 1e-5, 1e-6)]


@pytest.mark.parametrize("costs", MACHINES)
@pytest.mark.parametrize("rows", [8, 16, 32])
@pytest.mark.parametrize("reading", [0.5, 0.9, 1.0])
def test_streams_stay_fluent(costs: tuple[float, float, float], rows: int, reading: float) -> None:
    machine, budget = Machine(*costs), StepBudget(0)
    machine.observe(budget, 200, rows, reading=reading)
    room = budget.room(rows)
    assert machine.slowdown(rows, room) < 2.5
    assert room == 256 or machine.slowdown(rows, room) > 1.3, "more could be read"


@pytest.mark.parametrize("rows", [1, 4, 8, 16, 64])
def test_start_values_are_sane(rows: int) -> None:
    assert 8 <= StepBudget(0).room(rows) <= 100


def test_what_was_seen_once_is_no_reason_to_stop_reading() -> None:
    budget = StepBudget(0)
    budget.ran(8, 1, 8, 60.0)
    assert budget.room(8) >= 8
    budget.ran(8, 0, 0, 1e-9)
    assert 8 <= budget.room(8) <= 256


def test_a_chunk_is_worth_its_pass_however_few_stream() -> None:
    machine, budget = Machine(*MACHINES[0]), StepBudget(0)
    machine.observe(budget, 100, 1, reading=0.5)
    assert budget.room(1) == 8


def test_disturbed_steps_change_little() -> None:
    machine = Machine(*MACHINES[0])
    calm, disturbed = StepBudget(0), StepBudget(0)
    for step in range(60):
        tokens = 20 * (step % 2)
        seconds = machine.seconds(16, step % 2, tokens)
        calm.ran(16, step % 2, tokens, seconds)
        disturbed.ran(16, step % 2, tokens, seconds * (50 if step % 10 == 5 else 1))
    assert disturbed.room(16) == pytest.approx(calm.room(16), rel=0.15)


def test_tokens_that_seem_to_cost_less_than_nothing_are_read() -> None:
    budget = StepBudget(0)
    for step in range(64):
        budget.ran(16, step % 2, 50 * (step % 2), 0.02 - 0.005 * (step % 2))
    assert budget.room(16) > 50


def test_it_follows_a_machine_that_changes() -> None:
    budget = StepBudget(0)
    for seed, costs in enumerate(MACHINES * 2):
        machine = Machine(*costs)
        machine.observe(budget, 100, 16, reading=0.7, seed=seed)
        assert machine.slowdown(16, budget.room(16)) < 2.5


def test_nobody_streams_so_chunks_are_large() -> None:
    budget = StepBudget(0)
    assert budget.room(0) == 128
    assert budget.room(0, 1, 28) == 100
    assert budget.room(0, 1, 128) == 0
    assert budget.room(0, 2, 122) == 0, "what is left isn't worth a pass"


def test_one_chunk_beside_streams_unless_it_was_tiny() -> None:
    budget = StepBudget(0)
    room = budget.room(32)
    assert budget.room(32, 1, room) == 0
    assert budget.room(32, 1, 2) > 0
    assert budget.room(8, 1, 1) == 0, "another pass is dearer than what is left"


@pytest.mark.parametrize(
    ("limit", "rows", "runs", "tokens", "room"),
    [
        (32, 0, 0, 0, 32),
        (32, 8, 0, 0, 24),
        (32, 8, 1, 10, 14),
        (32, 8, 1, 20, 0),
        (32, 8, 1, 24, 0),
        (4, 8, 0, 0, 1),
        (4, 8, 1, 1, 0),
        (1000, 0, 0, 0, 1000),
    ],
)
def test_a_fixed_limit_counts_rows_and_tokens(
    limit: int, rows: int, runs: int, tokens: int, room: int
) -> None:
    budget = StepBudget(limit)
    budget.ran(8, 1, 8, 1.0)
    assert budget.room(rows, runs, tokens) == room

"""How large batches are found to pay, on made-up machines and their noise."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.loading.batching_pays import BUDGET_SECONDS, FIXED_SECONDS, measure

if TYPE_CHECKING:
    from collections.abc import Callable

MICROSECOND = 1e-6


class Machine:
    """Runs that take what `cost` says of their rows, and now and then a lot more."""

    def __init__(self, cost: Callable[[int], float], noise: random.Random | None = None) -> None:
        self.cost = cost
        self.noise = noise
        self.passed = 0.0
        self.runs: list[int] = []

    def __call__(self, rows: int) -> tuple[float, float]:
        seconds = self.cost(rows)
        if self.noise is not None:
            seconds *= self.noise.uniform(1, 1.05)
            if self.noise.random() < 0.2:  # another process took the core
                seconds += self.noise.uniform(0, 4e-3)
        self.passed += seconds
        self.runs.append(rows)
        return seconds, seconds


def line(fixed: float, per_row: float) -> Callable[[int], float]:
    return lambda rows: (fixed + per_row * rows) * MICROSECOND


@pytest.mark.parametrize(
    ("cost", "largest", "useful"),
    [
        (line(3, 0.1), 64, 64),  # one small node
        (line(60, 20), 8, 8),  # a small LSTM
        (line(0, 1500), 32, 1),  # a MobileNet
        (line(0, 35_000), 8, 1),  # a BERT
        (line(2, 200), 32, 1),
        (line(50, 20), 1, 1),
        (line(3, 0.1), 6, 6),  # not a power of two
        (lambda rows: (100 if rows < 4 else 30 * rows) * MICROSECOND, 32, 4),  # the same from 4 on
    ],
)
def test_the_largest_batch_that_pays_is_found(
    cost: Callable[[int], float], largest: int, useful: int
) -> None:
    assert measure(Machine(cost), largest).useful == useful


@pytest.mark.parametrize("seed", range(100))
def test_noise_decides_nothing(seed: int) -> None:
    noise = random.Random(seed)  # noqa: S311 - no secret
    assert measure(Machine(line(2, 300), noise), 16).useful == 1
    assert measure(Machine(line(100, 2), noise), 16).useful >= 8


def test_a_graph_that_gains_nothing_is_tried_with_two_rows_only() -> None:
    """Each larger batch has onnxruntime keep memory for it."""
    machine = Machine(line(0, 1500))
    measure(machine, 64)
    assert max(machine.runs) == 2


def test_a_slow_graph_is_tried_with_one_pair_of_runs() -> None:
    machine = Machine(line(0, 90_000))
    assert measure(machine, 64).useful == 1
    assert machine.runs == [1, 2, 1]


def test_a_slow_graph_that_gains_plainly_is_batched() -> None:
    assert measure(Machine(line(80_000, 1000)), 2).useful == 2


def test_a_graph_slower_than_the_budget_is_run_once() -> None:
    machine = Machine(line(0, 1e6))
    found = measure(machine, 64)
    assert machine.runs == [1]
    assert (found.useful, list(found.figures)) == (1, [1])


def test_figures_are_seconds_a_row_with_the_fixed_cost() -> None:
    found = measure(Machine(line(0, 100)), 2)
    assert found.figures[1] == pytest.approx(100 * MICROSECOND + FIXED_SECONDS)
    assert found.figures[2] == pytest.approx(100 * MICROSECOND + FIXED_SECONDS / 2)


@given(
    fixed=st.floats(0.1, 2e5), per_row=st.floats(0.01, 2e5), largest=st.integers(1, 128), seed=st.integers(0)
)
def test_it_ends_in_time_with_a_size_that_was_tried(
    fixed: float, per_row: float, largest: int, seed: int
) -> None:
    machine = Machine(line(fixed, per_row), random.Random(seed))  # noqa: S311 - no secret
    found = measure(machine, largest)
    assert 1 <= found.useful <= largest
    assert found.useful in found.figures
    assert max(machine.runs) <= largest
    longest = max(machine.cost(rows) for rows in machine.runs) * 1.05 + 4e-3
    assert machine.passed <= BUDGET_SECONDS + 4 * longest

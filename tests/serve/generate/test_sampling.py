"""Sampling against Hugging Face's definitions, written with torch in double precision."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.errors import InternalError, InvalidArgumentError
from serve.generate.penalties import Penalties
from serve.generate.ranking import RunningTotals
from serve.generate.sampling import SamplingParameters, _Sampler, sampler

PROMPT = [1, 2, 3]


def random_logits(seed: int, vocabulary: int, grid: float = 0.0) -> np.ndarray:
    """FP32 [vocabulary]; on a grid many of them are equal."""
    logits = np.random.default_rng(seed).normal(0, 2, vocabulary)
    return (np.round(logits / grid) * grid if grid else logits).astype(np.float32)


def next_token(parameters: SamplingParameters, logits: np.ndarray, ids: list[int] | None = None) -> int:
    return sampler(parameters).next(logits.copy(), ids or PROMPT, len(PROMPT))


def reference_scores(logits: np.ndarray, p: SamplingParameters) -> torch.Tensor:
    """FP64 [vocabulary] after temperature and top-k."""
    scores = torch.tensor(logits, dtype=torch.float64) / p.temperature
    if p.top_k > 0:
        scores[scores < scores.topk(min(p.top_k, len(scores)))[0][-1]] = -math.inf
    return scores


def reference_probabilities(logits: np.ndarray, p: SamplingParameters) -> torch.Tensor:
    """FP64 [vocabulary] of every token."""
    scores = reference_scores(logits, p)
    if p.top_p < 1:
        ordered, tokens = scores.sort(descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        removed = probabilities.cumsum(-1) - probabilities >= p.top_p
        removed[0] = False
        scores[tokens[removed]] = -math.inf
    probabilities = scores.softmax(-1)
    scores[probabilities < p.min_p * probabilities.max()] = -math.inf
    return scores.softmax(-1)


def clear_top_p(logits: np.ndarray, p: SamplingParameters, seed: int) -> float:
    """A top-p in the middle between two tokens' running totals, where rounding decides nothing."""
    probabilities = reference_scores(logits, p).softmax(-1).sort(descending=True)[0]
    totals = probabilities[probabilities > 1e-5].cumsum(-1)
    place = int(np.random.default_rng(seed).integers(0, len(totals) - 1))
    return float((totals[place] + totals[place + 1]) / 2)


def kept_tokens(
    parameters: SamplingParameters, logits: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """The tokens that can be drawn, each rank's once."""
    chosen: list[int] = []
    count = 1
    for rank in itertools.count():
        if rank == count:
            return chosen

        def draw(_: Any, weights: np.ndarray, rank: int = rank) -> int:
            nonlocal count
            count = len(weights)
            return rank

        monkeypatch.setattr(_Sampler, "_draw", draw)
        chosen.append(next_token(parameters, logits))
    raise AssertionError


TRUNCATIONS = [
    (top_k, use_top_p, min_p)
    for top_k, use_top_p, min_p in itertools.product((0, 1, 5, 50), (False, True), (0.0, 0.0317))
    if top_k or use_top_p or min_p
]


@pytest.mark.parametrize("vocabulary", [60, 300, 3000])
@pytest.mark.parametrize("grid", [0.0, 0.25, 2.0])
@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
def test_the_tokens_left_are_those_of_the_definition(
    vocabulary: int, grid: float, truncation: tuple[int, bool, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    top_k, use_top_p, min_p = truncation
    for seed in range(3):
        logits = random_logits(seed, vocabulary, grid)
        parameters = SamplingParameters(temperature=0.7, top_k=top_k, min_p=min_p)
        if use_top_p and np.count_nonzero(reference_scores(logits, parameters).isfinite()) > 1:
            top_p = clear_top_p(logits, parameters, seed)
            parameters = SamplingParameters(temperature=0.7, top_k=top_k, top_p=top_p, min_p=min_p)
        expected = reference_probabilities(logits, parameters).nonzero()[:, 0].tolist()
        kept = kept_tokens(parameters, logits, monkeypatch)
        assert sorted(kept) == expected
        assert kept == sorted(kept, key=lambda token: (-logits[token], token)), "the likeliest first"


@pytest.mark.parametrize("top_p", [0.3, 0.999])
def test_a_nucleus_that_is_most_of_a_large_vocabulary(top_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(0, 5000) / 4
    parameters = SamplingParameters(top_p=top_p)
    counts: list[int] = []

    def draw(_: Any, weights: np.ndarray) -> int:
        counts.append(len(weights))
        return len(weights) - 1

    monkeypatch.setattr(_Sampler, "_draw", draw)
    last = next_token(parameters, logits)
    expected = reference_probabilities(logits, parameters)
    assert abs(counts[0] - int(expected.count_nonzero())) <= 1  # FP32 at the edge
    assert np.count_nonzero(logits > logits[last]) == counts[0] - 1


@pytest.mark.parametrize(
    "parameters",
    [
        SamplingParameters(seed=1),
        SamplingParameters(seed=2, temperature=0.5),
        SamplingParameters(seed=3, temperature=3),
        SamplingParameters(seed=4, top_k=4),
        SamplingParameters(seed=5, top_p=0.8),
        SamplingParameters(seed=6, min_p=0.1),
        SamplingParameters(seed=7, top_k=6, top_p=0.9, min_p=0.02, temperature=1.3),
    ],
)
def test_tokens_come_as_often_as_they_are_likely(parameters: SamplingParameters) -> None:
    logits = random_logits(11, 12, grid=0.5)
    chooser, draws = sampler(parameters), 10_000
    counts = np.bincount([chooser.next(logits.copy(), PROMPT, 3) for _ in range(draws)], minlength=12)
    expected = reference_probabilities(logits, parameters).numpy() * draws
    assert counts[expected == 0].sum() == 0
    expected, counts = expected[expected > 0], counts[expected > 0]
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_a_large_vocabulary_is_drawn_from_as_it_is_likely() -> None:
    logits = random_logits(3, 50_257)
    chooser, draws = sampler(SamplingParameters(seed=8)), 4000
    tokens = np.array([chooser.next(logits.copy(), PROMPT, 3) for _ in range(draws)])
    parts = reference_probabilities(logits, SamplingParameters()).chunk(20)
    expected = np.array([part.sum() for part in parts])
    counts = np.bincount(tokens // math.ceil(50_257 / 20), minlength=20)
    assert ((counts - expected * draws) ** 2 / (expected * draws)).sum() < 19 + 4 * math.sqrt(38)


@pytest.mark.parametrize("temperature", [0, 1e-9])
def test_greedy_takes_what_torch_takes(temperature: float) -> None:
    for seed in range(20):
        logits = random_logits(seed, 1000, grid=2.0)  # with ties at the top
        assert next_token(SamplingParameters(temperature), logits) == int(torch.tensor(logits).argmax())


@pytest.mark.parametrize("parameters", [{"top_p": 1e-9}, {"min_p": 1.0, "top_k": 1, "top_p": 1e-9}])
def test_the_smallest_nucleus_is_the_greedy_token(parameters: dict[str, float]) -> None:
    for seed in range(20):
        logits = random_logits(seed, 1000, grid=2.0)
        assert next_token(SamplingParameters(**parameters), logits) == logits.argmax()  # type: ignore[arg-type]


@given(
    weights=st.lists(st.sampled_from([0.0, 1e-30, 0.25, 0.5, 1.0]), min_size=1, max_size=700).filter(any),
    part=st.floats(0, 1),
    side=st.sampled_from(["left", "right"]),
)
@settings(max_examples=200, deadline=None)
def test_running_totals_in_blocks_find_what_plain_ones_do(
    weights: list[float], part: float, side: Any
) -> None:
    array = np.array(weights, np.float32)
    plain = array.cumsum(dtype=np.float64)
    totals = RunningTotals(array)
    assert totals.total == pytest.approx(plain[-1])
    mark = round(part * totals.total * 4) / 4  # often a total itself
    place = totals.place(mark, side)
    assert place == min(plain.searchsorted(mark, side), plain.searchsorted(plain[-1]))
    if side == "right":
        assert array[place] > 0


def penalized(
    logits: np.ndarray, ids: list[int], prompt_length: int, penalties: tuple[float, float, float]
) -> torch.Tensor:
    repetition, presence, frequency = penalties
    scores = torch.tensor(logits, dtype=torch.float64)
    seen = torch.tensor(sorted(set(ids)))
    scores[seen] = torch.where(scores[seen] < 0, scores[seen] * repetition, scores[seen] / repetition)
    times = torch.bincount(torch.tensor(ids[prompt_length:], dtype=torch.int64), minlength=len(scores))
    return scores - frequency * times - presence * (times > 0)


@pytest.mark.parametrize("values", [(1.3, 0, 0), (0.5, 0, 0), (1, 0.7, 0), (1, 0, -0.4), (1.1, 0.3, 0.6)])
def test_penalties_are_those_of_the_definition_at_every_token(values: tuple[float, float, float]) -> None:
    random = np.random.default_rng(5)
    prompt = random.integers(0, 40, 20).tolist()
    ids, penalties = list(prompt), Penalties(*values)
    for step in range(40):
        logits = random_logits(step, 40)
        expected = penalized(logits, ids, len(prompt), values)
        penalties.apply(logits, ids, len(prompt))
        np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-6, atol=1e-6)
        # Several at a time now and then, as when a sequence starts with some generated already.
        ids += random.integers(0, 40, 1 + 3 * (step % 5 == 0)).tolist()


def test_the_same_seed_gives_the_same_tokens_whatever_runs_beside_it() -> None:
    logits = random_logits(0, 500)

    def tokens(seed: int | None, others: int) -> list[int]:
        chooser = sampler(SamplingParameters(seed=seed, top_p=0.95))
        beside = [sampler(SamplingParameters(seed=other)) for other in range(others)]
        chosen = []
        for _ in range(50):
            for other in beside:
                other.next(logits.copy(), PROMPT, 3)
            chosen.append(chooser.next(logits.copy(), PROMPT, 3))
        return chosen

    assert tokens(7, 0) == tokens(7, 3)
    assert tokens(2**64 - 1, 0) != tokens(7, 0)
    assert tokens(None, 0) != tokens(None, 0)
    assert tokens(-1, 0) != tokens(-1, 0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_end_before_the_least_number_of_tokens(temperature: float) -> None:
    logits = np.zeros(5, np.float32)
    logits[4] = 50
    # An end that the vocabulary doesn't have is none of its tokens.
    chooser = sampler(SamplingParameters(temperature, min_tokens=2), {4, 99})
    ids = list(PROMPT)
    for _ in range(3):
        ids.append(chooser.next(logits.copy(), ids, len(PROMPT)))
    assert 4 not in ids[-3:-1]
    assert ids[-1] == 4


@pytest.mark.parametrize("parameters", [{"temperature": 0}, {}, {"top_k": 2}, {"repetition_penalty": 2.0}])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_an_error(parameters: dict[str, Any], value: float) -> None:
    logits = random_logits(0, 100)
    logits[50] = value
    with pytest.raises(InternalError, match=f"expected numbers, got {value} as the largest, of token 50"):
        next_token(SamplingParameters(**parameters), logits)


def test_without_any_token_left_there_is_an_error() -> None:
    with pytest.raises(InternalError, match="got -inf as the largest"):
        next_token(SamplingParameters(), np.full(10, -np.inf, np.float32))


@pytest.mark.parametrize(
    "parameters",
    [
        {"temperature": 0},
        {"temperature": 2e-5},
        {"temperature": 1e30},
        {"top_k": 40},
        {"top_k": 10**6},
        {"top_p": 0.99},
        {"min_p": 0.5},
        {"repetition_penalty": 1e-37},
        {"repetition_penalty": 3e38},
    ],
)
@pytest.mark.parametrize("mask", [-np.inf, np.finfo(np.float32).min])
def test_masked_tokens_are_never_taken(parameters: dict[str, Any], mask: float) -> None:
    logits = random_logits(1, 100)
    logits[1:90] = mask
    chooser = sampler(SamplingParameters(**parameters))
    tokens = {chooser.next(logits.copy(), [0, 95], 1) for _ in range(100)}
    assert tokens <= {0, *range(90, 100)}


@pytest.mark.parametrize("extreme", [0.0, math.nextafter(1, 0)])
@pytest.mark.parametrize("parameters", [{}, {"top_k": 10}, {"top_p": 0.999999}])
def test_no_random_number_leads_to_a_masked_token(parameters: dict[str, Any], extreme: float) -> None:
    logits = np.full(10, -np.inf, np.float32)
    logits[3:5] = 1.0
    chooser = _Sampler(SamplingParameters(**parameters), ())

    class Extreme:
        @staticmethod
        def random() -> float:
            return extreme

    chooser._random = Extreme()  # type: ignore[assignment]
    assert chooser.next(logits, PROMPT, 3) == (4 if extreme else 3)


def test_a_penalty_beyond_all_numbers_leaves_the_token_the_likeliest() -> None:
    logits = random_logits(0, 100)
    logits[7] = 100
    assert next_token(SamplingParameters(repetition_penalty=1e-37), logits, [1, 2, 7]) == 7


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, math.inf, math.nan, "hot", None, True]),
        ("top_k", [-2, 1.5, "5", math.nan]),
        ("top_p", [0, -1, 1.01, math.nan]),
        ("min_p", [-0.1, 1.1]),
        ("repetition_penalty", [0, -1, math.inf]),
        ("presence_penalty", [-2.1, 2.1]),
        ("frequency_penalty", [-2.1, math.nan]),
        ("seed", [-2, 2**64, 0.5]),
        ("min_tokens", [-1, 0.5]),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InvalidArgumentError, match=f"^{name}: expected a .*, got {value!r}"):
            SamplingParameters(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "least", "most"),
    [
        ("temperature", 1e39, 0.0, 3.4e38),
        ("top_p", 1e-38, 1.2e-38, 1.0),
        ("repetition_penalty", 1e-38, 1.2e-38, 3.4e38),
        ("repetition_penalty", 1e39, 1.2e-38, 3.4e38),
    ],
)
def test_the_bounds_that_a_refusal_names_are_accepted(
    name: str, value: float, least: float, most: float
) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        SamplingParameters(**{name: value})  # type: ignore[arg-type]
    said = str(refused.value).partition(", got")[0]
    assert [float(found) for found in re.findall(r"\d[\d.]*(?:e[-+]?\d+)?", said)][:2] == [least, most]
    for bound in (least, most):
        SamplingParameters(**{name: bound})  # type: ignore[arg-type]


def test_numpy_numbers_are_numbers() -> None:
    parameters = SamplingParameters(np.float32(0.5), np.int32(3), seed=np.uint64(2**64 - 1))  # type: ignore[arg-type]
    assert 0 <= next_token(parameters, random_logits(0, 10)) < 10

"""Which tokens of a prompt another sequence has read, or is about to."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serve.generate.cache_slots import Prefix
from serve.generate.prefix_reuse import Match, common_length, find_match
from tests.serve.generate.scheduled_cache import sequence

TEXT = list(range(100))


@given(st.lists(st.integers(0, 3)), st.integers(0, 300), st.integers(0, 300), st.integers(0, 300), st.data())
def test_the_common_length_is_that_of_a_comparison_token_by_token(
    tail: list[int], one: int, other: int, limit: int, data: st.DataObject
) -> None:
    first, second = [*TEXT * 3, *tail][:one], [*TEXT * 3, *data.draw(st.permutations(tail))][:other]
    expected = 0
    while expected < min(len(first), len(second), limit) and first[expected] == second[expected]:
        expected += 1
    assert common_length(first, second, limit) == expected


def test_the_longest_prefix_that_a_slot_holds() -> None:
    running = sequence(TEXT[:60])
    running.slot, running.cached = 4, 40
    retained = {2: Prefix(TEXT[:30], 1), 3: Prefix(TEXT[:20], 2)}
    assert find_match(sequence([*TEXT[:25], 0]), [], retained) == Match(2, 25)
    assert find_match(sequence(TEXT), [], retained) == Match(2, 30)
    late = sequence(TEXT)
    assert find_match(late, [late, running], retained) == Match(4, 40)


def test_the_last_token_of_a_prompt_is_always_read() -> None:
    assert find_match(sequence(TEXT[:30]), [], {2: Prefix(TEXT, 1)}) == Match(2, 29)


def test_a_few_tokens_are_not_worth_it() -> None:
    retained = {2: Prefix(TEXT[:8], 1)}
    assert find_match(sequence([*TEXT[:7], 0, 0]), [], retained) == Match()
    assert find_match(sequence(TEXT[:8]), [], retained) == Match()
    assert find_match(sequence([*TEXT[:8], 0]), [], retained) == Match(2, 8)


def test_one_that_came_earlier_is_waited_for_if_it_will_have_more() -> None:
    early, late, other = sequence(TEXT), sequence(TEXT), sequence(TEXT)
    running = [early, late, other]
    early.slot, early.cached = 0, 20
    assert find_match(late, running, {}) == Match(0, 20, early, 99)
    assert find_match(early, running, {}) == Match()
    assert find_match(late, running, {5: Prefix(TEXT[:95], 1)}) == Match(5, 95)
    early.cached = 100
    assert find_match(late, running, {}) == Match(0, 99)

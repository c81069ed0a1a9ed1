"""Stop strings against a search of the whole text, however it is cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serve.errors import InvalidArgumentError
from serve.generate.stop_strings import MAX_STOP_BYTES, MAX_STOPS, StopStrings

# Few characters, so that stops overlap with themselves and one another.
SHORT = st.text("ab한", max_size=40)
STOPS = st.lists(st.text("ab한", min_size=1, max_size=6), max_size=5)


def first_stop(text: str, stops: list[str]) -> tuple[int, int] | None:
    """Where the stop that is complete first begins and ends, of those the longest."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return end - max(map(len, found)), end
    return None


def beginning(text: str, stops: list[str]) -> int:
    """How many characters at the end of a text may begin a stop."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


@given(text=SHORT, stops=STOPS, cuts=st.lists(st.integers(0, 40)), include=st.booleans())
@example(text="aab", stops=["aab"], cuts=[1, 2], include=False)
@example(text="abab한", stops=["ababa", "b한"], cuts=[4], include=False)
@settings(max_examples=1000, deadline=None)
def test_stops_are_found_as_in_the_whole_text(
    text: str, stops: list[str], cuts: list[int], *, include: bool
) -> None:
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    found = first_stop(text, stops)
    search = StopStrings(stops, include_stop_str_in_output=include)
    shown = ""
    for start, end in pairwise(places):
        new, stopped = search.push(text[start:end])
        shown += new
        assert stopped == (found is not None and found[1] <= end and end > start)
        if stopped:
            assert found is not None
            assert shown == text[: found[1] if include else found[0]]
            return
        held = 0 if include else beginning(text[:end], stops)
        assert shown == text[: end - held], "no less is shown than can be, and no more"
    assert shown + search.flush() == text
    assert search.flush() == ""


def test_a_long_stop_that_nearly_comes_again_and_again() -> None:
    search = StopStrings(["a" * 1000 + "b"])
    shown = "".join(search.push("a")[0] for _ in range(5000))
    assert len(shown) == 4000
    assert search.push("b") == ("", True)


def test_of_stops_that_end_together_the_longest_counts() -> None:
    assert StopStrings(["\n", "User:\n"]).push("Hello.\nUser:") == ("Hello.", True)
    search = StopStrings([":\n", "User:\n"])
    assert search.push("Hello. User:") == ("Hello. ", False)
    assert search.push("\nHow") == ("", True)


def test_as_many_stops_and_as_long_ones_as_are_allowed() -> None:
    stops = [f"{n:02}" + "한" * 340 for n in range(MAX_STOPS)]
    search = StopStrings(stops)
    assert search.push("x" + stops[-1][:-1]) == ("x", False)
    assert search.push("한") == ("", True)


@pytest.mark.parametrize(
    ("stops", "reason"),
    [
        (["x"] * (MAX_STOPS + 1), "expected 64 strings at most, got 65"),
        (["fine", ""], "expected strings of 1 to 1024 bytes, got one of 0"),
        (["한" * 400], "expected strings of 1 to 1024 bytes, got one of 1200"),
    ],
)
def test_what_is_out_of_bounds_is_refused(stops: list[str], reason: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^stop: {reason}"):
        StopStrings(stops)


def test_a_stop_that_no_text_has_is_no_error() -> None:
    assert StopStrings(["\ud800"]).push("text") == ("text", False)
    assert MAX_STOP_BYTES >= 1000

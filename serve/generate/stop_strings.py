"""Ends a text where a client's stop string comes, however the tokens cut it."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from serve.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_STOPS = 64
MAX_STOP_BYTES = 1024


class StopStrings:
    """Passes a text on but for what may be the beginning of a stop string, until one has come.

    The stop that is complete first counts, of those that end together the longest; that doesn't depend on
    how the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str], *, include_stop_str_in_output: bool = False) -> None:
        """Prepare to look for some strings.

        Args:
            stops: none, or up to `MAX_STOPS`.
            include_stop_str_in_output: the stop that came is part of the text; nothing is kept back then.

        Raises:
            InvalidArgumentError: there are too many, or one is empty or too long.
        """
        if len(stops) > MAX_STOPS:
            raise InvalidArgumentError(f"stop: expected {MAX_STOPS} strings at most, got {len(stops)}")
        for stop in stops:
            size = len(stop.encode(errors="surrogatepass"))
            if not 0 < size <= MAX_STOP_BYTES:
                raise InvalidArgumentError(
                    f"stop: expected strings of 1 to {MAX_STOP_BYTES} bytes, got one of {size}"
                )
        # The longest first: of those that end together it is found first.
        self._searches = [_Search(stop) for stop in sorted(set(stops), key=len, reverse=True)]
        self._include = include_stop_str_in_output
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """What may be shown now that `text` has come, and whether it is the last, as a stop has come.

        Not to be called again after the last.
        """
        if not self._searches:
            return text, False
        whole = self._held + text
        for end, character in enumerate(text, len(self._held) + 1):
            for search in self._searches:
                if search.read(character):
                    self._held = ""
                    return whole[: end if self._include else end - search.matched], True
        held = 0 if self._include else max(search.matched for search in self._searches)
        shown = len(whole) - held
        self._held = whole[shown:]
        return whole[:shown], False

    def flush(self) -> str:
        """What was kept back, at the end of a text in which no stop has come."""
        held, self._held = self._held, ""
        return held


class _Search:
    """Looks for one string in a text that comes character by character (Knuth, Morris and Pratt 1977).

    Attributes:
        matched: how many of the string's first characters are the last ones of the text.
    """

    def __init__(self, string: str) -> None:
        self.matched = 0
        self._string = string
        # For each count of matched characters but the full one: how many fewer may match, at most.
        self._shorter = array("H", [0])
        for character in string[1:]:
            self._shorter.append(self.matched)
            self._advance(character)
        self.matched = 0

    def read(self, character: str) -> bool:
        """Whether the string is complete with the text's next character."""
        self._advance(character)
        return self.matched == len(self._string)

    def _advance(self, character: str) -> None:
        matched = self.matched
        while matched and self._string[matched] != character:
            matched = self._shorter[matched]
        self.matched = matched + (self._string[matched] == character)

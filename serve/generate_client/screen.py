"""What the user of `onnxedge generate` sees: the text as it comes, and how fast it came."""

from __future__ import annotations

import io
import os
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve.generate_client.messages import Answer

# What moves a terminal's cursor or sets the terminal up: control characters but for tabs and line ends.
_CONTROLS = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - set(map(ord, "\t\n\r")), "\ufffd")


class Screen:
    """The standard output, to which text comes in pieces."""

    def __init__(self) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # where it isn't UTF-8
        self._terminal = sys.stdout.isatty()
        self._last = "\n"

    def write(self, text: str) -> None:
        """Show a piece now."""
        if text:
            self._last = text[-1]
            sys.stdout.write(text.translate(_CONTROLS) if self._terminal else text)
            sys.stdout.flush()

    def end_line(self) -> None:
        """Begin a new line, unless one has just begun."""
        if self._last != "\n":
            self.write("\n")

    def leave(self) -> None:
        """Begin a new line if that can be done; what is left in the buffer won't fail again at the exit."""
        try:
            self.end_line()
            sys.stdout.flush()
        except OSError:  # its reader has gone, or its disk is full
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Statistics:
    """How many tokens came, and when; begins when it is made."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._seconds: list[float] = []
        self._tokens: list[int] = []
        self._counted = True
        self._prompt = ""
        self._reason = ""

    def add(self, answer: Answer) -> None:
        """Count a response that has just come."""
        self._seconds.append(time.monotonic() - self._start)
        count = answer.output_tokens
        if count is None:  # this server's models say it, some others' don't
            count = len(answer.ids) or 1
            self._counted = self._counted and bool(answer.ids)
        self._tokens.append(count)
        if answer.input_tokens is not None:
            self._prompt = f" after {answer.input_tokens}"
        self._reason = answer.finish_reason

    def __str__(self) -> str:
        if not self._seconds:
            return "no answer"
        unit = "tokens" if self._counted else "answers"
        total, first, last = sum(self._tokens), self._seconds[0], self._seconds[-1]
        text = f"{total} {unit}{self._prompt} in {last:.3f} s"
        later = total - self._tokens[0]
        if later and last > first:
            text += f": the first after {first:.3f} s, then {later / (last - first):.1f} {unit}/s"
        return text + (f"; ended by {self._reason}" if self._reason not in ("", "None") else "")

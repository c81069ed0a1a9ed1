"""Numbers as a reader wants them: with the digits that say something, and with their unit."""

from __future__ import annotations

import math

# A thin space that no line breaks at: groups of thousands, and before units.
_THIN, _SPACE = "\u202f", "\u00a0"
_DIGITS = 3
_MOST_DECIMALS = 6


def significant(value: float) -> str:
    """Three digits, and all before the point: 0.0521, 8.33, 251.8 is 252, 16 975."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "none"
    if value == int(value):
        return grouped(value)
    # Rounded first: 99.95 is 100, not 100.0.
    rounded = abs(float(f"{value:.{_DIGITS - 1}e}"))
    return grouped(value, max(0, _DIGITS - 1 - math.floor(math.log10(rounded))))


def grouped(value: float, decimals: int = 0) -> str:
    """With so many decimals, thousands apart."""
    return f"{value:,.{decimals}f}".replace(",", _THIN).replace("-", "\N{MINUS SIGN}")


def exact(value: float) -> str:
    """All that it has, down to a millionth."""
    if not math.isfinite(value) or value == int(value):
        return significant(value)
    return grouped(value, _MOST_DECIMALS).rstrip("0")


def milliseconds(value: float) -> str:
    """A time with its unit."""
    return f"{significant(value)}{_SPACE}ms"


def percent(share: float, decimals: int = 1) -> str:
    """A share of 1 in percent; never 0 or 100 of what is only nearly so."""
    text = f"{100 * share:.{decimals if share else 0}f}"
    if share > 0 and float(text) == 0:
        text = f"<{0.1**decimals:.{decimals}f}"
    elif share < 1 and float(text) == 100:  # noqa: PLR2004 - percent
        text = f">{100 - 0.1**decimals:.{decimals}f}"
    return f"{text}{_SPACE}%"


def counted(count: int, noun: str) -> str:
    """`1 request`, `3 022 requests`."""
    return f"{grouped(count)}{_SPACE}{noun}{'' if count == 1 else 's'}"

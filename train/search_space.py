"""Which values a search tries: choices and ranges of a recipe's fields, and the trials that they make."""

from __future__ import annotations

import difflib
import itertools
import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from train.recipe import Recipe

LOG_FACTOR = 10  # between the ends of a range: from here on it is drawn from log-uniformly
DRAWN_DIGITS = 4  # significant ones of a drawn number, so that it can be read and typed
TRUTH = {"true": True, "false": False}


@dataclass(frozen=True)
class Interval:
    """A range of real numbers to draw from, both ends included, `low` below `high`."""

    low: float
    high: float

    def draw(self, generator: random.Random) -> float:
        """A number of few digits: uniform, or log-uniform where the ends are far apart and above 0."""
        if self.low > 0 and self.high / self.low >= LOG_FACTOR:
            drawn = math.exp(generator.uniform(math.log(self.low), math.log(self.high)))
        else:
            drawn = generator.uniform(self.low, self.high)
        return min(self.high, max(self.low, float(f"{drawn:.{DRAWN_DIGITS}g}")))


Axis = tuple[Any, ...] | range | Interval
"""The values to try for one field: choices, whole numbers to draw from, real numbers to draw from."""


def parse_axes(texts: Iterable[str], recipe: type[Recipe]) -> dict[str, Axis]:
    """The values of each `--try`, by field, of the field's type.

    Raises:
        ValueError: a field is unknown or given twice, or a value is not of its type.
    """
    kinds = {name: get_args(hint)[0] for name, hint in get_type_hints(recipe, include_extras=True).items()}
    axes: dict[str, Axis] = {}
    for text in texts:
        field, _, values = text.partition("=")
        name = field.strip().removeprefix("--").replace("-", "_")
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, n=1)
            hint = f"did you mean {near[0]}?" if near else "--help lists the recipe's fields"
            raise ValueError(f"--try {text}: the recipe has no field {name!r}; {hint}")
        if name in axes:
            raise ValueError(f"--try {text}: {name} is given twice; give all its values at once")
        axes[name] = parse_axis(text, kinds[name], values)
    return axes


def parse_axis(text: str, kind: Any, values: str) -> Axis:
    """The values of one `--try`, whose whole text is for the messages.

    Raises:
        ValueError: a value is not of this type, or a range runs backwards or is not of numbers.
    """
    if ".." not in values:
        return tuple(dict.fromkeys(parse_value(text, kind, word.strip()) for word in values.split(",")))
    if kind not in (int, float):
        raise ValueError(f"--try {text}: a range needs a field of numbers; give choices, A,B,C")
    low, high = (parse_value(text, kind, end.strip()) for end in values.split("..", 1))
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"--try {text}: expected a range A..B with A below B")
    return range(low, high + 1) if kind is int else Interval(low, high)


def parse_value(text: str, kind: Any, word: str) -> Any:
    """One value of a recipe's field.

    Raises:
        ValueError: it is not of the field's type.
    """
    if kind is bool or get_origin(kind) is Literal:
        known = TRUTH if kind is bool else {str(choice): choice for choice in get_args(kind)}
        if word not in known:
            raise ValueError(f"--try {text}: expected {' or '.join(known)}, got {word!r}")
        return known[word]
    try:
        return kind(word)
    except ValueError:
        raise ValueError(f"--try {text}: expected {kind.__name__} values, got {word!r}") from None


def plan_trials(axes: Mapping[str, Axis], count: int | None, seed: int) -> list[dict[str, Any]]:
    """The fields' values, trial by trial.

    Args:
        axes: field to its values.
        count: that many different random draws, at most as many as there are; None is every combination, the
            last field's values changing fastest.
        seed: of the draws; a larger count begins with the draws of a smaller one.

    Raises:
        ValueError: `count` is below 1, or None though there is a range.
    """
    ranges = [name for name, axis in axes.items() if not isinstance(axis, tuple)]
    if count is None:
        if ranges:
            raise ValueError(f"--trials: needed to draw from the range of {', '.join(ranges)}")
        return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]  # type: ignore[arg-type]  # tuples all
    if count < 1:
        raise ValueError(f"--trials: expected at least 1, got {count}")
    generator = random.Random(seed)  # noqa: S311 - settings, not secrets
    countable = [len(axis) for axis in axes.values() if not isinstance(axis, Interval)]
    endless = len(countable) < len(axes)
    if not endless:
        count = min(count, math.prod(countable))
    trials: list[dict[str, Any]] = []
    while len(trials) < count:
        drawn = {
            name: axis.draw(generator) if isinstance(axis, Interval) else generator.choice(axis)
            for name, axis in axes.items()
        }
        if endless or drawn not in trials:
            trials.append(drawn)
    return trials

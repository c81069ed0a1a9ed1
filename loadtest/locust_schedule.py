"""What a process of locust sends when: its share of an open loop's requests, drawn before they are due."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from loadtest.schedule import SECOND, arrivals, steady
from loadtest.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from loadtest.schedule import Process

_NUMBER = r"\d+(?:\.\d*)?"
_STAGE = re.compile(rf"\s*(?P<value>{_NUMBER}):(?P<time>{_NUMBER})(?P<unit>[smh]?)\s*")
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}
# Drawn at a time: a process that joins or leaves changes the others' shares from the next block on.
_BLOCK_SECONDS = 1.0


@dataclass(frozen=True)
class Stage:
    """So many users, or requests per second, for so long.

    Raises:
        SettingsError: it is none of these.
    """

    value: float
    seconds: float

    def __post_init__(self) -> None:
        if not (0 < self.value < math.inf and self.seconds > 0):
            raise SettingsError(f"a load of {self.value:g} for {self.seconds:g} s: expected more than 0")


class Share(NamedTuple):
    """Which of how many processes this one is."""

    number: int = 0
    processes: int = 1


class Arrival(NamedTuple):
    """A request: when it is due, in nanoseconds from the start of the run, and the index of its model."""

    due: int
    model: int


def parse_stages(text: str, flag: str) -> tuple[Stage, ...]:
    """Stages as they are written, 10:30s,50:1m: VALUE:TIME; no stages of no text.

    Raises:
        SettingsError: one can't be read.
    """
    if not text.strip():
        return ()
    found = [_STAGE.fullmatch(part) for part in text.split(",")]
    stages = [
        Stage(float(part["value"]), float(part["time"]) * _UNITS[part["unit"]]) for part in found if part
    ]
    if len(stages) < len(found):
        raise SettingsError(f"{flag} is '{text}', expected VALUE:TIME,... such as 10:30s,50:1m")
    return tuple(stages)


def schedule(
    stages: Sequence[Stage],
    share: Callable[[], Share],
    weights: Sequence[float],
    process: Process,
    seed: int,
) -> Iterator[Arrival]:
    """A process's share of the requests, in order and without an end if the last stage has none.

    The processes together send what the stages say. Each draws its own Poisson arrivals: the sum of such is
    one, whenever each of them began. Those of constant arrivals lie evenly between each other.

    Args:
        stages: rates of all processes together, one after the other.
        share: of this process; asked once a block.
        weights: of the models.
        process: of the arrivals.
        seed: of all draws.
    """
    chances = np.array(weights) / np.sum(weights)
    start, block = 0.0, 0
    for stage in stages:
        end = start + stage.seconds
        while start < end:
            number, processes = share()
            rate = stage.value / processes
            # A whole number of requests, so that evenly spaced ones stay so from block to block.
            seconds = min(max(1, round(rate * _BLOCK_SECONDS)) / rate, end - start)
            draw = np.random.SeedSequence((seed, number, block))
            offsets = arrivals(steady(rate, seconds), process, int(draw.generate_state(1)[0]))
            if process == "constant":
                offsets += round(((number % processes + 0.5) / processes - 0.5) / rate * SECOND)
            models = np.random.default_rng(draw.spawn(1)[0]).choice(len(chances), len(offsets), p=chances)
            dues = (offsets + round(start * SECOND)).tolist()
            yield from map(Arrival, dues, models.tolist())
            start += seconds
            block += 1


def common_start(earliest: int, rate: float, share: Share) -> int:
    """When a process begins constant arrivals, so that its requests lie evenly between the others'.

    Args:
        earliest: nanoseconds of the wall clock, which all processes have in common.
        rate: of all processes together.
        share: of this process.
    """
    interval = round(share.processes / rate * SECOND)
    return -(-earliest // interval) * interval

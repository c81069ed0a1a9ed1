"""The command line of a run, and the settings that it comes to."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, get_args

from loadtest.conditions import ConditionError, parse_condition
from loadtest.payload import ModelSpec
from loadtest.scenario import OFFLINE_USERS
from loadtest.schedule import SECOND, read_trace
from loadtest.settings import Arrivals, LoadSettings, Scenario, SettingsError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from loadtest.conditions import Condition

T = TypeVar("T")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """What is asked."""
    group = parser.add_argument_group("requests")
    group.add_argument(
        "--model", "-m", action="append", required=True, metavar="NAME[:VERSION][=WEIGHT]",
        help="model to call; several times for a mix, by weight",
    )  # fmt: skip
    group.add_argument("--batch-size", "-b", type=int, default=1, help="rows in a request (default: 1)")
    group.add_argument(
        "--shape", action="append", default=[], metavar="INPUT:DIM,DIM",
        help="an input's dimensions where the model leaves them open, without the batch",
    )  # fmt: skip
    group.add_argument(
        "--data", type=Path, metavar="FILE.npz",
        help="real rows, by input name; an entry's golden.npz is such a file (default: random numbers)",
    )  # fmt: skip
    group.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="for a model that generates text; in turn",
    )
    group.add_argument(
        "--max-tokens", type=int, default=32, help="that it is asked for (default: %(default)s)"
    )
    group.add_argument(
        "--request-parameter",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="sent with each request",
    )


def add_load_flags(parser: argparse.ArgumentParser) -> None:
    """How it is asked."""
    group = parser.add_argument_group("load", "Without --rate, --users or --scenario: one request at a time.")
    group.add_argument(
        "--rate", metavar="R",
        help="requests per second, an open loop: 200, or 100:500 (evenly up), or 100,200,400 (in steps)",
    )  # fmt: skip
    group.add_argument(
        "--arrivals", choices=get_args(Arrivals), default="poisson", help="in time (default: %(default)s)"
    )
    group.add_argument(
        "--burst-on", type=float, default=1.0, help="seconds of a burst (default: %(default)s)"
    )
    group.add_argument("--burst-off", type=float, default=1.0, help="between bursts (default: %(default)s)")
    group.add_argument(
        "--trace", type=Path, metavar="FILE",
        help="recorded arrivals: a time in seconds a line, or CSV with the columns timestamp, model",
    )  # fmt: skip
    group.add_argument("--users", type=int, help="a closed loop: so many requests at a time")
    group.add_argument(
        "--scenario", choices=get_args(Scenario),
        help="of MLPerf: single-stream, multi-stream, server, offline; of operation: soak, overload, reload",
    )  # fmt: skip
    group.add_argument(
        "--duration", "-d", type=float, default=None, help="seconds (default: 10; soak: 600; a trace: all)"
    )
    group.add_argument("--queries", type=int, default=0, help="end a closed loop after so many")
    group.add_argument("--samples-per-query", type=int, default=8, help="of multi-stream (default: 8)")
    group.add_argument(
        "--times", type=float, default=10.0, help="overload: so often its capacity (default: 10)"
    )
    group.add_argument("--reload-every", type=float, default=2.0, help="reload: seconds (default: 2)")
    group.add_argument("--warmup", type=float, default=1.0, help="seconds that don't count (default: 1)")
    group.add_argument("--timeout", type=float, default=None, help="seconds (default: 10; overload: 1)")
    group.add_argument("--seed", type=int, default=0, help="of arrivals, mix and tensors (default: 0)")
    group.add_argument("--processes", type=int, default=1, help="of the load generator (default: 1)")
    group.add_argument(
        "--realtime", action="store_true", help="schedule it before all other programs (needs CAP_SYS_NICE)"
    )
    group.add_argument("--connections", type=int, default=1, help="of each of them (default: 1)")


def add_report_flags(parser: argparse.ArgumentParser) -> None:
    """Where it is written, and what fails it."""
    group = parser.add_argument_group("report")
    group.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots, in one file")
    group.add_argument(
        "--json", type=Path, metavar="FILE", help="write everything, for `compare` and `report`"
    )
    group.add_argument("--csv", type=Path, metavar="FILE", help="append a line for each model")
    group.add_argument(
        "--metrics-url", metavar="URL",
        help="of the server's metrics (default: port 8002 of a server on port 8001; '' for none)",
    )  # fmt: skip
    group.add_argument(
        "--fail-on", action="append", default=[], metavar="CONDITION",
        help="exit with 1 if p99>20ms, errors>0, gpt:ttft_p99>200ms, ...; may be given more than once",
    )  # fmt: skip
    group.add_argument("--quiet", "-q", action="store_true", help="no progress")


def conditions_of(texts: list[str]) -> tuple[Condition, ...]:
    """Conditions as they are written.

    Raises:
        SettingsError: one can't be read.
    """
    try:
        return tuple(parse_condition(text) for text in texts)
    except ConditionError as error:
        raise SettingsError(str(error)) from error


def settings_of(options: argparse.Namespace) -> LoadSettings:
    """The load that the flags ask for.

    Raises:
        SettingsError: a flag is out of its range, or doesn't go with another.
    """
    scenario = _scenario(options)
    rates, ramp = parse_rates(options.rate) if options.rate else ((), False)
    users = options.users or (OFFLINE_USERS if scenario == "offline" else 1)
    if options.users is not None and options.users <= 0:
        raise SettingsError(f"--users is {options.users}, expected more than 0")
    duration = options.duration if options.duration is not None else _usual_duration(scenario, options.trace)
    timeout = options.timeout if options.timeout is not None else 1.0 if scenario == "overload" else 10.0
    same = (
        "arrivals", "burst_on", "burst_off", "trace", "warmup", "seed", "samples_per_query", "queries",
        "processes", "connections", "realtime", "times", "reload_every",
    )  # fmt: skip
    return LoadSettings(
        scenario=scenario, rates=rates, ramp=ramp, users=users, duration=duration, timeout=timeout,
        fail_on=conditions_of(options.fail_on), **{name: getattr(options, name) for name in same},
    )  # fmt: skip


def _usual_duration(scenario: str, trace: Path | None) -> float:
    """Ten seconds, ten minutes of a soak, and all of a trace."""
    if trace:
        offsets, _ = read_trace(trace)
        return max(float(offsets[-1]) / SECOND, 1e-3)
    return 600.0 if scenario == "soak" else 10.0


def _scenario(options: argparse.Namespace) -> Scenario:
    if options.rate and options.users:
        raise SettingsError("--rate is an open loop and --users a closed one: choose one of them")
    chosen: Scenario | None = options.scenario
    if chosen is None:
        return "server" if options.rate or options.trace else "closed" if options.users else "single-stream"
    if chosen in ("single-stream", "multi-stream") and (options.users or 1) != 1:
        raise SettingsError(f"--scenario {chosen} has one user, --users is {options.users}")
    return chosen


def parse_rates(text: str) -> tuple[tuple[float, ...], bool]:
    """(rates, whether from one to the other evenly) of 200, 100:500 or 100,200,400.

    Raises:
        SettingsError: it is none of these.
    """
    ramp = ":" in text
    try:
        rates = tuple(float(part) for part in text.split(":" if ramp else ","))
    except ValueError:
        rates = ()
    if not rates or (ramp and len(rates) != 2):  # noqa: PLR2004 - from, to
        raise SettingsError(f"--rate is '{text}', expected 200, or 100:500, or 100,200,400 requests/s")
    return rates, ramp


def specs_of(options: argparse.Namespace) -> list[ModelSpec]:
    """What is asked of which models.

    Raises:
        SettingsError: a flag can't be read.
    """
    for name in ("batch_size", "max_tokens"):
        if getattr(options, name) <= 0:
            flag = name.replace("_", "-")
            raise SettingsError(f"--{flag} is {getattr(options, name)}, expected more than 0")
    shapes = dict(_pair(text, ":", _dims) for text in options.shape)
    parameters = dict(_pair(text, "=", _value) for text in options.request_parameter)
    specs = []
    for text in options.model:
        named, _, weight = text.partition("=")
        name, _, version = named.partition(":")
        if not name or not _is_positive(weight or "1"):
            raise SettingsError(f"--model is '{text}', expected NAME, NAME:VERSION or NAME=WEIGHT")
        specs.append(
            ModelSpec(
                name, version, float(weight or 1), options.batch_size, shapes, options.data,
                tuple(options.prompt), options.max_tokens, parameters,
            )
        )  # fmt: skip
    if len({spec.name for spec in specs}) < len(specs):
        raise SettingsError("--model names a model twice: give it one weight")
    return specs


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False


def _pair(text: str, sign: str, read: Callable[[str], T]) -> tuple[str, T]:
    name, found, value = text.rpartition(sign)
    if found and name:
        with contextlib.suppress(ValueError):
            return name, read(value)
    raise SettingsError(f"'{text}': expected NAME{sign}VALUE")


def _dims(text: str) -> tuple[int, ...]:
    return tuple(int(dim) for dim in text.split(","))


def _value(text: str) -> bool | int | float | str:
    """A parameter's value: what JSON reads as a bool or a number, else the text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, bool | int | float) else text


def metrics_url_of(options: argparse.Namespace) -> str:
    """Where the server's metrics are, if it is known."""
    if options.metrics_url is not None:
        return str(options.metrics_url)
    host, _, port = options.url.rpartition("/")[2].rpartition(":")
    return f"http://{host}:8002/metrics" if port == "8001" else ""

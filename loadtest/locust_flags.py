"""The flags of the locustfile, and what they ask for.

Every value is a string, a number or a list of strings: locust sends them from the master to its workers, and
shows those of `_IN_WEB_UI` in its web page's form. They are checked when a test starts, too, so that what was
typed there is held to the same rules as a command line.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, get_args

from loadtest.flags import add_model_flags, specs_of
from loadtest.locust_schedule import Stage, parse_stages
from loadtest.schedule import Process
from loadtest.settings import SettingsError
from loadtest.target import add_target_flags, target_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from locust.argument_parser import LocustArgumentParser

    from loadtest.payload import ModelSpec
    from loadtest.target import Target

MODEL, HOST = "mobilenet", "localhost:8001"
# A second of them is drawn at a time.
MOST_RATE = 1e6
_IN_WEB_UI = (
    "model",
    "batch_size",
    "max_tokens",
    "rate",
    "rate_stages",
    "arrivals",
    "stages",
    "timeout",
    "seed",
)


def _checked(flag: str) -> Callable[[str], str]:
    """A flag's text as it is, if it can be read: a wrong command line ends before locust starts processes."""

    def check(text: str) -> str:
        try:
            (users_of if flag == "stages" else rates_of)({flag.replace("-", "_"): text})
        except SettingsError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(f"--{flag} ")) from error
        return text

    return check


class _Join(argparse.Action):
    """A flag that may be given again: one text, which a form's field can hold, too."""

    def __call__(
        self,
        _parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        _option: str | None = None,
    ) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, f"{before},{values}" if before else values)


def add_flags(parser: LocustArgumentParser) -> None:
    """Add them beside locust's own; the names are those of `python -m loadtest` where both have one."""
    _add_model_flags(parser.add_argument_group("Requests"))
    _add_load_flags(parser.add_argument_group("Load", "Without --rate: users who wait for each answer."))
    _add_server_flags(
        parser.add_argument_group("Server", "--host is its host:port (default: localhost:8001).")
    )
    for action in parser._actions:  # noqa: SLF001 - a group's flags never pass locust's own add_argument
        if action.dest in _IN_WEB_UI:
            vars(action).update(include_in_web_ui=True)


def _add_model_flags(group: Any) -> None:
    group.add_argument(
        "--model", action=_Join, default="", metavar="NAME[:VERSION][=WEIGHT],...",
        help=f"model to call; several, or the flag several times, for a mix by weight (default: {MODEL})",
    )  # fmt: skip
    group.add_argument("--batch-size", type=int, default=1, help="rows in a request (default: 1)")
    group.add_argument(
        "--shape", action="append", default=[], metavar="INPUT:DIM,DIM",
        help="an input's dimensions where the model leaves them open, without the batch",
    )  # fmt: skip
    group.add_argument("--data", default="", metavar="FILE.npz", help="real rows, by input name")
    group.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="for a model that generates text; in turn",
    )
    group.add_argument("--max-tokens", type=int, default=32, help="that it is asked for (default: 32)")
    group.add_argument(
        "--request-parameter",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="sent with each request",
    )


def _add_load_flags(group: Any) -> None:
    group.add_argument(
        "--rate", type=_checked("rate"), default="", metavar="R",
        help="an open loop: so many requests per second, of all processes together, whatever the server does",
    )  # fmt: skip
    group.add_argument(
        "--rate-stages", type=_checked("rate-stages"), default="", metavar="R:TIME,...",
        help="an open loop in stages: 100:30s,200:1m, requests per second; the test ends with them",
    )  # fmt: skip
    group.add_argument(
        "--arrivals", choices=get_args(Process), default="poisson", help="of an open loop (default: poisson)"
    )
    group.add_argument(
        "--stages", type=_checked("stages"), default="", metavar="USERS:TIME,...",
        help="users in stages, a load shape: 10:30s,50:1m; --spawn-rate applies; the test ends with them",
    )  # fmt: skip
    group.add_argument(
        "--timeout",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="until a request is given up (default: 10)",
    )
    group.add_argument("--seed", type=int, default=0, help="of arrivals, mix and tensors (default: 0)")
    group.add_argument("--connections", type=int, default=1, help="of each process (default: 1)")


def _add_server_flags(group: Any) -> None:
    group.add_argument(
        "--header", action="append", default=[], metavar="'NAME: VALUE'",
        help="such as 'authorization: Bearer TOKEN'; may be given more than once",
    )  # fmt: skip
    files = {
        "--token-file": "send its first token as a bearer token",
        "--root-cert": "TLS, with these certificates, PEM",
        "--client-cert": "this client's certificate, PEM",
        "--client-key": "and its key, PEM",
    }
    for flag, meaning in files.items():
        group.add_argument(flag, default="", metavar="FILE", help=meaning)
    group.add_argument("--ssl", action="store_true", help="TLS, with the system's certificates")
    group.add_argument("--ssl-server-name", default="", metavar="NAME", help="the name in its certificate")
    group.add_argument(
        "--wait", type=float, default=0.0, metavar="SECONDS", help="for the server to be ready"
    )


def target_of_flags(options: argparse.Namespace, host: str | None) -> Target:
    """The server that the flags name.

    Raises:
        SettingsError: a header is none.
        TargetError: a file can't be read.
    """
    return target_of(_read_as_engine(add_target_flags, options, url=host or HOST))


def specs_of_flags(options: argparse.Namespace) -> list[ModelSpec]:
    """What is asked of which models.

    Raises:
        SettingsError: a flag can't be read.
    """
    models = [name.strip() for name in (options.model or MODEL).split(",")]
    return specs_of(_read_as_engine(add_model_flags, options, model=models))


def _read_as_engine(
    add: Callable[[argparse.ArgumentParser], None], options: argparse.Namespace, **others: Any
) -> argparse.Namespace:
    """The flags as `python -m loadtest` reads them, which makes paths and headers of text.

    Raises:
        SettingsError: a flag can't be read.
    """
    parser = argparse.ArgumentParser(exit_on_error=False, add_help=False)
    add(parser)
    values = {**vars(options), **others}
    words: list[str] = []
    for action in parser._actions:  # noqa: SLF001 - which flags there are, argparse tells nobody else
        value, flag = values.get(action.dest), action.option_strings[0]
        if action.nargs == 0:
            words += [flag] * bool(value)
        elif value:
            words += [f"{flag}={one}" for one in (value if isinstance(value, list) else [value])]
    try:
        return parser.parse_args(words)
    except argparse.ArgumentError as error:
        raise SettingsError(str(error)) from error


def rates_of(values: Mapping[str, Any]) -> tuple[Stage, ...]:
    """The rates of an open loop, of all processes together; none: it is a closed one.

    Args:
        values: of the flags, by their names; a form's are all text.

    Raises:
        SettingsError: a flag can't be read, or doesn't go with another.
    """
    rate, rate_stages, stages = (str(values.get(name) or "") for name in ("rate", "rate_stages", "stages"))
    if rate and rate_stages:
        raise SettingsError("--rate is one rate and --rate-stages several: choose one of them")
    if stages and (rate or rate_stages):
        raise SettingsError("--stages are of users, and an open loop has none: use --rate-stages")
    found = parse_stages(rate_stages, "--rate-stages") if rate_stages else _steady(rate)
    if any(stage.value > MOST_RATE for stage in found):
        raise SettingsError(f"a rate of {max(s.value for s in found):g} requests/s: at most {MOST_RATE:g}")
    return found


def _steady(text: str) -> tuple[Stage, ...]:
    if not text:
        return ()
    try:
        return (Stage(float(text), float("inf")),)
    except ValueError:
        raise SettingsError(f"--rate is '{text}', expected more than 0 requests/s") from None


def users_of(values: Mapping[str, Any]) -> tuple[Stage, ...]:
    """The numbers of users of a closed loop in stages; none: --users says how many.

    Raises:
        SettingsError: the flag can't be read.
    """
    return parse_stages(str(values.get("stages") or ""), "--stages")

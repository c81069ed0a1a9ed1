"""Which users a test has, and its load shape: by the flags, or by the fields of locust's web page."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

from flask import Response, jsonify, request
from locust import LoadTestShape
from locust.runners import STATE_RUNNING, STATE_SPAWNING, WorkerRunner

from loadtest.locust_flags import rates_of, users_of
from loadtest.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from locust.env import Environment
    from locust.web import WebUI

logger = logging.getLogger(__name__)


class StagesShape(LoadTestShape):
    """The load shape of --stages, and the end of --rate-stages.

    Abstract, because locust always uses a shape that it finds in a locustfile; `choose_users` does if asked.
    """

    abstract = True
    use_common_options = True

    def tick(self) -> tuple[int, float] | None:
        """(users, how many of them start or stop per second) now; None: the test is over."""
        runner: Any = self.runner
        options, seconds = runner.environment.parsed_options, self.get_run_time()  # type: ignore[no-untyped-call] # locust's
        if options.run_time and seconds >= options.run_time:
            return None
        rates = rates_of(vars(options))
        for stage in rates or users_of(vars(options)):
            if seconds < stage.seconds:
                return (
                    (runner.worker_count, 1.0) if rates else (round(stage.value), options.spawn_rate or 1.0)
                )
            seconds -= stage.seconds
        return None


def choose_by_flags(environment: Environment, web_ui: WebUI | None) -> None:
    """Choose users and shape now, and again when a form asks for a test."""
    runner: Any = environment.runner
    shape = StagesShape()  # type: ignore[no-untyped-call] # locust's constructor
    shape.runner = runner
    # For --class-picker, which lets the page's user choose.
    environment.available_shape_classes = {
        **(environment.available_shape_classes or {}),
        "StagesShape": shape,
    }
    flags = vars(environment.parsed_options)

    def choose_by_form() -> Response | None:
        if request.endpoint != "locust.swarm" or runner.state in (STATE_RUNNING, STATE_SPAWNING):
            return None  # a test that runs is only edited
        try:
            choose_users(environment, shape, {**flags, **request.form.to_dict()})
        except SettingsError as error:
            logger.error("%s", error)  # noqa: TRY400 - says it all
            return jsonify({"success": False, "message": str(error), "host": environment.host})
        return None

    if web_ui is not None and web_ui.app is not None:
        web_ui.app.before_request(choose_by_form)
    # The form may mend flags that don't go together; a test that is started with them is refused.
    with contextlib.suppress(SettingsError):
        choose_users(environment, shape, flags)


def choose_users(environment: Environment, shape: StagesShape, flags: Mapping[str, Any]) -> None:
    """Open-loop users of a rate, else those who wait; classes that were named or picked stay as they are.

    Raises:
        SettingsError: a flag can't be read, or doesn't go with another.
    """
    rates, users = rates_of(flags), users_of(flags)
    environment.shape_class = shape if users or flags.get("rate_stages") else None
    options = environment.parsed_options
    if options is None or options.user_classes or options.class_picker:
        return
    available: Any = environment.available_user_classes or {}
    environment.user_classes = [kind for kind in available.values() if bool(kind.fixed_count) == bool(rates)]
    if rates:
        # One in each process, at once: see OneUserPerProcess, which would see to it, but not the messages.
        options.num_users = options.spawn_rate = options.expect_workers if options.master else 1


def check(environment: Environment, flags: Mapping[str, Any]) -> None:
    """Refuse what makes no load.

    Raises:
        SettingsError: a flag is out of its range, doesn't go with another, or is missing.
    """
    rates = rates_of(flags)
    users_of(flags)
    for name in ("timeout", "connections"):
        if not 0 < flags[name] < float("inf"):
            raise SettingsError(f"--{name} is {flags[name]:g}, expected more than 0")
    kinds = [] if isinstance(environment.runner, WorkerRunner) else environment.user_classes
    if any(kind.fixed_count for kind in kinds) and not rates:
        raise SettingsError("OpenLoopUser needs --rate, requests per second")

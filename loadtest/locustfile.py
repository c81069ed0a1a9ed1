"""A locustfile for any model of a server that speaks the Open Inference Protocol.

locust -f loadtest/locustfile.py --host localhost:8001 --model mobilenet             users who wait
locust -f loadtest/locustfile.py --host localhost:8001 --model mobilenet --rate 200  an open loop

`InferUser` is a user as locust has them: one request, its answer, the next request. A slow server slows it
down, so what a stall costs the requests that would have come meanwhile is in none of its figures.
`OpenLoopUser` sends at the times of a schedule, and counts from them.
"""

from __future__ import annotations

import logging
import os
import random
import time
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar

# A refused handshake is reported with its reason; gRPC's own log would say it again.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import gevent
import grpc.experimental.gevent as grpc_gevent
from locust import User, constant, events, task
from locust.exception import CatchResponseError, StopUser
from locust.runners import STATE_INIT, STATE_SPAWNING, MasterRunner, WorkerRunner
from locust.user.task import LOCUST_STATE_STOPPING

from loadtest.locust_calls import Answer, Calls, now
from loadtest.locust_flags import add_flags, rates_of, specs_of_flags, target_of_flags
from loadtest.locust_open_loop import LATE_MS, OneUserPerProcess, OpenLoop
from loadtest.locust_schedule import Share, common_start, schedule
from loadtest.locust_shape import check, choose_by_flags
from loadtest.locust_statistics import count_from_first_request, keep_fractions
from loadtest.payload import load_of
from loadtest.settings import SettingsError
from loadtest.target import Questions, TargetError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from locust.env import Environment
    from locust.rpc import Message
    from locust.web import WebUI

logger = logging.getLogger(__name__)

# Before any grpc object is made: without it the C core blocks the greenlets' one thread. The objects come
# when a test starts, after the fork of --processes.
grpc_gevent.init_gevent()
keep_fractions()
events.init_command_line_parser.add_listener(add_flags)  # type: ignore[no-untyped-call] # locust's

_TYPE = "gRPC"
_REFUSED = "load refused"
_SPAWN_LOOKS = 100


class InferenceUser(User):
    """What both kinds of users have: the process's connections, and how an answer is reported."""

    abstract = True
    calls: ClassVar[Calls | None] = None

    def on_start(self) -> None:
        """End quietly where there is no server to ask; the reason has been given."""
        if self.calls is None:
            raise gevent.GreenletExit  # StopUser would be logged with a traceback

    @property
    def _calls(self) -> Calls:
        assert self.calls is not None
        return self.calls

    def report(self, model: int, since: int, answer: Answer) -> None:
        """Count a request.

        Args:
            model: its index.
            since: when its time began, of `now`.
            answer: what became of it.
        """
        name = self._calls.models[model].spec.name
        if answer.first:
            # Not as an event: the request would be counted twice in the line of all together.
            first_token = self.environment.stats.get(f"{name} first token", _TYPE)
            first_token.log((answer.first - since) / 1e6, 0)
        self.environment.events.request.fire(
            request_type=_TYPE,
            name=name,
            response_time=(answer.done - since) / 1e6,
            response_length=answer.size,
            exception=CatchResponseError(answer.error) if answer.error else None,
            context=self.context(),
        )


class InferUser(InferenceUser):
    """A closed loop: sends a request, waits for its answer, sends the next one."""

    wait_time = constant(0)

    _numbers: ClassVar[Iterator[int]] = count()

    def on_start(self) -> None:
        """Draw models as the seed says, each user others."""
        super().on_start()
        share, seed = _share(self.environment), _options(self.environment).seed
        self._random = random.Random(f"{seed} {share.number} {next(self._numbers)}")  # noqa: S311 - no secret
        self._weights = [model.spec.weight for model in self._calls.models]

    @task
    def infer(self) -> None:
        """Call a model, picked by the weights, and report how long it took."""
        (model,) = self._random.choices(range(len(self._weights)), self._weights)
        sent = now()
        self.report(model, sent, self._calls.wait(model))


class OpenLoopUser(InferenceUser):
    """An open loop: sends at the times of a schedule, whatever has been answered. One in each process."""

    fixed_count = 1

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self._loop: OpenLoop | None = None

    @task
    def send(self) -> None:
        """Send this process's share of the requests to the end of the schedule, or of the test."""
        options = _options(self.environment)
        rates = rates_of(vars(options))
        weights = [model.spec.weight for model in self._calls.models]
        arrivals = schedule(rates, lambda: _share(self.environment), weights, options.arrivals, options.seed)
        start = now()
        if options.arrivals == "constant":
            wall = time.time_ns()
            start += common_start(wall, rates[0].value, _share(self.environment)) - wall
        self._loop = OpenLoop(self._calls, self.report)
        self._loop.run(arrivals, start, lambda: self._state == LOCUST_STATE_STOPPING)
        raise StopUser

    def on_stop(self) -> None:
        """Give up what is under way, and say how late requests were sent."""
        if self._loop is None:
            return
        if self._loop.under_way:
            logger.info(
                "%d requests were under way at the end and are not counted; --stop-timeout 10 waits for them",
                self._loop.under_way,
            )
            self._loop.give_up()
        if self._loop.unsent:
            logger.warning(
                "%d requests were due at the end, not sent, and are not counted", self._loop.unsent
            )
        lag = self._loop.lag
        late = lag.percentile(99) > LATE_MS
        logger.log(
            logging.WARNING if late else logging.INFO,
            "%d requests were sent late by %.3f ms (median), %.3f ms (p99)%s",
            lag.count, lag.percentile(50), lag.percentile(99),
            ": more than a server should be judged by; give this more cores, or --processes" if late else "",
        )  # fmt: skip


def _share(environment: Environment) -> Share:
    runner: Any = environment.runner
    return Share(runner.worker_index, getattr(environment.parsed_options, "open_loop_processes", 1))


@events.init.add_listener  # type: ignore[untyped-decorator] # locust's are not annotated
def prepare(environment: Environment, web_ui: WebUI | None, **_others: object) -> None:
    """Choose users and load shape by the flags; the web page's form may choose others."""
    # The loop's clock has stood still since before the imports: --run-time would be shorter by that.
    gevent.get_hub().loop.update_now()
    OneUserPerProcess.options = _options(environment)
    environment.dispatcher_class = OneUserPerProcess
    runner = environment.runner
    if runner is not None and not isinstance(runner, WorkerRunner):  # a worker's master chooses for it
        runner.register_message(_REFUSED, take_refusal)
        count_from_first_request(environment)
        choose_by_flags(environment, web_ui)


@events.test_start.add_listener  # type: ignore[untyped-decorator] # locust's are not annotated
def connect(environment: Environment, **_others: object) -> None:
    """Connect to the server and make the requests, once per process; without a server the test is over."""
    runner, options = environment.runner, _options(environment)
    try:
        check(environment, vars(options))
        if not isinstance(runner, MasterRunner):
            InferenceUser.calls = _connect(environment, options)
            environment.stats.clear_all()  # rates count from here, not from before the wait for a server
    except (SettingsError, TargetError) as error:
        if isinstance(runner, WorkerRunner):
            runner.send_message(_REFUSED, str(error))  # type: ignore[arg-type] # any message does
        else:
            end_test(environment, str(error))


def _connect(environment: Environment, options: argparse.Namespace) -> Calls:
    target = target_of_flags(options, environment.host)
    with Questions(target) as questions:
        if options.wait:
            questions.wait_until_ready(options.wait)
        models = [load_of(questions, spec, options.seed) for spec in specs_of_flags(options)]
    return Calls(target, models, options.connections, options.timeout, _share(environment))


def _options(environment: Environment) -> argparse.Namespace:
    options: argparse.Namespace | None = environment.parsed_options
    assert options is not None
    return options


@events.test_stop.add_listener  # type: ignore[untyped-decorator] # locust's are not annotated
def disconnect(**_others: object) -> None:
    """Close the connections; its users have ended."""
    calls, InferenceUser.calls = InferenceUser.calls, None
    if calls is not None:
        calls.close()


def take_refusal(environment: Environment, msg: Message, **_others: object) -> None:
    """A worker can't take part."""
    end_test(environment, msg.data, msg.node_id)


def end_test(environment: Environment, reason: str, process: str = "local") -> None:
    """End the test of all processes because one can't take part: a line, and an exit status that tells."""
    runner: Any = environment.runner
    if all(row["msg"] != reason for row in runner.exceptions.values()):
        logger.error("%s", reason)
        # In a greenlet of its own: this one may be among those that it ends.
        gevent.spawn(runner.quit if _options(environment).headless else partial(_stop, runner))
    runner.log_exception(process, reason, "")


def _stop(runner: Any) -> None:
    """Stop once all users are started: locust loses a worker that is stopped before."""
    for _ in range(_SPAWN_LOOKS):
        if runner.state not in (STATE_INIT, STATE_SPAWNING):
            break
        gevent.sleep(0.1)
    runner.stop()

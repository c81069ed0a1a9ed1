"""`python -m loadtest`: a closed-loop load test with locust's users, reported to the microsecond."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import gevent
import grpc
from locust.env import Environment
from tqdm import tqdm

from loadtest.latency import LatencyRecorder
from loadtest.locustfile import InferUser, prepare

_PROGRESS_STEP_SECONDS = 0.2


def main() -> int:
    """Run the test and print its report; 1 when a request failed or none was answered."""
    options = parse()
    try:
        InferUser.shared.update(prepare(options.url, options.model, options.batch_size))
    except grpc.RpcError as error:
        print(f"loadtest: {options.url}: {error.code().name}: {error.details()}", file=sys.stderr)
        return 1
    print(
        f"closed loop: {options.users} users, each with one request of model '{options.model}' "
        f"(batch {options.batch_size}, {len(InferUser.shared['request'])} bytes) at a time, "
        f"for {options.duration:g} s against {options.url}"
    )
    recorder, seconds = drive(options.users, options.duration)
    print(recorder.table(seconds))
    print("A closed loop slows down with its server, so its tail is too kind: no figure for a release.")
    return 1 if recorder.failures or not recorder.answered else 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m loadtest", description=__doc__)
    parser.add_argument("--model", "-m", required=True, help="model to call")
    parser.add_argument("--url", "-u", default="localhost:8001", help="the server (default: %(default)s)")
    parser.add_argument("--users", type=int, default=8, help="requests at once (default: %(default)s)")
    parser.add_argument("--duration", type=float, default=10.0, help="seconds (default: %(default)s)")
    parser.add_argument("--batch-size", "-b", type=int, default=1, help="rows in a request (default: 1)")
    options = parser.parse_args()
    for name in ("users", "duration", "batch_size"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}, expected more than 0")
    return options


def drive(users: int, duration: float) -> tuple[LatencyRecorder, float]:
    """Have `users` locust users call for `duration` seconds; what they saw, and how long it really took."""
    recorder = LatencyRecorder()
    environment = Environment(user_classes=[InferUser])
    runner = environment.create_local_runner()
    runner.start(users, spawn_rate=users, wait=True)

    def record(response_time: float, exception: Exception | None, **_rest: Any) -> None:
        if exception is None:
            recorder.record(response_time)
        else:
            code = getattr(exception, "code", None)
            recorder.failures[code().name if code else repr(exception)] += 1

    # From here on, with every user at work: their first requests were the warm-up.
    request = environment.events.request
    request.add_listener(record)  # type: ignore[no-untyped-call] # locust's events are not annotated
    start = time.perf_counter()
    with tqdm(total=duration, unit="s", bar_format="{l_bar}{bar}| {n:.1f}/{total:g} s") as progress:
        while (elapsed := time.perf_counter() - start) < duration:
            gevent.sleep(min(_PROGRESS_STEP_SECONDS, duration - elapsed))
            progress.update(min(time.perf_counter() - start, duration) - progress.n)
    seconds = time.perf_counter() - start
    request.remove_listener(record)  # type: ignore[no-untyped-call] # the same
    runner.quit()
    return recorder, seconds


if __name__ == "__main__":
    sys.exit(main())

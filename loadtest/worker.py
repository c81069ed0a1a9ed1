"""One process of the load generator: it is told what to send, sends it, and gives back what it saw."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loadtest.calls import Calls
from loadtest.driver import ClosedLoad, ClosedLoop, OpenLoad, OpenLoop, Progress

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from loadtest.payload import ModelLoad
    from loadtest.samples import Samples
    from loadtest.target import Target

# Python hands its lock on after 5 ms otherwise: a thread that sends would be so late when another one
# decodes.
_SWITCH_SECONDS = 5e-4


@dataclass(frozen=True)
class Connect:
    """Connect to a server, for the runs that follow."""

    target: Target
    models: list[ModelLoad]
    connections: int
    timeout: float


@dataclass(frozen=True)
class Run:
    """Run a load from a time on, of `time.perf_counter_ns`, which all processes of a machine share."""

    load: OpenLoad | ClosedLoad
    start: int


@dataclass(frozen=True)
class Ran:
    """What a run left.

    Attributes:
        samples: of its requests.
        cpu: seconds that this process's threads computed, from the start of the run to its end.
        seconds: from the start to the end.
    """

    samples: Samples
    cpu: float
    seconds: float


def work(pipe: Connection, figures: Any, stop: Any, realtime: Any) -> None:
    """Take orders from a pipe until it closes; the whole life of a worker process."""
    if realtime:  # before gRPC has threads, which inherit it
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    sys.setswitchinterval(_SWITCH_SECONDS)
    calls: Calls | None = None
    with contextlib.ExitStack() as stack, contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            order = pipe.recv()
            if isinstance(order, Connect):
                stack.close()
                calls = stack.enter_context(
                    Calls(order.target, order.models, order.connections, order.timeout)
                )
                pipe.send(None)
            else:
                assert calls is not None
                pipe.send(_run(calls, order, Progress(figures, stop)))


def _run(calls: Calls, order: Run, progress: Progress) -> Ran:
    gc.collect()
    gc.freeze()  # what is there now is no garbage: a collection in the run has less to look at
    loop: OpenLoop | ClosedLoop
    if isinstance(order.load, OpenLoad):
        loop = OpenLoop(calls, order.load, order.start, progress)
    else:
        loop = ClosedLoop(calls, order.load, order.start, progress)
    cpu = time.process_time()
    samples = loop.run()
    seconds = (time.perf_counter_ns() - order.start) / 1e9
    return Ran(samples, time.process_time() - cpu, seconds)

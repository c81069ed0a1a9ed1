"""One run, from settings to result: warm up, look at the server, send, look again, judge."""

from __future__ import annotations

import shlex
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loadtest.conditions import OF_SERVER, value_of
from loadtest.driver import OpenLoad
from loadtest.early_stopping import upper_bound
from loadtest.figures import figures_of, slices_of
from loadtest.latency import PERCENTILES
from loadtest.machine import describe_machine, describe_versions
from loadtest.operations import MemoryWatch, Reloading
from loadtest.result import Checked, RunResult
from loadtest.samples import STATUS_NAMES
from loadtest.scenario import describe, make_load, warmup_of
from loadtest.server_side import between, take_snapshot
from loadtest.target import TargetError
from loadtest.validity import judge
from serve.pb import grpc_service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from loadtest.driver import ClosedLoad
    from loadtest.figures import Figures
    from loadtest.generator import LoadGenerator, Recording, Seen
    from loadtest.payload import ModelLoad
    from loadtest.settings import LoadSettings
    from loadtest.target import Questions

_MEMORY_LOOKS = 40


@dataclass(frozen=True)
class Setting:
    """Where a run takes place.

    Attributes:
        generator: connected to the server.
        questions: asked of the server beside the load.
        models: that are asked.
        metrics_url: of the server's metrics; empty: it has none.
        show: is told how far a run is.
    """

    generator: LoadGenerator
    questions: Questions
    models: Sequence[ModelLoad]
    metrics_url: str
    show: Callable[[Seen], None] = lambda _seen: None

    @property
    def names(self) -> list[str]:
        """Of the models."""
        return [model.spec.name for model in self.models]


def run(
    setting: Setting, settings: LoadSettings, seed: int | None = None, capacity: float = 0.0
) -> RunResult:
    """Run a load and judge it; Ctrl-C ends it early, and the result says so.

    Args:
        setting: where.
        settings: what.
        seed: in place of the settings', as for a repetition.
        capacity: answers per second that the server is known to give, to compare with; 0: nobody knows.

    Raises:
        ScheduleError: rates or a trace that make no schedule.
        ConditionError: a condition on something that this run doesn't have.
        TargetError: the load generator ended.
    """
    seed = settings.seed if seed is None else seed
    load = make_load(settings, setting.models, seed)
    if settings.warmup and (settings.rates or not settings.open_loop):
        warmup = warmup_of(settings)
        load_before = make_load(warmup, setting.models, seed + 1_000_003)
        if setting.generator.run(load_before, warmup.duration).interrupted:
            raise KeyboardInterrupt
    return _measure(setting, settings, load, seed=seed, capacity=capacity)


def _measure(
    setting: Setting, settings: LoadSettings, load: OpenLoad | ClosedLoad, *, seed: int, capacity: float
) -> RunResult:
    seconds = settings.duration
    if settings.trace and isinstance(load, OpenLoad) and len(load.offsets):
        seconds = min(seconds, max(float(load.offsets[-1]) / 1e9, 1e-3))
    before = take_snapshot(setting.questions, setting.names, setting.metrics_url)
    with ExitStack() as stack:
        reloading = memory = None
        if settings.scenario == "reload":
            reloading = Reloading(setting.questions, setting.names, settings.reload_every)
            stack.enter_context(reloading)
        if setting.metrics_url:
            memory = MemoryWatch(setting.metrics_url, seconds / _MEMORY_LOOKS)
            stack.enter_context(memory)
        recording = setting.generator.run(load, seconds, setting.show)
    if settings.queries and len(recording.samples):  # it may have ended before its time
        ended = float(recording.samples.done.max()) / 1e9
        recording = replace(recording, seconds=min(seconds, ended))
    extras, notes = _meanwhile(reloading, memory)
    if capacity:
        total = figures_of(recording.samples, recording.seconds)
        # A deadline counts from the sending; what a user gets in time counts from the schedule.
        extras["goodput_ratio"] = total.goodput(settings.limit_ms or settings.timeout * 1e3) / capacity
    after = take_snapshot(setting.questions, setting.names, setting.metrics_url)
    result = result_of(setting, settings, recording, seed=seed, load=describe(settings, load), extras=extras)
    result.notes += notes
    result.server = between(before, after)
    result.notes += [*_open_dimensions(setting.models), *result.server.notes]
    return result


def _open_dimensions(models: Sequence[ModelLoad]) -> list[str]:
    return [
        f"model '{model.spec.name}': the open dimensions of {', '.join(model.ones)} are 1, which may be far "
        "less than what users send: name them with --shape, or give rows with --data"
        for model in models
        if model.ones
    ]


def _meanwhile(reloading: Reloading | None, memory: MemoryWatch | None) -> tuple[dict[str, float], list[str]]:
    extras: dict[str, float] = {}
    notes: list[str] = []
    if reloading is not None:
        extras |= {"reloads": reloading.done, "failed_reloads": len(reloading.failed)}
        notes += [f"a reload failed: {reason}" for reason in dict.fromkeys(reloading.failed)]
    if memory is not None and memory.series:
        extras |= {"memory_growth": memory.growth, "memory_peak": max(memory.megabytes)}
        notes.append(f"memory in MB is the server's {memory.series}")
    return extras, notes


def result_of(
    setting: Setting,
    settings: LoadSettings,
    recording: Recording,
    *,
    seed: int,
    load: str,
    extras: dict[str, float],
) -> RunResult:
    """What a recording comes to.

    Raises:
        ConditionError: a condition on something that this run doesn't have.
    """
    total = figures_of(recording.samples, recording.seconds)
    per_model = {
        name: figures_of(recording.samples.of_model(n), recording.seconds)
        for n, name in enumerate(setting.names)
    }
    validity = judge(
        recording, settings.limit_ms, open_loop=settings.open_loop, overload=settings.scenario == "overload"
    )
    result = RunResult(
        scenario=settings.scenario,
        load=load,
        command=_command(sys.argv[1:]),
        seed=seed,
        started=recording.started.isoformat(timespec="seconds"),
        target=describe_target(setting.questions),
        models=[_describe_model(model) for model in setting.models],
        machine=describe_machine(),
        versions=describe_versions(),
        total=total,
        per_model=per_model,
        slices=slices_of(recording.samples, recording.seconds, settings.slices),
        validity=validity,
        extras=extras,
        bounds={f"{p:g}": upper_bound(total.latency, p) for p in PERCENTILES},
        messages={
            STATUS_NAMES.get(code, str(code)): text for code, text in recording.samples.messages.items()
        },
    )
    result.conditions = check(settings, total, per_model, extras)
    return result


def _command(words: Sequence[str]) -> list[str]:
    """The command line without the values of headers, which may be secrets and have no place in a report."""
    shown = list(words)
    for n, word in enumerate(words):
        if word in ("--header", "-H") and n + 1 < len(words):
            shown[n + 1] = f"{words[n + 1].partition(':')[0]}: ..."
        elif word.startswith(("--header=", "-H")):
            shown[n] = f"{word.partition(':')[0]}: ..."
    return [shlex.quote(word) for word in shown]


def check(
    settings: LoadSettings, total: Figures, per_model: Mapping[str, Figures], extras: Mapping[str, float]
) -> list[Checked]:
    """Ask the settings' conditions.

    Raises:
        ConditionError: a condition on something that this run doesn't have.
    """
    checked = []
    for condition in settings.fail_on:
        if condition.metric in extras:
            value = extras[condition.metric]
        elif condition.metric == "goodput":
            figures = per_model.get(condition.model, total)
            value = figures.goodput(settings.limit_ms)
        else:
            value = value_of(condition, total, per_model)
        checked.append(Checked(condition.text, value, condition.met_by(value), condition.metric in OF_SERVER))
    return checked


def describe_target(questions: Questions) -> dict[str, str]:
    """The server as it calls itself."""
    found = {"url": questions.target.url, "tls": "yes" if questions.target.tls else "no"}
    try:
        answer = questions.ask("ServerMetadata", pb.ServerMetadataRequest(), pb.ServerMetadataResponse)
    except TargetError as error:
        return found | {"server": f"doesn't say ({error})", "version": ""}
    return found | {"server": answer.name, "version": answer.version}


def _describe_model(model: ModelLoad) -> dict[str, object]:
    return {
        "name": model.spec.name, "version": model.version, "weight": model.spec.weight,
        "batch_size": model.spec.batch_size, "streams": model.streams,
        "request_bytes": round(sum(map(len, model.requests)) / len(model.requests)),
    }  # fmt: skip

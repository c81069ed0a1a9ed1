"""What the commands share: a server that is reached, a generator that runs, errors in a line."""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Self

from tqdm import tqdm

from loadtest.conditions import ConditionError
from loadtest.flags import metrics_url_of
from loadtest.generator import LoadGenerator
from loadtest.payload import load_of
from loadtest.result import ResultError
from loadtest.run import Setting
from loadtest.scenario import describe, make_load
from loadtest.schedule import ScheduleError
from loadtest.settings import SettingsError
from loadtest.target import Questions, TargetError, target_of
from loadtest.tensors import RequestError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence

    from loadtest.generator import Seen
    from loadtest.payload import ModelLoad, ModelSpec
    from loadtest.settings import LoadSettings

ASKED_WRONGLY = 2
INTERRUPTED = 130  # a shell's status of a program that Ctrl-C ended


class CommandError(Exception):
    """What ends a command, in one line."""


def guarded(name: str, work: Callable[[], int]) -> int:
    """Do a command's work; what goes wrong is one line on stderr, not a traceback."""
    try:
        return work()
    except (SettingsError, ConditionError, ScheduleError, RequestError, ResultError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return ASKED_WRONGLY
    except (TargetError, CommandError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED


class Session:
    """A load generator that is connected to the server of a command line. Ends with its `with` block.

    Raises:
        TargetError: the server can't be reached, or a model can't be asked so.
    """

    def __init__(
        self, options: argparse.Namespace, specs: Sequence[ModelSpec], settings: LoadSettings
    ) -> None:
        self._quiet = options.quiet
        self._stack = ExitStack()
        try:
            questions = self._stack.enter_context(Questions(target_of(options)))
            if options.wait:
                questions.wait_until_ready(options.wait)
            models = [load_of(questions, spec, settings.seed) for spec in specs]
            _check_shapes(models)
            generator = LoadGenerator(
                settings.processes, settings.connections, settings.timeout, realtime=settings.realtime
            )
            self._stack.enter_context(generator)
            generator.connect(questions.target, models)
        except BaseException:
            self._stack.close()
            raise
        self.setting = Setting(generator, questions, models, metrics_url_of(options))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_raised: object) -> None:
        self._stack.close()

    def describe(self, settings: LoadSettings) -> str:
        """What is about to run, in one sentence."""
        models = ", ".join(_describe(self.setting, n) for n in range(len(self.setting.models)))
        load = (
            make_load(settings, self.setting.models, settings.seed)
            if settings.scenario != "overload"
            else None
        )
        what = describe(settings, load) if load else f"overload, {settings.times:g} times its capacity"
        return f"{settings.scenario}: {what}, {models}, against {self.setting.questions.target.url}"

    @contextmanager
    def progress(self, settings: LoadSettings) -> Iterator[Setting]:
        """The setting of a run whose progress is shown."""
        form = "{l_bar}{bar}| {n:.1f}/{total:g} s {postfix}"
        with tqdm(total=settings.duration, bar_format=form, disable=self._quiet or None, leave=False) as bar:
            yield Setting(
                self.setting.generator, self.setting.questions, self.setting.models, self.setting.metrics_url,
                lambda seen: _show(bar, seen),
            )  # fmt: skip


def _check_shapes(models: Sequence[ModelLoad]) -> None:
    """A shape may be of an input that one model of a mix has, but not of one that none has."""
    known = {name for model in models for name in model.inputs}
    for name in models[0].spec.shapes:
        if name not in known:
            raise SettingsError(f"--shape names input '{name}', there is only {', '.join(sorted(known))}")


def _describe(setting: Setting, index: int) -> str:
    model = setting.models[index]
    mean = sum(map(len, model.requests)) / len(model.requests)
    share = f", weight {model.spec.weight:g}" if len(setting.models) > 1 else ""
    kind = ", streamed" if model.streams else ""
    return f"model '{model.spec.name}' (batch {model.spec.batch_size}, {mean:.0f} bytes{share}{kind})"


def _show(bar: tqdm[Any], seen: Seen) -> None:
    if bar.total is not None:
        bar.n = min(seen.seconds, bar.total)
    under_way = seen.sent - seen.answered
    bar.set_postfix_str(f"{seen.answered} answered, {under_way} under way, {seen.failed} failed")

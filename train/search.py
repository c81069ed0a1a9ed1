"""`python -m train search FAMILY --try FIELD=VALUES`: train with several values of a recipe's fields.

VALUES are choices with commas between them (learning_rate=1e-3,3e-3) or a range to draw from (width=0.25..1),
log-uniformly where its ends are above 0 and a factor of ten or more apart. Without --trials every combination
is trained; with it, so many random ones: those find a good value sooner where only some of the fields matter
(Bergstra, Bengio, "Random Search for Hyper-Parameter Optimization", JMLR 2012). --seed seeds the draws too.

Trials are ranked by the validation figure of their best epoch; the test split chooses nothing.
"""

from __future__ import annotations

import argparse
import csv
import math
import shlex
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.checkpoint import INFO, CheckpointError, load_info
from train.data.download import DataError
from train.device import choose_device
from train.family import FAMILIES, load_family
from train.flags import (
    DEFAULT_RECIPE,
    INTERRUPTED,
    FlagParser,
    add_device_flag,
    add_family_flags,
    chosen_recipe,
    given_fields,
)
from train.loop import Trainer
from train.search_space import parse_axes, plan_trials

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from train.family import Family, Metric
    from train.recipe import Recipe

TABLE = "search.csv"


@dataclass(frozen=True)
class Trial:
    """One training of a search.

    Attributes:
        folder: its checkpoint.
        values: the fields that are tried.
        recipe: all fields.
    """

    folder: Path
    values: Mapping[str, Any]
    recipe: Recipe

    def __str__(self) -> str:
        return "  ".join(f"{field}={value}" for field, value in self.values.items())


@dataclass(frozen=True)
class Result:
    """How a trial ended.

    Attributes:
        trial: which one.
        metric: what `validation` is; None where the trial failed.
        validation: the figure of the best epoch.
        epochs: finished ones.
        seconds: that they took.
        failure: why it failed, or "".
    """

    trial: Trial
    metric: Metric | None = None
    validation: float = math.nan
    epochs: int = 0
    seconds: float = 0.0
    failure: str = ""

    @property
    def cost(self) -> float:
        """What a better trial has less of; infinite for a failed one."""
        return -self.metric.gain(self.validation, over=0.0) if self.metric else math.inf

    def __str__(self) -> str:
        if not self.metric:
            return f"failed: {self.failure}"
        figure = f"validation {self.metric.name} {self.validation:.4f}"
        return f"{figure}, {self.epochs} epochs, {self.seconds:.0f} s"


def main(arguments: Sequence[str]) -> int:
    """Search as the arguments say, the family first.

    Returns:
        The exit code: 0, 1 where every trial failed, 130 after Ctrl-C. Wrong arguments exit with 2.

    Raises:
        CheckpointError: a trial's folder holds something else, or can't be written.
    """
    usage = "python -m train search FAMILY --try FIELD=VALUES [flags]"
    words = make_parser("python -m train search", usage)
    words.add_argument("family", choices=FAMILIES, help="FAMILY --help lists its flags")
    name = words.parse(arguments[:1]).family
    family = load_family(name)
    parser = make_parser(f"python -m train search {name}", usage.replace("FAMILY", name))
    add_search_flags(parser, name)
    add_family_flags(parser, family)
    parsed = parser.parse(arguments[1:])
    try:
        recipe = chosen_recipe(parsed, family)
        planned = plan_trials(parse_axes(parsed.tries, family.Recipe), parsed.trials, recipe.seed)
        trials = [
            Trial(parsed.out / f"{number:02}", values, replace(recipe, **values))
            for number, values in enumerate(planned, start=1)
        ]
        device = choose_device(parsed.device)
    except ValueError as error:
        parser.error(str(error))
    require_same_search(name, trials)
    results: list[Result] = []
    try:
        for trial in trials:
            print(f"{len(results) + 1}/{len(trials)}  {trial}", flush=True)
            results.append(run_trial(trial, name, family, parsed.data_dir, device))
            print(f"    {results[-1]}", flush=True)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    finally:
        if results:
            report(results, parsed, name, given_fields(parsed, family.Recipe))
    return 0 if any(result.metric for result in results) else 1


def make_parser(prog: str, usage: str) -> FlagParser:
    """A parser whose help begins with this module's text, as it stands here."""
    return FlagParser(
        prog=prog,
        usage=usage,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_search_flags(parser: FlagParser, name: str) -> None:
    """Add the flags that a search of the family `name` has beside the recipe's."""
    parser.add_argument(
        "--try",
        dest="tries",
        action="append",
        required=True,
        metavar="FIELD=VALUES",
        help="a field of the recipe, and choices A,B,C or a range A..B; given once for each field",
    )
    parser.add_argument("--trials", type=int, metavar="N", help="train N random draws, not every combination")
    out = Path("runs") / "search" / name
    parser.add_argument(
        "--out",
        type=Path,
        default=out,
        metavar="FOLDER",
        help=f"a checkpoint folder for each trial, and {TABLE}; what the same search has left there is not "
        f"trained again (default: {out})",
    )
    add_device_flag(parser)


def require_same_search(name: str, trials: Sequence[Trial]) -> None:
    """Keep another search's checkpoints from being lost or taken for this one's.

    Raises:
        CheckpointError: a folder has a checkpoint of another recipe, or of another family.
    """
    for trial in trials:
        if (trial.folder / INFO).exists():
            found = load_info(trial.folder, family=name).recipe
            if found != asdict(trial.recipe):
                raise CheckpointError(
                    f"{trial.folder}: has a trial of another search, which would be lost; delete it, or name "
                    "another folder with --out"
                )


def run_trial(trial: Trial, name: str, family: Family, data_dir: Path | None, device: torch.device) -> Result:
    """Train one trial, or what is left of it, or nothing where its checkpoint is complete.

    Raises:
        CheckpointError: the checkpoint can't be read or written.
    """
    try:
        task = family.task(trial.recipe, data_dir)
        trainer = Trainer(task, trial.recipe, trial.folder, family=name, device=device)
        if (trial.folder / INFO).exists():
            trainer.resume()
        if f"test_{task.metric.name}" not in trainer.progress.metrics:
            trainer.fit()
    except (DataError, FloatingPointError, ValueError) as error:
        return Result(trial, failure=str(error))
    progress = trainer.progress
    return Result(
        trial,
        metric=task.metric,
        validation=progress.metrics[f"validation_{task.metric.name}"],
        epochs=progress.epoch,
        seconds=sum(row["seconds"] for row in progress.history),
    )


def report(
    results: Sequence[Result], parsed: argparse.Namespace, name: str, given: Mapping[str, Any]
) -> None:
    """Print the trials, the best first, write them to `TABLE`, and say how to train with the best values."""
    lines = table(results)
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    print()
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    best = min(results, key=lambda result: result.cost)
    if best.metric:
        print(f"\nthe best again: {training_command(name, parsed, {**given, **best.trial.values})}")
    path = parsed.out / TABLE
    try:
        parsed.out.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream, lineterminator="\n").writerows(lines)
    except OSError as error:
        print(f"{path}: can't be written: {error.strerror}", file=sys.stderr)


def table(results: Sequence[Result]) -> list[list[str]]:
    """The names of the columns, then a line per trial, the best first and failed ones last."""
    metric = next((result.metric.name for result in results if result.metric), "figure")
    fields = list(results[0].trial.values)
    lines = [["rank", *fields, f"validation_{metric}", "epochs", "seconds", "checkpoint or failure"]]
    for rank, result in enumerate(sorted(results, key=lambda result: result.cost), start=1):
        values = [str(result.trial.values[field]) for field in fields]
        if result.failure:
            lines.append(["-", *values, "failed", "", "", result.failure])
        else:
            figures = [f"{result.validation:.6g}", str(result.epochs), f"{result.seconds:.1f}"]
            lines.append([str(rank), *values, *figures, str(result.trial.folder)])
    return lines


def training_command(name: str, parsed: argparse.Namespace, values: Mapping[str, Any]) -> str:
    """What trains with these fields, starting from the recipe and the data that were searched with."""
    words = ["python", "-m", "train", name, "--recipe", parsed.recipe or DEFAULT_RECIPE]
    if parsed.data_dir is not None:
        words += ["--data-dir", str(parsed.data_dir)]
    for field, value in values.items():
        if field == "sample" and parsed.data_dir is not None:
            continue
        flag = "--" + field.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, str(value)]
    return shlex.join(words)

"""`python -m train FAMILY [flags]`: train one model and leave a checkpoint folder."""

from __future__ import annotations

import json
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from train.checkpoint import INFO, CheckpointError, load_info
from train.device import choose_device, describe
from train.family import load_family
from train.flags import (
    INTERRUPTED,
    FlagParser,
    add_device_flag,
    add_family_flags,
    chosen_recipe,
    given_fields,
)
from train.history import TensorBoard
from train.loop import Trainer

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from train.family import Family
    from train.history import Row
    from train.recipe import Recipe

REHEARSED_UPDATES = 5


def main(arguments: Sequence[str]) -> int:
    """Train the family that the first word names, as the other words say.

    Returns:
        The exit code: 0, or 130 where Ctrl-C ended the training.

    Raises:
        CheckpointError: the checkpoint to resume can't be used, or the new one can't be written.
        DataError: the data can't be read.
        FloatingPointError: the loss is not finite.
    """
    name, family = arguments[0], load_family(arguments[0])
    parser = make_parser(name, family)
    parsed = parser.parse(arguments[1:])
    try:
        recipe = resumed_recipe(parsed, family, name) if parsed.resume else chosen_recipe(parsed, family)
        device = choose_device(parsed.device)
        if not (parsed.resume or parsed.overwrite or parsed.dry_run):
            _refuse_trained(parsed.out)
        task = family.task(recipe, parsed.data_dir)
        trainer = Trainer(task, recipe, parsed.out, family=name, device=device)
    except ValueError as error:
        parser.error(str(error))
    if parsed.resume:
        trainer.resume()
    print(_headline(name, trainer), flush=True)
    return dry_run(trainer) if parsed.dry_run else train(trainer, parsed)


def make_parser(name: str, family: Family) -> FlagParser:
    """The parser of one family's flags."""
    parser = FlagParser(
        prog=f"python -m train {name}",
        usage=f"python -m train {name} [flags]",  # all of them at every error would bury the message
        description=(family.__doc__ or "").partition("\n")[0],
    )
    out = Path("runs") / name
    parser.add_argument(
        "--out", type=Path, default=out, metavar="FOLDER", help=f"checkpoint folder (default: {out})"
    )
    earlier = parser.add_mutually_exclusive_group()
    earlier.add_argument(
        "--resume", action="store_true", help="go on from --out, by its recipe; --epochs may differ"
    )
    earlier.add_argument("--overwrite", action="store_true", help="replace the checkpoint that is in --out")
    add_device_flag(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the recipe, take a few steps, say how long the run would take, and write nothing",
    )
    parser.add_argument(
        "--tensorboard", type=Path, metavar="FOLDER", help="write TensorBoard events below this folder"
    )
    add_family_flags(parser, family)
    return parser


def resumed_recipe(parsed: argparse.Namespace, family: Family, name: str) -> Recipe:
    """The recipe of the checkpoint in `--out`, with `--epochs` where it is given.

    Raises:
        ValueError: other fields were given too.
        CheckpointError: there is nothing to resume, or it is another family's.
    """
    given = given_fields(parsed, family.Recipe)
    others = sorted(set(given) - {"epochs"} | ({"recipe"} if parsed.recipe is not None else set()))
    if others:
        flags = ", ".join("--" + field.replace("_", "-") for field in others)
        raise ValueError(f"{flags}: --resume keeps the checkpoint's recipe; only --epochs may be given")
    info = load_info(parsed.out, family=name)
    recipe: Recipe = family.Recipe.from_mapping({**info.recipe, **given})
    return recipe


def train(trainer: Trainer, parsed: argparse.Namespace) -> int:
    """Run to the end or to Ctrl-C, and say what came out; the exit code."""
    started = time.perf_counter()
    trainer.observers = _observers(trainer, parsed.tensorboard)
    try:
        metrics = trainer.fit()
    except KeyboardInterrupt:
        print(f"\n{_interrupt_message(trainer, parsed)}", file=sys.stderr)
        return INTERRUPTED
    tested = ", ".join(
        f"{name.removeprefix('test_').replace('_', ' ')} {value:.4f}"
        for name, value in metrics.items()
        if name.startswith("test_")
    )
    trivial, *others = trainer.progress.baselines.items()
    beaten = f"{trainer.task.metric.name} {trivial[1]:.4f} of the {trivial[0]}"
    beaten += "".join(f", {name.replace('_', ' ')} {value:.4f}" for name, value in others)
    print(
        f"test {tested} with the weights of epoch {trainer.progress.best_epoch}, "
        f"{time.perf_counter() - started:.0f} s\n"
        f"against {beaten}\n"
        f"checkpoint: {parsed.out}\n"
        f"next: {_export_command(trainer.family, parsed)}"
    )
    return 0


def dry_run(trainer: Trainer) -> int:
    """Print the recipe, take a few updates and one validation, and say how long all of them would take."""
    print(json.dumps(asdict(trainer.recipe), indent=2))
    batches = trainer.groups()
    trainer.model.train()
    rate = trainer.recipe.learning_rate * 1e-3
    losses = [float(trainer.train_step(next(batches), rate))]  # the first one also warms up
    started = time.perf_counter()
    count = min(REHEARSED_UPDATES, trainer.updates - 1)
    losses += [float(trainer.train_step(next(batches), rate)) for _ in range(count)]
    update = (time.perf_counter() - started) / max(1, count)
    started = time.perf_counter()
    trainer.task.validate(trainer.judged)
    validation = time.perf_counter() - started
    epoch = update * trainer.updates + validation
    epochs = trainer.recipe.epochs - trainer.progress.epoch
    print(
        f"first loss {losses[0]:.4f}, of a network that knows nothing {trainer.task.first_loss:.4f}\n"
        f"{update * 1000:.0f} ms an update, {validation:.1f} s a validation: about {epoch:.0f} s an epoch, "
        f"{epoch * epochs / 60:.1f} minutes for {epochs} epochs\n"
        "nothing was written (--dry-run)"
    )
    return 0


def _headline(name: str, trainer: Trainer) -> str:
    task, recipe = trainer.task, trainer.recipe
    parameters = sum(weight.numel() for weight in task.model.parameters())
    half = f" with {trainer.half}".replace("torch.", "") if trainer.half else ""
    return (
        f"{name}: {parameters:,} parameters, {task.dataset}, {trainer.progress.epoch} of {recipe.epochs} "
        f"epochs done, {trainer.updates} updates each, on {describe(trainer.device)}{half}"
    )


def _observers(trainer: Trainer, tensorboard: Path | None) -> list[Callable[[Row], None]]:
    observers: list[Callable[[Row], None]] = [lambda row: print(_epoch_line(trainer, row), flush=True)]
    if tensorboard is not None:
        observers.append(TensorBoard(tensorboard / trainer.out.name, trainer.progress.epoch))
    return observers


def _epoch_line(trainer: Trainer, row: Row) -> str:
    metric = trainer.task.metric.name
    best = " (best)" if trainer.progress.best_epoch == row["epoch"] else "       "
    return (
        f"epoch {row['epoch']:3}/{trainer.recipe.epochs}  loss {row['train_loss']:.4f}  "
        f"validation {metric} {row[f'validation_{metric}']:.4f}{best}  {row['seconds']:.1f} s"
    )


def _refuse_trained(out: Path) -> None:
    """Keep a run's epochs from being lost to a forgotten --out."""
    if (out / INFO).exists() and (epochs := load_info(out).epoch):
        raise CheckpointError(
            f"{out}: has a checkpoint of {epochs} epoch{'s' * (epochs > 1)}; --resume goes on from it, "
            "--overwrite replaces it, --out names another folder"
        )


def _export_command(family: str, parsed: argparse.Namespace) -> str:
    """What to type next; a run in a folder of its own becomes an entry of its own."""
    words = ["python", "-m", "export", str(parsed.out), "--to", "models/"]
    if parsed.out.name != family:
        words += ["--name", parsed.out.name]
    return shlex.join(words + _data_flags(parsed))


def _data_flags(parsed: argparse.Namespace) -> list[str]:
    return ["--data-dir", str(parsed.data_dir)] if parsed.data_dir is not None else []


def _interrupt_message(trainer: Trainer, parsed: argparse.Namespace) -> str:
    if not trainer.saved:
        return f"interrupted in the first epoch; {parsed.out} still has an earlier run's checkpoint"
    command = ["python", "-m", "train", trainer.family, "--resume", "--out", str(parsed.out)]
    command += _data_flags(parsed)
    epoch = load_info(parsed.out).epoch
    epochs = "1 finished epoch" if epoch == 1 else f"{epoch} finished epochs"
    return f"interrupted; {parsed.out} has {epochs}; go on with: {shlex.join(command)}"

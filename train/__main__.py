"""The command line: `python -m train FAMILY [flags]`.

Trains one model and leaves a checkpoint folder. The flags are the fields of the family's recipe, so that
`python -m train mobilenet --help` is their documentation.
"""

from __future__ import annotations

import difflib
import os
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from train.checkpoint import INFO, CheckpointError, load_info
from train.data.download import DataError
from train.family import FAMILIES, load_family
from train.flags import FlagParser, add_recipe_flags, given_fields
from train.loop import Trainer

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from train.family import Family
    from train.recipe import Recipe

INTERRUPTED = 130  # 128 + SIGINT, what a shell expects of a program that Ctrl-C ended
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the arguments say.

    Returns:
        The exit code: 0, 1 for a failure that the message explains, 130 after Ctrl-C. Wrong arguments exit
        with 2.
    """
    name, flags = split_family(sys.argv[1:] if arguments is None else arguments)
    family = load_family(name)
    parser = make_parser(name, family)
    parsed = parser.parse(flags)
    try:
        recipe = choose_recipe(parsed, family, name)
        device = choose_device(parsed.device)
    except ValueError as error:
        parser.error(str(error))
    except CheckpointError as error:
        return _fail(error)
    if "OMP_NUM_THREADS" not in os.environ:
        # One CPU stays free. Threads spin at every barrier: on two CPUs a step took 50 ms with two threads on
        # an idle machine but 170 to 790 ms beside one busy process; with one thread 71 ms in either case.
        torch.set_num_threads(max(1, available_cpus() - 1))
    try:
        return run(name, family, recipe, parsed, device)
    except (CheckpointError, DataError, FloatingPointError) as error:
        return _fail(error)
    except KeyboardInterrupt:
        print("\ninterrupted before training began", file=sys.stderr)
        return INTERRUPTED


def split_family(arguments: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The family's name and the flags after it; exits where there is no such family."""
    usage = f"usage: python -m train FAMILY [flags]\nfamilies: {', '.join(FAMILIES)}"
    name = arguments[0] if arguments else ""
    if name in FAMILIES:
        return name, arguments[1:]
    if name in ("-h", "--help"):
        print(f"{usage}\nflags: python -m train FAMILY --help")
        raise SystemExit(0)
    near = difflib.get_close_matches(name, FAMILIES, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    print(f"{usage}\nerror: {name or 'nothing'} given as the family{hint}", file=sys.stderr)
    raise SystemExit(2)


def make_parser(name: str, family: Family) -> FlagParser:
    """The parser of one family's flags."""
    parser = FlagParser(
        prog=f"python -m train {name}",
        usage=f"python -m train {name} [flags]",  # all of them at every error would bury the message
        description=(family.__doc__ or "").partition("\n")[0],
    )
    parser.add_argument(
        "--recipe",
        choices=sorted(family.RECIPES),
        default="full",
        help="settings to start from (default: full)",
    )
    parser.add_argument(
        "--data-dir", type=Path, metavar="FOLDER", help="the data set's files, or a folder of them"
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
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one"
    )
    add_recipe_flags(parser, family.Recipe)
    return parser


def choose_recipe(parsed: argparse.Namespace, family: Family, name: str) -> Recipe:
    """The recipe that the flags describe, or with `--resume` the checkpoint's.

    Raises:
        ValueError: a field is out of range, or the flags contradict each other.
        CheckpointError: there is nothing to resume.
    """
    given = given_fields(parsed, family.Recipe)
    if not parsed.resume:
        if parsed.data_dir is not None:
            if given.get("sample"):
                raise ValueError("--sample and --data-dir exclude each other; give one of them")
            given["sample"] = False
        recipe: Recipe = replace(family.RECIPES[parsed.recipe], **given)
        return recipe
    if others := sorted(set(given) - {"epochs"}):
        flags = ", ".join("--" + field.replace("_", "-") for field in others)
        raise ValueError(f"{flags}: --resume keeps the checkpoint's recipe; only --epochs may be given")
    info = load_info(parsed.out, family=name)
    resumed: Recipe = family.Recipe.from_mapping({**info.recipe, **given})
    return resumed


def choose_device(name: str) -> torch.device:
    """The device that `--device` names.

    Raises:
        ValueError: there is no GPU that torch can use.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("--device cuda: torch finds no GPU here; use --device cpu")
    return torch.device(("cuda" if available else "cpu") if name == "auto" else name)


def run(name: str, family: Family, recipe: Recipe, parsed: argparse.Namespace, device: torch.device) -> int:
    """Load the data, train, and say what came out.

    Returns:
        The exit code: 0, or 130 where Ctrl-C ended the training.

    Raises:
        CheckpointError: the checkpoint to resume can't be used.
        DataError: the data can't be read.
        FloatingPointError: the loss is not finite.
    """
    started = time.perf_counter()
    if not parsed.resume and not parsed.overwrite:
        _refuse_trained(parsed.out)
    task = family.task(recipe, parsed.data_dir)
    trainer = Trainer(task, recipe, parsed.out, family=name, metric=family.METRIC, device=device)
    if parsed.resume:
        trainer.resume()
    parameters = sum(weight.numel() for weight in task.model.parameters())
    threads = torch.get_num_threads()
    on_cpu = "1 CPU thread" if threads == 1 else f"{threads} CPU threads"
    where = on_cpu if device.type == "cpu" else torch.cuda.get_device_name()
    print(
        f"{name}: {parameters:,} parameters, {task.dataset}, {trainer.progress.epoch} of {recipe.epochs} "
        f"epochs done, {task.steps_per_epoch} steps each, on {where}",
        flush=True,
    )
    try:
        metrics = trainer.fit()
    except KeyboardInterrupt:
        print(f"\n{_interrupt_message(name, trainer, parsed)}", file=sys.stderr)
        return INTERRUPTED
    print(
        f"test {family.METRIC} {metrics[f'test_{family.METRIC}']:.4f} with the weights of epoch "
        f"{trainer.progress.best_epoch}, {time.perf_counter() - started:.0f} s\n"
        f"checkpoint: {parsed.out}\n"
        f"next: {_export_command(name, parsed.out)}"
    )
    return 0


def _refuse_trained(out: Path) -> None:
    """Keep a run's epochs from being lost to a forgotten --out."""
    if (out / INFO).exists() and (epochs := load_info(out).epoch):
        raise CheckpointError(
            f"{out}: has a checkpoint of {epochs} epoch{'s' * (epochs > 1)}; --resume goes on from it, "
            "--overwrite replaces it, --out names another folder"
        )


def _export_command(family: str, out: Path) -> str:
    """What to type next; a run in a folder of its own becomes an entry of its own."""
    words = ["python", "-m", "export", str(out), "--to", "models/"]
    if out.name != family:
        words += ["--name", out.name]
    return shlex.join(words)


def available_cpus() -> int:
    """CPUs that this process may use: its affinity, and no more than a container's quota.

    torch doesn't look at the quota: under `docker run --cpus 2` on a large machine its threads take turns.
    """
    cpus = len(os.sched_getaffinity(0))
    try:
        quota, period = CPU_QUOTA.read_text(encoding="ascii").split()
    except OSError:
        return cpus
    return cpus if quota == "max" else max(1, min(cpus, int(quota) // int(period)))


def _interrupt_message(name: str, trainer: Trainer, parsed: argparse.Namespace) -> str:
    if not trainer.saved:
        return f"interrupted in the first epoch; {parsed.out} still has an earlier run's checkpoint"
    command = ["python", "-m", "train", name, "--resume", "--out", str(parsed.out)]
    if parsed.data_dir is not None:
        command += ["--data-dir", str(parsed.data_dir)]
    epoch = load_info(parsed.out).epoch
    epochs = "1 finished epoch" if epoch == 1 else f"{epoch} finished epochs"
    return f"interrupted; {parsed.out} has {epochs}; go on with: {shlex.join(command)}"


def _fail(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())

"""Command-line flags from a recipe's fields."""

from __future__ import annotations

import argparse
import difflib
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from collections.abc import Sequence

    from train.family import Family
    from train.recipe import Recipe


DEFAULT_RECIPE = "cpu"
INTERRUPTED = 130  # 128 + SIGINT, what a shell expects of a program that Ctrl-C ended


class FlagParser(argparse.ArgumentParser):
    """A parser that takes no abbreviations and answers an unknown flag with the nearest one it knows."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse all arguments, or exit with code 2 and a message."""
        parsed, unknown = self.parse_known_args(arguments)
        if unknown:
            flag = unknown[0].partition("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, n=1, cutoff=0.7)
            self.error(
                f"{flag}: unknown; " + (f"did you mean {near[0]}?" if near else "--help lists the flags")
            )
        return parsed


def add_recipe_flags(parser: argparse.ArgumentParser, recipe: type[Recipe]) -> None:
    """Add a flag per field, of the field's type; what is not given is absent from the parsed namespace."""
    group = parser.add_argument_group("recipe", "each replaces one field of the recipe that --recipe names")
    for name, hint in get_type_hints(recipe, include_extras=True).items():
        kind, description = get_args(hint)
        options: dict[str, Any] = {"help": description, "default": argparse.SUPPRESS}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is Literal:
            options["choices"] = get_args(kind)
        else:
            options |= {"type": kind, "metavar": kind.__name__.upper()}
        group.add_argument("--" + name.replace("_", "-"), **options)


def given_fields(parsed: argparse.Namespace, recipe: type[Recipe]) -> dict[str, Any]:
    """The recipe's fields that were given as flags."""
    names = [field.name for field in fields(recipe)]
    return {name: getattr(parsed, name) for name in names if hasattr(parsed, name)}


def add_device_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--device`, which `train.device.choose_device` reads."""
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one"
    )


def add_family_flags(parser: argparse.ArgumentParser, family: Family) -> None:
    """Add what every command about a family takes: `--recipe`, `--data-dir` and the recipe's fields."""
    parser.add_argument(
        "--recipe",
        choices=sorted(family.RECIPES),
        help="settings to start from: quick is a minute offline, cpu half an hour at most, reference is for "
        "a GPU (default: cpu)",
    )
    parser.add_argument(
        "--data-dir", type=Path, metavar="FOLDER", help="the data set's files, or a folder of them"
    )
    add_recipe_flags(parser, family.Recipe)


def chosen_recipe(parsed: argparse.Namespace, family: Family) -> Recipe:
    """The recipe that `--recipe` names, with the fields that were given as flags.

    Raises:
        ValueError: a field is out of range, or the flags contradict each other.
    """
    given = given_fields(parsed, family.Recipe)
    if parsed.data_dir is not None and "sample" in {field.name for field in fields(family.Recipe)}:
        if given.get("sample"):
            raise ValueError("--sample and --data-dir exclude each other; give one of them")
        given["sample"] = False
    recipe: Recipe = replace(family.RECIPES[parsed.recipe or DEFAULT_RECIPE], **given)
    return recipe

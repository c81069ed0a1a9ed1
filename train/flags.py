"""Command-line flags from a recipe's fields."""

from __future__ import annotations

import argparse
import difflib
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from collections.abc import Sequence

    from train.recipe import Recipe


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

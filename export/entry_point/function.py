"""Import a function that the command line names as `module:function`, and say where it fails."""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from export.errors import ExportError
from export.explanation import place_of, summary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

MOST_NAMES = 8


def call_function(text: str) -> tuple[Any, Path | None]:
    """Import the module and call the function.

    Args:
        text: `module:function`; the module is a path to a file, or dotted and importable from the current
            folder.

    Returns:
        What the function returned, and the module's file.

    Raises:
        ExportError: there is no such module or function, it takes arguments, or its own code fails.
    """
    module_name, _, name = text.rpartition(":")
    with _importing(module_name) as module:
        function = _function(module, name, text)
        try:
            returned = function()
        except (Exception, SystemExit) as error:
            raise ExportError(_failure(text, "failed", error)) from error
    return returned, Path(module.__file__) if module.__file__ else None


def is_path(module_name: str) -> bool:
    """Whether a module is named by its file."""
    return module_name.endswith(".py") or "/" in module_name


def forgotten_function(text: str) -> str | None:
    """What to say of a module without `:function`; None where the text names no module."""
    name = text.removesuffix(":")
    file = _source_file(name)
    if file is None:
        return None
    if not file.is_file():
        return f"{name}: no such file"
    try:
        found = [node for node in ast.parse(file.read_bytes()).body if isinstance(node, ast.FunctionDef)]
    except (OSError, SyntaxError, ValueError):
        found = []
    names = [node.name for node in found if node.name[0] != "_" and _takes_nothing(node.args)]
    hint = f"; {file.name} has {', '.join(names[:MOST_NAMES])}" if names else ""
    return f"{name} is a Python module: name its function that returns the network, {name}:function{hint}"


def _source_file(name: str) -> Path | None:
    """Of a `.py` file or an importable module."""
    if name.endswith(".py"):
        return Path(name)
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name):
        return None
    try:
        spec = importlib.util.find_spec(name)
    except Exception:  # noqa: BLE001 - looking for a.b imports a, which may raise anything
        return None
    return Path(spec.origin) if spec and spec.origin and spec.has_location else None


def _takes_nothing(arguments: ast.arguments) -> bool:
    positional = len(arguments.posonlyargs) + len(arguments.args)
    return positional == len(arguments.defaults) and None not in arguments.kw_defaults


@contextlib.contextmanager
def _importing(module_name: str) -> Iterator[ModuleType]:
    """The user's module, with its folder first among those that it may import from, as Python runs a script.

    Afterwards the folder is the last: what the network imports later is found, and nothing that torch imports
    later is taken from there.
    """
    folder = str(Path(module_name).resolve().parent if is_path(module_name) else Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield _import_file(Path(module_name)) if is_path(module_name) else _import(module_name)
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise ExportError(
                f"no module {name!r} in {Path.cwd()} or among the installed packages; name a file as "
                "path/to/net.py:function"
            ) from error
        raise ExportError(_failure(name, "can't be imported", error)) from error
    except (Exception, SystemExit) as error:
        raise ExportError(_failure(name, "can't be imported", error)) from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file() or path.suffix != ".py":
        raise ExportError(f"{path}: {'is no .py file' if path.exists() else 'no such file'}")
    # Weights that were saved as whole objects name the module that they were made in; what is loaded stays.
    name = path.stem if path.stem not in sys.modules else f"{path.stem}_entry_point"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # a dataclass looks for its module there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ExportError(_failure(str(path), "can't be imported", error)) from error
    return module


def _failure(what: str, failed: str, error: BaseException) -> str:
    """The user's error with the place in the user's file."""
    if isinstance(error, SyntaxError):
        return f"{what} {failed}: {error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}"
    if isinstance(error, SystemExit):
        return f"{what} {failed}: it ends the program; put what a script does under __name__ == '__main__'"
    place = place_of(error, libraries=False)
    return f"{what} {failed}: {f'{place}: ' if place else ''}{summary(error)}"


def _function(module: ModuleType, name: str, text: str) -> Callable[[], Any]:
    found: Any = getattr(module, name, None)
    if found is None:
        own = [key for key, value in vars(module).items() if _is_own_function(value, module)]
        near = difflib.get_close_matches(name, own) or own
        hint = f"; it has {', '.join(near)}" if near else ", nor any other"
        raise ExportError(f"{text}: no function {name!r} in {_module_file(module)}{hint}")
    if not callable(found) or isinstance(found, nn.Module):
        raise ExportError(f"{text} is a {type(found).__name__}, expected a function that returns it")
    if needed := _needed(found):
        takes = ", ".join(needed)
        raise ExportError(f"{text} takes {takes}; it is called without arguments: give them defaults")
    function: Callable[[], Any] = found
    return function


def _module_file(module: ModuleType) -> str:
    """Where a module comes from, for a message."""
    return module.__file__ or module.__name__


def _is_own_function(value: Any, module: ModuleType) -> bool:
    return inspect.isfunction(value) and value.__module__ == module.__name__


def _needed(function: Callable[..., Any]) -> list[str]:
    """Names of the parameters without which it can't be called."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some built-ins have no signature
        return []
    several = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty and parameter.kind not in several
    ]

"""The house rules that a machine can check: what imports what, and how long things are."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from train.family import FAMILIES

ROOT = Path(__file__).parents[1]
STAGES = ("train", "export", "serve", "loadtest")
# A stage may import these of the others: `serve.pb` is generated from the protocol that they share.
MAY_IMPORT = {"train": (), "export": ("train", "serve.pb"), "serve": (), "loadtest": ("serve.pb",)}
LONGEST_FILE = 300
# Read top to bottom, with nothing hidden elsewhere.
LONGEST_FAMILY = 349
LONGEST_FUNCTION = 60
MEDIAN_FUNCTION = 20


@cache
def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for stage in STAGES
        for path in sorted((ROOT / stage).rglob("*.py"))
        if "pb" not in path.relative_to(ROOT).parts
    }


def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text())


def imported(module: str, *, top_level: bool) -> set[str]:
    """Absolute names that a module imports, type-checking blocks left out."""
    names: set[str] = set()
    parsed = tree(module)
    for node in parsed.body if top_level else ast.walk(parsed):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def reachable(module: str) -> set[str]:
    seen: set[str] = set()
    todo = [module]
    while todo:
        for name in imported(todo.pop(), top_level=True) & modules().keys() - seen:
            seen.add(name)
            todo.append(name)
    return seen


def functions(module: str) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree(module)) if isinstance(node, ast.FunctionDef)]


def length(function: ast.FunctionDef) -> int:
    return (function.end_lineno or 0) - function.lineno + 1


def test_no_import_circle() -> None:
    assert [module for module in modules() if module in reachable(module)] == []


@pytest.mark.parametrize("stage", STAGES)
def test_stages_meet_in_files_and_on_the_wire(stage: str) -> None:
    foreign = {
        (module, name)
        for module in modules()
        if module.split(".")[0] == stage
        for name in imported(module, top_level=False)
        if name.split(".")[0] in STAGES and name.split(".")[0] != stage
        if not any(f"{name}.".startswith(f"{allowed}.") for allowed in MAY_IMPORT[stage])
    }
    assert foreign == set()


def test_serve_loads_neither_torch_nor_onnx() -> None:
    script = f"""
import importlib, sys
for name in {sorted(m for m in modules() if m.startswith("serve"))!r}:
    importlib.import_module(name)
print([n for n in ("torch", "onnx", "train", "export", "PIL", "tokenizers") if n in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_onnxruntime_reports_to_nobody(tmp_path: Path) -> None:
    script = "import os, serve.runtime.session; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT, capture_output=True, text=True, check=True,
        env={"PATH": "", "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.stdout.strip() == "1"
    assert list(tmp_path.iterdir()) == []


def test_files_and_functions_fit_on_a_screen() -> None:
    long_files = {
        module: lines
        for module, path in modules().items()
        if (lines := len(path.read_text().splitlines()))
        > (LONGEST_FAMILY if module.removeprefix("train.") in FAMILIES else LONGEST_FILE)
    }
    assert long_files == {}
    lengths = {(m, f.name): length(f) for m in modules() for f in functions(m)}
    assert {key: n for key, n in lengths.items() if n > LONGEST_FUNCTION} == {}
    assert statistics.median(lengths.values()) < MEDIAN_FUNCTION


def test_no_test_folder_shadows_a_stage() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []
    assert list((ROOT / "proto").rglob("*.py")) == []

"""Ways to make a graph of each precision, in the order in which they are tried.

One way is enough for all but static int8. There, where the metric falls too far, the layers that suffer most
stay float, first one in twenty, then one in ten, one in four, half of them; then the activations' ranges are
found by another method; what is left is fp32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from export.errors import ExportError
from export.int8.calibration import Method, calibrate, prepare
from export.int8.sensitivity import layer_errors
from export.passes.bound_ranges import BoundRanges
from export.passes.clean_up import CleanUp
from export.passes.dynamic_int8 import DynamicInt8
from export.passes.float16 import Float16
from export.passes.static_int8 import SCHEMES, StaticInt8
from export.passes.weight_only import WeightOnly
from export.session import rows, take

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy as np
    import onnx_ir as ir

    from export.passes import Pass
    from export.recipes import Precision
    from export.targets import Target

EXCLUDED = (0.05, 0.1, 0.25, 0.5)
SENSITIVITY_ROWS = 32
BITS: Mapping[Precision, Literal[4, 8]] = {"q8": 8, "q4": 4}


class NotApplicableError(ExportError):
    """A graph can't be had in a precision at all; the message says why."""


@dataclass(frozen=True)
class Attempt:
    """One way to make a graph of some precision.

    Attributes:
        how: for the report, "minmax calibration, /layers/3/Conv float".
        model: the graph that it made.
        changes: name of each pass to what it changed, or why it was not applied; JSON values.
        mixes_rows: whether a row's answer depends on the others of its batch: ranges are taken over them all.
    """

    how: str
    model: ir.Model
    changes: Mapping[str, Any]
    mixes_rows: bool = False


def attempts(
    fp32: ir.Model,
    precision: Precision,
    *,
    rows: Mapping[str, np.ndarray],
    target: Target,
    method: Method,
    say: Callable[[str], None],
) -> Iterator[Attempt]:
    """Graphs of a precision, the best hope first; the next one is only made when it is asked for.

    Args:
        fp32: as exported; stays as it is.
        precision: any but "fp32".
        rows: input name to rows [n, ...] to calibrate with, as a client sends them.
        target: what the graph will run on.
        method: how the ranges of activations are found first.
        say: called with each step's description.

    Raises:
        NotApplicableError: the graph can't be had in this precision.
        ExportError: the rows are no good.
    """
    if precision == "int8":
        yield from _static_attempts(fp32, rows, target, method, say)
        return
    say(f"make {precision}")
    if precision == "int8_dynamic":
        yield _dynamic_attempt(fp32, rows, target)
    else:
        yield _attempt("", fp32.clone(), Float16() if precision == "fp16" else WeightOnly(BITS[precision]))


def apply(passes: Sequence[Pass], model: ir.Model, changes: dict[str, Any]) -> ir.Model:
    """Run passes in order; `changes` gets what each did, or why it was not applied."""
    for step in passes:
        if reason := step.check(model):
            changes[step.name] = f"not applied: {reason}"
            continue
        result = step.apply(model)
        model, changes[step.name] = result.model, dict(result.changes)
    return model


def _static_attempts(
    fp32: ir.Model,
    calibration: Mapping[str, np.ndarray],
    target: Target,
    method: Method,
    say: Callable[[str], None],
) -> Iterator[Attempt]:
    if not rows(calibration):
        raise NotApplicableError(
            "int8 needs rows to calibrate with: name a file of them with --data ROWS.npz"
        )
    scheme = SCHEMES[target]
    prepared = prepare(fp32.clone())
    say(f"calibrate int8 for {target} with {rows(calibration)} rows ({method})")
    ranges = calibrate(prepared, calibration, method)
    yield _attempt(f"{method} calibration", prepared.clone(), StaticInt8(ranges, scheme), CleanUp())
    say("find the layers that suffer most from int8")
    errors = layer_errors(prepared, ranges, scheme, take(calibration, 0, SENSITIVITY_ROWS))
    counts = sorted({max(1, round(share * len(errors))) for share in EXCLUDED})
    for count in counts:
        if count == len(errors):  # that would be fp32
            break
        worst = errors[:count]
        named = ", ".join(f"{error.node} ({error.sqnr_db:.0f} dB)" for error in worst)
        how = f"{method} calibration, {len(worst)} of {len(errors)} layers float: {named}"
        say(f"leave the worst {len(worst)} of {len(errors)} layers float")
        excluded = frozenset(error.node for error in worst)
        yield _attempt(how, prepared.clone(), StaticInt8(ranges, scheme, excluded), CleanUp())
    for other in get_args(Method):
        if other == method:
            continue
        say(f"calibrate again ({other})")
        ranges = calibrate(prepared, calibration, other)
        yield _attempt(f"{other} calibration", prepared.clone(), StaticInt8(ranges, scheme), CleanUp())


def _dynamic_attempt(fp32: ir.Model, calibration: Mapping[str, np.ndarray], target: Target) -> Attempt:
    """Dynamic ranges, bound to constants where there are rows to tell them: so a batch's rows stay apart."""
    model = fp32.clone()
    changes: dict[str, Any] = {}
    bound = BoundRanges(calibration)
    is_bound = rows(calibration) > 0 and bound.check(model) is None
    if is_bound:
        model = apply((bound,), model, changes)
    attempt = _attempt("", model, DynamicInt8(reduce_range=SCHEMES[target].reduce_range))
    return replace(attempt, changes={**changes, **attempt.changes}, mixes_rows=not is_bound)


def _attempt(how: str, model: ir.Model, way: Pass, *after: Pass) -> Attempt:
    """Run a pass that must apply, and what tidies up after it."""
    if reason := way.check(model):
        raise NotApplicableError(f"{way.name} can't be applied: {reason}")
    changes: dict[str, Any] = {}
    return Attempt(how, apply((way, *after), model, changes), changes)

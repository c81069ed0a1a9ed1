"""A comparison as text for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from export.inspection.description import megabytes, prefixed
from export.session import INTRA_OP_THREADS
from export.targets import processor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from export.difference import OutputDifference
    from export.inspection.compare import Comparison

Row = tuple[str, str, str, str]


def table(found: Comparison) -> str:
    """Figures in two columns, then how far the outputs are apart, then what to know about both."""
    a, b = found.inspections
    rows: list[Row] = [("", "A", "B", ""), *_figures(found), *_operators(found)]
    lines = [f"A  {a.path}", f"B  {b.path}", ""]
    width = max(len(label) for label, *_ in rows)
    lines += [f"{label:<{width}}{left:>14}{right:>14}   {note}".rstrip() for label, left, right, note in rows]
    machine = processor()
    where = f"{INTRA_OP_THREADS} thread, {machine['model']}, dot products: {machine['dot_products']}"
    lines += [f"({where})", "", f"B's outputs against A's, on {found.samples}:"]
    lines += [f"  {name}: {_difference(difference)}" for name, difference in found.outputs.items()]
    notes = dict.fromkeys((*found.notes, *a.notes, *b.notes))
    lines += [*found.signature, *(f"note: {note}" for note in notes)]
    return "\n".join(lines)


def _figures(found: Comparison) -> Iterator[Row]:
    a, b = found.inspections
    yield "file", megabytes(a.file_bytes), megabytes(b.file_bytes), _ratio(a.file_bytes, b.file_bytes)
    yield "parameters", f"{a.parameters.count:,}", f"{b.parameters.count:,}", ""
    yield "  in 8 bits or less", f"{a.quantized_parameters:.1%}", f"{b.quantized_parameters:.1%}", ""
    work = (a.work.flops, b.work.flops)
    yield "work", f"{prefixed(work[0])}FLOPs", f"{prefixed(work[1])}FLOPs", ""
    yield "  in integers", f"{a.quantized_work:.1%}", f"{b.quantized_work:.1%}", "of the multiply-adds"
    resident = found.resident_bytes
    if resident[0] is None or resident[1] is None:
        yield "resident memory", "-", "-", "can't be measured on this system"
    else:
        yield "resident memory", megabytes(resident[0]), megabytes(resident[1]), _ratio(*resident)
    for batch, (first, second) in found.latency_ms.items():
        label = f"latency, batch {batch}" if batch.isdecimal() else f"latency, {batch}"
        yield label, f"{first:.3f} ms", f"{second:.3f} ms", f"{first / second:.2f} times as fast"


def _operators(found: Comparison) -> Iterator[Row]:
    for name, (first, second) in sorted(found.operators.items()):
        yield name, str(first), str(second), f"{second - first:+d}"


def _ratio(first: float | None, second: float | None) -> str:
    return f"x {second / first:.2f}" if first and second else ""


def _difference(found: OutputDifference) -> str:
    parts = []
    if found.max_abs is not None and found.mean_abs is not None:
        parts.append(f"max {found.max_abs:.3g}, mean {found.mean_abs:.3g}, relative {found.relative:.3g}")
    if found.cosine is not None:
        parts.append(f"cosine {found.cosine:.6f}")
    if found.top1 is not None:
        parts.append(f"top-1 agrees in {found.top1:.1%}")
    return ", ".join([*parts, f"{found.equal:.1%} of the numbers equal"])

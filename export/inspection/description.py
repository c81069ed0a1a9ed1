"""An inspection as text for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from export.inspection.inspect import Inspection

WIDTH = 90


def describe(found: Inspection) -> str:
    """The figures as text for people."""
    parameters, work = found.parameters, found.work
    sizes = ", ".join(f"{name}={size}" for name, size in found.sizes.items())
    types = ", ".join(f"{kind} {megabytes(size)}" for kind, size in parameters.bytes_by_type.items())
    opsets = ", ".join(f"{domain} {version}" for domain, version in found.opsets.items())
    activations = megabytes(found.peak_activation_bytes)
    rows = [
        *(("input", f"{tensor.name}: {tensor}") for tensor in found.inputs),
        *(("output", f"{tensor.name}: {tensor}") for tensor in found.outputs),
        ("opsets", f"{opsets}; IR version {found.ir_version}"),
        ("producer", found.producer or "not named"),
        ("file", megabytes(found.file_bytes)),
        ("parameters", f"{parameters.count:,}"),
        ("stored", f"{megabytes(parameters.bytes)}: {types}" if types else "nothing"),
        ("quantized", f"{found.quantized_parameters:.1%} of the parameters in 8 bits or less"),
        ("", f"{found.quantized_work:.1%} of the multiply-adds in integer operators"),
        (
            "work",
            f"{prefixed(work.flops)}FLOPs ({prefixed(work.multiply_adds)}MACs)"
            + (f" for {sizes}" if sizes else ""),
        ),
        *(("not counted", f"{count} x {what}") for what, count in work.not_counted.items()),
        (
            "memory",
            f"{megabytes(found.memory_bytes)}: weights, and activations up to {activations}",
        ),
        *(("operators", line) for line in _operator_lines(found.operators)),
        *(("note", note) for note in found.notes),
    ]
    return "\n".join([found.path, *_aligned(rows)])


def _aligned(rows: Sequence[tuple[str, str]]) -> list[str]:
    before = ""
    lines = []
    for label, text in rows:
        lines.append(f"  {'' if label == before else label:<13}{text}")
        before = label or before
    return lines


def _operator_lines(operators: Mapping[str, int]) -> list[str]:
    """As many to a line as fit into 90 characters."""
    lines = [""]
    for name, count in operators.items():
        text = f"{name} {count}"
        if len(lines[-1]) + len(text) > WIDTH:
            lines.append("")
        lines[-1] += f", {text}" if lines[-1] else text
    return lines


def megabytes(size: int) -> str:
    """A size in the largest unit that it has one of."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size} B"


def prefixed(count: int) -> str:
    """A number with a prefix in place of its zeros."""
    for unit, factor in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} "

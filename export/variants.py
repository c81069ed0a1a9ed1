"""The precisions of one graph: made, verified, measured side by side, and the one that is served."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from export import recipes
from export.errors import ExportError, GateError
from export.graph import check_graph, export_graph, serialize
from export.latency import BATCHES, measure
from export.memory import resident_bytes
from export.metric_gate import MetricError, check_score
from export.original import run_original
from export.passes.any_size_pixels import AnySizePixels
from export.passes.fix_shapes import FixShapes
from export.passes.flatten_normalization import FlattenNormalization
from export.passes.top_k import TopK
from export.quantization import Attempt, NotApplicableError, apply, attempts
from export.session import CPU, Session, cycle, usable_providers
from export.targets import is_here, provider
from export.verify import compare, verify

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import onnx_ir as ir

    from export.original import Original
    from export.passes import Pass
    from export.recipes import Precision
    from export.settings import ExportSettings, GraphOptions
    from export.verify import Differences, Findings
    from train.family import ServingGraph


WORTHWHILE = 1.1
"""A graph that is not this many times as fast as fp32 gains nothing that shows."""


@dataclass(frozen=True)
class Variant:
    """A graph of one precision that passed every gate.

    Attributes:
        precision: of it.
        model: the graph.
        content: of its `.onnx` file.
        how: which way it was made, of several.
        changes: name of each pass to what it changed, or why it was not applied; JSON values.
        findings: what the gates measured.
        mixes_rows: whether a row's answer depends on the others of its batch.
        latencies: batch size to median milliseconds of a run.
        resident_bytes: what the loaded graph takes of a process's memory; None where it can't be measured.
    """

    precision: Precision
    model: ir.Model
    content: bytes
    how: str
    changes: Mapping[str, Any]
    findings: Findings
    mixes_rows: bool
    latencies: Mapping[int, float]
    resident_bytes: int | None = None


@dataclass(frozen=True)
class Variants:
    """What became of one graph.

    Attributes:
        graphs: precision to variant; those asked for, and fp32.
        written: precisions to write, the default first.
        skipped: precision to why there is none.
        notes: what a reader should know about the choice.
        original: torch's answers.
    """

    graphs: Mapping[Precision, Variant]
    written: tuple[Precision, ...]
    skipped: Mapping[Precision, str]
    notes: tuple[str, ...]
    original: Original

    @property
    def default(self) -> Variant:
        """The one that is served."""
        return self.graphs[self.written[0]]


def make_variants(graph: ServingGraph, settings: ExportSettings, say: Callable[[str], None]) -> Variants:
    """Translate a graph, make it in each precision, verify and measure all.

    Raises:
        ExportError: it can't be translated, fp32 isn't right, or a precision that was asked for can't be had.
    """
    original = run_original(graph)
    maker = Maker(graph, settings, original, say)
    graphs: dict[Precision, Variant] = {"fp32": maker.fp32_variant()}
    skipped: dict[Precision, str] = {}
    wanted = settings.precisions or maker.recipe()
    for precision in wanted:
        if precision == "fp32":
            continue
        try:
            graphs[precision] = maker.variant(precision)
        except (NotApplicableError, GateError) as error:
            if settings.precisions:
                raise
            skipped[precision] = str(error)
            say(f"note: no {precision}: {error}")
    graphs = _measured(graphs, graph, provider(settings.target), say)
    default, notes = choose_default(list(graphs.values()), wanted, settings)
    if settings.precisions:
        return Variants(graphs, settings.precisions, skipped, notes, original)
    written = (default, *(name for name in graphs if name != default))
    return Variants(graphs, written, skipped, notes, original)


class Maker:
    """Makes the variants of one graph."""

    def __init__(
        self,
        graph: ServingGraph,
        settings: ExportSettings,
        original: Original,
        say: Callable[[str], None],
    ) -> None:
        self._graph, self._settings, self._original, self._say = graph, settings, original, say
        self._changes: dict[str, Any] = {}
        translated = export_graph(graph.module, graph.example)
        self._kind = recipes.kind(translated)
        self._fp32 = apply((FlattenNormalization(),), translated, self._changes)

    def recipe(self) -> tuple[Precision, ...]:
        """The precisions of the table, for the graph's kind and the target."""
        return recipes.PRECISIONS[self._kind][self._settings.target]

    def fp32_variant(self) -> Variant:
        """The graph as it was translated."""
        return self._finish("fp32", Attempt("", self._fp32.clone(), {}))

    def variant(self, precision: Precision) -> Variant:
        """The first attempt that passes every gate.

        Raises:
            GateError: of the one that came closest, when none does.
            NotApplicableError: the graph can't be had in this precision.
            ExportError: a gate refuses the graph.
        """
        refused: list[GateError] = []
        for attempt in attempts(
            self._fp32,
            precision,
            rows=self._graph.data.calibration,
            target=self._settings.target,
            method=self._settings.method,
            say=self._say,
        ):
            try:
                return self._finish(precision, attempt)
            except GateError as error:
                refused.append(error)
                if attempt.how:
                    self._say(f"note: {attempt.how}: {error}")
        raise min(refused, key=lambda error: error.worse if isinstance(error, MetricError) else math.inf)

    def _finish(self, precision: Precision, attempt: Attempt) -> Variant:
        """Put the ends on, verify."""
        changes = {**self._changes, **attempt.changes}
        model = _add_ends(attempt.model, self._graph, self._settings.options, changes)
        check_graph(model)
        content = serialize(model)
        tolerance = self._tolerance(precision)
        self._say(f"verify {precision} on {len(self._graph.data.targets)} held-out rows")
        findings = verify(
            precision,
            Session(content),
            self._graph,
            self._original,
            tolerance=tolerance,
            mixes_rows=attempt.mixes_rows,
        )
        elsewhere = {
            name: self._on_provider(precision, content, name, tolerance)
            for name in usable_providers()
            if name != CPU
        }
        findings = replace(findings, providers=elsewhere)
        return Variant(precision, model, content, attempt.how, changes, findings, attempt.mixes_rows, {})

    def _tolerance(self, precision: Precision) -> float:
        if self._settings.tolerance is not None:
            return self._settings.tolerance / 100
        return recipes.tolerance(precision, relative=self._graph.metric.relative)

    def _on_provider(
        self, precision: Precision, content: bytes, name: str, tolerance: float
    ) -> Differences | str:
        """The differences from torch on an execution provider, or why it can't run the graph.

        Raises:
            ExportError: it can't, and is the target's.
            MetricError: the metric is too bad there.
        """
        try:
            outputs = Session(content, name).run_in_batches(self._graph.data.held_out)
        except ExportError as error:
            if name == provider(self._settings.target):
                raise
            self._say(f"note: {name}, which is not the target's, doesn't run {precision}: {error}")
            return str(error)
        check_score(precision, self._graph, self._original, outputs, tolerance)
        return compare(outputs, self._original.outputs)


def _add_ends(
    model: ir.Model, graph: ServingGraph, options: GraphOptions, changes: dict[str, Any]
) -> ir.Model:
    """Pixels of any size in front, the best classes behind, axes fixed.

    Raises:
        ExportError: one that was asked for can't be had.
    """
    if graph.image and options.any_size and not options.encoded_image:
        model = apply((AnySizePixels(graph.image),), model, changes)
    demanded: list[Pass] = []
    if options.top_k:
        demanded.append(TopK(options.top_k, graph.example.outputs[0], keep_logits=True))
    if options.fixed:
        demanded.append(FixShapes(options.fixed))
    for step in demanded:
        if reason := step.check(model):
            raise ExportError(f"{step.name} can't be applied: {reason}")
        model = apply((step,), model, changes)
    return model


def _measured(
    graphs: Mapping[Precision, Variant], graph: ServingGraph, where: str, say: Callable[[str], None]
) -> dict[Precision, Variant]:
    say("measure latency and memory")
    sessions: dict[str, Session] = {name: Session(variant.content, where) for name, variant in graphs.items()}
    inputs = graph.data.held_out
    fixed = next(iter(sessions.values())).batch_size
    latencies = {batch: measure(sessions, inputs, batch) for batch in ((fixed,) if fixed else BATCHES)}
    one = cycle(inputs, fixed or 1)
    return {
        name: replace(
            variant,
            latencies={batch: medians[name] for batch, medians in latencies.items()},
            resident_bytes=resident_bytes(variant.content, one),
        )
        for name, variant in graphs.items()
    }


def choose_default(
    variants: Sequence[Variant], wanted: Sequence[Precision], settings: ExportSettings
) -> tuple[Precision, tuple[str, ...]]:
    """The fastest at batch 1, where this machine is of the target's kind; else the recipe's first.

    Returns:
        Its precision, and what to say about it.
    """
    names = [variant.precision for variant in variants]
    preferred: Precision = next((name for name in wanted if name in names), "fp32")
    if not is_here(settings.target):
        note = f"these times are not {settings.target}'s, which can't be measured here: they decide nothing"
        return preferred, (note,)
    fp32 = next(variant for variant in variants if variant.precision == "fp32")
    batch = min(fp32.latencies)
    speedups = {variant.precision: fp32.latencies[batch] / variant.latencies[batch] for variant in variants}
    best: Precision = max(speedups, key=lambda name: speedups[name])
    slow = [name for name in names if name != "fp32" and speedups[name] < WORTHWHILE]
    notes = tuple(
        f"{name} gains nothing in speed: {speedups[name]:.2f} times as fast as fp32, where {WORTHWHILE} "
        "would make it the default"
        for name in slow
    )
    return ("fp32" if speedups[best] < WORTHWHILE else best), notes

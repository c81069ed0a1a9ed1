"""Opening a graph on the accelerators that its model wants, or, where that is allowed, on what works."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import onnxruntime as ort

from serve.errors import ModelLoadError
from serve.runtime.placement import RECORDING, Placement, read_placement
from serve.runtime.providers import CPU, CPU_NEEDED, NOT_THERE, create_session, first_line, missing
from serve.runtime.thread_pool import set_threads

if TYPE_CHECKING:
    from pathlib import Path

    from serve.runtime.session import SessionSettings

logger = logging.getLogger(__name__)

# Triton's optimization.graph.level: 0 is "not set", 2 switches every optimization off.
GRAPH_LEVELS = {
    0: ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    1: ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    -1: ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    2: ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}

# OpenVINO's sessions can't be made by two threads at once; others compile, which one at a time does as fast.
_ACCELERATED = threading.Lock()


def open_session(path: Path, settings: SessionSettings) -> tuple[Any, SessionSettings, Placement]:
    """An onnxruntime.InferenceSession, the settings with the accelerators that it uses, and what runs where.

    Raises:
        ModelLoadError: the graph can't be loaded, or, where the settings are strict, not wholly on the
            accelerators that they name.
    """
    model = settings.model or path.parent.parent.name
    if settings.strict and settings.accelerators:
        session, used = _open_strictly(path, settings), settings
    else:
        session, used = _open_on_what_works(path, settings, model)
    placement = read_placement(session)
    for accelerator in used.accelerators:
        if placement.nodes.get(accelerator.name) == 0:
            logger.warning("'%s': %s takes none of the graph's nodes", model, accelerator.name)
    logger.info("'%s': %s", model, placement)
    return session, used, placement


def _open_on_what_works(path: Path, settings: SessionSettings, model: str) -> tuple[Any, SessionSettings]:
    """Try with all accelerators, then without the first, and so on down to the CPU alone."""
    problems = {a.name: problem for a in settings.accelerators if (problem := missing(a.name))}
    rest = [a for a in settings.accelerators if a.name not in problems]
    while True:
        used = replace(settings, accelerators=tuple(rest))
        try:
            session = _create(path, used, strict=False)
            break
        except ModelLoadError as error:
            if not rest:
                raise
            problems[rest.pop(0).name] = str(error)
    in_use = session.get_providers()
    for accelerator in rest:
        if accelerator.name not in in_use:
            problems[accelerator.name] = NOT_THERE
    for name, problem in problems.items():
        logger.warning("'%s': %s can't be used, going on without it: %s", model, name, problem)
    return session, replace(settings, accelerators=tuple(a for a in rest if a.name not in problems))


def _open_strictly(path: Path, settings: SessionSettings) -> Any:
    names = ", ".join(accelerator.name for accelerator in settings.accelerators)
    advice = "change the model's config, or take --provider-policy=fallback"
    for accelerator in settings.accelerators:
        problem = missing(accelerator.name)
        if problem:
            raise ModelLoadError(f"{accelerator.name} can't be used: {problem}; {advice}")
    try:
        session = _create(path, settings, strict=True)
    except ModelLoadError as error:
        if not CPU_NEEDED.search(str(error)):
            raise ModelLoadError(f"it can't be loaded on {names}: {error}; {advice}") from error
        problem = _needs_cpu(path, settings)
        raise ModelLoadError(f"it doesn't run wholly on {names}: {problem}; {advice}") from error
    unused = [a.name for a in settings.accelerators if a.name not in session.get_providers()]
    if unused:
        raise ModelLoadError(f"{', '.join(unused)} can't be used: {NOT_THERE}; {advice}")
    return session


def _needs_cpu(path: Path, settings: SessionSettings) -> str:
    """Which nodes a strict session needed the CPU for, which onnxruntime doesn't say."""
    try:
        session = _create(path, settings, strict=False)
    except ModelLoadError as error:
        return str(error)
    in_use = session.get_providers()
    unused = [a.name for a in settings.accelerators if a.name not in in_use]
    if unused:
        return f"{', '.join(unused)} can't be used: {NOT_THERE}"
    placement = read_placement(session)
    if not placement.nodes:
        return "some of its nodes need the CPU"
    on_cpu, every = placement.nodes[CPU], sum(placement.nodes.values())
    return f"{on_cpu} of {every} nodes need the CPU ({placement.most_frequent(CPU)})"


def _create(path: Path, settings: SessionSettings, *, strict: bool) -> Any:
    try:
        options = _options(settings)
        if strict:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        if not settings.accelerators:
            return create_session(str(path), options, (), settings.intra_op_threads)
        with _ACCELERATED:
            return create_session(str(path), options, settings.accelerators, settings.intra_op_threads)
    except Exception as error:  # onnxruntime's errors share no base class; UnicodeDecodeError too is one
        # Clients see this message, and the server's folders are none of their business.
        raise ModelLoadError(first_line(error).replace(f"{path.parent}/", "")) from error


def _options(settings: SessionSettings) -> Any:
    options = ort.SessionOptions()
    set_threads(options, settings.intra_op_threads, settings.inter_op_threads, shared=settings.shared_pool)
    if settings.parallel:
        options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    options.graph_optimization_level = GRAPH_LEVELS[settings.graph_level]
    options.enable_cpu_mem_arena = settings.memory_arena
    options.enable_mem_pattern = settings.memory_pattern
    # Spinning threads burn the cores that the next request wants; a board has no core to spare.
    entries = {"session.intra_op.allow_spinning": "0", "session.inter_op.allow_spinning": "0", RECORDING: "1"}
    for name, value in {**entries, **settings.entries}.items():
        options.add_session_config_entry(name, value)
    # Fatal only: what goes wrong comes back as an exception, and a client's bad index is no log line.
    options.log_severity_level = 4
    return options

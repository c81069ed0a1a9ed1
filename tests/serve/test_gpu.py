"""Graphs on a real GPU, where there is one: CUDA's answers, its memory limit, TensorRT's engines on disk."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from serve.loading import golden
from serve.runtime.providers import CPU, CUDA, TENSORRT, Accelerator, problem
from serve.runtime.session import Session, SessionSettings
from tests.graphs import addition, write_model

if TYPE_CHECKING:
    from pathlib import Path

on_cuda = pytest.mark.skipif(bool(problem(CUDA)), reason=f"no CUDA here: {problem(CUDA)}")
on_tensorrt = pytest.mark.skipif(bool(problem(TENSORRT)), reason=f"no TensorRT here: {problem(TENSORRT)}")

ROWS = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)


def answer(session: Session) -> np.ndarray:
    return session.run({"a": ROWS, "b": ROWS}, ["sum"])[0]


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return write_model(tmp_path / "adder", addition())


@on_cuda
@pytest.mark.parametrize("search", ["HEURISTIC", "EXHAUSTIVE", "DEFAULT"])
def test_cuda_answers_what_the_cpu_answers(graph: Path, search: str) -> None:
    cuda = Accelerator(CUDA, {"cudnn_conv_algo_search": search, "gpu_mem_limit": str(1 << 30)})
    session = Session(graph, SessionSettings((cuda,), strict=True))
    assert session.providers[0] == CUDA
    on_cpu = answer(Session(graph, SessionSettings()))
    np.testing.assert_allclose(answer(session), on_cpu, atol=golden.ACCELERATOR_ROUNDING)


@on_cuda
def test_what_is_over_the_memory_limit_ends_the_request_and_not_the_server(graph: Path) -> None:
    cuda = Accelerator(CUDA, {"gpu_mem_limit": str(1 << 20), "arena_extend_strategy": "kSameAsRequested"})
    session = Session(graph, SessionSettings((cuda,)))
    large = np.zeros((1 << 20, 3), np.float32)
    with pytest.raises(Exception, match=r"(?i)memory|allocat"):
        session.run({"a": large, "b": large}, ["sum"])
    assert answer(session).shape == ROWS.shape


@on_tensorrt
@pytest.mark.parametrize("precision", [{}, {"trt_fp16_enable": "1"}])
def test_tensorrt_keeps_its_engines(graph: Path, tmp_path: Path, precision: dict[str, str]) -> None:
    folder = tmp_path / "engines"
    folder.mkdir()
    options = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(folder), **precision}
    wanted = SessionSettings((Accelerator(TENSORRT, options), Accelerator(CUDA)))
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        session = Session(graph, wanted)
        found = answer(session)
        seconds.append(time.perf_counter() - started)
        session.close()
    on_cpu = answer(Session(graph, SessionSettings()))
    np.testing.assert_allclose(found, on_cpu, atol=golden.ACCELERATOR_ROUNDING)
    assert list(folder.glob("*.engine"))
    assert seconds[1] < seconds[0]
    assert CPU in session.providers

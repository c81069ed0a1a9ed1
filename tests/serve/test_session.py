"""One graph in memory: its knobs reach onnxruntime, its runs end as they should, its memory goes back."""

from __future__ import annotations

import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from serve.errors import CanceledError, InternalError, InvalidArgumentError, ModelLoadError
from serve.request import Call
from serve.runtime.placement import Placement
from serve.runtime.providers import CPU, CUDA, TENSORRT, Accelerator
from serve.runtime.session import Session, SessionSettings
from tests.graphs import addition, gather, identity, slow, write_model

ROOT = Path(__file__).parents[2]
ONES = np.ones((2, 3), np.float32)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("m") / "adder", addition())


def test_a_run_needs_no_call(path: Path) -> None:
    difference, total = Session(path, SessionSettings()).run({"a": ONES, "b": ONES}, ["difference", "sum"])
    assert (difference.tolist(), total.tolist()) == ([[0] * 3] * 2, [[2] * 3] * 2)


def test_bfloat16_needs_no_call_either(tmp_path: Path) -> None:
    session = Session(write_model(tmp_path, identity(["n"], 16)), SessionSettings())
    bits = np.array([0x3F80, 0xC000], np.uint16)
    assert session.run({"x": bits}, ["y"])[0].tolist() == bits.tolist()


def test_a_cancelled_call_does_not_run(path: Path) -> None:
    call = Call()
    call.cancel()
    with pytest.raises(CanceledError):
        Session(path, SessionSettings()).run({"a": ONES, "b": ONES}, ["sum"], call)


def test_a_call_lets_go_of_its_run(path: Path) -> None:
    call = Call()
    Session(path, SessionSettings()).run({"a": ONES, "b": ONES}, ["sum"], call)
    assert call.run_options is None


@pytest.mark.parametrize("call", [None, Call()])
def test_errors_are_told_apart_with_and_without_a_call(path: Path, tmp_path: Path, call: Call | None) -> None:
    with pytest.raises(InvalidArgumentError):
        Session(path, SessionSettings()).run({"a": ONES[:, :1, None], "b": ONES}, ["sum"], call)
    taker = Session(write_model(tmp_path, gather()), SessionSettings())
    with pytest.raises(InternalError, match="indices element out of data bounds"):
        taker.run({taker.inputs[0].name: np.array([99], np.int64)}, [taker.outputs[0].name], call)


def test_closing_frees_the_graph_at_once(path: Path) -> None:
    session = Session(path, SessionSettings())
    graph = weakref.ref(session._session)
    session.close()
    assert graph() is None
    with pytest.raises(InternalError, match="closed"):
        session.run({"a": ONES, "b": ONES}, ["sum"])


def test_the_knobs_reach_onnxruntime(path: Path) -> None:
    session = Session(
        path,
        SessionSettings(
            intra_op_threads=2,
            inter_op_threads=3,
            parallel=True,
            graph_level=2,
            memory_arena=False,
            memory_pattern=False,
            entries={"session.disable_prepacking": "1", "session.intra_op.allow_spinning": "1"},
        ),
    )
    options = session._session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 3)
    assert options.execution_mode == ort.ExecutionMode.ORT_PARALLEL
    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    assert (options.enable_cpu_mem_arena, options.enable_mem_pattern) == (False, False)
    assert options.get_session_config_entry("session.disable_prepacking") == "1"
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "1"
    assert options.get_session_config_entry("session.inter_op.allow_spinning") == "0"


def test_by_default_one_run_has_one_thread_and_nothing_spins(path: Path) -> None:
    options = Session(path, SessionSettings())._session.get_session_options()
    assert (options.intra_op_num_threads, options.execution_mode) == (1, ort.ExecutionMode.ORT_SEQUENTIAL)
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert (options.enable_cpu_mem_arena, options.enable_mem_pattern) == (True, True)


def test_arenas_are_given_back_where_asked(path: Path) -> None:
    shrinking = Session(path, SessionSettings(arena_shrinkage="cpu:0"))
    assert shrinking.run({"a": ONES, "b": ONES}, ["sum"])[0].tolist() == [[2] * 3] * 2
    with pytest.raises((InternalError, InvalidArgumentError), match="arena"):
        Session(path, SessionSettings(arena_shrinkage="cpu:7")).run({"a": ONES, "b": ONES}, ["sum"])
    with pytest.raises(ModelLoadError, match="enable_mem_arena"):
        SessionSettings(arena_shrinkage="cpu:0", memory_arena=False)


def test_what_onnxruntime_refuses_is_a_load_error(path: Path) -> None:
    entries = {"session.intra_op_thread_affinities": "first"}
    with pytest.raises(ModelLoadError, match="Processor id must consist of only digits"):
        Session(path, SessionSettings(intra_op_threads=2, entries=entries))


def test_placement_counts_nodes_and_operators(path: Path) -> None:
    session = Session(path, SessionSettings())
    assert session.placement.operators == {CPU: {"Add": 1, "Sub": 1}}
    assert session.placement.nodes == {CPU: 2}
    assert session.placement.properties() == {"execution_providers": CPU, f"nodes.{CPU}": "2"}
    assert str(session.placement) == f"2 nodes on {CPU}"
    assert (session.providers, session.file_bytes) == ((CPU,), path.stat().st_size)


def test_placement_counts_the_nodes_of_inner_graphs(tmp_path: Path) -> None:
    session = Session(write_model(tmp_path, slow()), SessionSettings(graph_level=2))
    assert session.placement.operators is not None
    assert {"Loop", "MatMul"} <= session.placement.operators[CPU].keys()


def test_placement_says_what_the_cpu_took_and_when_nobody_knows() -> None:
    shared = Placement((CUDA, CPU), {CUDA: {"Conv": 9}, CPU: {"Shape": 3, "Gather": 1}})
    assert str(shared) == f"9 nodes on {CUDA}, 4 nodes on {CPU} (3 Shape, 1 Gather)"
    assert shared.properties()[f"nodes.{CPU}"] == "4"
    assert Placement((CUDA, CPU), {CPU: {"Shape": 1}}).nodes == {CUDA: 0, CPU: 1}
    unknown = Placement((CUDA, CPU))
    assert (unknown.nodes, unknown.properties()) == ({}, {"execution_providers": f"{CUDA},{CPU}"})
    assert "doesn't tell" in str(unknown)


def test_settings_step_down_one_accelerator_at_a_time() -> None:
    both = SessionSettings((Accelerator(TENSORRT), Accelerator(CUDA, {"device_id": "1"})), instances=2)
    one = both.demoted()
    assert one is not None
    assert (one.accelerators, one.instances) == ((Accelerator(CUDA, {"device_id": "1"}),), 2)
    none = one.demoted()
    assert (none, none and none.demoted()) == (both.on_cpu(), None)
    assert SessionSettings(both.accelerators, strict=True).demoted() is None
    assert pickle.loads(pickle.dumps(both)) == both  # noqa: S301 - its own


def test_a_shared_pool_has_one_set_of_threads(path: Path) -> None:
    """In a process of its own: the pool is the process's for good, and sessions that don't ask get it too."""
    code = (
        "import os, sys; from pathlib import Path\n"
        "from serve.runtime.providers import problem\n"
        "from serve.runtime.session import Session, SessionSettings\n"
        "def load(shared):\n"
        "    return Session(Path(sys.argv[1]), SessionSettings(intra_op_threads=2, shared_pool=shared))\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "kept = [load(True) for _ in range(3)] + [load(False)]\n"
        "print(len(os.listdir('/proc/self/task')) - before, repr(problem('CPUExecutionProvider')))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (ended.stdout, ended.stderr.count("shared pool spins")) == ("1 ''\n", 1)

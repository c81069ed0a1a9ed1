"""Cores, execution providers that are there and that aren't, and what a model gets under either policy."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from serve.errors import ModelLoadError
from serve.runtime import fallback, providers
from serve.runtime.command import main
from serve.runtime.cores import usable_cores
from serve.runtime.providers import (
    CPU,
    CUDA,
    TENSORRT,
    Accelerator,
    create_session,
    missing,
    problem,
    provider_name,
    short_name,
)
from serve.runtime.session import Session, SessionSettings
from tests.graphs import addition, write_model

ROOT = Path(__file__).parents[2]
AZURE = "AzureExecutionProvider"
NAMES = sorted({*ort.get_all_providers()} - {AZURE, CPU})
ABSENT = next(name for name in NAMES if missing(name))
WANTED = (Accelerator(ABSENT),)
THREE = np.full((1, 3), 3, np.float32)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return write_model(tmp_path / "adder", addition())


@pytest.fixture
def listed_but_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every provider claims to be there, as CUDA does in a build for GPUs on a machine without one."""
    monkeypatch.setattr(fallback, "missing", lambda _: "")


def runs(session: Session) -> bool:
    return bool((session.run({"a": THREE, "b": THREE}, ["sum"])[0] == 6).all())


@pytest.mark.parametrize("name", NAMES)
def test_each_provider_goes_by_its_name_and_its_short_name(name: str) -> None:
    assert (
        provider_name(name)
        == provider_name(short_name(name))
        == provider_name(short_name(name).upper())
        == name
    )


@pytest.mark.parametrize("name", ["azure", AZURE, "cpu", "frobnicator", ""])
def test_what_is_no_accelerator_is_refused_with_the_list(name: str) -> None:
    with pytest.raises(ModelLoadError, match=rf"'{name}' is unknown, expected one of .*cuda.*tensorrt"):
        provider_name(name)


def test_azure_is_never_used() -> None:
    assert "cloud" in problem(AZURE)
    assert AZURE not in providers.DEFAULT_ORDER


def test_the_cpu_works_and_an_absent_provider_says_so() -> None:
    assert problem(CPU) == ""
    assert problem(ABSENT) == "this onnxruntime was built without it"


def test_fallback_goes_on_and_says_what_is_missing(graph: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        session = Session(graph, SessionSettings(WANTED, model="m"))
    assert (session.providers, session.settings.accelerators, runs(session)) == ((CPU,), (), True)
    assert (
        f"'m': {ABSENT} can't be used, going on without it: this onnxruntime was built without it"
        in caplog.text
    )
    assert "'m': 2 nodes on CPUExecutionProvider" in caplog.text


def test_strict_refuses_a_missing_provider(graph: Path) -> None:
    with pytest.raises(ModelLoadError, match=rf"{ABSENT} can't be used: .* --provider-policy=fallback"):
        Session(graph, SessionSettings(WANTED, strict=True))


def test_strict_without_a_wish_runs_on_the_cpu(graph: Path) -> None:
    assert runs(Session(graph, SessionSettings(strict=True)))


@pytest.mark.usefixtures("listed_but_broken")
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_is_left_out_in_silence_is_noticed(
    graph: Path, caplog: pytest.LogCaptureFixture
) -> None:
    session = Session(graph, SessionSettings(WANTED, model="m"))
    assert (session.settings.accelerators, runs(session)) == ((), True)
    assert f"'m': {ABSENT} can't be used, going on without it: its libraries" in caplog.text


@pytest.mark.usefixtures("listed_but_broken")
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_strict_refuses_nodes_that_need_the_cpu(graph: Path) -> None:
    with pytest.raises(ModelLoadError, match=rf"doesn't run wholly on {ABSENT}: {ABSENT} can't be used"):
        Session(graph, SessionSettings(WANTED, strict=True))


@pytest.mark.usefixtures("listed_but_broken")
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_one_provider_after_the_other_is_given_up(graph: Path, caplog: pytest.LogCaptureFixture) -> None:
    """onnxruntime refuses these two together; without the first it leaves out the second."""
    pair = (Accelerator(TENSORRT), Accelerator("NvTensorRTRTXExecutionProvider"))
    session = Session(graph, SessionSettings(pair))
    assert (session.settings.accelerators, runs(session)) == ((), True)
    assert f"'adder': {TENSORRT} can't be used, going on without it: Cannot enable both" in caplog.text
    assert "'adder': NvTensorRTRTXExecutionProvider can't be used" in caplog.text
    with pytest.raises(ModelLoadError, match=r"can't be loaded on .*Cannot enable both"):
        Session(graph, SessionSettings(pair, strict=True))


def test_cuda_finds_libraries_that_pip_installed_and_searches_by_heuristics(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What onnxruntime is handed; its complaints of libraries that pip didn't install are not shown."""
    handed: list[object] = []
    monkeypatch.setattr(ort, "preload_dlls", lambda: print("Failed to load libcublas.so"), raising=False)
    monkeypatch.setattr(ort, "InferenceSession", lambda *_, **more: handed.append(more["providers"]))
    providers._load_cuda.cache_clear()
    for options in ({}, {"cudnn_conv_algo_search": "DEFAULT", "gpu_mem_limit": "1000"}):
        create_session(b"", ort.SessionOptions(), (Accelerator(TENSORRT), Accelerator(CUDA, options)), 1)
    assert handed == [
        [(TENSORRT, {}), (CUDA, {"cudnn_conv_algo_search": "HEURISTIC"}), CPU],
        [(TENSORRT, {}), (CUDA, {"cudnn_conv_algo_search": "DEFAULT", "gpu_mem_limit": "1000"}), CPU],
    ]
    assert capsys.readouterr().out == ""
    providers._load_cuda.cache_clear()


def test_a_broken_graph_is_not_blamed_on_its_provider(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(ModelLoadError, match=r"INVALID_PROTOBUF.*Load model from model\.onnx") as caught:
        Session(path, SessionSettings(WANTED))
    assert str(tmp_path) not in str(caught.value)
    assert caplog.text == ""


def test_the_command_lists_short_names_and_the_default_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert f"cpu             {CPU}         usable\n" in listed
    assert "Default order: cuda, " in listed
    assert short_name(ABSENT) in listed.partition("Not in this onnxruntime: ")[2].partition("\n")[0]


def test_a_plugin_package_is_found_and_its_fault_is_told(tmp_path: Path) -> None:
    """In a process of its own: plugins are looked for once."""
    (tmp_path / "onnxruntime_ep_fake.py").write_text(
        "def get_ep_name():\n    return 'FakeExecutionProvider'\n"
        "def get_library_path():\n    return '/nowhere/libfake.so'\n"
    )
    code = (
        "from serve.runtime.command import main; from serve.runtime.providers import missing; main([]);"
        "print(missing('FakeExecutionProvider') != '', missing('onnxruntime_ep_broken'))"
    )
    (tmp_path / "onnxruntime_ep_broken.py").write_text("raise RuntimeError('half installed')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path)))}
    listed = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert "FakeExecutionProvider        not usable: " in listed
    assert "True half installed" in listed


def cgroup(root: Path, lines: str, files: dict[str, str]) -> int:
    """The usable cores where the process is in the cgroups of `lines` and these files exist."""
    for name, text in files.items():
        path = root / "sys" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "self").write_text(lines)
    return usable_cores(root / "sys", root / "self")


ALL = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@pytest.mark.parametrize(
    ("lines", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "max 100000\n"}, ALL),
        ("0::/\n", {"cpu.max": "100000000 100000\n"}, ALL),
        ("0::/\n", {"cpu.max": "nonsense\n"}, ALL),
        ("0::/\n", {"cpu.max": "100000 0\n"}, ALL),
        ("", {}, ALL),
        ("0::/pod/box\n", {"pod/cpu.max": "100000 100000\n", "pod/box/cpu.max": "max 100000\n"}, 1),
        ("0::/pod/box\n", {"pod/box/cpu.max": "100000 100000\n"}, 1),
        ("0::/seen/from/outside\n", {"cpu.max": "100000 100000\n"}, 1),
        ("0::/box\n", {"unified/box/cpu.max": "100000 100000\n"}, 1),
        ("5:cpu,cpuacct:/b\n", {f"cpu,cpuacct/b/cpu.cfs_{x}_us": "9" for x in ("quota", "period")}, 1),
        ("5:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, ALL),
        ("5:cpuset:/\n", {"cpuset/cpu.cfs_quota_us": "1\n", "cpuset/cpu.cfs_period_us": "100000\n"}, ALL),
    ],
)  # fmt: skip
def test_cores_are_what_the_cgroups_grant(
    tmp_path: Path, lines: str, files: dict[str, str], expected: int
) -> None:
    assert cgroup(tmp_path, lines, files) == expected


def test_a_machine_without_cgroups_has_all_its_cores(tmp_path: Path) -> None:
    assert usable_cores(tmp_path / "none", tmp_path / "none") == ALL
    assert CUDA in providers.GPU_PROVIDERS

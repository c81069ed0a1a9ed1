"""Which execution providers and cores this device has, and which a model gets."""

from __future__ import annotations

import argparse
import base64
import functools
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import onnxruntime as ort

from serve.errors import ModelLoadError

if TYPE_CHECKING:
    from collections.abc import Sequence

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"

# y = Relu(x) for one FLOAT, opset 13: small enough to try a provider with.
_PROBE = base64.b64decode(
    "CAcSADozCgwKAXgSAXkiBFJlbHUSAWdaDwoBeBIKCggIARIECgIIAWIPCgF5EgoKCAgBEgQKAggBQgQKABAN"
)


@dataclass(frozen=True, slots=True)
class ProviderState:
    """A provider of this onnxruntime build; `problem` says why it can't be used here, empty where it can."""

    name: str
    problem: str = ""


def find_providers() -> list[ProviderState]:
    """Try each provider of this onnxruntime build on a one-node graph.

    `get_available_providers()` lists what was compiled in: onnxruntime-gpu names CUDA where no driver is and
    then falls back to the CPU in silence. Only a session that was created tells.
    """
    return [ProviderState(name, _problem(name)) for name in ort.get_available_providers()]


@functools.cache
def _problem(name: str) -> str:
    if name == "AzureExecutionProvider":
        return "it sends tensors to a cloud service; this server doesn't"
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        session = ort.InferenceSession(_PROBE, options, providers=[name])
    except Exception as error:  # noqa: BLE001 - onnxruntime's errors share no base class
        return str(error).strip().splitlines()[0]
    return "" if name in session.get_providers() else "its libraries did not load"


def choose_providers(kind: str) -> tuple[str, ...]:
    """The providers for an instance_group kind, most wanted first.

    KIND_CPU: the CPU. KIND_GPU: CUDA, refused where it does not work. KIND_AUTO: CUDA where it works.

    Raises:
        ModelLoadError: KIND_GPU without a working CUDA provider, or a kind that is none of these.
    """
    if kind == "KIND_CPU":
        return (CPU,)
    if kind not in ("KIND_AUTO", "KIND_GPU"):
        raise ModelLoadError(f"instance_group.kind is {kind}, expected KIND_AUTO, KIND_CPU or KIND_GPU")
    if CUDA in ort.get_available_providers():
        problem = _problem(CUDA)
    else:
        problem = "this onnxruntime was built without it"
    if not problem:
        return (CUDA, CPU)
    if kind == "KIND_GPU":
        raise ModelLoadError(f"instance_group.kind is KIND_GPU, but {CUDA} can't be used: {problem}")
    return (CPU,)


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may use: its CPU affinity, cut to what its cgroup (v2) grants; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    if quota != "max":
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def main(arguments: Sequence[str]) -> int:
    """`onnxedge providers`: print this device's cores and providers; the exit status."""
    parser = argparse.ArgumentParser(
        prog="onnxedge providers", description="What this device can run graphs on."
    )
    parser.parse_args(arguments)
    print(f"onnxruntime {ort.__version__}, {platform.machine()}, {usable_cores()} usable cores")
    for state in find_providers():
        print(f"  {state.name:<28} {f'not usable: {state.problem}' if state.problem else 'usable'}")
    print(f"A model without an instance_group runs on: {', '.join(choose_providers('KIND_AUTO'))}")
    return 0

"""Which execution providers this device has: built into onnxruntime or plugged in, and which of them work."""

from __future__ import annotations

import base64
import contextlib
import functools
import importlib
import io
import logging
import platform
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnxruntime as ort

from serve.errors import ModelLoadError
from serve.runtime.thread_pool import set_threads

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

logger = logging.getLogger(__name__)

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
OPENVINO = "OpenVINOExecutionProvider"
QNN = "QNNExecutionProvider"
XNNPACK = "XnnpackExecutionProvider"

# onnxruntime's provider that sends tensors to a cloud service.
_AZURE = "AzureExecutionProvider"
_SUFFIX = "ExecutionProvider"
_ALIASES = {"directml": "DmlExecutionProvider", "rocm": "ROCMExecutionProvider"}

# What KIND_GPU means: the first of these that works.
GPU_PROVIDERS = (CUDA, "MIGraphXExecutionProvider", "ROCMExecutionProvider", "DmlExecutionProvider")

# What a model gets whose config says nothing: the first of these that works, and the CPU. Left to the config
# are TensorRT (its engines take minutes to build), OpenVINO (on a CPU as fast as onnxruntime's own provider,
# 1.15 against 1.10 ms for a small convolutional network on one thread, while int8 answers differ) and XNNPACK
# (no gain where measured). QNN is an accelerator on Arm; elsewhere its library holds a simulator of one.
_ARM = platform.machine().lower() in ("aarch64", "arm64")
DEFAULT_ORDER = (*GPU_PROVIDERS, "CoreMLExecutionProvider", *((QNN,) if _ARM else ()))

# y = Relu(x) for one FLOAT, opset 13: small enough to try a provider with.
_PROBE = base64.b64decode(
    "CAcSADozCgwKAXgSAXkiBFJlbHUSAWdaDwoBeBIKCggIARIECgIIAWIPCgF5EgoKCAgBEgQKAggBQgQKABAN"
)


# A provider whose libraries don't load is left out in silence, as far as exceptions go.
NOT_THERE = "its libraries or its device are not there (onnxruntime's own message on stderr says more)"
CPU_NEEDED = re.compile("fallback to CPU EP has been explicitly disabled")
_SOURCE = re.compile(r"/\S+\.(?:cc|cpp|h):\d+ [^(]*\([^)]*\)(?: const)? ")


@dataclass(frozen=True, slots=True)
class Accelerator:
    """A provider other than the CPU that a model wants, and onnxruntime's options for it."""

    name: str
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ProviderState:
    """A provider of this onnxruntime build; `problem` says why it can't be used here, empty where it can."""

    name: str
    problem: str = ""


def short_name(name: str) -> str:
    """The name that a config.pbtxt may use: `tensorrt` for `TensorrtExecutionProvider`."""
    return name.removesuffix(_SUFFIX).lower()


def provider_name(text: str) -> str:
    """The provider, by onnxruntime's name, that goes by `text` in a config.pbtxt.

    Raises:
        ModelLoadError: onnxruntime knows none of this name, whatever it was built with.
    """
    names: set[str] = {*ort.get_all_providers(), *_plugins()} - {_AZURE, CPU}
    short = {short_name(name): name for name in names} | _ALIASES
    if text in names:
        return text
    if text.lower() not in short:
        raise ModelLoadError(
            f"config.pbtxt: execution accelerator '{text}' is unknown, "
            f"expected one of {', '.join(sorted(short))}"
        )
    return short[text.lower()]


def find_providers() -> list[ProviderState]:
    """Try each provider that this onnxruntime was built with or that is plugged in on a one-node graph.

    `get_available_providers()` lists what was compiled in: onnxruntime-gpu names CUDA where no driver is and
    then falls back to the CPU in silence. Only a session that runs the node tells.
    """
    names = dict.fromkeys((*_plugins(), *ort.get_available_providers()))
    return [ProviderState(name, problem(name)) for name in names]


def missing(name: str) -> str:
    """Why a provider isn't even there; empty where it is, which doesn't mean that it works."""
    plugin = _plugins().get(name)
    if plugin is not None:
        return plugin if isinstance(plugin, str) else ""
    return "" if name in ort.get_available_providers() else "this onnxruntime was built without it"


@functools.cache
def problem(name: str) -> str:
    """Why a provider can't run a graph of one node here; empty where it can. It may take seconds."""
    if name == _AZURE:
        return "it sends tensors to a cloud service; this server doesn't"
    absent = missing(name)
    if absent:
        return absent
    options = ort.SessionOptions()
    options.log_severity_level = 4
    set_threads(options, 1, 1)
    if name != CPU:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = create_session(_PROBE, options, () if name == CPU else (Accelerator(name),), 1)
    except Exception as error:  # noqa: BLE001 - onnxruntime's errors share no base class
        return NOT_THERE if CPU_NEEDED.search(str(error)) else first_line(error)
    return "" if name in session.get_providers() else NOT_THERE


def create_session(
    graph: str | bytes, options: Any, accelerators: Sequence[Accelerator], threads: int
) -> Any:
    """An onnxruntime.InferenceSession on these accelerators and, unless `options` forbid it, the CPU.

    Args:
        graph: its file or its bytes.
        options: onnxruntime.SessionOptions.
        accelerators: most wanted first.
        threads: for accelerators that compute on the CPU with threads of their own.
    """
    if any(accelerator.name in (CUDA, TENSORRT) for accelerator in accelerators):
        _load_cuda()
    plugins = _plugins() if accelerators else {}
    plugged = {name: devices for name, devices in plugins.items() if not isinstance(devices, str)}
    if not any(accelerator.name in plugged for accelerator in accelerators):
        wanted = [(a.name, _completed(a, threads)) for a in accelerators]
        cpu = [] if _forbids_cpu(options) else [CPU]
        # Without enable_fallback=0 the session would print to stdout and go on without the accelerators, and
        # so would one that fails while another thread runs it.
        return ort.InferenceSession(graph, options, providers=[*wanted, *cpu], enable_fallback=0)
    for accelerator in accelerators:
        if accelerator.name in plugged:
            devices, rest = _chosen_devices(plugged[accelerator.name], _completed(accelerator, 0))
            options.add_provider_for_devices(devices, rest)
        else:
            options.add_provider(accelerator.name, _completed(accelerator, threads))
    return ort.InferenceSession(graph, options, enable_fallback=0)


@functools.cache
def _load_cuda() -> None:
    """Load CUDA's libraries where pip installed them (onnxruntime-gpu[cuda,cudnn]), off the loader's path."""
    if not hasattr(ort, "preload_dlls"):
        return
    said = io.StringIO()
    # It prints what it doesn't find, also where the system's own libraries will do.
    with contextlib.redirect_stdout(said), contextlib.suppress(RuntimeError, OSError):
        ort.preload_dlls()
    for line in said.getvalue().splitlines():
        logger.debug("%s", line)


def _forbids_cpu(options: Any) -> bool:
    try:
        return bool(options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1")
    except RuntimeError:  # it is not set
        return False


def _completed(accelerator: Accelerator, threads: int) -> dict[str, str]:
    """The options, and those without which a provider would take all cores, be slow or not start."""
    defaults: dict[str, str] = {}
    if accelerator.name == OPENVINO and threads:
        defaults = {"num_of_threads": str(threads)}
    elif accelerator.name == XNNPACK and threads:
        defaults = {"intra_op_num_threads": str(threads)}
    elif accelerator.name == CUDA:
        # onnxruntime's own EXHAUSTIVE tries every algorithm of each convolution when a shape comes for the
        # first time, and a server's batches have many.
        defaults = {"cudnn_conv_algo_search": "HEURISTIC"}
    elif accelerator.name == QNN and "backend_path" not in accelerator.options:
        defaults = {"backend_type": "htp"}
    return {**defaults, **accelerator.options}


def _chosen_devices(devices: list[Any], options: dict[str, str]) -> tuple[list[Any], dict[str, str]]:
    """A plugin's first device, or its first of the type that `device_type` names (CPU, GPU, NPU)."""
    wanted = options.pop("device_type", "").split(".", maxsplit=1)[0]
    chosen = [device for device in devices if wanted in ("", device.device.type.name)]
    if not chosen:
        found = ", ".join(device.device.type.name for device in devices)
        raise ModelLoadError(f"device_type is {wanted}, this machine has {found}")
    return chosen[:1], options


@functools.cache
def _plugins() -> dict[str, list[Any] | str]:
    """Providers in packages of their own, registered: name to its devices here, or to why it has none.

    By onnxruntime's packaging guidance such a package says where its library is and what the provider is
    called. A plugin reports a device only where it can use it.
    """
    if not hasattr(ort, "register_execution_provider_library"):
        return {}
    plugins: dict[str, list[Any] | str] = {}
    for module in _plugin_modules():
        name = module
        try:
            package = importlib.import_module(module)
            name = package.get_ep_name()
            ort.register_execution_provider_library(name, package.get_library_path())
        except Exception as error:  # noqa: BLE001 - a plugin may fail in any way, and is then not used
            plugins[name] = first_line(error)
        else:
            devices = [device for device in ort.get_ep_devices() if device.ep_name == name]
            plugins[name] = devices or "its plugin finds no device that it can use"
    return plugins


def _plugin_modules() -> list[str]:
    # Two globs in each folder take 1 ms, pkgutil.iter_modules, which looks into every package, 20.
    patterns = ("onnxruntime_ep_*", "onnxruntime_qnn*")
    found = {
        entry.stem
        for folder in filter(None, sys.path)
        for pattern in patterns
        for entry in Path(folder).glob(pattern)
    }
    return sorted(name for name in found if name.isidentifier())


def first_line(error: Exception) -> str:
    """An onnxruntime error's first line without its place in the source; the others are stack frames."""
    lines = _SOURCE.sub("", str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def first_working(names: Sequence[str]) -> Accelerator | None:
    """The first of these providers that works here, None where none does."""
    return next((Accelerator(name) for name in names if not problem(name)), None)

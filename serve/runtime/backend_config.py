"""How onnxruntime is to run a model: the parameters of Triton's onnxruntime backend, and --backend-config."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from serve.errors import ModelLoadError
from serve.runtime.accelerators import CUDA_PARAMETERS, cuda_option, wanted_accelerators
from serve.runtime.session import SHRINKAGE, SessionSettings
from serve.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from serve.pb import model_config_pb2 as pb

logger = logging.getLogger(__name__)

# Two runs at once keep two cores busy while one request is on its way through gRPC; one instance alone halves
# the throughput on two cores.
DEFAULT_INSTANCES = 2
_MOST_INSTANCES = 64

_COUNTS = ("intra_op_thread_count", "inter_op_thread_count")
# Instances share one session here in any case, which is what this parameter asks of Triton.
_SWITCHES = ("execution_mode", "enable_mem_arena", "enable_mem_pattern", "share_session_between_instances")
# Session configuration entries. onnxruntime takes any name in silence and some entries name files to read or
# write, so the names are listed: those about speed and memory.
_ENTRY_SWITCHES = (
    "session.use_device_allocator_for_initializers",
    "session.disable_prepacking",
    "session.set_denormal_as_zero",
    "session.intra_op.allow_spinning",
    "session.inter_op.allow_spinning",
    "session.force_spinning_stop",
    "session.disable_quant_qdq",
    "session.disable_double_qdq_remover",
    "session.enable_quant_qdq_cleanup",
    "session.disable_aot_function_inlining",
    "optimization.enable_gelu_approximation",
    "optimization.enable_cast_chain_elimination",
    "mlas.enable_gemm_fastmath_arm64_bfloat16",
)
_ENTRY_COUNTS = ("session.dynamic_block_base", "session.qdq_matmulnbits_accuracy_level")
_ENTRY_TEXTS = ("session.intra_op_thread_affinities", "optimization.disable_specified_optimizers")
_ENTRIES = (*_ENTRY_SWITCHES, *_ENTRY_COUNTS, *_ENTRY_TEXTS)

PARAMETERS = (*_COUNTS, *_SWITCHES, SHRINKAGE, *CUDA_PARAMETERS, *_ENTRIES)
"""The names of a config's parameters that are read here."""

_SHARED_POOL = "enable-global-threadpool"
_MAX_BATCH_SIZE = "default-max-batch-size"
# Of the server and not of a model: a folder on its disk.
_ENGINE_CACHE = "trt_engine_cache_path"
_BACKEND = "onnxruntime"
# Settings of Triton for all backends that mean nothing to this server.
_WITHOUT_EFFECT = ("backend-directory", "min-compute-capability", "auto-complete-config")
_ARENAS = re.compile(r"(cpu|gpu):\d+(;(cpu|gpu):\d+)*")
_BOOLEANS = {"1": True, "true": True, "0": False, "false": False}


@dataclass(frozen=True, slots=True)
class BackendConfig:
    """What --backend-config says.

    Attributes:
        defaults: parameters for models whose config has none of the name.
        default_max_batch_size: for models that can batch and don't say how much; None: not given.
    """

    defaults: Mapping[str, str] = field(default_factory=dict)
    default_max_batch_size: int | None = None


def takes_parameter(name: str) -> bool:
    """Whether a config's parameter of this name is read here."""
    return name in PARAMETERS


def parse_backend_config(texts: Iterable[str]) -> BackendConfig:
    """Read `onnxruntime,NAME=VALUE` and, for all backends, `NAME=VALUE`; later ones win.

    Raises:
        SettingsError: one has another form, an unknown name or a value that can't be.
    """
    defaults: dict[str, str] = {}
    max_batch_size: int | None = None
    for text in texts:
        backend, comma, setting = text.rpartition(",")
        name, equals, value = setting.partition("=")
        if not equals or not name or (comma and not backend):
            raise SettingsError(
                f"--backend-config is {text!r}, expected onnxruntime,NAME=VALUE or NAME=VALUE"
            )
        if (backend and backend != _BACKEND) or (not backend and name in _WITHOUT_EFFECT):
            logger.warning(
                "--backend-config=%s has no effect: this server's only backend is onnxruntime", text
            )
        elif name == _MAX_BATCH_SIZE:
            max_batch_size = _whole_number(text, value)
        elif backend and (name in (_SHARED_POOL, _ENGINE_CACHE) or takes_parameter(name)):
            defaults[name] = value
        else:
            known = ", ".join((_MAX_BATCH_SIZE, _SHARED_POOL, _ENGINE_CACHE, *PARAMETERS))
            raise SettingsError(f"--backend-config={text}: '{name}' is unknown, expected one of {known}")
    try:
        _read_settings(defaults)
    except ModelLoadError as error:
        raise SettingsError(f"--backend-config: {error}") from error
    return BackendConfig(defaults, max_batch_size)


def _whole_number(text: str, value: str) -> int:
    if not value.isdecimal():
        raise SettingsError(f"--backend-config={text}: expected a whole number")
    return int(value)


def session_settings(
    message: pb.ModelConfig,
    defaults: Mapping[str, str],
    cores: int,
    *,
    policy: str = "fallback",
    model: str = "",
) -> SessionSettings:
    """All that a model's config says about how its graph is to be run, completed.

    Threads within a run, unless they are given, are the cores divided among the instances.

    Args:
        message: the config.
        defaults: of --backend-config, for parameters that the config doesn't have.
        cores: that the server may use; more threads than these are cut to them, with a warning.
        policy: of the accelerators that the config names, `strict` or `fallback`.
        model: its name, for the log.

    Raises:
        ModelLoadError: a value can't be, or, where strict, no GPU works for KIND_GPU.
    """
    model = model or message.name
    own = {name: value.string_value for name, value in message.parameters.items() if takes_parameter(name)}
    if _shares_pool(defaults):  # all models' threads are the same ones
        own = {name: text for name, text in own.items() if name not in _COUNTS}
    try:
        values = _read_settings({**defaults, **own})
    except ModelLoadError as error:
        raise ModelLoadError(f"config.pbtxt: {error}") from error
    instances = _instances(message, cores)
    share = max(1, cores // instances)
    shared_pool = values.switch(_SHARED_POOL, default=False)
    parallel = values.switch("execution_mode", default=False)
    cuda = {name: cuda_option(name, text) for name, text in values.texts.items() if name in CUDA_PARAMETERS}
    accelerators, named = wanted_accelerators(
        message, cuda, model, strict=policy == "strict", engine_cache=values.texts.get(_ENGINE_CACHE, "")
    )
    return SessionSettings(
        accelerators=accelerators,
        strict=named and policy == "strict",
        instances=instances,
        intra_op_threads=values.threads(
            "intra_op_thread_count", cores if shared_pool else share, cores, model
        ),
        inter_op_threads=values.threads("inter_op_thread_count", share if parallel else 1, cores, model),
        parallel=parallel,
        shared_pool=shared_pool,
        graph_level=message.optimization.graph.level,
        memory_arena=values.switch("enable_mem_arena", default=True),
        memory_pattern=values.switch("enable_mem_pattern", default=True),
        arena_shrinkage=values.texts.get(SHRINKAGE, ""),
        entries=values.entries(),
        model=model,
    )


def _shares_pool(defaults: Mapping[str, str]) -> bool:
    return _BOOLEANS.get(defaults.get(_SHARED_POOL, "0").lower(), False)


def _instances(message: pb.ModelConfig, cores: int) -> int:
    """Runs at once: the groups' counts; a group that has none counts 1 beside others."""
    counts = [group.count for group in message.instance_group]
    if any(count < 0 for count in counts):
        raise ModelLoadError(f"config.pbtxt: instance_group.count is {min(counts)}, expected 0 or more")
    if counts in ([], [0]):
        return min(DEFAULT_INSTANCES, cores)
    total = sum(count or 1 for count in counts)
    if total > _MOST_INSTANCES:
        raise ModelLoadError(
            f"config.pbtxt: instance_group has a count of {total}, expected {_MOST_INSTANCES} at most: each "
            "is a thread, and more than there are cores gain nothing"
        )
    return total


@dataclass(frozen=True, slots=True)
class _Values:
    """Parameters by name, each known to have a value of its type."""

    texts: Mapping[str, str]

    def switch(self, name: str, *, default: bool) -> bool:
        return _BOOLEANS[self.texts[name].lower()] if name in self.texts else default

    def threads(self, name: str, default: int, cores: int, model: str) -> int:
        wanted = int(self.texts.get(name, "0")) or default
        if wanted > cores:
            logger.warning(
                "'%s': %s is %d, cut to the %d cores that this server may use", model, name, wanted, cores
            )
        return min(wanted, cores)

    def entries(self) -> dict[str, str]:
        found = {name: text for name, text in self.texts.items() if name in _ENTRIES}
        return {
            name: str(int(_BOOLEANS[text.lower()])) if name in _ENTRY_SWITCHES else text
            for name, text in found.items()
        }


def _read_settings(texts: Mapping[str, str]) -> _Values:
    for name, text in texts.items():
        expected = _expected(name, text)
        if expected:
            raise ModelLoadError(f"parameter '{name}' is {text!r}, expected {expected}")
    return _Values(texts)


def _expected(name: str, text: str) -> str:
    """What a parameter's value should have been; empty where it is that."""
    if name in (*_COUNTS, *_ENTRY_COUNTS) and not (text.isascii() and text.isdecimal()):
        return "a number, 0 for the default"
    if name in (*_SWITCHES, *_ENTRY_SWITCHES, _SHARED_POOL) and text.lower() not in _BOOLEANS:
        return "0 or 1"
    if name == SHRINKAGE and text and not _ARENAS.fullmatch(text):
        return "cpu:DEVICE, gpu:DEVICE or several of them, divided by semicolons"
    if name == _ENGINE_CACHE and not Path(text).is_dir():
        return "a folder that is there, which the server can write"
    if name in CUDA_PARAMETERS:
        cuda_option(name, text)
    return ""

"""Which accelerators a config.pbtxt asks for, in execution_accelerators and instance_group."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

from serve.errors import ModelLoadError
from serve.pb import model_config_pb2 as pb
from serve.runtime.providers import (
    CUDA,
    DEFAULT_ORDER,
    GPU_PROVIDERS,
    OPENVINO,
    TENSORRT,
    Accelerator,
    first_working,
    missing,
    problem,
    provider_name,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

logger = logging.getLogger(__name__)

_Declared = pb.ModelOptimizationPolicy.ExecutionAccelerators.Accelerator

# CUDA options that Triton also takes as parameters of the model, some as numbers for onnxruntime's words.
CUDA_PARAMETERS: dict[str, tuple[str, ...]] = {
    "cudnn_conv_algo_search": ("EXHAUSTIVE", "HEURISTIC", "DEFAULT"),
    "gpu_mem_limit": (),
    "arena_extend_strategy": ("kNextPowerOfTwo", "kSameAsRequested"),
    "do_copy_in_default_stream": (),
}
_CUDA_NUMBERS = {"gpu_mem_limit": "a number of bytes", "do_copy_in_default_stream": "0 or 1"}

# TensorRT's options under Triton's names; those that begin with trt_ are onnxruntime's own.
_TENSORRT_OPTIONS = {
    "max_workspace_size_bytes": "trt_max_workspace_size",
    "int8_calibration_table_name": "trt_int8_calibration_table_name",
    "int8_use_native_calibration_table": "trt_int8_use_native_calibration_table",
}
_PRECISIONS = {
    "FP32": {},
    "FP16": {"trt_fp16_enable": "1"},
    "BF16": {"trt_bf16_enable": "1"},
    "INT8": {"trt_int8_enable": "1"},
}
_OF_SEVERAL_GPUS = ("Tensorrt", "NvTensorRTRTX", "CUDA", "MIGraphX", "ROCM", "Dml")
_FILES = re.compile(
    r"path|directory|(^|_)(dir|files?|libs?|library)(_|$)|plugin|load_config|table_name|prefix|dump",
    re.IGNORECASE,
)


def device_kind(message: pb.ModelConfig) -> tuple[str, int | None]:
    """The kind that all instance_groups agree on, KIND_AUTO where there is none, and the GPU that they name.

    Raises:
        ModelLoadError: the groups differ in kind or name several GPUs: one session serves all instances here.
    """
    kinds = sorted({pb.ModelInstanceGroup.Kind.Name(group.kind) for group in message.instance_group})
    gpus = sorted({gpu for group in message.instance_group for gpu in group.gpus})
    if len(kinds) > 1 or len(gpus) > 1:
        what = f"kinds {', '.join(kinds)}" if len(kinds) > 1 else f"gpus {gpus}"
        raise ModelLoadError(
            f"config.pbtxt: instance_group has {what}, but one session serves all instances here: "
            "expected one kind and at most one GPU"
        )
    kind = kinds[0] if kinds else "KIND_AUTO"
    if gpus and (kind not in ("KIND_AUTO", "KIND_GPU") or gpus[0] < 0):
        raise ModelLoadError(f"config.pbtxt: instance_group has gpus {gpus} with {kind}, expected KIND_GPU")
    # Where the config's author leaves the choice to the model (KIND_MODEL), a graph has no opinion.
    if kind == "KIND_MODEL":
        kind = "KIND_AUTO"
    return ("KIND_GPU" if gpus else kind), (gpus[0] if gpus else None)


def wanted_accelerators(
    message: pb.ModelConfig,
    cuda_parameters: Mapping[str, str],
    model: str,
    *,
    strict: bool,
    engine_cache: str = "",
) -> tuple[tuple[Accelerator, ...], bool]:
    """The accelerators for a model, most wanted first, and whether its config names them.

    As in Triton: GPU accelerators are for KIND_GPU and KIND_AUTO, with CUDA behind TensorRT for what that
    leaves; then come CPU accelerators. Without a wish it is the first of the default order that works.

    Args:
        message: the model's config.
        cuda_parameters: CUDA options that are parameters of the model.
        model: its name, for the log.
        strict: refuse KIND_GPU where no GPU works, instead of going on with the CPU.
        engine_cache: folder for TensorRT's engines, where the config says nothing of it; empty: none.

    Raises:
        ModelLoadError: an accelerator or one of its parameters is unknown, or there is no GPU under `strict`.
    """
    kind, gpu = device_kind(message)
    declared = message.optimization.execution_accelerators
    accelerators = [_accelerator(found, "CPU") for found in declared.cpu_execution_accelerator]
    on_gpu = [_accelerator(found, "GPU") for found in declared.gpu_execution_accelerator]
    if kind == "KIND_CPU":
        if on_gpu:
            logger.warning(
                "'%s': instance_group says KIND_CPU, so no gpu_execution_accelerator is used", model
            )
        return tuple(accelerators), bool(accelerators)
    names = [accelerator.name for accelerator in on_gpu]
    if TENSORRT in names and CUDA not in names and not missing(CUDA):
        on_gpu.append(Accelerator(CUDA))
    if kind == "KIND_GPU" and not on_gpu:
        on_gpu = _any_gpu(model, strict=strict)
    accelerators = on_gpu + accelerators
    named = bool(accelerators)
    if not named and kind == "KIND_AUTO":
        default = first_working(DEFAULT_ORDER)
        accelerators = [default] if default else []
    added = {CUDA: cuda_parameters, TENSORRT: _cached_in(engine_cache)}
    return tuple(_completed(a, gpu, added.get(a.name, {})) for a in accelerators), named


def _any_gpu(model: str, *, strict: bool) -> list[Accelerator]:
    found = first_working(GPU_PROVIDERS)
    if found:
        return [found]
    reasons = [f"{name}: {problem(name)}" for name in GPU_PROVIDERS if not missing(name)]
    reason = "; ".join(reasons) or "this onnxruntime was built without a provider for GPUs"
    text = f"instance_group.kind is KIND_GPU, but no GPU can be used: {reason}"
    if strict:
        raise ModelLoadError(f"config.pbtxt: {text}; change it, or take --provider-policy=fallback")
    logger.warning("'%s': %s; going on with the CPU", model, text)
    return []


def _accelerator(declared: _Declared, device: str) -> Accelerator:
    name = provider_name(declared.name)
    parameters = dict(sorted(declared.parameters.items()))
    if name == TENSORRT:
        return Accelerator(name, _tensorrt_options(parameters))
    if name == OPENVINO:
        return Accelerator(name, {"device_type": device, **parameters})
    return Accelerator(name, parameters)


def _tensorrt_options(parameters: Mapping[str, str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for name, value in parameters.items():
        if name == "precision_mode":
            if value not in _PRECISIONS:
                raise ModelLoadError(
                    f"config.pbtxt: precision_mode is {value!r}, expected {', '.join(_PRECISIONS)}"
                )
            options |= _PRECISIONS[value]
        elif name in _TENSORRT_OPTIONS or name.startswith("trt_"):
            options[_TENSORRT_OPTIONS.get(name, name)] = value
        else:
            raise ModelLoadError(
                f"config.pbtxt: parameter '{name}' of accelerator 'tensorrt' is unknown, expected "
                f"precision_mode, {', '.join(_TENSORRT_OPTIONS)} or an option of onnxruntime's (trt_…)"
            )
    return options


def _cached_in(folder: str) -> dict[str, str]:
    """TensorRT builds an engine for minutes, so it is kept, and the timings that led to it, too."""
    if not folder:
        return {}
    engines = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": folder}
    return {**engines, "trt_timing_cache_enable": "1", "trt_timing_cache_path": folder}


def _completed(accelerator: Accelerator, gpu: int | None, added: Mapping[str, str]) -> Accelerator:
    options = {**added, **accelerator.options}
    if gpu is not None and accelerator.name.removesuffix("ExecutionProvider") in _OF_SEVERAL_GPUS:
        options["device_id"] = str(gpu)
    if gpu is not None and accelerator.name == OPENVINO and options.get("device_type") == "GPU":
        options["device_type"] = f"GPU.{gpu}"
    return Accelerator(accelerator.name, options)


def cuda_option(name: str, value: str) -> str:
    """A CUDA parameter of the model in onnxruntime's words.

    Raises:
        ModelLoadError: it is no number, or none of Triton's numbers for onnxruntime's words.
    """
    words = CUDA_PARAMETERS[name]
    if not words:
        if not (value.isascii() and value.isdecimal()):
            raise ModelLoadError(f"parameter '{name}' is {value!r}, expected {_CUDA_NUMBERS[name]}")
        return value
    if not value.isdecimal() or int(value) >= len(words):
        expected = ", ".join(f"{number} ({word})" for number, word in enumerate(words))
        raise ModelLoadError(f"parameter '{name}' is {value!r}, expected {expected}")
    return words[int(value)]


def file_parameters(message: pb.ModelConfig) -> list[str]:
    """Accelerator parameters that name files or libraries, which a config from a stranger must not have."""
    declared = message.optimization.execution_accelerators
    every: Iterable[_Declared] = (*declared.gpu_execution_accelerator, *declared.cpu_execution_accelerator)
    return sorted(name for found in every for name in found.parameters if _FILES.search(name))

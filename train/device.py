"""Where a network is trained: the device, its 16-bit type, how many CPU threads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from train.recipe import Precision

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
# Instructions that multiply bfloat16, by the name torch has for them on x86 and on ARM.
BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16")


def choose_device(name: str) -> torch.device:
    """The device that `--device` names: auto, cpu or cuda.

    Raises:
        ValueError: there is no GPU that torch can use.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("--device cuda: torch finds no GPU here; use --device cpu")
    return torch.device(("cuda" if available else "cpu") if name == "auto" else name)


def mixed_type(device: torch.device, precision: Precision) -> torch.dtype | None:
    """The 16-bit type for matrix products and convolutions; None where all is FP32.

    bfloat16 wherever there are instructions for it: ResNet-20 trains 1.8 times as fast on a CPU that has
    them, and several times slower on one that has not. float16 on older GPUs, which needs a scaled loss.
    """
    if precision == "float32":
        return None
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    capabilities = torch.cpu.get_capabilities()
    return torch.bfloat16 if any(capabilities.get(name) for name in BFLOAT16_INSTRUCTIONS) else None


def make_deterministic(device: torch.device) -> None:
    """Same seed, same weights on a CPU; on a GPU speed comes first."""
    torch.use_deterministic_algorithms(device.type == "cpu")
    torch.backends.cudnn.benchmark = device.type == "cuda"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


def describe(device: torch.device) -> str:
    """The device in words: the GPU's name, or the number of CPU threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return "1 CPU thread" if threads == 1 else f"{threads} CPU threads"


def leave_one_cpu_free() -> None:
    """Set torch's threads, unless OMP_NUM_THREADS says how many.

    Threads spin at every barrier: on two CPUs a MobileNetV2 step took 50 ms with two threads on an idle
    machine but 170 to 790 ms beside one busy process; with one thread 71 ms in either case.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, available_cpus() - 1))


def available_cpus() -> int:
    """CPUs that this process may use: its affinity, and no more than a container's quota.

    torch doesn't look at the quota: under `docker run --cpus 2` on a large machine its threads take turns.
    """
    cpus = len(os.sched_getaffinity(0))
    try:
        quota, period = CPU_QUOTA.read_text(encoding="ascii").split()
    except OSError:
        return cpus
    return cpus if quota == "max" else max(1, min(cpus, int(quota) // int(period)))

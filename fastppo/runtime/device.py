"""Choose the training device, and name the hardware."""

from __future__ import annotations

import contextlib
import platform

import torch

from fastppo.errors import ConfigError
from fastppo.runtime.cores import processes
from fastppo.runtime.distributed import local_rank
from fastppo.runtime.threads import CORES


def choose_device(name: str) -> torch.device:
    """Return the device for `auto`, `cpu`, `cuda` or `cuda:K`; a CUDA device always has an index.

    `auto` is CUDA where available. Without an index, each process of a machine takes the GPU of its local rank.

    Raises:
        ConfigError: no such device; or cuda:K with several processes, which would share one GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device={name!r} must be auto, cpu, cuda or cuda:K.") from None
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise ConfigError(f"device={name}: this torch ({torch.__version__}) sees no CUDA device; use device=cpu.")
    last = f"cuda:{count - 1}"
    if ":" not in name:
        device, advice = torch.device("cuda", local_rank()), "start one process per GPU"
    elif processes() > 1:
        raise ConfigError(f"device={name} under torchrun: each process takes a GPU of its own; use device=cuda.")
    else:
        advice = f"use device={last} or lower"
    if device.index >= count:
        raise ConfigError(f"device={name}: this machine has no {device}, only devices up to {last}; {advice}.")
    return device


def cpu_name() -> str:
    """Return the processor's model name."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine_name() -> str:
    """Return the processor and its usable cores: the key under which measurements on this machine are stored."""
    return f"{cpu_name()} x {CORES}"

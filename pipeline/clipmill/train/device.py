"""Where a run computes."""

from __future__ import annotations

import os
import re

import torch

from clipmill.errors import ConfigError

SECONDS_AT_ONCE = {"cpu": 32, "cuda": 320}
"""Sound in one batch that is scored, by device: what bounds the memory."""


def pick_device(name: str = "auto") -> torch.device:
    """The device called "cpu", "cuda" or "cuda:N"; "auto" is CUDA where there is one, else the CPU.

    Raises:
        ConfigError: no such device here, or not such a name.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ConfigError(f"--device {name}: allowed are auto, cpu, cuda and cuda:0, cuda:1, ...")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if found else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= found:
        raise ConfigError(
            f"--device {name}: torch {torch.__version__} finds {found or 'no'} CUDA device{'s' * (found > 1)} here; "
            "--device cpu or auto trains on the processor"
        )
    return device


def default_workers(device: torch.device, *, far: bool = False) -> int:
    """Threads that read ahead: on a CPU none, for the network needs every core and clips decode in no time.

    `far`: some shards are not on this machine, so that reading is mostly waiting.
    """
    cores = len(os.sched_getaffinity(0))
    return (4 if far else 0) if device.type == "cpu" else min(8, max(4 if far else 1, cores - 1))

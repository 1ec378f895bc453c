"""Units of work that engines are tested on. Each worker imports this file, so it imports little itself."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Unit:
    """`how` is what becomes of it; `marks` is a folder where it leaves a line for each time it is begun."""

    name: str
    how: str = "work"
    marks: Path | None = None
    load: bytes = field(default=b"\0" * 100_000, repr=False)


def work(unit: Unit) -> str:
    """A unit's name in capitals, or what its `how` says."""
    begun = 0
    if unit.marks is not None:
        with open(unit.marks / unit.name, "a+") as file:
            file.write(f"{os.getpid()}\n")
            file.seek(0)
            begun = len(file.readlines())
    if unit.how == "full disk":
        raise OSError(errno.ENOSPC, "No space left on device", "/shards")
    if unit.how == "dies" or (unit.how == "dies once" and begun == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if unit.how == "takes a while":
        time.sleep(1)
    if unit.how == "hangs once" and begun == 1:
        time.sleep(600)
    if unit.how == "has a helper":  # as a decoder may be: it must not hear what is meant for the task
        status = subprocess.run(["sleep", "4" if begun == 1 else "0"], check=False).returncode
        return f"{unit.name} {status}"
    return unit.name.upper()


def double(unit: int) -> int:
    """Work that takes its worker down, for one unit of many."""
    if unit == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05)
    return unit * 2

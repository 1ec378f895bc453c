"""From the flags of a command to an engine."""

from __future__ import annotations

import os
from pathlib import Path

from clipmill.errors import ConfigError
from clipmill.run.local import Local
from clipmill.run.units import Engine

_FOR_SLURM = ("partition", "time", "mem", "max_jobs")
_MB_A_JOB = 4000


def choose(
    engine: str,
    folder: Path,
    *,
    jobs: int | None = None,
    address: str | None = None,
    partition: str | None = None,
    time: str | None = None,
    mem: int | None = None,
    max_jobs: int | None = None,
) -> Engine:
    """The engine called `engine`: local, dask, ray or slurm.

    Args:
        engine: its name.
        folder: gets what Slurm's tasks leave: their logs.
        jobs: worker processes; with slurm, of each task.
        address: of the Dask or Ray cluster; None: one is started on this machine.
        partition: of Slurm; None: its default.
        time: Slurm's time limit of a task, as `sbatch` takes it.
        mem: Slurm's memory limit of a task, in MB.
        max_jobs: Slurm tasks at once.

    Raises:
        ConfigError: the engine is unknown or not installed, or a flag is none of its own or makes no sense.
    """
    slurm = dict(zip(_FOR_SLURM, (partition, time, mem, max_jobs), strict=True))
    stray = [name for name, value in slurm.items() if value is not None and engine != "slurm"]
    stray += ["address"] if address is not None and engine not in ("dask", "ray") else []
    if stray:
        allowed = "dask or ray" if stray[0] == "address" else "slurm"
        raise ConfigError(f"--{stray[0].replace('_', '-')} goes with --engine {allowed}, not with {engine}")
    cores = len(os.sched_getaffinity(0))
    if engine == "local":
        return Local(jobs or cores)
    if engine == "dask":
        from clipmill.run.dask import DaskEngine

        return DaskEngine(address, jobs or cores)
    if engine == "ray":
        from clipmill.run.ray import RayEngine

        return RayEngine(address, jobs or cores)
    if engine == "slurm":
        from clipmill.run.slurm import SlurmEngine
        from clipmill.run.slurm_queue import minutes_of

        jobs = jobs or 1
        minutes = minutes_of(time or "4:00:00")
        return SlurmEngine(folder, partition, minutes, mem or _MB_A_JOB * jobs, max_jobs or 32, jobs)
    raise ConfigError(f"--engine {engine}: unknown; known: local, dask, ray, slurm")

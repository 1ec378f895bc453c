"""A long command as a Slurm job, in as many processes as it has ranks: preempted and requeued without loss.

Each Slurm task starts the command as a process of its own, with the variables that torchrun would set, and
stays beside it. The command is to save and leave with 130 when it gets SIGUSR1, SIGUSR2 or SIGTERM (Slurm may
signal every process of a job), and to go on from there when it is started again with the same words.

    FOLDER/jobs.json      the jobs submitted last: no others are while one of them waits or runs
    FOLDER/logs/ID.log    what job ID said, all its starts one after the other
    FOLDER/tasks/         submitit's files, and ID.N.end: how its start N ended, should Slurm forget
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipmill.errors import ConfigError, RunError
from clipmill.run.slurm_queue import NEVER, State, ask, check_slurm, how_it_ended, queued, submitting
from clipmill.run.slurm_ranks import Ranks, said_of_end

_ASK_S = (1.0, 20.0)  # between questions to Slurm: in a short job, in a long one
_SILENCE_S = 600.0  # Slurm's controller may restart; after so long it is gone
_LAG_S = 20.0  # a shared disk may show how a job ended late

GOING_ON = (
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "SUSPENDED",
    "STOPPED",
    "SIGNALING",
    "COMPLETING",
    "REQUEUED",
)
"""The states of a job that has not ended, as far as Slurm shows them."""

_REFUSED = {
    "partition": "--partition: `sinfo` lists those there are",
    "time limit": "a smaller --time may be allowed",
    "memory": "a smaller --mem may fit",
    "node count": "fewer --nodes may be allowed",
    "node configuration": "no node has as much as --mem, --gpus and the cores of each rank ask for",
    "generic resource": "no node has such GPUs; `sinfo -o %G` lists those there are",
}
"""What stands in sbatch's refusals, and what helps."""


@dataclass(frozen=True)
class SlurmJob:
    """What a job asks Slurm for.

    Args:
        folder: gets the logs and submitit's files; all nodes see it.
        partition: None: Slurm's default.
        time_min: time limit of one start; a job that reaches it is put back in line.
        mem_mb: memory of each node, in MB; None: Slurm's default.
        nodes: how many.
        ranks_per_node: processes on each, usually one for each GPU.
        gpus_per_node: GPUs of each node; every rank sees them all, and takes the one of its LOCAL_RANK.
        cpus_per_rank: cores.
        signal_delay_s: the command is told to save so long before the time limit.
        restarts: a job that was put back in line so many times in a row without progress is given up.
        extra: more of sbatch's parameters, by their long names, such as account, qos or constraint.

    Raises:
        ConfigError: submitit is not installed, this machine has no Slurm, or `folder` has a path that Slurm
            would read as a pattern.
    """

    folder: Path
    partition: str | None = None
    time_min: int = 240
    mem_mb: int | None = None
    nodes: int = 1
    ranks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_rank: int = 4
    signal_delay_s: int = 120
    restarts: int = 3
    extra: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_slurm(self.folder)
        object.__setattr__(self, "folder", self.folder.resolve())

    def submit(self, commands: Sequence[Sequence[str]], name: str, progress: Sequence[Path]) -> list[str]:
        """Submit one job for each command; they start in the current folder, with the current environment.

        Args:
            commands: what to run, word by word.
            name: of the jobs, in Slurm's queue, where a mark comes behind it.
            progress: for each command a file whose time or size changes when it comes further.

        Returns:
            the jobs' ids.

        Raises:
            ConfigError: Slurm refuses, or see `check_free`.
            RunError: see `check_free`.
        """
        import submitit

        self.check_free()
        many = len(commands) > 1
        log = str(self._logs / ("%A_%a.log" if many else "%j.log"))
        for folder in (self._logs, self._transit):
            folder.mkdir(parents=True, exist_ok=True)
        delay_s = min(self.signal_delay_s, self.time_min * 20)
        name = f"{name}-{uuid.uuid4().hex[:6]}"
        self._keep(name, commands, [])  # should we be killed before we know the jobs' ids
        with submitting(f"{len(commands)} job{'s' * many}", _REFUSED):
            executor = submitit.AutoExecutor(
                folder=self._transit,
                cluster="slurm",
                slurm_max_num_timeout=1_000_000,  # `checkpoint` says when it is enough
            )
            executor.update_parameters(
                name=name,
                timeout_min=self.time_min,
                nodes=self.nodes,
                tasks_per_node=self.ranks_per_node,
                cpus_per_task=self.cpus_per_rank,
                slurm_gpus_per_node=self.gpus_per_node or None,
                slurm_mem=self.mem_mb and f"{self.mem_mb}MB",
                slurm_partition=self.partition,
                slurm_signal_delay_s=delay_s,
                slurm_stderr_to_stdout=True,
                slurm_srun_args=self._srun(log),
                slurm_additional_parameters={"output": log, "requeue": True, **self.extra},
            )
            jobs = executor.submit_array(
                [
                    Ranks(list(command), path.resolve(), self.ranks_per_node, delay_s, self.restarts)
                    for command, path in zip(commands, progress, strict=True)
                ]
            )
        ids = [job.job_id for job in jobs]
        self._keep(name, commands, ids)
        return ids

    def check_free(self) -> None:
        """See that no job of an earlier `submit` would write where new ones are to.

        Raises:
            ConfigError: one has not ended.
            RunError: Slurm does not answer, or the file that tells of those jobs is damaged.
        """
        _, left = self._left()
        if left:
            raise ConfigError(f"{_have(left)} not ended: --wait waits for them, `{_scancel(left)}` ends them")

    def attach(self, commands: Sequence[Sequence[str]]) -> list[str]:
        """The jobs of the last `submit`, of these commands or some of them, where one has not ended; none otherwise.

        Raises:
            ConfigError: those jobs have other commands.
            RunError: as `check_free`.
        """
        kept, left = self._left()
        given = [list(command) for command in commands]
        if left and not all(command in given for command in kept["commands"]):
            raise ConfigError(
                f"{_have(left)} not ended, and were submitted with other flags: give the same to wait for them; "
                f"`{_scancel(left)}` ends them"
            )
        return list(kept["jobs"]) if left else []

    def _left(self) -> tuple[dict[str, Any], list[str]]:
        """What is known of the last `submit`, and those of its jobs that have not ended."""
        try:
            kept = json.loads(self._ledger.read_text())
            name, jobs, many = kept["name"], kept["jobs"], len(kept["commands"])
        except FileNotFoundError:
            return {}, []
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{self._ledger}: is damaged ({error!r}); `scancel` what the command before left, and remove the file"
            ) from error
        states = queued()
        if states is None:
            raise RunError(
                f"squeue does not answer, and jobs submitted before may still be there ({self._ledger}); "
                "run the same command again when Slurm does"
            )
        if not jobs and (found := [job for job, state in states.items() if state.name == name]):
            first, array, _ = found[0].partition("_")
            kept["jobs"] = jobs = [f"{first}_{number}" for number in range(many)] if array else [first]
        return kept, [job for job in jobs if job in states]

    def _keep(self, name: str, commands: Sequence[Sequence[str]], jobs: list[str]) -> None:
        temporary = self._ledger.with_suffix(".tmp")
        temporary.write_text(json.dumps({"name": name, "commands": list(map(list, commands)), "jobs": jobs}))
        os.replace(temporary, self._ledger)

    def _srun(self, log: str) -> list[str]:
        # srun takes neither the log nor the cores from sbatch. A rank that fails ends the others, which might
        # wait for it for ever; one that is done does not, whatever the cluster's habit: the first may evaluate.
        own = [f"--output={log}", "--open-mode=append", f"--cpus-per-task={self.cpus_per_rank}"]
        own += ["--kill-on-bad-exit=1", "--wait=0"]
        return own + ["--label"] * (self.nodes * self.ranks_per_node > 1)

    @property
    def _ledger(self) -> Path:
        return self.folder / "jobs.json"

    @property
    def _logs(self) -> Path:
        return self.folder / "logs"

    @property
    def _transit(self) -> Path:
        return self.folder / "tasks"

    def log(self, job: str) -> Path:
        """Where a job's log is."""
        return self._logs / f"{job}.log"

    def wait(
        self, jobs: Sequence[str], update: Callable[[Mapping[str, str]], None] = lambda states: None
    ) -> dict[str, str]:
        """Wait until jobs have ended, and return how: COMPLETED, FAILED, CANCELLED ..., as Slurm calls it.

        UNKNOWN is a job that Slurm has forgotten, and that has not left word itself.

        Args:
            jobs: their ids.
            update: called after each look with the state of every job, PENDING and RUNNING among them.

        Raises:
            ConfigError: Slurm would never start a job; all of `jobs` that wait are cancelled.
            RunError: Slurm does not answer.
        """
        began = answered = time.monotonic()
        states: dict[str, str] = {}
        while left := [job for job in jobs if job not in states]:
            found = queued()
            now = time.monotonic()
            if found is not None:
                answered = now
                _check_startable(left, found)
                there = {job: found[job].state for job in left if job in found}
                for job in set(left) - set(there):
                    state = self._ended(job)
                    (there if state in GOING_ON else states)[job] = state
                update({**states, **there})
            elif now - answered > _SILENCE_S:
                raise RunError(f"Slurm has not answered for {_SILENCE_S:g} s; the jobs may be going on")
            if len(states) < len(jobs):
                time.sleep(min(max(_ASK_S[0], (now - began) / 20), _ASK_S[1]))
        return {job: states[job] for job in jobs}

    def _ended(self, job: str) -> str:
        """How a job that is no longer in the queue ended."""
        deadline = time.monotonic() + _LAG_S
        while True:
            if state := how_it_ended(job) or said_of_end(self._transit, job):
                return state
            if time.monotonic() > deadline:
                return "UNKNOWN"
            time.sleep(1)


def _have(jobs: Sequence[str]) -> str:
    more = f" and {len(jobs) - 5} more" if len(jobs) > 5 else ""
    return f"Slurm jobs that were submitted for this before ({', '.join(jobs[:5])}{more}) have"


def _scancel(jobs: Sequence[str]) -> str:
    return " ".join(["scancel", *sorted({job.partition("_")[0] for job in jobs})])


def _check_startable(jobs: Sequence[str], found: Mapping[str, State]) -> None:
    for job in jobs:
        reason = found[job].reason if job in found else ""
        # "JobHeldUser" is the user's own wish; what Slurm itself holds, after starts that failed, stays held.
        if reason in NEVER or "requeued held" in reason.lower() or reason == "JobHoldMaxRequeue":
            ask("scancel", "--quiet", "--state=PENDING", *jobs)
            raise ConfigError(
                f"Slurm would never start job {job} ({reason}); "
                "ask for less with --time, --mem, --gpus or --nodes, or name another --partition"
            )

"""The Slurm engine: a job array, submitted through submitit; each of its tasks works on a pack of units.

What it keeps, on a disk that all nodes see:

    FOLDER/jobs.json      which task has which units: a driver that comes after one that was killed waits for
                          the tasks that are still there, and submits the rest
    FOLDER/logs/ID.log    what task ID (`<array>_<number>`) said
    FOLDER/tasks/         packs and results in transit, removed as they come back
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipmill.errors import ConfigError, RunError
from clipmill.run.crew import Lost
from clipmill.run.local import Local
from clipmill.run.slurm_queue import NEVER, State, ask, cancel, check_slurm, how_it_ended, queued, submitting

_LEDGER, _TRANSIT = "jobs.json", "tasks"

_PACKS_A_JOB = 8
"""Packs for each task that may run at a time: one that is lost costs no more than its pack."""

_FRUITLESS = 3
"""A task that was stopped so many times without finishing a unit is not started again."""

_LOOK_S = 0.5  # between looks for results
_ASK_S = (1.0, 20.0)  # between questions to Slurm: in a short run, in a long one
_SILENCE_S = 600.0  # Slurm's controller may restart; after so long it is gone
_LAG_S = 20.0  # a shared disk may show a result late
_CANCELLED_S = 120.0  # for cancelled tasks to have ended
_WARNING_S = 60  # before the time limit, a task is told to stop

_REFUSED = {
    "partition": "--partition: `sinfo` lists those there are",
    "submit": "a smaller --max-jobs asks for fewer tasks",
    "time limit": "a smaller --time may be allowed",
    "memory": "a smaller --mem may fit",
    "node configuration": "no node has as much as --mem and --jobs ask for",
}
"""What stands in sbatch's refusals, and what helps."""


@dataclass(frozen=True)
class SlurmEngine:
    """An array of at most `max_jobs` tasks at a time, each with `jobs` cores, `mem_mb` MB and `time_min` minutes.

    Raises:
        ConfigError: submitit is not installed, this machine has no Slurm, or `folder` has a path that Slurm
            would read as a pattern.
    """

    folder: Path
    partition: str | None = None
    time_min: int = 60
    mem_mb: int = 4096
    max_jobs: int = 16
    jobs: int = 1

    def __post_init__(self) -> None:
        check_slurm(self.folder)

    def run(
        self, function: Callable[[Any], Any], units: Sequence[Any]
    ) -> Generator[tuple[int, Any], None, None]:
        """See `clipmill.run.Engine`; a unit comes as lost when its task has ended without a result.

        Raises:
            ConfigError: Slurm refuses such tasks, or would never start them.
            RunError: Slurm does not answer.
        """
        size = _max_array_size()
        tasks = _Tasks(self.folder)
        places = {unit.name: place for place, unit in enumerate(units)}
        try:
            given = tasks.attach({unit.name: _digest(function, unit) for unit in units})
            packs = self._packs(function, [unit for unit in units if unit.name not in given], size)
            if packs:
                tasks.submit(self, packs)
            for name, result in tasks.results():
                if name in places:
                    yield places[name], result
        finally:
            tasks.close()

    def _packs(self, function: Callable[[Any], Any], units: list[Any], size: int) -> list[_Pack]:
        many = min(-(-len(units) // self.jobs), _PACKS_A_JOB * self.max_jobs, size)
        return [_Pack(function, units[first::many], self.jobs) for first in range(many)]


@dataclass
class _Pack:
    """What a task does: `function` on its units, `jobs` at a time.

    Called it returns (unit's name, result) for each, and what `function` raised. `found` has
    the results of the units that were finished when the task was stopped, and put back in line.
    """

    function: Callable[[Any], Any]
    units: list[Any]
    jobs: int
    found: list[tuple[str, Any]] = field(default_factory=list)
    fruitless: int = 0

    def __call__(self) -> tuple[list[tuple[str, Any]], Exception | None]:
        self._new: list[tuple[str, Any]] = []
        self._error: Exception | None = None
        # Slurm signals every process of a task. This one's main thread is there for that; the helpers that the
        # work starts would die of it, and a clip be blamed, so they inherit from a thread that holds it off.
        thread = threading.Thread(target=self._work, daemon=True)
        thread.start()
        thread.join()
        return self.found + self._new, self._error

    def _work(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM])
        try:
            for place, result in Local(self.jobs).run(self.function, self.units):
                self._new.append((self.units[place].name, result))
        except Exception as error:
            self._error = _portable(error)

    def checkpoint(self) -> Any:
        """Called by submitit when the task is stopped: what to do when it starts again, or None to give up."""
        from submitit.helpers import DelayedSubmission

        new = list(self._new)
        fruitless = 0 if new else self.fruitless + 1
        done = {name for name, _ in new}
        left = [unit for unit in self.units if unit.name not in done]
        again = _Pack(self.function, left, self.jobs, self.found + new, fruitless)
        return DelayedSubmission(again) if fruitless < _FRUITLESS else None


@dataclass
class _Tasks:
    """The tasks under way: submitted by this driver, or by one before it."""

    folder: Path
    units: dict[str, dict[str, str]] = field(default_factory=dict)
    """Task -> its units' names -> their digests."""

    def __post_init__(self) -> None:
        self.folder = self.folder.resolve()
        self.ledger, self.transit, self.logs = (self.folder / n for n in (_LEDGER, _TRANSIT, "logs"))
        for folder in (self.transit, self.logs):
            folder.mkdir(parents=True, exist_ok=True)

    def attach(self, wanted: Mapping[str, str]) -> set[str]:
        """Take over the tasks of a driver that was killed; returns the names of the units they have.

        Tasks with nothing that is wanted, or with other units of the same names, are cancelled.
        """
        strangers = []
        for task, units in _left(self.ledger).items():
            same = [wanted[name] == digest for name, digest in units.items() if name in wanted]
            if same and all(same):
                self.units[task] = units
            else:
                strangers.append(task)
        _end(strangers)
        return {name for units in self.units.values() for name in units}

    def submit(self, engine: SlurmEngine, packs: list[_Pack]) -> None:
        """Submit one task for each pack.

        Raises:
            ConfigError: Slurm refuses.
        """
        import submitit

        name = f"clipmill-{uuid.uuid4().hex[:12]}"
        units = [{unit.name: _digest(pack.function, unit) for unit in pack.units} for pack in packs]
        log = str(self.logs / ("%A_%a.log" if len(packs) > 1 else "%j.log"))
        executor = submitit.AutoExecutor(
            folder=self.transit,
            cluster="slurm",
            slurm_max_num_timeout=1_000_000,  # `checkpoint` says when it is enough
            slurm_max_pickle_size_gb=1000,
        )
        executor.update_parameters(
            name=name,
            timeout_min=engine.time_min,
            cpus_per_task=engine.jobs,
            slurm_mem=f"{engine.mem_mb}MB",
            slurm_partition=engine.partition,
            slurm_array_parallelism=engine.max_jobs,
            slurm_signal_delay_s=min(_WARNING_S, engine.time_min * 20),
            slurm_stderr_to_stdout=True,
            # srun takes neither the log nor the cores from sbatch.
            slurm_srun_args=[f"--output={log}", f"--cpus-per-task={engine.jobs}"],
            slurm_additional_parameters={"output": log, "requeue": True},
        )
        self._write(name, units)
        with submitting(f"{len(packs)} tasks", _REFUSED):
            jobs = executor.submit_array(packs)
        self.units |= {job.job_id: pack for job, pack in zip(jobs, units, strict=True)}
        self._write()

    def _write(self, name: str = "", packs: Sequence[dict[str, str]] = ()) -> None:
        temporary = self.ledger.with_suffix(".tmp")
        temporary.write_text(json.dumps({"tasks": self.units, "name": name, "packs": list(packs)}))
        os.replace(temporary, self.ledger)

    def results(self) -> Iterator[tuple[str, Any]]:
        """(unit's name, result or `Lost`), as tasks end; a task that lost a worker leaves units out.

        Raises:
            what a unit's function raised, ConfigError, RunError.
        """
        began = answered = asked = time.monotonic()
        ended: dict[str, float] = {}  # task -> when it was first seen to have ended, without a result
        while self.units:
            there = set(os.listdir(self.transit))
            for task in [task for task in self.units if f"{task}_0_result.pkl" in there]:
                yield from self._take(task)
            now = time.monotonic()
            if now - asked >= min(max(_ASK_S[0], (now - began) / 20), _ASK_S[1]):
                asked = now
                states = queued()
                if states is not None:
                    answered = now
                    for task in list(self.units):
                        yield from self._look(task, states.get(task), ended)
                elif now - answered > _SILENCE_S:
                    raise RunError(
                        f"Slurm has not answered for {_SILENCE_S:g} s; run the same command again when it does"
                    )
            time.sleep(_LOOK_S)

    def _take(self, task: str) -> Iterator[tuple[str, Any]]:
        """A task's results, from what submitit left."""
        outcome, value = pickle.loads((self.transit / f"{task}_0_result.pkl").read_bytes())
        units = self._forget(task)
        if outcome != "success":
            said = str(value).strip().splitlines()[-1]
            yield from self._lost(task, units, "timeout" if "not requeued" in said else "tool-error", said)
            return
        found, error = value
        yield from found
        if error is not None:
            raise error

    def _look(self, task: str, state: State | None, ended: dict[str, float]) -> Iterator[tuple[str, Any]]:
        """What Slurm's word on a task without a result means: nothing, or that its units are lost."""
        if state is not None:
            ended.pop(task, None)
            if state.reason in NEVER:
                raise ConfigError(
                    f"Slurm would never start task {task} ({state.reason}); "
                    "ask for less with --time, --mem or --jobs, or name another --partition"
                )
            if "held" in state.reason.lower():
                cancel([task])
                yield from self._lost(
                    task, self._forget(task), "tool-error", f"Slurm holds it: {state.reason}"
                )
            return
        how = how_it_ended(task)
        if how in ("COMPLETED", "") and time.monotonic() - ended.setdefault(task, time.monotonic()) < _LAG_S:
            return  # its result may not have reached us
        if f"{task}_0_result.pkl" in os.listdir(self.transit):
            return  # it came while we asked
        reason = "timeout" if how == "TIMEOUT" else "tool-error"
        yield from self._lost(task, self._forget(task), reason, f"it ended as {how or 'unknown'}")

    def _lost(self, task: str, units: dict[str, str], reason: str, why: str) -> Iterator[tuple[str, Any]]:
        log = self.logs / f"{task}.log"
        with contextlib.suppress(OSError):
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            why = " | ".join([why, *lines[-3:]])
        yield from ((name, Lost(reason, f"Slurm task {task}: {why}; log: {log}")) for name in units)

    def _forget(self, task: str) -> dict[str, str]:
        for name in (f"{task}_submitted.pkl", f"{task}_0_result.pkl"):
            (self.transit / name).unlink(missing_ok=True)
        return self.units.pop(task)

    def close(self) -> None:
        """Cancel what is left, and leave nothing but the logs."""
        cancel(list(self.units))
        self.ledger.unlink(missing_ok=True)
        shutil.rmtree(self.transit, ignore_errors=True)


def leftovers(folder: Path) -> list[str]:
    """The tasks of a driver that was killed which are still in Slurm's queue; none where this machine has no Slurm.

    Args:
        folder: the engine's, of that driver.

    Raises:
        RunError: Slurm does not answer, or the file that tells of the tasks is damaged.
    """
    return list(_left(folder / _LEDGER)) if shutil.which("squeue") else []


def cancel_leftovers(folder: Path) -> int:
    """Cancel the `leftovers`, wait until none of them runs any more, and forget them; returns how many there were.

    For whoever is about to write where they would. Where this machine has no Slurm, nothing is done.

    Raises:
        RunError: as `leftovers`; or they do not end.
    """
    if not shutil.which("squeue"):
        return 0
    tasks = leftovers(folder)
    _end(tasks)
    (folder / _LEDGER).unlink(missing_ok=True)
    shutil.rmtree(folder / _TRANSIT, ignore_errors=True)
    return len(tasks)


def _left(ledger: Path) -> dict[str, dict[str, str]]:
    """What a driver that was killed has left in Slurm's queue: task -> its units' names -> their digests."""
    try:
        kept = json.loads(ledger.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise RunError(
            f"{ledger}: is damaged ({error}); `scancel` what the run before left, and remove the file"
        ) from error
    states = queued()
    if states is None:
        raise RunError(
            f"squeue does not answer, and tasks of the run before may still be there ({ledger}); "
            "run the same command again when Slurm does"
        )
    tasks = dict(kept["tasks"])
    for task, state in states.items():
        if state.name == kept["name"]:  # submitted, and the driver killed before it could write down more
            tasks[task] = kept["packs"][int(task.partition("_")[2] or 0)]
    return {task: units for task, units in tasks.items() if task in states}


def _end(tasks: Sequence[str]) -> None:
    """Cancel tasks, and wait until none of them can write any more.

    Raises:
        RunError: some do not end.
    """
    cancel(tasks)
    deadline = time.monotonic() + _CANCELLED_S
    left = list(tasks)
    while left:
        if time.monotonic() > deadline:
            raise RunError(
                f"tasks of the run before do not end, though cancelled: {', '.join(left[:5])}; see `squeue`, "
                "and run the same command again when they are gone"
            )
        time.sleep(_LOOK_S)
        states = queued()
        left = left if states is None else [task for task in left if task in states]


def _max_array_size() -> int:
    """How many tasks an array may have here.

    Raises:
        RunError: Slurm's controller does not answer.
    """
    said = ask("scontrol", "show", "config") or ""
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", said)
    if not found:
        raise RunError("--engine slurm: Slurm's controller does not answer; see what `scontrol ping` says")
    return int(found[1])


def _digest(function: Callable[[Any], Any], unit: Any) -> str:
    return hashlib.sha256(pickle.dumps((function, unit))).hexdigest()[:16]


def _portable(error: Exception) -> Exception:
    """The error itself, if it survives the way back."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RunError(f"{type(error).__name__}: {error}")
    return error

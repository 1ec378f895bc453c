"""Worker processes for jobs that may hang, crash or be killed: each has a time limit and a pipe of its own.

joblib's pool is for units that are all needed; when a worker of it dies, the run ends. Here
a job that takes too long, or takes its worker with it, costs that job alone. Workers share
no lock, so that one may be killed at any instant without harm to the others; they end, with
every process they started, as soon as their parent does.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

Job = TypeVar("Job")

_SPAWN = multiprocessing.get_context("spawn")  # a fork would copy locks that other threads hold
_WATCH_EVERY_S = 0.5
_JOBS_A_WORKER = 500  # then it is replaced, whatever its libraries leaked
_STARTING_S = 120.0  # for a worker to start and import what its job needs, which is not the job's time
_BEGUN = "begun"


@dataclass(frozen=True)
class Lost:
    """Why a job has no result: `reason` is "timeout" (it was killed) or "tool-error" (its worker died)."""

    reason: str
    message: str


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    job: Any = None
    busy: bool = False
    limit_s: float = 0.0
    deadline: float = 0.0
    done: int = 0


class Crew(Generic[Job]):
    """At most `size` processes that call `function`; to be used in a `with`, which ends with all of them dead.

    An error that `function` raises is raised by `results` in the caller's process.
    """

    def __init__(self, function: Callable[[Job], Any], size: int) -> None:
        self._function, self._size = function, size
        self._workers: list[_Worker] = []

    def __enter__(self) -> Crew[Job]:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in list(self._workers):
            self._end(worker)

    @property
    def in_flight(self) -> int:
        """Jobs given and not yet returned."""
        return sum(worker.busy for worker in self._workers)

    @property
    def free(self) -> int:
        """How many more jobs can be given now."""
        return self._size - self.in_flight

    def give(self, job: Job, limit_s: float) -> None:
        """Start a job on a free worker; `limit_s` is its time limit in seconds.

        Raises:
            RuntimeError: no worker is free.
        """
        if not self.free:
            raise RuntimeError("no worker is free")
        for worker in [w for w in self._workers if not w.busy and not w.process.is_alive()]:
            self._end(worker)  # killed while it was idle
        worker = next((worker for worker in self._workers if not worker.busy), None) or self._hire()
        worker.job, worker.busy, worker.limit_s = job, True, limit_s
        worker.deadline = time.monotonic() + _STARTING_S
        with contextlib.suppress(OSError):  # it died idle, and `results` will see that
            worker.pipe.send((self._function, job))

    def results(self, wait_s: float) -> list[tuple[Job, Any]]:
        """What has come to an end by now, or within `wait_s`: each job with its result, or with a `Lost`."""
        busy = [worker for worker in self._workers if worker.busy]
        now = time.monotonic()
        patience = min([wait_s, *(worker.deadline - now for worker in busy)])
        ready = set(wait([worker.pipe for worker in busy], max(patience, 0.0)))
        found = []
        for worker in busy:
            if worker.pipe in ready:
                job, answer = worker.job, self._take(worker)
                if answer != _BEGUN:
                    found.append((job, answer))
            elif time.monotonic() >= worker.deadline:
                self._end(worker)
                found.append((worker.job, Lost("timeout", f"took longer than {worker.limit_s:g} s")))
        return found

    def _take(self, worker: _Worker) -> Any:
        try:
            answer = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join(1)
            code = worker.process.exitcode
            self._end(worker)
            return Lost("tool-error", f"its worker process died (exit code {code})")
        if answer == _BEGUN:
            worker.deadline = time.monotonic() + worker.limit_s
            return answer
        result, error = answer
        worker.busy, worker.job = False, None
        worker.done += 1
        if worker.done >= _JOBS_A_WORKER:
            self._end(worker)
        if error is not None:
            raise error
        return result

    def _hire(self) -> _Worker:
        ours, theirs = _SPAWN.Pipe()
        process = _SPAWN.Process(target=_work, args=(theirs, os.getpid()), daemon=True)
        process.start()
        theirs.close()
        worker = _Worker(process, ours)
        self._workers.append(worker)
        return worker

    def _end(self, worker: _Worker) -> None:
        """Kill a worker and whatever it started."""
        self._workers.remove(worker)
        for kill in (lambda: os.killpg(worker.process.pid or 0, signal.SIGKILL), worker.process.kill):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill()
        worker.process.join()
        worker.pipe.close()


def _work(pipe: Connection, parent: int) -> None:
    """A worker's life: take a job, do it, send what came of it."""
    os.setsid()  # a group of its own: killing it kills its children, and Ctrl-C goes to the parent alone
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    while True:
        try:
            function, job = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            pipe.send(_BEGUN)
            answer: tuple[Any, Exception | None] = function(job), None
        except Exception as error:
            answer = None, error
        try:
            pipe.send(answer)
        except OSError:
            return
        except Exception as error:  # an error that cannot be pickled
            pipe.send((None, RuntimeError(f"{type(error).__name__}: {error}")))


def _die_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_WATCH_EVERY_S)
    os.killpg(0, signal.SIGKILL)

"""Worker processes for jobs that may hang, crash or be killed: each has a time limit and pipes of its own.

joblib's pools are for units of minutes that are all needed, and lose their other units with a
worker that dies. Here a job that takes too long, needs too much memory, or takes its worker
with it costs that job alone. Workers share no lock, so that one may be killed at any instant
without harm to the others; they end, with every process they started, as soon as their parent
does. They are plain subprocesses, because those that other pools run us in may be daemons,
whom multiprocessing allows no children.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

Job = TypeVar("Job")

_WATCH_EVERY_S = 0.5
_STARTING_S = 120.0  # for a worker to start and import what its job needs, which is not the job's time
_DYING_S = (
    5.0  # for a worker that was killed to be gone: one that waits for a dead network disk stays for ever
)
_BEGUN = "begun"
_PIPE_BYTES = 1 << 20  # what an unprivileged process may ask for: most results then pass in one piece

# Python looks in the user's current folder first, and a `random.py` there would be taken for the real one.
_PROGRAM = (
    "import sys; sys.path[:] = filter(None, sys.path); "
    "from clipmill.run.crew import work; work(*map(int, sys.argv[1:]))"
)
# A worker is one process among as many as there are cores: its libraries must not start threads for all of them.
_ENVIRONMENT = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1") | {
    # Arrays of some megabytes come and go with every job: given back to the system each time, as glibc would do,
    # their pages take longer to have again than most of the work on them.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
    "MALLOC_TOP_PAD_": str(16 << 20),
    "PYTHONSAFEPATH": "1",
}


@dataclass(frozen=True)
class Lost:
    """Why a job has no result: `reason` is "timeout" (it was killed) or "tool-error" (its worker died).

    `signal` is the number of the signal that ended the worker, where one did. `begun` is False where the
    worker never came to the job, which then has no part in it: it could not start, or import what it needs.
    """

    reason: str
    message: str
    signal: int | None = None
    begun: bool = True


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    jobs: Connection
    answers: Connection
    job: Any = None
    busy: bool = False
    begun: bool = False
    limit_s: float = 0.0
    deadline: float = 0.0
    done: int = 0


class Crew(Generic[Job]):
    """At most `size` processes that call `function`; to be used in a `with`, which ends with all of them dead.

    An error that `function` raises is raised by `results` in the caller's process.

    Args:
        function: can be imported by its name; so can what it is given and gives.
        size: how many processes at most.
        memory_mb: how much memory a job may take beside what its worker has when it has started; more
            raises MemoryError in `function`, or ends its worker. None: any.
        renew_after: a worker that has done so many jobs is replaced, whatever its libraries leaked.
    """

    def __init__(
        self,
        function: Callable[[Job], Any],
        size: int,
        *,
        memory_mb: int | None = None,
        renew_after: int = 500,
    ) -> None:
        self._function, self._size = function, size
        self._memory_mb, self._renew_after = memory_mb, renew_after
        self._workers: list[_Worker] = []

    def __enter__(self) -> Crew[Job]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers, whatever they are at."""
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
        for worker in [w for w in self._workers if not w.busy and w.process.poll() is not None]:
            self._end(worker)  # killed while it was idle
        worker = next((worker for worker in self._workers if not worker.busy), None) or self._hire()
        worker.job, worker.busy, worker.limit_s = job, True, limit_s
        worker.deadline = time.monotonic() + (limit_s if worker.begun else _STARTING_S)
        with contextlib.suppress(OSError):  # it died idle, and `results` will see that
            worker.jobs.send((self._function, job, self._memory_mb))

    def results(self, wait_s: float) -> list[tuple[Job, Any]]:
        """What has come to an end by now, or within `wait_s`: each job with its result, or with a `Lost`."""
        busy = [worker for worker in self._workers if worker.busy]
        now = time.monotonic()
        patience = min([wait_s, *(worker.deadline - now for worker in busy)])
        ready = set(wait([worker.answers for worker in busy], max(patience, 0.0)))
        found = []
        for worker in busy:
            if worker.answers in ready:
                job, answer = worker.job, self._take(worker)
                if answer != _BEGUN:
                    found.append((job, answer))
            elif time.monotonic() >= worker.deadline:
                self._end(worker)
                late = Lost("timeout", f"took longer than {worker.limit_s:g} s")
                found.append(
                    (worker.job, late if worker.begun else _not_begun("timeout", "it takes too long"))
                )
        return found

    def ask(self, job: Job, limit_s: float) -> Any:
        """Give one job and wait for its result, or its `Lost`; for a crew that has nothing else in flight."""
        self.give(job, limit_s)
        while not (found := self.results(_STARTING_S)):
            pass
        return found[0][1]

    def _take(self, worker: _Worker) -> Any:
        try:
            answer = worker.answers.recv()
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(1)
            code = worker.process.returncode
            self._end(worker)
            number = -code if code is not None and code < 0 else None
            if not worker.begun:
                return _not_begun("tool-error", f"exit code {code}", number)
            return Lost("tool-error", f"its worker process died (exit code {code})", number)
        if isinstance(answer, Lost):
            self._end(worker)
            return answer
        if answer == _BEGUN:
            worker.begun = True
            worker.deadline = time.monotonic() + worker.limit_s
            return answer
        result, error = answer
        worker.busy, worker.job = False, None
        worker.done += 1
        if worker.done >= self._renew_after:
            self._end(worker)
        if error is not None:
            raise error
        return result

    def _hire(self) -> _Worker:
        (jobs_out, jobs_in), (answers_out, answers_in) = os.pipe(), os.pipe()
        for pipe in (jobs_in, answers_in):
            with contextlib.suppress(OSError):  # refused where a user's pipes are many already
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, *map(str, (jobs_out, answers_in, os.getpid()))],
                pass_fds=(jobs_out, answers_in),
                stdin=subprocess.DEVNULL,
                env=os.environ | _ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # killing its group kills its children, and Ctrl-C goes to the parent alone
            )
        finally:
            os.close(jobs_out)
            os.close(answers_in)
        worker = _Worker(
            process, Connection(jobs_in, readable=False), Connection(answers_out, writable=False)
        )
        self._workers.append(worker)
        return worker

    def _end(self, worker: _Worker) -> None:
        """Kill a worker and whatever it started."""
        self._workers.remove(worker)
        if worker.process.returncode is None:  # else its number may be another's by now
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(worker.process.pid, signal.SIGKILL)
            worker.process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(_DYING_S)
        worker.jobs.close()
        worker.answers.close()


def _not_begun(reason: str, why: str, number: int | None = None) -> Lost:
    return Lost(reason, f"its worker process does not start ({why})", number, begun=False)


def work(jobs_fd: int, answers_fd: int, parent: int) -> None:
    """A worker's life: take a job, do it, send what came of it; `parent` is the process to die with."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    jobs, answers = Connection(jobs_fd, writable=False), Connection(answers_fd, readable=False)
    begun = False
    while True:
        try:
            function, job, memory_mb = jobs.recv()
        except (EOFError, OSError):
            return
        except Exception as error:  # what the job needs cannot be imported
            answers.send(_not_begun("tool-error", " ".join(f"{type(error).__name__}: {error}".split())))
            return
        try:
            if not begun:  # what it needs has been imported with the function
                _limit_memory(memory_mb)
                answers.send(_BEGUN)
                begun = True
            answer: tuple[Any, Exception | None] = function(job), None
        except Exception as error:
            answer = None, error
        try:
            answers.send(answer)
        except OSError:
            return
        except Exception as error:  # an error that cannot be pickled
            answers.send((None, RuntimeError(f"{type(error).__name__}: {error}")))


def _limit_memory(more_mb: int | None) -> None:
    if more_mb is None:
        return
    with open("/proc/self/statm") as file:
        has = int(file.read().split()[0]) * resource.getpagesize()
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = has + (more_mb << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit if most < 0 else min(limit, most), most))


def _die_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_WATCH_EVERY_S)
    os.killpg(0, signal.SIGKILL)

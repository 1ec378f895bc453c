"""What runs on the nodes of a `SlurmJob`: beside each rank of the command, one that starts it and sees to its end."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from clipmill.run.slurm_queue import how_it_ended

_INTERRUPTED = 130
_STOPPED = (_INTERRUPTED, -signal.SIGUSR1, -signal.SIGUSR2, -signal.SIGTERM)
"""Exit codes of a command that was stopped; a negative one: the signal came before it could listen."""

_FAILED = "FAILED"  # as Slurm calls it

_LOOK_S = 0.1  # between looks at the command
_HEAR_S = 1.0  # for the signal that stopped the command to reach us too
_REQUEUE_S = 10.0  # of the time to save, what is kept for putting the job back in line
_PARTING_S = 60.0  # for the first rank to put the job back in line, when it has saved

_PORTS = range(12_000, 28_000)
"""Below those that systems give to whoever asks for any."""

# Whatever becomes of us, the command must not stay behind: the kernel kills it when we die.
_GUARD = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGKILL); "
    "os.getppid() == int(sys.argv[1]) or sys.exit(1); os.execvp(sys.argv[2], sys.argv[2:])"
)


@dataclass
class Ranks:
    """What submitit calls in each Slurm task of a job, there to run `command` as one rank of many.

    The first rank's command decides what becomes of the job. One that fails before it was told to stop
    fails the job, whichever rank it is; one that fails after was stopped: its ranks lose each other as they end.

    Args:
        command: what to run, word by word.
        progress: a file whose time or size changes when the command comes further.
        ranks_per_node: how many there are on each node.
        delay_s: how long it is, when the command is told to stop, until it would be killed.
        restarts: may be in a row without progress.
        fruitless: so many were.
    """

    command: list[str]
    progress: Path
    ranks_per_node: int
    delay_s: float
    restarts: int
    fruitless: int = 0
    _job: Any = field(default=None, init=False, repr=False)
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)
    _code: int | None = field(default=None, init=False, repr=False)
    _told: bool = field(default=False, init=False, repr=False)  # to stop, before it ended
    _seen: tuple[int, int] | None = field(default=None, init=False, repr=False)
    _heard: set[int] = field(default_factory=set, init=False, repr=False)
    _requeue: Any = field(default=None, init=False, repr=False)

    def __call__(self) -> None:
        """Run the command to its end.

        Raises:
            SystemExit: it failed, was stopped, or is to be started again.
        """
        self._begin()
        if self._job.global_rank == 0:
            for old in _ends(self._folder, self._job.job_id):
                if old != self._end_file:
                    old.unlink(missing_ok=True)
            # Of a start that was killed as it went back in line; submitit would stumble over it.
            pickled = self._job.paths.submitted_pickle
            pickled.with_suffix(f"{pickled.suffix}.save_tmp").unlink(missing_ok=True)
        # submitit's; on the first rank it calls `checkpoint`
        self._requeue = signal.getsignal(self._job._usr_sig())
        for number in {signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, self._job._usr_sig()}:
            signal.signal(number, self._hear)
        self._start()
        _until(lambda: self._code is not None)
        if self._stopped:
            self._part()
        if self._code:
            self._fail()
        self._note("COMPLETED")

    def _begin(self) -> None:
        """What `checkpoint` needs too, should the signal come before we are called."""
        import submitit

        if self._job is None:
            self._seen = _fingerprint(self.progress)
            self._job = submitit.JobEnvironment()

    def _start(self) -> None:
        environment = {"OMP_NUM_THREADS": os.environ.get("SLURM_CPUS_PER_TASK", "1")}  # not one for each core
        environment |= os.environ | rank_variables(self._job, self.ranks_per_node)
        self._process = process = subprocess.Popen(
            [sys.executable, "-ISc", _GUARD, str(os.getpid()), *self.command],
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # so that it can be killed with its children
        )

        # A thread waits for it, and leaves word in a plain attribute: signal handlers wait for that too, and
        # they come at any place of the main thread, also where it would hold a lock.
        def see_it_end() -> None:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # what it started and left behind
            self._told = bool(self._heard)
            self._code = process.wait()

        threading.Thread(target=see_it_end, daemon=True).start()
        if self._heard:
            self._tell()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        """Take a signal: submitit's before the time limit, SIGTERM before the end, either when preempted."""
        first = number not in self._heard
        self._heard.add(number)
        self._tell()
        if number == self._job._usr_sig() and first:
            self._requeue(number, frame)

    def _tell(self) -> None:
        if self._process is not None and self._code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGUSR1)

    @property
    def _stopped(self) -> bool:
        """Whether the command ended since it was told to."""
        return self._code in _STOPPED or bool(self._code and self._told)

    def _part(self) -> NoReturn:
        """The command was stopped: put the job back in line, or wait for the first rank to do so."""
        if self._job.global_rank:
            # Were we to leave with an error, the job would fail, and Slurm might end the first before it has saved.
            _until(lambda: signal.SIGTERM in self._heard, self.delay_s + _PARTING_S)
            raise SystemExit(0)
        _until(lambda: bool(self._heard), _HEAR_S)
        state = how_it_ended(self._job.raw_job_id)
        if state not in ("RUNNING", ""):  # cancelled, or Slurm itself puts it back in line
            raise SystemExit(_INTERRUPTED)
        signal.raise_signal(self._job._usr_sig())
        raise AssertionError("submitit has not put the job back in line")

    def checkpoint(self) -> Any:
        """Called by submitit on the first rank, which was told to stop: what is to be run when the job starts again.

        Raises:
            SystemExit: the job has ended.
        """
        from submitit.helpers import DelayedSubmission

        self._begin()
        _until(
            lambda: self._process is None or self._code is not None,
            max(self.delay_s - _REQUEUE_S, self.delay_s / 2),
        )
        if self._process is not None and self._code is None:
            _say(f"the command has not stopped within {self.delay_s:g} s, and is killed")
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        elif self._code == 0:
            self._note("COMPLETED")
            raise SystemExit(0)
        elif self._process is not None and not self._stopped:
            self._fail()
        with contextlib.suppress(OSError):
            if self._end_file.read_text() == _FAILED:  # another rank; it has said why
                raise SystemExit(1)
        fruitless = self.fruitless + 1 if _fingerprint(self.progress) == self._seen else 0
        if fruitless > self.restarts:
            _say(
                f"given up: the job was started {fruitless} times in a row without progress ({self.progress} "
                "did not change); a longer --time, or more often saved, it would come further"
            )
            self._note(_FAILED)
            raise SystemExit(1)
        return DelayedSubmission(replace(self, fruitless=fruitless))

    def _fail(self) -> NoReturn:
        code = self._code or 0
        how = f"ended with {code}"
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
            how += " (out of memory?)" if code == -signal.SIGKILL else ""
        _say(f"rank {self._job.global_rank}: the command {how}: {shlex.join(self.command)}")
        self._note(_FAILED)
        raise SystemExit(128 - code if code < 0 else code)

    def _note(self, state: str) -> None:
        """Leave word of how the job ended, which is the first rank's to say, but for a failure of any."""
        if state == _FAILED or self._job.global_rank == 0:
            with contextlib.suppress(OSError), open(self._end_file, "w" if state == _FAILED else "x") as file:
                file.write(state)

    @property
    def _folder(self) -> Path:
        return Path(self._job.paths.folder)

    @property
    def _end_file(self) -> Path:
        # One for each start: a faster rank may have failed before the first one begins. Not asked for before it
        # is written: a network disk would then go on saying that it is not there.
        start = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        return self._folder / f"{self._job.job_id}.{start}.end"


def said_of_end(folder: Path, job: str) -> str:
    """How a job's last start ended, by what its ranks left in `folder`; empty when they left nothing."""
    ends = sorted(_ends(folder, job), key=lambda path: int(path.suffixes[-2][1:]))
    with contextlib.suppress(OSError):
        return ends[-1].read_text().strip() if ends else ""
    return ""


def _ends(folder: Path, job: str) -> list[Path]:
    return list(folder.glob(f"{job}.*.end"))


def rank_variables(job: Any, ranks_per_node: int) -> dict[str, str]:
    """The environment variables by which processes find each other, as torchrun sets them; `job`: submitit's."""
    return {
        "RANK": str(job.global_rank),
        "WORLD_SIZE": str(job.num_tasks),
        "LOCAL_RANK": str(job.local_rank),
        "LOCAL_WORLD_SIZE": str(ranks_per_node),
        "MASTER_ADDR": "127.0.0.1" if job.num_nodes == 1 else job.hostnames[0],
        "MASTER_PORT": str(_PORTS[int(job.raw_job_id) % len(_PORTS)]),
    }


def _fingerprint(path: Path) -> tuple[int, int] | None:
    """What changes when a file does; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _until(condition: Callable[[], bool], limit_s: float = float("inf")) -> None:
    deadline = time.monotonic() + limit_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(_LOOK_S)


def _say(text: str) -> None:
    print(f"clipmill: {text}", file=sys.stderr, flush=True)

"""Slurm, asked and told: what its queue says of our jobs, and how it refuses one. Its accounting is not needed."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipmill.errors import ConfigError
from clipmill.run.local import safe_path

NEVER = ("PartitionTimeLimit", "PartitionConfig", "BadConstraints", "InvalidAccount", "InvalidQOS")
"""Why a pending task will never start, and would wait for ever."""


def check_slurm(folder: Path) -> None:
    """See that jobs can be submitted from here, with their files in `folder`.

    Raises:
        ConfigError: submitit is not installed, this machine has no Slurm, or `folder` has a path that Slurm
            would read as a pattern.
    """
    try:
        import submitit  # noqa: F401
    except ImportError as error:
        raise ConfigError("--engine slurm needs submitit: pip install 'clipmill[slurm]'") from error
    if not shutil.which("sbatch"):
        raise ConfigError("--engine slurm: there is no sbatch here; run this on a node where it is")
    if found := set("%\\") & set(str(folder.resolve())):
        raise ConfigError(
            f"--engine slurm: {folder.resolve()} has {' and '.join(sorted(found))} in its path, which "
            "Slurm would not take as it is; choose another place with --out"
        )


def minutes_of(text: str) -> int:
    """A time limit as `sbatch` takes it, in whole minutes: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Raises:
        ConfigError: it is none.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise ConfigError(f"--time {text}: is no time limit; one looks like 4:00:00 or 1-12:00:00")
    days, first, second, third = (int(part or 0) for part in match.groups())
    if match[1] is not None:
        seconds = days * 86_400 + first * 3600 + second * 60 + third
    elif match[4] is not None:
        seconds = first * 3600 + second * 60 + third
    else:
        seconds = first * 60 + second
    if not seconds:
        raise ConfigError(f"--time {text}: allowed is a minute and more")
    return -(-seconds // 60)


@contextlib.contextmanager
def submitting(what: str, hints: Mapping[str, str]) -> Iterator[None]:
    """Around what calls sbatch through submitit: nothing of our own job, if we are one, reaches the new one.

    Args:
        what: is submitted, such as "3 tasks".
        hints: what may stand in sbatch's refusal, in small letters, and what helps.

    Raises:
        ConfigError: sbatch refuses.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        with safe_path(), _outside_slurm(), contextlib.redirect_stderr(io.StringIO()):
            yield
    except (FailedJobError, FailedSubmissionError) as error:
        why = "; ".join(line.removeprefix("sbatch: error: ") for line in str(error).splitlines())
        helps = [f"; {hint}" for word, hint in hints.items() if word in why.lower()]
        raise ConfigError(f"Slurm refuses {what}: {why}{''.join(helps[:1])}") from error


@contextlib.contextmanager
def _outside_slurm() -> Iterator[None]:
    """Without what a Slurm job that we may ourselves be part of says to sbatch and srun."""
    ours = {
        name: value for name, value in os.environ.items() if name.startswith(("SLURM_", "SBATCH_", "SRUN_"))
    }
    ours.pop("SLURM_CONF", None)
    for name in ours:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(ours)


@dataclass(frozen=True)
class State:
    """What Slurm says of a task that it has in its queue."""

    state: str
    reason: str
    name: str


def queued() -> dict[str, State] | None:
    """This user's tasks that have not ended; None when Slurm does not answer."""
    said = ask("squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i|%T|%r|%j")
    if said is None:
        return None
    rows = [line.strip().split("|", 3) for line in said.splitlines() if line.count("|") >= 3]
    return {task: State(state, reason, name) for task, state, reason, name in rows}


def how_it_ended(task: str) -> str:
    """Slurm's word for how a task ended; empty when it has forgotten, as it does after minutes."""
    said = ask("scontrol", "show", "job", task) or ""
    found = re.search(r"JobState=(\w+)", said)
    return found[1] if found else ""


def cancel(tasks: Sequence[str]) -> None:
    """End tasks at once: one that is merely asked to end may go on for half a minute."""
    if tasks:
        ask("scancel", "--quiet", "--full", "--signal=KILL", "--state=RUNNING", *tasks)
        ask("scancel", "--quiet", *tasks)


def ask(*command: str) -> str | None:
    """What one of Slurm's commands prints; None when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None

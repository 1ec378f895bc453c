"""A real Slurm of one node for the tests: its own munge key and socket, ports and state, nothing under /etc."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

CORES = 4
"""More than the machine may have: tasks are to wait for each other as little as possible."""

_NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
_CONF = """
ClusterName=clipmill
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SlurmdParameters=config_overrides
KillWait=2
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdSpoolDir={folder}/spool
StateSaveLocation={folder}/state
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
ReturnToService=2
MailProg=/bin/true
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=60 State=UP
"""


class NoSlurm(Exception):
    """Why there can be no node here."""


@contextlib.contextmanager
def slurm_node() -> Iterator[Path]:
    """Start the node, give its slurm.conf (for $SLURM_CONF), and end it with all that runs on it.

    Raises:
        NoSlurm: a program is missing, we are not root, or the node does not come up.
    """
    # Debian keeps the daemons where only root looks.
    os.environ["PATH"] += "".join(
        f":{p}" for p in ("/usr/sbin", "/sbin") if p not in os.environ["PATH"].split(":")
    )
    missing = [name for name in _NEEDED if not shutil.which(name)]
    if missing:
        raise NoSlurm(f"there is no {', '.join(missing)} here: `apt-get install slurm-wlm munge`")
    if os.getuid():
        raise NoSlurm("only root can start a node of Slurm")
    # Not under pytest's folders: the paths of sockets must be short.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    conf = folder / "slurm.conf"
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(conf)
    try:
        _start(folder, conf)
        yield conf
    finally:
        _end(folder)
        os.environ.pop("SLURM_CONF")
        if before is not None:
            os.environ["SLURM_CONF"] = before
        shutil.rmtree(folder, ignore_errors=True)


class BeginSoon:
    """What Slurm puts back in line it would let wait for some seconds: begin it, some looks later."""

    def __init__(self) -> None:
        self.since: dict[str, float] = {}

    def __call__(self, states: Mapping[str, str]) -> None:
        """Called at each look with the state of every task."""
        now = time.monotonic()
        self.since = {each: self.since.get(each, now) for each, state in states.items() if state == "PENDING"}
        for each, since in self.since.items():
            if now - since > 1.5:  # in the second in which it was put there the node would refuse it
                _run("scontrol", "update", f"JobId={each}", "StartTime=now", check=False)

    def look(self) -> None:
        """Ask for the states here."""
        said = _run("squeue", "--noheader", "--array", "--states=PENDING", "--format=%i", check=False)
        self(dict.fromkeys(said.split(), "PENDING"))


def _start(folder: Path, conf: Path) -> None:
    for name in ("spool", "state"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    host = socket.gethostname().partition(".")[0]
    conf.write_text(_CONF.format(host=host, folder=folder, cores=CORES, ports=_free_ports(2)))
    # --force: its socket may stand in a folder that others cannot write to, and ours is.
    own = {"key-file": key, "socket": folder / "munge.socket", "seed-file": folder / "munge.seed"}
    own |= {"pid-file": folder / "munged.pid", "log-file": folder / "munged.log"}
    _run("munged", "--force", *(f"--{name}={path}" for name, path in own.items()))
    _run("slurmctld", "-f", str(conf))
    _run("slurmd", "-f", str(conf))
    deadline = time.monotonic() + 20
    while "idle" not in (said := _run("sinfo", "--noheader", "--format=%T %E", check=False)):
        if time.monotonic() > deadline:
            log = (folder / "slurmctld.log").read_text().splitlines()[-1:]
            raise NoSlurm(f"the node does not come up: {said.strip()}; {' '.join(log)}")
        time.sleep(0.2)


def _run(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if check and done.returncode:
        raise NoSlurm(
            f"{command[0]} does not start: {(done.stderr or done.stdout).strip().splitlines()[-1:]}"
        )
    return done.stdout


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _end(folder: Path) -> None:
    if (folder / "slurmctld.pid").exists():
        _run("scancel", "--quiet", f"--user={os.getuid()}", check=False)
        deadline = time.monotonic() + 10
        while (
            _run("squeue", "--noheader", "--states=PENDING,RUNNING", check=False).strip()
            and time.monotonic() < deadline
        ):
            time.sleep(0.2)
    for name in ("slurmd", "slurmctld", "munged"):
        with contextlib.suppress(OSError, ValueError):
            pid = int((folder / f"{name}.pid").read_text())
            os.kill(pid, signal.SIGTERM)
            deadline = time.monotonic() + 5
            while _lives(pid) and time.monotonic() < deadline:
                time.sleep(0.05)


def _lives(pid: int) -> bool:
    """Whether a process still runs; one that has ended may be listed until init asks after it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

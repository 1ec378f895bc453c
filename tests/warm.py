"""Python programs that begin where their imports have ended.

What a command imports takes seconds of a core, and the tests run hundreds of them. One process imports it all once;
each program is a fork of that: a process of its own, with its own output, signals and exit code, that runs
`python -m MODULE` from there on. That the commands also begin from nothing is tested in test_cli.py.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import clipmill

LIBRARIES = (
    *(
        "torch",
        "torch._dynamo",
        "torch.distributed.launcher.api",
        "torch.utils.tensorboard",
        "torchaudio",
        "sklearn.metrics",
    ),
    *(
        "pandas",
        "pyarrow.compute",
        "pyarrow.dataset",
        "pyarrow.parquet",
        "av",
        "h5py",
        "matplotlib.figure",
        "rich.live",
    ),
)


def _ours() -> list[str]:
    """All that clipmill has, by name."""
    root = Path(clipmill.__file__).parent
    files = (path.relative_to(root.parent).with_suffix("") for path in sorted(root.rglob("*.py")))
    return [".".join(path.parts).removesuffix(".__init__") for path in files if path.name != "__main__"]


_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload([*LIBRARIES, *_ours()])


class Program:
    """One that was started: what subprocess.Popen has, with its output in files until it has ended."""

    def __init__(self, process: BaseProcess, said: tempfile.TemporaryDirectory[str]) -> None:
        assert process.pid
        self._process, self._said, self.pid = process, said, process.pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code, or minus the number of the signal that ended it; None: it runs."""
        self.returncode = self._process.exitcode
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended.

        Raises:
            subprocess.TimeoutExpired: it has not.
        """
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Its output and what it said on stderr, when it has ended."""
        self.wait(timeout)
        return self.said("out"), self.said("err")

    def said(self, stream: str) -> str:
        """Its "out" or "err" so far."""
        path = Path(self._said.name, stream)
        return path.read_text() if path.exists() else ""

    def send_signal(self, number: int) -> None:
        """Unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()


def start(
    program: str | Path,
    *words: object,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    new_session: bool = False,
    first: str = "",
) -> Program:
    """Begin `python -m PROGRAM WORDS`, or `python PROGRAM WORDS` where that is a file; as subprocess.Popen does.

    `first`: statements to execute before.
    """
    said = tempfile.TemporaryDirectory(prefix="said-")
    settings = {**os.environ, **(env or {})}
    arguments = (program, list(map(str, words)), cwd or Path.cwd(), settings, said.name, new_session, first)
    process = _server.Process(target=_program, args=arguments, name=" ".join(map(str, (program, *words))))
    process.start()
    started = Program(process, said)
    while new_session and started.poll() is None and os.getpgid(started.pid) != started.pid:
        time.sleep(0.001)
    return started


def run(
    program: str | Path, *words: object, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    started = start(program, *words, cwd=cwd, env=env)
    try:
        out, err = started.communicate(timeout=280)
    finally:
        started.kill()
    return subprocess.CompletedProcess([program, *words], started.returncode, out, err)


def _program(
    program: str | Path,
    words: list[str],
    cwd: Path,
    env: dict[str, str],
    said: str,
    new_session: bool,
    first: str,
) -> None:
    if new_session:
        os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{said}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, number)
        os.close(file)
    sys.argv = [str(program), *words]
    exec(first, {})
    try:
        if isinstance(program, Path):
            runpy.run_path(str(program), run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()

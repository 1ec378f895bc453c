"""Worker processes that may hang or die: each costs its job alone."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clipmill.run import Crew, Lost


def double(number: int) -> int:
    return 2 * number


def misbehave(how: str) -> str:
    if how == "hang":
        time.sleep(600)
    if how == "hang with a child":
        subprocess.run(["sleep", "600"], check=False)
    if how == "crash":
        os.abort()
    if how == "eat":
        return str(len(bytearray(1 << 30)))
    if how == "raise":
        raise OSError(28, "No space left on device", "/full")
    return how


def process_number(_: None) -> int:
    return os.getpid()


def content(path: str) -> bytes:
    return Path(path).read_bytes()


def ask_a_crew() -> int:
    with Crew(double, 1) as crew:
        return int(crew.ask(21, 30))


def everything(crew: Crew, jobs: list, limit_s: float = 30.0) -> dict:
    """Give all jobs as workers become free, and collect what comes of them."""
    waiting, found = list(jobs), {}
    while waiting or crew.in_flight:
        while waiting and crew.free:
            crew.give(waiting.pop(0), limit_s)
        found |= dict(crew.results(0.5))
    return found


def test_every_job_gets_its_result():
    with Crew(double, 2) as crew:
        assert everything(crew, list(range(20))) == {n: 2 * n for n in range(20)}


def test_more_jobs_than_workers_are_refused():
    with Crew(double, 1) as crew:
        crew.give(1, 30)
        with pytest.raises(RuntimeError, match="no worker is free"):
            crew.give(2, 30)


def test_a_job_that_hangs_is_killed_at_its_limit_with_all_it_started_and_costs_itself_alone():
    with Crew(misbehave, 2) as crew:
        found = everything(crew, ["hang with a child", "a", "b"], limit_s=1.0)
    assert found["hang with a child"] == Lost("timeout", "took longer than 1 s")
    assert (found["a"], found["b"]) == ("a", "b")
    left = subprocess.run(["pgrep", "-f", "^sleep 600$"], capture_output=True, text=True, check=False)
    assert not left.stdout


def test_a_job_that_takes_its_worker_with_it_costs_itself_alone():
    with Crew(misbehave, 1) as crew:
        found = everything(crew, ["a", "crash", "b"])
    assert found["crash"] == Lost("tool-error", "its worker process died (exit code -6)", signal.SIGABRT)
    assert (found["a"], found["b"]) == ("a", "b")


def test_a_worker_that_is_killed_while_idle_is_replaced():
    with Crew(double, 1) as crew:
        assert everything(crew, [1]) == {1: 2}
        os.kill(crew._workers[0].process.pid, signal.SIGKILL)
        time.sleep(0.3)
        assert everything(crew, [2]) == {2: 4}


def test_a_job_that_takes_more_memory_than_it_may_is_refused_it_and_the_next_is_not():
    with Crew(misbehave, 1, memory_mb=200) as crew:
        crew.give("eat", 30)
        with pytest.raises(MemoryError):
            everything(crew, [])
        assert crew.ask("a", 30) == "a"


def test_workers_are_renewed_after_so_many_jobs_and_asked_one_by_one():
    with Crew(process_number, 1, renew_after=2) as crew:
        first, second, third = (crew.ask(None, 30) for _ in range(3))
    assert first == second != third


def test_a_crew_works_within_a_process_that_may_have_no_children_by_multiprocessing():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(ask_a_crew) == 42


def test_an_error_of_the_job_is_raised_where_the_results_are_taken():
    with Crew(misbehave, 1) as crew:
        crew.give("raise", 30)
        with pytest.raises(OSError, match="No space left") as caught:
            everything(crew, [])
    assert caught.value.filename == "/full"


@pytest.mark.parametrize(
    ("fault", "why", "number"),
    [
        (
            "raise ImportError('libsndfile.so.1: cannot open')",
            "ImportError: libsndfile.so.1: cannot open",
            None,
        ),
        ("os.abort()", "exit code -6", signal.SIGABRT),
    ],
)
def test_a_worker_that_cannot_import_what_its_job_needs_says_that_it_never_began(
    fault, why, number, tmp_path, monkeypatch
):
    (tmp_path / "broken_there.py").write_text(
        f"import os\nif os.getpid() != {os.getpid()}: {fault}\ndef same(job): return job\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    function = importlib.import_module("broken_there").same
    with Crew(function, 1) as crew:
        for _ in range(2):
            lost = crew.ask("a", 30)
            assert lost == Lost(
                "tool-error", f"its worker process does not start ({why})", number, begun=False
            )


def test_modules_in_the_current_folder_are_not_taken_for_what_workers_need(tmp_path):
    pools = "Local(2)" if sys.version_info >= (3, 11) else ""  # joblib's workers cannot be told before
    here = tmp_path / "here"
    here.mkdir()
    for name in ("random", "soxr", "tempfile"):
        (here / f"{name}.py").write_text(f"raise SystemExit('not this {name}')\n")
    script = tmp_path / "parent.py"
    script.write_text(f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from clipmill.run import Crew, Local, run_rounds
from test_crew import double
if __name__ == "__main__":
    with Crew(double, 1) as crew:
        print(crew.ask(21, 30))
    for engine in [{pools}]:
        assert dict(run_rounds(double, [1, 2, 3], engine)) == {{0: 2, 1: 4, 2: 6}}
""")
    done = subprocess.run(
        [sys.executable, script], cwd=here, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("42\n", "")


@contextlib.contextmanager
def dead_disk(folder: Path) -> Iterator[Path]:
    """A mounted file system whose server has answered once and never again: who reads there cannot be killed."""
    try:
        server = os.open("/dev/fuse", os.O_RDWR)
    except OSError as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"fd={server},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
    try:
        if libc.mount(b"dead", bytes(folder), b"fuse", 0, options.encode()):
            pytest.skip(f"no file system can be mounted here: {os.strerror(ctypes.get_errno())}")
        hello = os.read(server, 1 << 20)
        answer = struct.pack("<IIIIHHII", 7, 31, 0, 0, 12, 9, 131072, 1).ljust(64, b"\0")
        os.write(
            server, struct.pack("<IiQ", 16 + len(answer), 0, *struct.unpack_from("<Q", hello, 8)) + answer
        )
        # It takes the first request, and keeps it.
        threading.Thread(target=os.read, args=(server, 1 << 20), daemon=True).start()
        yield folder
    finally:
        os.close(server)  # what waits is let go
        libc.umount2(bytes(folder), 2)


def test_a_worker_that_cannot_be_killed_is_left_behind(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "file").write_bytes(b"here")
    with dead_disk(disk), Crew(content, 1) as crew:
        assert crew.ask(str(tmp_path / "file"), 30) == b"here"
        stuck = crew._workers[0].process
        assert crew.ask(str(disk / "file"), 0.5) == Lost("timeout", "took longer than 0.5 s")
        assert stuck.poll() is None
        assert crew.ask(str(tmp_path / "file"), 30) == b"here"
    assert stuck.wait(10) == -signal.SIGKILL


def test_workers_end_when_their_parent_is_killed(tmp_path: Path):
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from clipmill.run import Crew
from test_crew import misbehave
if __name__ == "__main__":
    with Crew(misbehave, 2) as crew:
        crew.give("hang with a child", 600)
        crew.give("hang", 600)
        while len(crew.results(0.5)) == 0 and not all(w.process.poll() is None for w in crew._workers): pass
        print(*(w.process.pid for w in crew._workers), flush=True)
        crew.results(600)
"""
    path = tmp_path / "parent.py"
    path.write_text(script)
    with subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        time.sleep(1)  # for the child of one of them to start
        parent.kill()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)

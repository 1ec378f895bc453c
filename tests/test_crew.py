"""Worker processes that may hang or die: each costs its job alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
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

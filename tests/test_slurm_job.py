"""Commands as Slurm jobs, on a real Slurm of one node: stopped, put back in line, failed, cancelled, given up."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import warm
from clipmill.errors import ConfigError
from clipmill.run.slurm_job import SlurmJob
from clipmill.run.slurm_ranks import Ranks, rank_variables
from slurm_node import BeginSoon, NoSlurm, slurm_node
from test_train import shards_of

COUNTS = """
import os, pathlib, signal, sys, time
stopping, place, limit = [], pathlib.Path(sys.argv[1]), int(sys.argv[2])
for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, lambda *_: stopping.append(1))
count = start = int(place.read_text()) if place.exists() else 0
print(f"from {start}", flush=True)
pathlib.Path(f"{place}.pid").write_text(str(os.getpid()))
while count < limit or (limit < 0 and start == 0):
    time.sleep(0.05)
    count += 1
    if stopping:
        if count > start: place.write_text(str(count))
        sys.exit(130)
place.write_text(f"{count} after {start}")
"""
"""Counts to a limit, or to when it is told to stop, and writes down how far it came, if further than before; -1: until
it was told so once."""


def until(condition: Callable[[], bool], limit_s: float = 40.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def slurm_conf() -> Iterator[Path]:
    pytest.importorskip("submitit", reason="submitit is not installed")
    try:
        with slurm_node() as conf, pytest.MonkeyPatch.context() as patch:
            patch.setattr("clipmill.run.slurm_job._ASK_S", (0.2, 0.2))
            yield conf
    except NoSlurm as why:
        pytest.skip(str(why))


@pytest.fixture
def job(slurm_conf: Path, tmp_path: Path) -> SlurmJob:
    return SlurmJob(tmp_path / "slurm", time_min=2, mem_mb=300, cpus_per_rank=1)


def runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def python(code: str, *words: object) -> list[str]:
    return [sys.executable, "-c", code, *map(str, words)]


def pid_of(place: Path) -> str:
    said = Path(f"{place}.pid")
    until(lambda: said.exists() and bool(said.read_text()))
    return said.read_text()


@pytest.mark.slurm
class TestSlurmJob:
    def test_ranks_find_each_other_and_speak_in_one_log(self, job, tmp_path):
        job = SlurmJob(**{**vars(job), "ranks_per_node": 2})
        code = (
            "import os, sys\n"
            "names = 'RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT'\n"
            "said = ' '.join(['has', *(os.environ[name] for name in names.split()), os.getcwd()])\n"
            "sys.stderr.write(f'{said}\\n')"
        )
        [name] = job.submit([python(code)], "two", [tmp_path / "none"])
        assert job.wait([name]) == {name: "COMPLETED"}
        port = 12_000 + int(name) % 16_000
        said = sorted(line for line in job.log(name).read_text().splitlines() if " has " in line)
        assert said == [f"{rank}: has {rank} {rank} 2 2 127.0.0.1 {port} {os.getcwd()}" for rank in (0, 1)]

    def test_a_job_of_several_ranks_told_to_stop_saves_goes_back_in_line_and_goes_on(self, job, tmp_path):
        """As Slurm tells it before the time limit."""
        job = SlurmJob(**{**vars(job), "ranks_per_node": 2})
        code = f"import os, sys; sys.argv[1] += os.environ['RANK']\n{COUNTS}"
        [name] = job.submit([python(code, tmp_path / "at", -1)], "count", [tmp_path / "at0"])
        places = [tmp_path / "at0", tmp_path / "at1"]
        for place in places:
            pid_of(place)
        subprocess.run(["scancel", "--signal=USR2", name], check=True)
        assert job.wait([name], BeginSoon()) == {name: "COMPLETED"}
        for place in places:
            count, start = place.read_text().split(" after ")
            assert int(count) == int(start) > 0
        log = job.log(name).read_text()
        assert "from 0" in log
        assert f"from {start}" in log
        assert "Traceback" not in log

    def test_however_a_job_is_stopped_it_goes_on_later(self, job, tmp_path):
        """Put back in line by Slurm, told to save, and interrupted by who knows whom."""
        how = ["scontrol requeue", "scancel --signal=TERM", "scancel --signal=USR2", "kill"]
        places = [tmp_path / str(number) for number in range(len(how))]
        names = job.submit([python(COUNTS, place, -1) for place in places], "preempted", places)
        pids = [pid_of(place) for place in places]
        for command, name in zip(how, [*names[:-1], pids[-1]], strict=True):
            subprocess.run([*command.split(), name], check=True)
        assert job.wait(names, BeginSoon()) == dict.fromkeys(names, "COMPLETED")
        for place in places:
            count, start = place.read_text().split(" after ")
            assert int(count) == int(start) > 0

    def test_jobs_that_fail_are_not_begun_again_and_those_beside_them_go_on(self, job, tmp_path):
        fails = "import os; open({!r}, 'a').write('x'); {}"
        commands = [
            python(fails.format(str(tmp_path / "a"), "1 / 0")),
            python(fails.format(str(tmp_path / "b"), "os.kill(os.getpid(), 9)")),
            python(fails.format(str(tmp_path / "c"), "pass")),
            [str(tmp_path / "nothing")],
        ]
        names = job.submit(commands, "fail", [tmp_path / "progress"] * 4)
        seen = []
        states = job.wait(names, seen.append)
        assert [states[name] for name in names] == ["FAILED", "FAILED", "COMPLETED", "FAILED"]
        assert set(seen[-1]) == set(names)
        assert [(tmp_path / name).read_text() for name in "abc"] == ["x", "x", "x"]
        logs = [job.log(name).read_text() for name in names]
        assert re.search(r"ZeroDivisionError: .*\nclipmill: rank 0: the command ended with 1: ", logs[0])
        assert "was killed by SIGKILL (out of memory?)" in logs[1]
        assert "FileNotFoundError" in logs[3]

    def test_a_rank_that_fails_ends_the_others_and_the_job(self, job, tmp_path):
        job = SlurmJob(**{**vars(job), "ranks_per_node": 2})
        code = f"import os, time\nif os.environ['RANK'] == '1': time.sleep(1); raise SystemExit(7)\n{COUNTS}"
        [name] = job.submit([python(code, tmp_path / "at", 10**6)], "one", [tmp_path / "at"])
        pid = pid_of(tmp_path / "at")
        assert job.wait([name], BeginSoon()) == {name: "FAILED"}
        until(lambda: not runs(pid))
        assert "rank 1: the command ended with 7" in job.log(name).read_text()

    def test_when_cancelled_jobs_leave_no_process_behind(self, job, tmp_path):
        deaf = COUNTS.replace("lambda *_: stopping.append(1)", "signal.SIG_IGN")
        child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {deaf!r}, *sys.argv[1:]])"
        places = [tmp_path / name for name in ("listens", "is-deaf", "has-a-deaf-child")]
        commands = [
            python(code, place, 10**6) for code, place in zip((COUNTS, deaf, child), places, strict=True)
        ]
        names = job.submit(commands, "cancelled", places)
        pids = [pid_of(place) for place in places]
        subprocess.run(["scancel", *names], check=True)
        assert job.wait(names) == dict.fromkeys(names, "CANCELLED")
        until(lambda: not any(runs(pid) for pid in pids))
        assert int(places[0].read_text()) > 0
        listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        assert str(tmp_path) not in listing

    def test_a_job_that_is_stopped_each_time_before_it_comes_further_is_given_up(self, job, tmp_path):
        job, place = SlurmJob(**{**vars(job), "restarts": 1}), tmp_path / "at"
        place.write_text("5")
        [name] = job.submit([python(COUNTS.replace("+= 1", "+= 0"), place, 9)], "stopped", [place])
        soon, told = BeginSoon(), set()

        def stop(states):
            soon(states)
            pid = Path(f"{place}.pid").read_text() if Path(f"{place}.pid").exists() else ""
            if pid and pid not in told:
                told.add(pid)
                subprocess.run(["scancel", "--signal=USR2", name], check=True)

        assert job.wait([name], stop) == {name: "FAILED"}
        assert len(told) == 2
        why = f"given up: the job was started 2 times in a row without progress ({place} did not change)"
        assert why in job.log(name).read_text()
        assert place.read_text() == "5"

    @pytest.mark.parametrize("number", ["USR2", "USR1"])
    def test_ranks_that_fail_of_being_stopped_or_of_each_other_begin_again(
        self, job, tmp_path, number, monkeypatch
    ):
        """Also where submitit is told of another signal than its own."""
        monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", number)
        job, place = SlurmJob(**{**vars(job), "ranks_per_node": 2}), tmp_path / "at"
        code = (
            "import os, pathlib, signal, sys, time\n"
            "place = pathlib.Path(sys.argv[1] + os.environ['RANK'])\n"
            "if place.exists(): sys.exit()\n"
            "if place.name == 'at0': signal.signal(signal.SIGUSR1, lambda *_: sys.exit(1))\n"
            "signal.signal(signal.SIGUSR2, signal.SIG_IGN)\n"
            "place.touch(); time.sleep(100)"
        )
        [name] = job.submit([python(code, place)], "fragile", [tmp_path / "at0"])
        until(lambda: all((tmp_path / f"at{rank}").exists() for rank in (0, 1)))
        subprocess.run(["scancel", f"--signal={number}", name], check=True)
        assert job.wait([name], BeginSoon()) == {name: "COMPLETED"}

    def test_no_second_job_is_submitted_while_one_waits_or_runs_but_it_can_be_waited_for(self, job, tmp_path):
        place = tmp_path / "at"
        commands = [python(COUNTS, place, 10**6), ["true"]]
        names = job.submit(commands, "mine", [place] * 2)
        pid_of(place)
        with pytest.raises(ConfigError, match=rf"{names[0]}.*not ended.*--wait.*`scancel {names[0][:-2]}`"):
            job.submit(commands, "mine", [place] * 2)
        assert job.attach(commands) == names
        ledger = job.folder / "jobs.json"  # as of one who was killed before he knew the ids
        ledger.write_text(json.dumps({**json.loads(ledger.read_text()), "jobs": []}))
        assert job.attach(commands) == names
        with pytest.raises(ConfigError, match=r"other flags.*`scancel \d+`"):
            job.attach([["true"]])
        subprocess.run(["scancel", names[0]], check=True)
        until(lambda: not job.attach(commands))
        assert job.wait(job.submit([["true"]], "mine", [place])).popitem()[1] == "COMPLETED"

    @pytest.mark.parametrize(
        ("settings", "what"),
        [
            ({"partition": "nowhere"}, r"invalid partition.*--partition"),
            ({"mem_mb": 10**7}, r"Memory.*--mem"),
            ({"nodes": 7}, r"--nodes"),
            ({"gpus_per_node": 2}, r"generic resource.*GPUs"),
            ({"time_min": 10_000}, r"Partition(TimeLimit|Config).*--time"),
        ],
    )
    def test_what_slurm_refuses_is_said_with_the_flag_that_mends_it(self, job, tmp_path, settings, what):
        job = SlurmJob(**{**vars(job), **settings})
        with pytest.raises(ConfigError, match=what) as caught:
            job.wait(job.submit([["true"]], "refused", [tmp_path]))
        assert "\n" not in str(caught.value)
        until(
            lambda: not subprocess.run(["squeue", "-h", "-t", "PD"], capture_output=True, check=True).stdout
        )

    def test_a_command_that_does_not_stop_is_killed_in_time_and_goes_on_later(self, job, tmp_path):
        job = SlurmJob(**{**vars(job), "signal_delay_s": 2})
        code = COUNTS.replace("lambda *_: stopping.append(1)", "signal.SIG_IGN")
        code = f"import os, sys\nif os.path.exists(sys.argv[1] + '.pid'): sys.exit(0)\n{code}"
        [name] = job.submit([python(code, tmp_path / "at", 10**6)], "deaf", [tmp_path / "at"])
        pid_of(tmp_path / "at")
        subprocess.run(["scancel", "--signal=USR2", name], check=True)
        assert job.wait([name], BeginSoon()) == {name: "COMPLETED"}
        assert "has not stopped within 2 s, and is killed" in job.log(name).read_text()


def test_ranks_of_several_nodes_meet_on_the_first(monkeypatch):
    job_environment = pytest.importorskip("submitit.slurm.slurm", reason="submitit is not installed")
    said = {"JOB_ID": "50123", "NTASKS": "8", "JOB_NUM_NODES": "2", "PROCID": "5", "LOCALID": "1"}
    for name, value in {**said, "JOB_NODELIST": "gpu[07-08]"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert rank_variables(job_environment.SlurmJobEnvironment(), 4) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "14123",
    }


def test_told_to_stop_before_it_begins_it_goes_back_in_line_unless_a_rank_of_this_start_failed(
    monkeypatch, tmp_path
):
    pytest.importorskip("submitit", reason="submitit is not installed")
    said = {"SLURM_JOB_ID": "50123", "SLURM_RESTART_COUNT": "1", "SUBMITIT_FOLDER": str(tmp_path)}
    for name, value in {**said, "SUBMITIT_EXECUTOR": "slurm"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "50123.0.end").write_text("FAILED")
    assert Ranks(["true"], tmp_path / "none", 1, 2.0, 3).checkpoint().function.fruitless == 1
    (tmp_path / "50123.1.end").write_text("FAILED")
    with pytest.raises(SystemExit):
        Ranks(["true"], tmp_path / "none", 1, 2.0, 3).checkpoint()


def test_without_slurm_it_is_said_where_to_run(monkeypatch, tmp_path):
    pytest.importorskip("submitit", reason="submitit is not installed")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="there is no sbatch here"):
        SlurmJob(tmp_path)


# Training


@pytest.mark.slurm
def test_training_as_a_job_of_two_ranks_is_waited_for_by_the_same_command_and_goes_on_when_stopped(
    slurm_conf, tmp_path
):
    where, out = shards_of(tmp_path), tmp_path / "run"
    train = ["clipmill", "train", "--shards", str(where), "--out", str(out), "--fold=1"]
    train += ["--model=erann-3-1", "--steps=12", "--batch-size=4", "--crop-s=0.1", "--eval-every=12"]
    train += ["--save-every=4", "--no-page", "--engine=slurm", "--gpus=0", "--ranks=2", "--cpus=1"]
    train += ["--time=5", "--mem=3000"]
    said = warm.run(*train).stderr
    name = re.search(rf"job (\d+): {out}, which says in (.*) how it goes", said)[1]
    log, soon = out / "slurm" / "logs" / f"{name}.log", BeginSoon()
    waiting = warm.start(*train, "--wait")
    until((out / "last.pt").exists, 120)
    subprocess.run(["scancel", "--signal=USR2", name], check=True)

    def ended() -> bool:
        soon.look()
        return waiting.poll() is not None

    until(ended, 120)
    printed, said = waiting.communicate()
    assert waiting.returncode == 0, (said, log.read_text())
    assert "what was submitted before has not ended, and is waited for" in said
    assert re.search(r"stopped at step \d+ of 12: the same command with --resume goes on", log.read_text())
    assert "going on from step" in log.read_text()
    assert re.search(r"last: accuracy \d\.\d+ on 6 clips at step 12", printed)
    # What has ended is asked for again: only what a job would do is left to one.
    assert "all of this is finished already" in warm.run(*train, "--resume").stderr
    other = warm.run(*train, "--resume", "--learning-rate=0.5")
    assert other.returncode == 1
    assert re.search(r"this run was begun otherwise: learning_rate was \S+, now 0\.5\. Give", other.stderr)
    longer = re.search(r"job (\d+): ", warm.run(*train, "--resume", "--steps=16").stderr)
    assert longer, "more steps train on, as they do here"
    subprocess.run(["scancel", longer[1]], check=True)

"""Dask, Ray and Slurm: every unit comes to its end, and the same bytes come from each.

Against real clusters on this machine: a Dask scheduler with two workers, a Ray head, a one-node Slurm.
"""

from __future__ import annotations

import errno
import http.server
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import soundfile

from clipmill.errors import ClipmillError, ConfigError, RunError
from clipmill.run import Engine, Lost, run_rounds
from clipmill.run.dask import DaskEngine
from clipmill.run.ray import RayEngine
from clipmill.run.slurm import SlurmEngine, cancel_leftovers, leftovers
from clipmill.shards.read import Shards
from conftest import sound
from slurm_node import BeginSoon, NoSlurm, slurm_node
from units import Unit, work

HERE = Path(__file__).parent


def begun(marks: Path, name: str) -> int:
    return len((marks / name).read_text().splitlines()) if (marks / name).exists() else 0


def until(condition: Callable[[], bool], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    """Workers import `units`, as they import clipmill: from what is installed for them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)
        # A token of our own: newer Rays want one, and the user's is none of a test's business.
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        yield


@pytest.fixture(scope="module")
def dask_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("distributed", reason="Dask is not installed")
    folder = tmp_path_factory.mktemp("dask")
    address = f"tcp://127.0.0.1:{free_port()}"
    port = address.rpartition(":")[2]
    commands = (
        ["scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard"],
        ["worker", address, "--nworkers", "2", "--nthreads", "1", "--no-dashboard"],
    )
    with open(folder / "log", "w") as log:
        started = [
            subprocess.Popen([sys.executable, "-m", "dask", *each], cwd=folder, stdout=log, stderr=log)
            for each in commands
        ]
        until(lambda: answers(int(port)))
        yield address
        for process in reversed(started):
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="module")
def ray_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("ray", reason="Ray is not installed")
    address = f"127.0.0.1:{free_port()}"
    command = [Path(sys.executable).parent / "ray", "start", "--head", "--block", "--num-cpus=2"]
    command += [
        f"--port={address.rpartition(':')[2]}",
        "--include-dashboard=false",
        "--node-ip-address=127.0.0.1",
    ]
    command += ["--disable-usage-stats", "--object-store-memory=100000000"]
    with open(tmp_path_factory.mktemp("ray") / "log", "w+") as log:
        head = subprocess.Popen(command, stdout=log, stderr=log)
        until(lambda: "Ray runtime started" in Path(log.name).read_text() or head.poll() is not None)
        assert head.poll() is None, Path(log.name).read_text()
        yield address
        head.terminate()
        head.wait(30)


@pytest.fixture(scope="module")
def slurm_conf() -> Iterator[Path]:
    pytest.importorskip("submitit", reason="submitit is not installed")
    try:
        with slurm_node() as conf, pytest.MonkeyPatch.context() as patch:
            patch.setattr("clipmill.run.slurm._LOOK_S", 0.1)
            patch.setattr("clipmill.run.slurm._ASK_S", (0.3, 20.0))
            yield conf
    except NoSlurm as why:
        pytest.skip(str(why))


@pytest.fixture
def slurm(slurm_conf: Path, tmp_path: Path) -> SlurmEngine:
    until(lambda: not in_queue())  # a result comes before Slurm hears that its task has ended
    return SlurmEngine(tmp_path / "slurm", time_min=2, mem_mb=500, max_jobs=4)


@pytest.fixture(params=["dask", "ray", pytest.param("slurm", marks=pytest.mark.slurm)])
def engine(request: pytest.FixtureRequest) -> Engine:
    if request.param == "slurm":
        return request.getfixturevalue("slurm")
    kind = {"dask": DaskEngine, "ray": RayEngine}[request.param]
    return kind(request.getfixturevalue(f"{request.param}_address"))


def test_every_unit_gets_its_result_in_whatever_order(engine):
    units = [Unit(f"u{number}") for number in range(9)]
    assert dict(engine.run(work, units)) == {number: f"U{number}" for number in range(9)}


def test_one_unit_alone_gets_its_result(engine):
    assert list(engine.run(work, [Unit("alone")])) == [(0, "ALONE")]


def test_what_a_unit_raises_is_raised_as_it_is(engine):
    with (
        pytest.raises(OSError, match="No space left") as caught,
        closing(engine.run(work, [Unit("a"), Unit("b", "full disk"), Unit("c")])) as results,
    ):
        list(results)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "/shards")


def test_a_dead_worker_costs_nothing_and_a_unit_that_kills_every_worker_itself_alone(engine, tmp_path):
    units = [Unit("a"), Unit("killer", "dies"), Unit("b", "dies once", tmp_path), Unit("c")]
    found = dict(run_rounds(work, units, engine))
    assert isinstance(lost := found.pop(1), Lost)
    assert lost.reason == "tool-error"
    assert found == {0: "A", 2: "B", 3: "C"}


def test_stopped_early_it_begins_nothing_more(engine, tmp_path):
    names = [f"u{number}" for number in range(40)]
    with closing(engine.run(work, [Unit(name, "takes a while", tmp_path) for name in names])) as results:
        next(results)
    before = sum(begun(tmp_path, name) for name in names)
    time.sleep(1.5)
    assert sum(begun(tmp_path, name) for name in names) <= before < len(names)


@pytest.fixture(scope="module")
def alone(make, tmp_path_factory) -> dict:
    """What one process makes of the small collection, and two."""
    folder = tmp_path_factory.mktemp("alone")
    one, two = make(folder / "one"), make(folder / "two", jobs=2)
    assert one["root_sha256"] == two["root_sha256"]
    return one


def test_the_same_bytes_come_from_every_engine(engine, alone, make, tmp_path):
    there = make(tmp_path / "there", engine=engine)
    assert there["root_sha256"] == alone["root_sha256"]
    assert there["counts"] == alone["counts"]


def test_the_same_features_come_from_every_engine(engine, make, tmp_path):
    from clipmill.features import create_feature
    from clipmill.featurestore import make_features

    make(tmp_path / "sound", clips_per_shard=12)
    shards = Shards.open(tmp_path / "sound", ours=True)
    here, there = (
        make_features(shards, tmp_path / name, create_feature("chroma", sample_rate=44100), engine=engine)
        for name, engine in (("here", None), ("there", engine))
    )
    assert there.stopped == ""
    assert there.entry.info["root_sha256"] == here.entry.info["root_sha256"]
    assert there.counts == here.counts


@pytest.mark.parametrize("kind", [DaskEngine, RayEngine])
def test_a_cluster_started_for_the_job_ends_with_it(kind, make, tmp_path):
    pytest.importorskip({DaskEngine: "distributed", RayEngine: "ray"}[kind])
    with closing(kind(None, 2).run(work, [Unit("a"), Unit("b", "hangs once", tmp_path)])) as results:
        assert next(results) == (0, "A")
        until(lambda: begun(tmp_path, "b") == 1)
    worker = Path("/proc", (tmp_path / "b").read_text().strip())
    until(lambda: not worker.exists(), 10)


@pytest.fixture(scope="module")
def minute(run, tmp_path_factory) -> Path:
    """A root with `minute`: many clips, and a current folder with modules that nobody means."""
    folder = tmp_path_factory.mktemp("minute")
    (folder / "media" / "noise").mkdir(parents=True)
    first = folder / "media" / "noise" / "0.wav"
    soundfile.write(first, sound(1.0, 44100), 44100)
    for number in range(1, 300):
        os.link(first, first.with_name(f"{number}.wav"))
    fetched = run(
        "fetch", "folder", "--name", "minute", "--from", folder / "media", "--root", folder / "root"
    )
    assert fetched.returncode == 0
    (folder / "here").mkdir()
    for name in ("random", "soxr"):
        (folder / "here" / f"{name}.py").write_text(f"raise SystemExit('not this {name}')\n")
    return folder


@pytest.mark.parametrize(
    ("name", "number"), [("dask", signal.SIGINT), ("ray", signal.SIGTERM), ("local", signal.SIGINT)]
)
def test_the_command_stopped_in_the_middle_says_so_and_nothing_else(name, number, minute):
    """All its processes hear of Ctrl-C, as in a terminal; who calls a scheduler's command stops it alone."""
    pytest.importorskip({"dask": "distributed", "ray": "ray", "local": "joblib"}[name])
    out = minute / name
    command = ["import sys; del sys.path[0]; from clipmill.cli import main; main()", "shard", "minute"]
    command += ["--root", minute / "root", "--out", out, "--clips-per-shard", "1", "--jobs", "2"]
    with subprocess.Popen(
        [sys.executable, "-c", *command, "--engine", name],
        cwd=minute / "here",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        until(lambda: len(list(out.glob("*.tar"))) > 4 or process.poll() is not None)
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        said = process.communicate(timeout=60)[1]
    lines = [line for line in said.splitlines() if line and not line.startswith("shard minute:")]
    assert lines == ["interrupted: run the same command again to go on"]
    assert process.returncode == 130
    assert set(re.findall(r"failed (\d+)", said)) <= {"0"}  # in a line of progress, where it came so far


@pytest.fixture
def other_server() -> Iterator[str]:
    """Where something answers that is neither Dask nor Ray."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), QuietHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


class QuietHandler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(("kind", "module"), [(DaskEngine, "distributed"), (RayEngine, "ray")])
def test_an_address_where_something_else_answers_is_said_in_one_line(
    kind, module, other_server, capfd, monkeypatch
):
    pytest.importorskip(module)
    monkeypatch.setattr("clipmill.run.dask._ANSWER_S", 1)
    with pytest.raises(ConfigError, match=r"no (Dask scheduler|Ray cluster) answers there") as caught:
        list(kind(other_server).run(work, [Unit("a")]))
    assert f"--address {other_server}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@dataclass
class Barren:
    """An engine whose workers always die, but for those that get one of `good`; it counts its rounds."""

    good: frozenset[int] = frozenset()
    rounds: int = 0

    def run(
        self, function: Callable[[int], int], units: Sequence[int]
    ) -> Generator[tuple[int, int], None, None]:
        self.rounds += 1
        if units[0] in self.good:
            yield 0, function(units[0])


def test_where_every_worker_dies_the_rest_is_given_up_after_one_batch():
    engine = Barren()
    found = list(run_rounds(abs, range(8125), engine))
    assert sorted(place for place, _ in found) == list(range(8125))
    assert {result for _, result in found} == {Lost("tool-error", "each worker process that had it was lost")}
    assert engine.rounds < 100


def test_as_long_as_anything_comes_of_the_units_none_is_given_up_untried():
    found = dict(run_rounds(abs, range(48), Barren(frozenset(range(10, 48, 10)))))
    assert {place for place, result in found.items() if not isinstance(result, Lost)} == {10, 20, 30, 40}
    assert len(found) == 48


@pytest.mark.parametrize(
    ("kind", "address", "what"),
    [
        (DaskEngine, "tcp://127.0.0.1:1", "no Dask scheduler answers there"),
        (DaskEngine, "nonsense://127.0.0.1:1", "no Dask scheduler answers there"),
        (DaskEngine, "tcp://127.0.0.1", "no Dask scheduler answers there"),
        (RayEngine, "127.0.0.1:1", "no Ray cluster answers there"),
    ],
)
def test_an_address_where_nobody_answers_is_said_in_one_line(kind, address, what, monkeypatch):
    pytest.importorskip({DaskEngine: "distributed", RayEngine: "ray"}[kind])
    monkeypatch.setattr("clipmill.run.dask._ANSWER_S", 1)
    with pytest.raises(ConfigError, match=what) as caught:
        list(kind(address).run(work, [Unit("a")]))
    assert f"--address {address}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_dask_scheduler_that_is_lost_ends_the_run(tmp_path):
    pytest.importorskip("distributed")
    port = str(free_port())
    command = [
        sys.executable,
        "-m",
        "dask",
        "scheduler",
        "--host",
        "127.0.0.1",
        "--port",
        port,
        "--no-dashboard",
    ]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": tmp_path}
    worker = [
        sys.executable,
        "-m",
        "dask",
        "worker",
        f"tcp://127.0.0.1:{port}",
        "--nworkers",
        "1",
        "--no-dashboard",
    ]
    with subprocess.Popen(command, **quiet) as scheduler, subprocess.Popen(worker, **quiet) as started:
        try:
            until(lambda: socket.socket().connect_ex(("127.0.0.1", int(port))) == 0)
            results = DaskEngine(f"tcp://127.0.0.1:{port}").run(
                work, [Unit("a"), *(Unit(f"u{n}", "takes a while") for n in range(20))]
            )
            assert next(results) == (0, "A")
            scheduler.kill()
            with pytest.raises(RunError, match="scheduler was lost"):
                list(results)
        finally:
            scheduler.kill()
            started.terminate()


@pytest.mark.parametrize(("name", "module"), [("Dask", "distributed"), ("Ray", "ray"), ("Slurm", "submitit")])
def test_an_engine_that_is_not_installed_says_what_to_install(name, module, tmp_path):
    (tmp_path / f"{module}.py").write_text("raise ImportError('not installed')\n")
    first = "Path('.')" if name == "Slurm" else "None"
    code = f"from pathlib import Path; from clipmill.run.{name.lower()} import {name}Engine as E; E({first})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert f"pip install 'clipmill[{name.lower()}]'" in done.stderr.splitlines()[-1]


@pytest.mark.slurm
class TestSlurm:
    def test_nothing_but_the_logs_is_left_one_for_each_task(self, slurm):
        list(slurm.run(work, [Unit(f"u{number}") for number in range(3)]))
        left = [path for path in slurm.folder.rglob("*") if path.is_file()]
        assert {path.parent.name for path in left} == {"logs"}
        assert len(left) == 3
        assert all(re.fullmatch(r"\d+_\d+\.log", path.name) for path in left)
        assert "completed successfully" in left[0].read_text()

    def test_units_are_packed_and_a_task_may_have_several_cores(self, slurm_conf, tmp_path):
        engine = SlurmEngine(tmp_path, time_min=2, mem_mb=500, max_jobs=1, jobs=2)
        assert len(dict(engine.run(work, [Unit(f"u{number}") for number in range(6)]))) == 6
        assert len(list((tmp_path / "logs").iterdir())) == 3

    def test_a_lost_task_says_where_its_log_is_and_how_it_ends(self, slurm):
        [(_, lost)] = slurm.run(work, [Unit("a", "dies")])
        assert re.search(
            r"Slurm task \d+: it ended as FAILED .*Killed.*; log: .*/logs/\d+\.log$", lost.message
        )

    def test_tasks_of_a_driver_that_was_killed_are_waited_for_and_not_begun_again(self, slurm, tmp_path):
        units = [Unit("a", "takes a while", tmp_path), Unit("b", "takes a while", tmp_path)]
        with driver(slurm, units) as process:
            until(lambda: begun(tmp_path, "a") == begun(tmp_path, "b") == 1)
            process.kill()
        assert (slurm.folder / "jobs.json").exists()
        more = [*units, Unit("c", "work", tmp_path)]
        assert dict(slurm.run(work, more)) == {0: "A", 1: "B", 2: "C"}
        assert [begun(tmp_path, name) for name in "abc"] == [1, 1, 1]
        assert not (slurm.folder / "jobs.json").exists()

    def test_tasks_of_another_plan_are_cancelled(self, slurm, tmp_path):
        with driver(slurm, [Unit("a", "hangs once", tmp_path)]) as process:
            until(lambda: begun(tmp_path, "a") == 1)
            process.kill()
        [hanging] = in_queue()
        assert dict(slurm.run(work, [Unit("a")])) == {0: "A"}
        assert hanging not in in_queue()

    def test_tasks_of_a_driver_that_was_killed_can_be_cancelled_before_another_engine_writes_there(
        self, slurm, tmp_path
    ):
        assert leftovers(slurm.folder) == []
        with driver(slurm, [Unit("a", "hangs once", tmp_path), Unit("b", "hangs once", tmp_path)]) as process:
            until(lambda: begun(tmp_path, "a") == begun(tmp_path, "b") == 1)
            process.kill()
        assert leftovers(slurm.folder) == in_queue()
        assert cancel_leftovers(slurm.folder) == 2
        assert not Path("/proc", (tmp_path / "a").read_text().strip()).exists()
        assert [path.name for path in slurm.folder.iterdir()] == ["logs"]
        assert (leftovers(slurm.folder), cancel_leftovers(slurm.folder)) == ([], 0)

    def test_a_folder_whose_name_slurm_would_read_as_a_pattern_is_refused(self, slurm, tmp_path):
        with pytest.raises(ConfigError, match=r"100% sure/slurm has % in its path.*--out"):
            SlurmEngine(tmp_path / "100% sure" / "slurm")

    def test_ctrl_c_cancels_the_array(self, slurm, tmp_path):
        with driver(slurm, [Unit("a", "hangs once", tmp_path), Unit("b")]) as process:
            until(lambda: begun(tmp_path, "a") == 1)
            process.send_signal(signal.SIGINT)
        until(lambda: not in_queue())

    def test_a_task_that_is_requeued_begins_again_and_finishes(self, slurm, tmp_path):
        with driver(slurm, [Unit("a", "hangs once", tmp_path)]) as process:
            until(lambda: begun(tmp_path, "a") == 1)
            subprocess.run(["scontrol", "requeue", in_queue()[0]], check=True)
            begin_at_once(process)
        assert begun(tmp_path, "a") == 2

    def test_a_task_told_to_stop_goes_on_later_and_its_helpers_do_not_hear_it(self, slurm, tmp_path):
        """As Slurm tells it before the time limit; a decoder that died of it would be taken for a bad clip."""
        units = [
            Unit("a", "work", tmp_path),
            Unit("b", "hangs once", tmp_path),
            Unit("c", "has a helper", tmp_path),
        ]
        with driver(slurm, units) as process:
            until(lambda: begun(tmp_path, "b") == begun(tmp_path, "c") == 1 and len(in_queue()) == 2)
            for task in in_queue():
                subprocess.run(["scancel", "--signal=USR2", task], check=True)
            begin_at_once(process)
            output = process.communicate()[0]
        assert sorted(output.split()) == ["0", "A", "B", "c"]
        assert [begun(tmp_path, name) for name in "abc"] == [1, 2, 2]

    @pytest.mark.parametrize(
        ("settings", "what"),
        [
            ({"partition": "nowhere"}, r"invalid partition.*--partition"),
            ({"mem_mb": 10**7}, r"Memory.*--mem"),
            ({"time_min": 10_000}, r"Partition(TimeLimit|Config).*--time"),  # Slurm says the one or the other
        ],
    )
    def test_what_slurm_refuses_is_said_with_the_flag_that_mends_it(self, slurm, settings, what):
        engine = SlurmEngine(**({**vars(slurm), **settings}))
        with pytest.raises(ConfigError, match=what) as caught:
            list(engine.run(work, [Unit("a"), Unit("b")]))
        assert "\n" not in str(caught.value)
        until(lambda: not in_queue())


def begin_at_once(process: subprocess.Popen[str], limit_s: float = 40) -> None:
    """Wait for a driver; what Slurm puts back in line it would otherwise let wait for some seconds."""
    deadline, soon = time.monotonic() + limit_s, BeginSoon()
    while process.poll() is None:
        soon.look()
        if time.monotonic() > deadline:
            process.kill()
        time.sleep(0.1)
    assert process.returncode == 0


def in_queue() -> list[str]:
    """Tasks that wait or run; what has ended is tidied up for some seconds more."""
    states = "PENDING,CONFIGURING,RUNNING,SUSPENDED,REQUEUED"
    command = ["squeue", "-h", "-r", f"--states={states}", "-o", "%i"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def driver(engine: SlurmEngine, units: list[Unit]) -> subprocess.Popen[str]:
    """A process of its own that runs the units and prints their results."""
    code = (
        "from pathlib import *; from clipmill.run.slurm import SlurmEngine; from units import Unit, work\n"
        f"print(*(result for _, result in {engine!r}.run(work, {units!r})), sep='\\n')"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def test_without_slurm_it_is_said_where_to_run(monkeypatch, tmp_path):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClipmillError, match="there is no sbatch here"):
        SlurmEngine(tmp_path)

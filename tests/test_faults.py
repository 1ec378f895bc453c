"""Whatever happens to a job: the same bytes as if nothing had, or exit 3 and an exact account."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import soundfile

import warm
from clipmill import tables
from clipmill.run import Local, Lost, run_rounds, run_units
from clipmill.shards.plan import ShardSpec
from clipmill.shards.prepare import Limits, Ready, Refused, prepare
from clipmill.shards.read import Shards
from clipmill.shards.verify import verify
from clipmill.types import Clip
from conftest import sound
from units import double

CLIPS = 60


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound clips of four kinds."""
    folder = tmp_path_factory.mktemp("media")
    kinds = [("wav", 48000, 2), ("flac", 44100, 1), ("ogg", 22050, 1), ("wav", 8000, 1)]
    for number in range(CLIPS):
        suffix, rate, channels = kinds[number % 4]
        path = folder / f"{'abc'[number % 3]}/{number:03d}.{suffix}"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, sound(0.5 + number / 50, rate, channels, seed=number), rate)
    return folder


@pytest.fixture(scope="module")
def root(media: Path, tmp_path_factory: pytest.TempPathFactory, run) -> Path:
    """A root with the clips fetched as `many`."""
    place = tmp_path_factory.mktemp("root")
    assert run("fetch", "folder", "--name", "many", "--from", media, "--root", place).returncode == 0
    return place


def shard(root: Path, out: Path, *more: object) -> tuple[object, ...]:
    """The command that shards them, two processes at it."""
    given = ("shard", "many", "--root", root, "--out", out, "--clips-per-shard", 3, "--jobs", 2)
    return ("clipmill", *given, *more)


def descendants(pid: int) -> list[int]:
    """Every process that a process started, and theirs."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(int(entry.name))
    found = parents.get(pid, [])
    return found + [below for child in found for below in descendants(child)]


def state(pid: int) -> str:
    """What a process is doing, as the kernel says it; Z where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


@pytest.fixture(scope="module")
def undisturbed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """`undisturbed(format)`: the root_sha256 of shards to which nothing happened."""

    @cache
    def made(form: str) -> str:
        out = tmp_path_factory.mktemp("undisturbed") / form
        assert warm.run(*shard(root, out, "--format", form, "--jobs", 1)).returncode == 0
        return tables.read_json(out / "dataset.json")["root_sha256"]

    return made


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Whoever opens the file waits, as on a network disk that does not answer (for 45 s: the kernel's patience)."""
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # the kernel's wish to have the lease back
    with open(path, "r+b") as file:
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        try:
            yield
        finally:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            signal.signal(signal.SIGIO, before)


def test_twelve_random_kills_of_workers_decoders_and_driver_change_no_byte(root, undisturbed, tmp_path):
    expected = undisturbed("webdataset")
    rng = np.random.default_rng(0)
    kills, rounds, victims = 0, 0, set()
    while kills < 12:  # a job that ended is begun anew, elsewhere
        out = tmp_path / f"killed {rounds}"
        rounds += 1
        done = False
        while not done:
            with warm.start(*shard(root, out)) as driver:
                while kills < 12:
                    time.sleep(rng.uniform(0.1, 0.6))
                    if driver.poll() is not None:
                        break
                    alive = [pid for pid in descendants(driver.pid) if state(pid) != "Z"]
                    if not alive:
                        continue
                    victim = driver.pid if rng.random() < 0.2 else int(rng.choice(alive))
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(victim, signal.SIGKILL)
                        kills += 1
                        victims.add("driver" if victim == driver.pid else "other")
                    if victim == driver.pid:
                        break
                driver.wait()
            done = driver.returncode == 0
            assert done or driver.returncode in (-signal.SIGKILL, 3)
        said = tables.read_json(out / "dataset.json")
        assert said["root_sha256"] == expected
        assert said["counts"]["written"] == CLIPS
    assert victims == {"driver", "other"}
    assert verify(out).problems == []


def test_nothing_that_a_killed_driver_started_lives_on(root, tmp_path):
    with warm.start(*shard(root, tmp_path / "s")) as driver:
        while len(started := descendants(driver.pid)) < 4:  # two workers, each with its decoder
            time.sleep(0.05)
            assert driver.poll() is None
        driver.kill()
    deadline = time.monotonic() + 20
    while any(state(pid) != "Z" for pid in started) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [pid for pid in started if state(pid) != "Z"] == []


def test_a_source_that_hangs_costs_that_clip_and_retry_has_it(root, media, tmp_path):
    out = tmp_path / "s"
    with held(media / "a/003.wav"):
        done = warm.run(*shard(root, out, "--clip-timeout", 2))
    assert done.returncode == 3, done.stderr
    assert "timeout (it took longer than the time limit): 1" in done.stderr
    counts = tables.read_json(out / "dataset.json")["counts"]
    assert (counts["written"], counts["reasons"]) == (CLIPS - 1, {"timeout": 1})
    (row,) = tables.read_jsonl(out / "failures.jsonl")
    assert (row["source"], row["message"]) == ("a/003.wav", "took longer than the 2 s of --clip-timeout")
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert warm.run(*shard(root, out, "--retry", "timeout")).returncode == 0
    assert sum(path.stat().st_mtime_ns != stamp for path, stamp in stamps.items()) == 1
    assert tables.read_json(out / "dataset.json")["counts"]["written"] == CLIPS


def test_a_decoder_that_dies_of_a_clip_is_tried_again_and_then_the_clip_is_the_culprit(media):
    def kill_decoders(number: int, times: int) -> None:
        for _ in range(times):
            while not (
                waiting := [pid for pid in descendants(os.getpid()) if _is_at(pid, media / "a/000.wav")]
            ):
                time.sleep(0.02)
            os.kill(waiting[0], number)
            while state(waiting[0]) != "Z":
                time.sleep(0.02)

    clip = Clip("x", "a/000.wav", ("a",))
    for number, times, expected in [(signal.SIGSEGV, 2, "crash"), (signal.SIGKILL, 5, "memory")]:
        with held(media / "a/000.wav"):
            killer = threading.Thread(target=kill_decoders, args=(number, times))
            killer.start()
            found = prepare(clip, media, ShardSpec(), Limits())
            killer.join()
        assert isinstance(found, Refused)
        assert found.reason == expected
    assert isinstance(prepare(clip, media, ShardSpec(), Limits()), Ready)


def _is_at(pid: int, path: Path) -> bool:
    """Whether a process waits for a file to open."""
    try:
        return "__break_lease" in Path(f"/proc/{pid}/wchan").read_text()
    except OSError:
        return False


def test_a_clip_that_needs_more_memory_than_it_may_have_fails_alone(run, tmp_path):
    (tmp_path / "media/x").mkdir(parents=True)
    soundfile.write(tmp_path / "media/x/long.flac", np.tile(sound(10, 8000), 60), 8000)
    soundfile.write(tmp_path / "media/x/short.wav", sound(1, 8000), 8000)
    assert (
        run("fetch", "folder", "--name", "m", "--from", tmp_path / "media", "--root", tmp_path).returncode
        == 0
    )
    done = run("shard", "m", "--root", tmp_path, "--clip-memory", 100, "--jobs", 1)
    assert done.returncode == 3, done.stderr
    assert "x/long.flac: needs more memory than --clip-memory allows" in done.stderr
    assert "2 in = 1 written + 1 failed + 0 skipped" in done.stderr
    assert run("shard", "m", "--root", tmp_path, "--retry", "memory", "--jobs", 1).returncode == 0


def test_a_source_that_vanishes_is_missing_and_a_whole_disk_that_vanishes_is_not_written_down(
    run, media, tmp_path
):
    place = tmp_path / "media"
    subprocess.run(["cp", "-r", str(media), str(place)], check=True)
    assert run("fetch", "folder", "--name", "many", "--from", place, "--root", tmp_path).returncode == 0
    (place / "a/000.wav").unlink()
    out = tmp_path / "s"
    done = warm.run(*shard(tmp_path, out))
    assert done.returncode == 3
    assert "missing (the source is not there): 1" in done.stderr
    with warm.start(*shard(tmp_path, tmp_path / "t")) as driver:
        while len(list((tmp_path / "t").glob("*.tar"))) < 3:
            time.sleep(0.01)
        place.rename(tmp_path / "elsewhere")
        _, said = driver.communicate()
    assert driver.returncode == 3
    assert f"stopped: {place}: the folder of the media is not there any more" in said
    counts = tables.read_json(tmp_path / "t/dataset.json")["counts"]
    assert counts["in"] == CLIPS == counts["written"] + counts["failed"]
    assert set(counts["reasons"]) <= {"not-built", "missing"}
    (tmp_path / "elsewhere").rename(place)
    assert warm.run(*shard(tmp_path, tmp_path / "t")).returncode == 3
    one, other = (tables.read_json(folder / "dataset.json") for folder in (out, tmp_path / "t"))
    assert one["root_sha256"] == other["root_sha256"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of two megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk], capture_output=True, check=False
    ).returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("form", ["webdataset", "hdf5"])
def test_a_full_disk_ends_the_job_with_an_exact_account_and_the_same_command_goes_on(
    root, undisturbed, small_disk, form
):
    command = shard(root, small_disk / "s", "--format", form)
    done = warm.run(*command)
    assert done.returncode == 3, done.stderr
    assert "No space left on device; the same command goes on" in done.stderr
    assert "Traceback" not in done.stderr
    counts = tables.read_json(small_disk / "s/dataset.json")["counts"]
    assert counts["in"] == CLIPS == counts["written"] + counts["failed"]
    assert set(counts["reasons"]) == {"not-built"}
    assert len(Shards.open(small_disk / "s")) == counts["written"]
    subprocess.run(["mount", "-o", "remount,size=200m", small_disk], check=True)
    assert warm.run(*command).returncode == 0
    assert tables.read_json(small_disk / "s/dataset.json")["root_sha256"] == undisturbed(form)


def test_media_on_a_disk_that_was_unmounted_are_not_written_down_as_missing(run, media, small_disk, tmp_path):
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    subprocess.run(["cp", "-r", str(media), str(small_disk / "m")], check=True)
    assert run("fetch", "folder", "--name", "many", "--from", small_disk, "--root", tmp_path).returncode == 0
    subprocess.run(["umount", small_disk], check=True)
    done = warm.run(*shard(tmp_path, tmp_path / "s"))
    assert done.returncode == 3
    assert f"stopped: {small_disk}: the disk of the media is not mounted there any more" in done.stderr
    assert set(tables.read_json(tmp_path / "s/dataset.json")["counts"]["reasons"]) == {"not-built"}
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=50m", "none", small_disk], check=True)
    subprocess.run(["cp", "-r", str(media), str(small_disk / "m")], check=True)
    assert warm.run(*shard(tmp_path, tmp_path / "s")).returncode == 0


def test_a_disk_that_lets_nobody_write_is_said_to(root, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    done = warm.run(*shard(root, small_disk / "s"))
    assert done.returncode == 1
    assert "Read-only file system; choose another place (--root, --out or --store)" in done.stderr


def test_units_whose_worker_dies_each_time_are_lost_alone():
    found = dict(run_rounds(double, range(8), Local(2)))
    assert isinstance(found.pop(3), Lost)
    assert found == {unit: unit * 2 for unit in range(8) if unit != 3}


def test_units_that_are_all_needed_say_so_when_some_are_lost():
    from clipmill.errors import RunError

    with pytest.raises(RunError, match="again and again"):
        list(run_units(double, range(8), 2))

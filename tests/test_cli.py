"""The command as its users meet it: the contract, exit codes, and what is said when things go wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile

from clipmill import tables
from clipmill.datasets.folder import Folder
from clipmill.fetch.job import fetch
from conftest import sound


def failed(done, code: int, *said: str) -> None:
    """Assert an exit code, no traceback, and that each text was said on stderr."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    for text in said:
        assert text in done.stderr, done.stderr


@pytest.fixture
def media(tmp_path: Path) -> Path:
    for number in range(6):
        path = tmp_path / "media" / ("dog", "cat")[number % 2] / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, sound(0.5, 8000, seed=number), 8000)
    return tmp_path / "media"


def test_the_whole_contract_from_a_folder_to_verified_shards(cold, media, tmp_path):
    (tmp_path / "l.csv").write_text(
        "filename,category,fold,src_file\n"
        + "".join(f"{n}.wav,{'dog' if n % 2 else 'cat'},{n % 3},{n}\n" for n in range(6))
    )
    root = tmp_path / "data"
    done = cold(
        "fetch", "folder", "--name", "esc10", "--from", media, "--labels", tmp_path / "l.csv", "--file-column", "filename",
        "--label-column", "category", "--fold-column", "fold", "--group-column", "src_file", "--root", root,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "6 in = 6 had + 0 failed + 0 skipped" in done.stderr
    done = cold(
        "shard", "esc10", "--root", root, "--format", "webdataset", "--encoding", "flac", "--jobs", "2"
    )
    assert done.returncode == 0, done.stderr
    shards = root / "esc10/shards/webdataset-flac-44100"
    assert sorted(path.name for path in shards.iterdir()) == [
        "README.md", "croissant.json", "dataset.json", "esc10-all-000000.json", "esc10-all-000000.tar",
        "failures.jsonl", "index.parquet", "plan.parquet",
    ]  # fmt: skip
    said = json.loads(cold("inspect", shards, "--json").stdout)
    assert said["clips"] == 6
    assert said["labels"] == {"cat": 3, "dog": 3}
    assert said["folds"] == {"0": 2, "1": 2, "2": 2}
    assert said["duration_s"]["median"] == 0.5
    assert said["counts"] == {"in": 6, "written": 6, "failed": 0, "skipped": 0, "reasons": {}}
    verdict = json.loads(cold("verify", shards, "--json").stdout)
    assert verdict["sound"]
    assert (
        verdict["root_sha256"]
        == said["root_sha256"]
        == tables.read_json(shards / "dataset.json")["root_sha256"]
    )


def test_bare_shard_takes_every_dataset_under_the_root_given_by_the_environment(run, media, tmp_path):
    env = {"CLIPMILL_ROOT": str(tmp_path / "data")}
    for name in ("one", "two"):
        assert run("fetch", "folder", "--name", name, "--from", media, env=env).returncode == 0
    done = run("shard", "--format", "hdf5", env=env)
    assert done.returncode == 0, done.stderr
    for name in ("one", "two"):
        assert (tmp_path / f"data/{name}/shards/hdf5-pcm16-44100/{name}-all-000000.h5").is_file()
    listed = json.loads(run("datasets", "--json", env=env).stdout)
    assert {d["name"] for d in listed["datasets"]} >= {"tones", "folder", "esc50"}
    assert [d["name"] for d in listed["fetched"]] == ["one", "two"]


def test_done_in_part_ends_with_3_and_says_which(run, media, tmp_path):
    (media / "dog/broken one.wav").write_bytes(b"RIFFnonsense")
    fetch("folder", Folder(name="x", from_dir=media), tmp_path)
    failed(
        run("shard", "x", "--root", tmp_path, "--jobs", 1),
        3,
        "7 in = 6 written + 1 failed + 0 skipped",
        "dog/broken one.wav",
    )


def test_a_csv_that_names_files_that_are_not_there_ends_with_3_and_they_stay_accounted_for(
    run, media, tmp_path
):
    (tmp_path / "l.csv").write_text("filename,label\n0.wav,cat\ngone.wav,cat\n")
    done = run(
        "fetch", "folder", "--name", "x", "--from", media, "--labels", tmp_path / "l.csv", "--root", tmp_path
    )
    failed(done, 3, "2 in = 1 had + 1 failed + 0 skipped", "gone.wav: line 3 of the labels names it")
    done = run("shard", "x", "--root", tmp_path, "--jobs", 1)
    failed(done, 3, "2 in = 1 written + 1 failed + 0 skipped", "gone.wav")


@pytest.mark.parametrize(("arguments", "code", "said"), [
    (["frobnicate"], 2, "No such command 'frobnicate'"),
    (["fetch", "nothing"], 2, "No such command 'nothing'"),
    (["fetch", "folder", "--name", "x"], 2, "Missing option '--from'"),
    (["fetch", "folder", "--name", "x", "--from", "nowhere", "--root", "."], 1, "nowhere: is no folder"),
    (["fetch", "folder", "--name", "a/b", "--from", ".", "--root", "."], 2, "allowed are 1 to 60 letters, digits, '_' and '-'"),
    (["fetch", "esc50", "--from", ".", "--root", "."], 1, "has no meta/esc50.csv"),
    (["shard", "x", "--root", "."], 1, "'x' has not been fetched under . (fetched there: none)"),
    (["shard", "--root", "."], 1, "nothing has been fetched under .: try `pipeline fetch tones"),
    (["shard", "--format", "zip"], 2, "'zip' is not one of 'webdataset', 'hdf5'"),
    (["shard", "--clips-per-shard", "0"], 2, "--clips-per-shard"),
    (["fetch", "folder", "--name", "n" * 61, "--from", ".", "--root", "."], 2, "1 to 60 letters"),
    (["fetch", "folder", "--name", "x", "--from", ".", "--labels", "no.csv", "--root", "."], 1, "no.csv: cannot be read"),
    (["fetch", "folder", "--name", "x", "--from", ".", "--root", "/dev/null/x"], 1, "Not a directory"),
    (["inspect", "nowhere"], 1, "nowhere: no such shard"),
    (["verify", "."], 1, "holds no dataset.json"),
])  # fmt: skip
def test_what_cannot_be_done_is_said_in_a_sentence(run, tmp_path, arguments, code, said):
    failed(run(*arguments, cwd=tmp_path), code, said)


def test_media_that_moved_away_since_the_fetch_are_said_so(run, media, tmp_path):
    fetch("folder", Folder(name="x", from_dir=media), tmp_path)
    shutil.rmtree(media)
    failed(run("shard", "x", "--root", tmp_path), 1, "its media folder", "is not there any more")


def test_verify_ends_with_1_on_damage(run, media, tmp_path):
    fetch("folder", Folder(name="x", from_dir=media), tmp_path)
    run("shard", "x", "--root", tmp_path, "--out", tmp_path / "s", "--jobs", 1)
    tar = tmp_path / "s/x-all-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-20000])
    done = run("verify", tmp_path / "s", "--jobs", 1)
    assert done.returncode == 1
    assert "problem: x-all-000000.tar: is cut short: " in done.stdout
    assert "UNSOUND" in done.stdout


def test_plots_are_drawn_without_a_screen(run, media, tmp_path):
    fetch("folder", Folder(name="x", from_dir=media), tmp_path)
    run("shard", "x", "--root", tmp_path, "--out", tmp_path / "s", "--jobs", 1)
    done = run("inspect", tmp_path / "s", "--plot", tmp_path / "x.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert done.stderr == f"drawn: {tmp_path / 'x.png'}\n"
    failed(run("inspect", tmp_path / "s", "--plot", tmp_path / "x.doc"), 2, "allowed endings are .png")


@pytest.mark.skipif(
    os.geteuid() == 0 and not shutil.which("setpriv"),
    reason="root may write anywhere, and there is no setpriv",
)
def test_output_that_may_not_be_written_is_said_in_a_sentence(media, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o555)
    command = [
        sys.executable,
        "-m",
        "clipmill",
        "fetch",
        "folder",
        "--name",
        "x",
        "--from",
        str(media),
        "--root",
        "closed/x",
    ]
    if os.geteuid() == 0:
        command = ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all", *command]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    failed(done, 1, "Permission denied", "choose another place (--root, --out or --store)")


def test_an_interrupt_ends_with_130_and_the_next_run_goes_on(run, fetched, tmp_path):
    command = [sys.executable, "-m", "clipmill", "shard", "small", "--root", fetched, "--out", tmp_path / "s",
               "--clips-per-shard", "1", "--jobs", "2"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("s/*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "run the same command again to go on" in said
    assert run(*command[3:]).returncode == 3


LOST = """
import os, signal, time, weakref
from clipmill import cli

class Thing:
    pass

def command(**_):
    thing = Thing()
    gone = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGINT))
    del thing
    time.sleep(60)

cli.cli.main = command
cli.main()
"""


def test_an_interrupt_that_comes_while_an_object_is_cleared_away_is_not_lost():
    """Python can only print what is raised there, and goes on."""
    done = subprocess.run(
        [sys.executable, "-c", LOST], capture_output=True, text=True, timeout=50, check=False
    )
    assert (done.returncode, done.stderr) == (130, "\ninterrupted: run the same command again to go on\n")


def test_sigterm_ends_a_job_like_an_interrupt_and_leaves_no_worker_behind(fetched, tmp_path):
    command = [sys.executable, "-m", "clipmill", "shard", "small", "--root", fetched, "--out", tmp_path / "s",
               "--clips-per-shard", "1", "--jobs", "2"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("s/*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    said = process.communicate()[1]
    assert process.returncode == 130, said
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)  # any process of the group still there?
        except ProcessLookupError:
            break
        time.sleep(0.2)
    else:
        pytest.fail("worker processes outlived the command")


def test_output_may_be_cut_by_a_pipe(fetched, tmp_path):
    script = f"{sys.executable} -m clipmill datasets --json --root {fetched} | head -c 1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {script}"], capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr
    assert "Broken pipe" not in done.stderr


def test_a_dataset_on_a_disk_that_may_not_be_written_is_read(fetched, tmp_path):
    from clipmill.fetch.fetched import load
    from clipmill.fetch.ledger import Ledger

    shutil.copytree(fetched / "small", tmp_path / "small")
    for path in (*(tmp_path / "small").iterdir(), tmp_path / "small"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert load(tmp_path, "small").counts == {"had": 24, "failed": 0, "skipped": 0}
    with Ledger(tmp_path / "small/ledger.sqlite") as ledger:
        assert ledger.losses() == []
    (tmp_path / "small").chmod(0o755)

"""`pipeline fetch audioset` as a user runs it: real yt-dlp, a server that misbehaves, kills, and a second run."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import soundfile

import warm
from clipmill.audio.media import encode_media
from clipmill.fetch.fetched import load
from clipmill.fetch.ledger import Ledger
from clipmill.shards.read import Shards
from clipmill.shards.verify import verify
from conftest import sound
from misbehaving import Body, Misbehaving, Reset, Short, Stall, Status, webm

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
TABLE = 'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/m/05zppz,"Male speech, man speaking"\n2,/m/0bt9lr,"Dog"\n'


@pytest.fixture
def server() -> Iterator[Misbehaving]:
    with Misbehaving() as server:
        yield server


def ids(count: int, seed: int = 0) -> list[str]:
    """Ids as YouTube makes them; some begin with '-', some hold '_'."""
    rng = random.Random(seed)
    return sorted({"-_" + "".join(rng.choices(LETTERS, k=9)) for _ in range(count)})


def write_list(path: Path, videos: list[str], label: str = "/m/0bt9lr", end_s: float = 3.0) -> Path:
    head = (
        "# Segments csv created Sun Mar  5 10:54:25 2017\n"
        f"# num_ytids={len(videos)}, num_segs={len(videos)}, num_unique_labels=1, num_positive_labels={len(videos)}\n"
        "# YTID, start_seconds, end_seconds, positive_labels\n"
    )
    path.write_text(head + "".join(f'{video}, 1.000, {end_s:.3f}, "{label}"\n' for video in videos))
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "class_labels_indices.csv"
    path.write_text(TABLE)
    return path


@pytest.fixture
def fetch(server: Misbehaving, tmp_path: Path, table: Path, run: Callable) -> Callable:
    """Run the command on a list, against the server; one worker, where more are not the point: each imports much."""

    def fetch(
        videos: list[str] | Path, *flags: object, root: Path = tmp_path / "data"
    ) -> subprocess.CompletedProcess:
        path = videos if isinstance(videos, Path) else write_list(tmp_path / "my.csv", videos)
        return run(
            "fetch", "audioset", "--list", path, "--label-table", table, "--root", root,
            "--url-template", server.template, "--pause", "0.2", "--jobs", "1", *flags,
        )  # fmt: skip

    return fetch


def outcomes(root: Path) -> dict[str, str]:
    """Video -> reason code, "" when had."""
    with Ledger(root / "audioset/ledger.sqlite") as ledger:
        rows = ledger.columns("key", "reason")
    return {key.rpartition("_")[0]: reason for key, reason in zip(*rows.values(), strict=True)}


def test_each_misbehaviour_ends_in_its_reason_and_a_second_run_heals_what_can_heal(server, fetch, tmp_path):
    cases = {
        "fine": (None, ""),
        "missing": (Status(404), "unavailable"),
        "refused": (Status(403), "forbidden"),
        "gone": (Status(410), "removed"),
        "broken": (Status(500), "network"),
        "reset": (Reset(), "network"),
        "shorter": (Short(), "network"),
        "stalled": (Stall(), "timeout"),
        "page": (Body(b"<html><body>try again</body></html>", "text/html"), "no-audio"),
        "nothing": (Body(b""), "empty"),
        "brief": (Body(webm(2.0)), "too-short"),
        "quiet": (Body(webm(level=0.0)), "silent"),
        "otherrate": (Body(encode_media(sound(12, 22_050).reshape(1, -1).astype("float32"), 22_050, "WAV", "PCM_16"), "audio/wav"), ""),
        "busyonce": (Status(429, {"Retry-After": "1"}), ""),
    }  # fmt: skip
    videos = {name: f"{name:_<11}" for name in cases}
    for name, (behaviour, _) in cases.items():
        if behaviour is not None:
            server.behave(f"{videos[name]}.webm", behaviour, times=1 if name == "busyonce" else None)
    first = fetch(sorted(videos.values()), "--retries", "0", "--timeout", "12", "--jobs", "3")
    root = tmp_path / "data"
    assert first.returncode == 3, first.stderr
    assert outcomes(root) == {videos[name]: reason for name, (_, reason) in cases.items()}
    assert "14 in = 3 had + 11 failed + 0 skipped" in first.stderr
    assert "all workers pause for 1 s (pause 1 of 6): rate-limited" in first.stderr
    got = load(root, "audioset")
    assert all(loss.message for loss in got.losses), "the tool's own words are kept"

    for name in cases:
        server.behave(f"{videos[name]}.webm", Body(webm()))
    again = fetch(sorted(videos.values()), "--retries", "0")
    healing = {"refused", "broken", "reset", "shorter", "stalled", "nothing"}
    final = {videos[n]: r for n, (_, r) in cases.items() if r and n not in healing}
    assert {video: reason for video, reason in outcomes(root).items() if reason} == final
    assert again.returncode == 3

    everything = fetch(sorted(videos.values()), "--retry", "all")
    assert everything.returncode == 0, everything.stderr
    assert set(outcomes(root).values()) == {""}


def test_retry_redoes_just_the_failures_of_the_reasons_given(server, fetch, tmp_path):
    gone, broken, fine, fresh = videos = ids(4)
    server.behave(f"{gone}.webm", Status(404))
    server.behave(f"{broken}.webm", Status(500))
    fetch([gone, broken, fine], "--retries", "0")
    server.behave(f"{gone}.webm", Body(webm()))
    server.behave(f"{broken}.webm", Body(webm()))
    server.requests.clear()
    done = fetch(videos, "--retry", "network,timeout")
    assert {request.name for request in server.requests} == {f"{broken}.webm"}
    assert outcomes(tmp_path / "data") == {gone: "unavailable", broken: "", fine: ""}
    assert "4 in = 2 had + 1 failed + 0 skipped + 1 left" in done.stderr
    assert done.returncode == 3
    del fresh


def test_killed_ten_times_it_ends_as_if_it_had_not_been(server, fetch, tmp_path, table):
    videos = ids(150, seed=3)
    for lost in videos[::15]:
        server.behave(f"{lost}.webm", Status(404))
    path = write_list(tmp_path / "my.csv", videos)
    quiet = tmp_path / "quiet"
    assert fetch(path, root=quiet).returncode == 3

    root, rng = tmp_path / "data", random.Random(11)
    words = (
        *("fetch", "audioset", "--list", path, "--label-table", table),
        *("--root", root, "--url-template", server.template, "--jobs", "2"),
    )
    for kill in range(10):
        before, enough = len(server.requests), rng.randint(1, 24)
        with warm.start("clipmill", *words) as process:
            while len(server.requests) < before + enough and process.poll() is None:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.05))
            assert process.poll() is None, f"done before kill {kill}: {process.said('err')}"
            process.kill()
    asked = len(server.requests)
    assert fetch(path, "--jobs", "2", root=root).returncode == 3
    assert len(server.requests) > asked, "nothing was left to do after the last kill"

    assert state(root) == state(quiet)
    # At most the clips in flight were lost at each kill: each of two workers' current one, asked for again.
    per_clip = len(list(server.requests[:asked])) / len(videos)
    assert per_clip < 4
    assert not (root / "audioset/.parts").exists()


def state(root: Path) -> tuple[dict, dict, bytes]:
    """All that a fetch leaves behind, but for the times."""
    with Ledger(root / "audioset/ledger.sqlite") as ledger:
        rows = ledger.columns(
            "key", "source", "outcome", "reason", "split", "bytes", "sha256", "duration_s", "start_s", "end_s"
        )
        tally = ledger.tally()
    media = root / "audioset/media"
    files = {p.relative_to(media).as_posix(): p.read_bytes() for p in media.rglob("*") if p.is_file()}
    return {"rows": rows, "tally": tally}, files, (root / "audioset/manifest.parquet").read_bytes()


def test_ctrl_c_ends_it_with_130_and_the_next_run_goes_on(server, fetch, tmp_path, table):
    videos = ids(30)
    server.behave(f"{videos[10]}.webm", Stall())
    path = write_list(tmp_path / "my.csv", videos)
    command = [
        sys.executable, "-m", "clipmill", "fetch", "audioset", "--list", str(path), "--label-table", str(table),
        "--root", str(tmp_path / "data"), "--url-template", server.template, "--jobs", "1",
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not server.asked(f"{videos[10]}.webm") and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.stderr
        said = process.stderr.read()
    assert process.returncode == 130
    assert "Traceback" not in said
    assert "audioset: 10 had, 0 failed, 20 left of 30" in said
    assert "run the same command again to go on" in said
    server.behave(f"{videos[10]}.webm", Body(webm()))
    server.requests.clear()
    assert fetch(path).returncode == 0
    assert not {request.name for request in server.requests} & {f"{video}.webm" for video in videos[:10]}


def test_a_ban_ends_it_with_75_and_says_what_to_do(server, fetch, tmp_path):
    server.behave(None, Status(429))
    done = fetch(ids(30), "--pause", "0.05", "--max-pauses", "1")
    assert done.returncode == 75
    assert "--cookies-from-browser" in done.stderr
    assert "audioset: 0 had, 0 failed, 30 left of 30" in done.stderr
    assert outcomes(tmp_path / "data") == {}


def test_status_tells_what_was_had_and_lost_by_split_reason_and_label(server, fetch, run, tmp_path):
    videos = ids(20)
    for lost in videos[:5]:
        server.behave(f"{lost}.webm", Status(404))
    fetch(videos, "--split", "eval")
    text = run("fetch", "audioset", "--status", "--root", tmp_path / "data")
    assert text.returncode == 0
    for said in (
        "20 in = 15 had + 5 failed + 0 skipped + 0 left",
        "erann 88.2%",
        "75.0%",
        "unavailable",
        "Dog",
        "25.0%",
    ):
        assert said in text.stdout, said
    told = json.loads(run("fetch", "audioset", "--status", "--json", "--root", tmp_path / "data").stdout)
    assert (told["had"], told["failed"], told["left"], told["reasons"]) == (15, 5, 0, {"unavailable": 5})
    assert told["splits"] == [
        {"split": "eval", "wanted": 20, "had": 15, "failed": 5, "left": 0, "share_had": 0.75,
         "papers": {"erann": 0.882, "panns": 0.9272}},
    ]  # fmt: skip
    assert told["labels"] == [{"label": "Dog", "wanted": 20, "lost": 5}]
    assert told["bytes"] == sum(p.stat().st_size for p in (tmp_path / "data/audioset/media").rglob("*.webm"))


def test_status_of_what_was_never_fetched_is_an_error(run, tmp_path):
    done = run("fetch", "audioset", "--status", "--root", tmp_path)
    assert done.returncode == 1
    assert "has not been fetched under" in done.stderr


def test_a_dry_run_says_clips_hours_and_disk_and_asks_for_nothing(server, fetch, tmp_path):
    done = fetch(ids(30), "--dry-run", "--rate", "300", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert (plan["wanted"], plan["had"], plan["ask"], plan["hours"]) == (30, 0, 30, 0.1)
    assert plan["bytes"] > 0
    assert not server.requests
    assert not (tmp_path / "data/audioset/manifest.parquet").exists()
    fetch(ids(30), "--limit", "10")
    plan = json.loads(fetch(ids(30), "--dry-run", "--json").stdout)
    assert (plan["wanted"], plan["had"], plan["ask"]) == (30, 10, 20)
    fetch(ids(30), "--limit", "2")  # what is not wanted for now is remembered
    plan = json.loads(fetch(ids(30), "--dry-run", "--json").stdout)
    assert (plan["wanted"], plan["had"], plan["ask"]) == (30, 10, 20)


def test_splits_add_up_and_asking_again_for_one_replaces_it(server, fetch, tmp_path):
    train, evaluation = ids(8, seed=1), ids(6, seed=2)
    fetch(train, "--split", "balanced_train")
    fetch(evaluation, "--split", "eval")
    got = load(tmp_path / "data", "audioset")
    assert (got.manifest.num_rows, got.counts["had"]) == (14, 14)
    fetch(train, "--split", "balanced_train", "--limit", "3")
    got = load(tmp_path / "data", "audioset")
    assert (got.manifest.num_rows, got.counts["had"]) == (9, 9)
    server.requests.clear()
    fetch(train, "--split", "balanced_train")
    assert load(tmp_path / "data", "audioset").counts["had"] == 14
    assert not server.requests, "what was set aside is remembered, and not fetched again"


def test_what_is_had_so_far_can_be_sharded_and_carries_what_it_is(server, fetch, run, tmp_path):
    videos = ids(7)
    server.behave(f"{videos[0]}.webm", Status(404))
    fetch(videos, "--split", "eval")
    done = run("shard", "audioset", "--root", tmp_path / "data", "--jobs", "1")
    assert done.returncode == 3
    assert "7 in = 6 written + 1 failed + 0 skipped" in done.stderr
    folder = tmp_path / "data/audioset/shards/webdataset-flac-44100"
    assert not verify(folder).problems
    shards = Shards.open(folder)
    row = shards.index.slice(0, 1).to_pylist()[0]
    assert row["key"].endswith("_1000")
    assert (row["split"], row["labels"], row["samples"], row["group"]) == (
        "eval",
        ["Dog"],
        88_200,
        row["key"][:-5],
    )


def test_shards_of_a_half_fetched_list_say_how_much_is_not_there_yet(server, fetch, run, tmp_path):
    videos = ids(6)
    server.behave(f"{videos[3]}.webm", Status(429))
    assert fetch(videos, "--jobs", "1", "--max-pauses", "0").returncode == 75
    done = run("shard", "audioset", "--root", tmp_path / "data", "--jobs", "1")
    assert "clips of audioset are not fetched yet; the shards hold what is had so far" in done.stderr
    assert "3 in = 3 written + 0 failed + 0 skipped" in done.stderr


def test_strong_labels_travel_as_events_into_the_shards(server, fetch, run, tmp_path):
    video = ids(1)[0]
    path = write_list(tmp_path / "my.csv", [video], end_s=11.0)
    strong = tmp_path / "strong.tsv"
    strong.write_text(
        "segment_id\tstart_time_seconds\tend_time_seconds\tlabel\n"
        f"{video}_1000\t0.5\t2.25\t/m/0bt9lr\n{video}_1000\t3.0\t9.0\t/m/09x0r\n"
    )
    (tmp_path / "class_labels_indices.csv").write_text("/m/09x0r\tSpeech\n/m/0bt9lr\tDog\n")
    done = fetch(path, "--strong", "--list", strong, "--split", "eval")
    assert done.returncode == 0, done.stderr
    run("shard", "audioset-strong", "--root", tmp_path / "data", "--jobs", "1")
    index = pq.read_table(
        tmp_path / "data/audioset-strong/shards/webdataset-flac-44100/index.parquet"
    ).to_pylist()
    assert index[0]["events"] == [
        {"label": "Dog", "start_s": 0.5, "end_s": 2.25}, {"label": "Speech", "start_s": 3.0, "end_s": 9.0},
    ]  # fmt: skip
    assert index[0]["labels"] == ["Dog", "Speech"]


def test_media_already_here_are_adopted_and_only_the_rest_is_asked_for(server, fetch, tmp_path, run):
    here, broken, absent = ids(3)
    media = tmp_path / "copies"
    media.mkdir()
    soundfile.write(media / f"{here}.flac", sound(2.0, 16_000), 16_000)
    (media / f"Y{broken}.wav").write_bytes(b"RIFF\x10\0\0\0WAVEnothing")
    before = {path: path.read_bytes() for path in media.iterdir()}
    done = fetch([here, broken, absent], "--from", media, "--offline")
    assert done.returncode == 3
    assert "3 in = 1 had + 0 failed + 0 skipped + 2 left" in done.stderr
    assert not server.requests
    done = fetch([here, broken, absent], "--from", media)
    assert done.returncode == 0, done.stderr
    assert {request.name for request in server.requests} == {f"{broken}.webm", f"{absent}.webm"}
    assert {path: path.read_bytes() for path in media.iterdir()} == before
    assert run("shard", "audioset", "--root", tmp_path / "data", "--jobs", "1").returncode == 0


def test_a_lock_names_the_clips_and_another_lab_takes_just_those(server, fetch, run, tmp_path):
    videos = ids(6)
    server.behave(f"{videos[1]}.webm", Status(404))
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    fetch(videos, "--split", "eval", root=ours)
    first, second = tmp_path / "ours.lock", tmp_path / "theirs.lock.gz"
    assert run("lock", "audioset", "--out", first, "--root", ours).returncode == 0
    server.behave(f"{videos[1]}.webm", Body(webm()))
    server.behave(f"{videos[2]}.webm", Status(404))
    server.behave(f"{videos[3]}.webm", Body(webm(12.0, 24_000)))  # the same video, encoded anew
    done = fetch(videos, "--split", "eval", "--lock", first, root=theirs)
    assert "5 clips = 3 the same + 1 of other content + 1 not here" in done.stderr
    assert "the lock names 5 clips; 5 of them stand in the lists asked for" in done.stderr
    assert "5 in = 4 had + 1 failed" in done.stderr
    assert run("lock", "audioset", "--out", second, "--root", theirs).returncode == 0
    diff = run("lock", "diff", first, second, "--json")
    assert diff.returncode == 1
    told = json.loads(diff.stdout)
    assert told["only_first"] == [f"{videos[2]}_1000"]
    assert told["only_second"] == []
    assert told["other_content"] == [f"{videos[3]}_1000"]
    assert told["same"] == 3
    assert run("lock", "diff", first, first).returncode == 0
    shard = run("shard", "audioset", "--root", theirs, "--lock", first, "--jobs", "1")
    assert "5 clips = 3 the same + 1 of other content + 1 not here; which: " in shard.stderr
    account = json.loads((theirs / "audioset/shards/webdataset-flac-44100/lock.json").read_text())
    assert (account["other_content"], account["absent"]) == ([f"{videos[3]}_1000"], [f"{videos[2]}_1000"])
    assert "5 in = 4 written + 1 failed + 0 skipped" in shard.stderr
    info = json.loads((theirs / "audioset/shards/webdataset-flac-44100/dataset.json").read_text())
    assert (
        info["about"]["lock_id"]
        == json.loads(
            run("lock", "make", "audioset", "--out", tmp_path / "x", "--root", ours, "--json").stdout
        )["id"]
    )


@pytest.mark.parametrize(("flags", "said"), [
    (["--url-template", "http://127.0.0.1/watch"], "expected an http(s) address with {id} in it"),
    (["--cookies", "nowhere.txt"], "--cookies nowhere.txt: is no file"),
    (["--retry", "networks"], "--retry networks: no such reason; known: all,"),
    (["--offline"], "--offline adopts media from --from DIR, and none was given"),
    (["--name", "a/b"], "dataset name 'a/b': allowed are"),
    (["--labels", "Dogs"], "Dog"),
    (["--lock", "nowhere.lock"], "nowhere.lock: cannot be read as a lock"),
    (["--rate", "nan"], "--rate nan: expected a finite number"),
    (["--proxy", "foo://h:1"], "--proxy (number 1): is no address of a proxy; expected SCHEME://"),
    (["--proxy", "http://me:s3cr/et@h:1"], "--proxy (number 1): is no address of a proxy; expected SCHEME://"),
])  # fmt: skip
def test_what_cannot_be_is_refused_in_words(fetch, flags, said):
    done = fetch(ids(1), *flags)
    assert done.returncode in (1, 2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_media_that_are_gone_are_wanted_again_when_it_is_asked_to_look(server, fetch, run, tmp_path):
    videos = ids(5)
    fetch(videos)
    media = sorted((tmp_path / "data/audioset/media").rglob("*.webm"))
    media[0].unlink()
    media[1].write_bytes(media[1].read_bytes()[:-1])
    lock = run("lock", "audioset", "--out", tmp_path / "x.lock", "--root", tmp_path / "data")
    assert "2 clips that were had are left out" in lock.stderr
    assert "3 clips of audioset" in lock.stderr
    server.requests.clear()
    assert "5 in = 5 had" in fetch(videos).stderr
    assert not server.requests, "nothing looks at a million files unless it is asked to"
    done = fetch(videos, "--recheck")
    assert "of 5 clips had, the media of 2 are gone or changed: they are wanted again" in done.stderr
    assert len({request.name for request in server.requests}) == 2
    assert done.returncode == 0


def test_a_root_that_moves_takes_its_datasets_along(server, fetch, run, tmp_path):
    videos = ids(3)
    fetch(videos)
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    assert "3 in = 3 had" in fetch(videos, root=tmp_path / "elsewhere").stderr
    assert run("shard", "audioset", "--root", tmp_path / "elsewhere", "--jobs", "1").returncode == 0


def test_the_same_clips_as_another_split_are_counted_as_that(fetch, run, tmp_path):
    fetch(ids(3))
    fetch(ids(3), "--split", "eval")
    told = json.loads(run("fetch", "audioset", "--status", "--json", "--root", tmp_path / "data").stdout)
    assert [(s["split"], s["wanted"], s["had"]) for s in told["splits"]] == [("eval", 3, 3)]


def test_retry_and_recheck_want_what_was_wanted_last(server, fetch, run, tmp_path):
    videos = ids(6)
    server.behave(f"{videos[0]}.webm", Status(404))
    fetch(videos, "--limit", "4", "--split", "eval")
    server.behave(f"{videos[0]}.webm", Body(webm()))
    template = ("--url-template", server.template)
    done = run("fetch", "audioset", "--retry", "unavailable", "--root", tmp_path / "data", *template)
    assert done.returncode == 0, done.stderr
    assert "4 in = 4 had + 0 failed + 0 skipped" in done.stderr
    assert run("fetch", "audioset", "--recheck", "--root", tmp_path / "data", *template).returncode == 0


def test_a_fetch_killed_while_it_lists_leaves_the_account_and_the_folder_its_own(fetch, run, tmp_path):
    fetch(ids(3))
    facts = tmp_path / "data/audioset/fetch.json"
    said = json.loads(facts.read_text())
    facts.write_text(json.dumps(said | {"request": None}))  # as it stands between two lists
    told = run("fetch", "audioset", "--status", "--root", tmp_path / "data")
    assert told.returncode == 1
    assert "the last fetch was ended while it listed the clips; run it again" in told.stderr
    (tmp_path / "data/audioset/manifest.parquet").unlink()
    (tmp_path / "mine").mkdir()
    soundfile.write(tmp_path / "mine/a.wav", sound(0.5, 8000), 8000)
    other = run(
        "fetch", "folder", "--name", "audioset", "--from", tmp_path / "mine", "--root", tmp_path / "data"
    )
    assert other.returncode == 2
    assert "3 in = 3 had" in fetch(ids(3)).stderr


def test_lists_of_one_name_are_told_apart_and_one_list_twice_is_refused(fetch, tmp_path):
    lists = []
    for seed, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        lists.append(write_list(tmp_path / folder / "my.csv", ids(3, seed=seed)))
        lists[-1].write_text(lists[-1].read_text().replace("num_segs=3", "num_segs=4") + "nothing\n")
    done = fetch(lists[0], "--list", lists[1], "--skip-bad-rows")
    assert "8 in = 6 had + 0 failed + 2 skipped" in done.stderr, done.stderr
    done = fetch(lists[0], "--list", lists[0], "--skip-bad-rows")
    assert done.returncode == 2
    assert "the same file is given twice" in done.stderr


def test_many_labels_are_no_path(fetch):
    done = fetch(ids(2), "--labels", ",".join(["Dog", "Speech", "Male speech, man speaking"] * 12))
    assert done.returncode == 0, done.stderr


def test_another_dataset_of_that_name_is_never_mixed_with_it(fetch, run, tmp_path):
    fetch(ids(3))
    (tmp_path / "mine").mkdir()
    soundfile.write(tmp_path / "mine/a.wav", sound(0.5, 8000), 8000)
    done = run(
        "fetch", "folder", "--name", "audioset", "--from", tmp_path / "mine", "--root", tmp_path / "data"
    )
    assert done.returncode == 2
    assert "holds what `pipeline fetch audioset` made; give this one another --name or --root" in done.stderr
    assert load(tmp_path / "data", "audioset").counts["had"] == 3


def test_a_lock_of_another_dataset_or_of_other_clips_is_refused(fetch, run, tmp_path):
    fetch(ids(3), "--name", "mine")
    run("lock", "mine", "--out", tmp_path / "mine.lock", "--root", tmp_path / "data")
    done = fetch(ids(3), "--lock", tmp_path / "mine.lock")
    assert done.returncode == 2
    assert "is a lock of mine, not of audioset" in done.stderr
    done = fetch(ids(3, seed=9), "--name", "mine", "--lock", tmp_path / "mine.lock")
    assert done.returncode == 2
    assert "none of its clips stands in the lists asked for" in done.stderr


def test_cookies_that_cannot_be_read_are_never_shown(server, fetch, tmp_path):
    jar = tmp_path / "cookies.txt"
    fine = "127.0.0.1\tFALSE\t/\tFALSE\t4102444800\tname\tvalue\n"
    jar.write_text(f"# Netscape HTTP Cookie File\n{fine}.youtube.com\tTRUE\t/\tTRUE\tSUPERSECRET\n")
    done = fetch(ids(3), "--cookies", jar)
    assert done.returncode == 0, done.stderr
    assert "SUPERSECRET" not in done.stderr + done.stdout
    assert server.requests[0].headers["Cookie"] == "name=value"


def test_two_fetches_of_one_dataset_at_once_are_refused(server, fetch, tmp_path, table):
    videos = ids(2)
    server.behave(None, Stall())
    path = write_list(tmp_path / "my.csv", videos)
    words = (
        *("fetch", "audioset", "--list", path, "--label-table", table),
        *("--root", tmp_path / "data", "--url-template", server.template, "--jobs", "1"),
    )
    with warm.start("clipmill", *words) as process:
        while not server.requests and process.poll() is None:
            time.sleep(0.01)
        second = fetch(path)
        process.kill()
    assert second.returncode == 1
    assert "another run is writing there" in second.stderr


def test_progress_is_a_live_bar_on_a_terminal(server, tmp_path, table):
    path = write_list(tmp_path / "my.csv", ids(6))
    command = [
        sys.executable, "-m", "clipmill", "fetch", "audioset", "--list", str(path), "--label-table", str(table),
        "--root", str(tmp_path / "data"), "--url-template", server.template, "--jobs", "1", "--rate", "7200",
    ]  # fmt: skip
    screen, terminal = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "160"}
    shown = b""
    with subprocess.Popen(command, stderr=terminal, env=env) as process:
        os.close(terminal)
        with contextlib.suppress(OSError):  # the end of a terminal is an error
            while block := os.read(screen, 4096):
                shown += block
    os.close(screen)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert process.returncode == 0
    assert re.search(
        r"fetch audioset .*[0-5]/6 +clips +[\d.]+/[hs] +\d:\d\d:\d\d had [0-5], failed 0, left [1-6]", text
    )
    assert "had 6, failed 0, left 0" in text


def test_progress_is_a_plain_line_now_and_then_elsewhere(server, tmp_path, table):
    path = write_list(tmp_path / "my.csv", ids(5))
    often = "import clipmill.cli as cli, clipmill.cli.console as c; c.PLAIN_EVERY_S /= 10; cli.main()"
    command = [
        sys.executable, "-c", often, "fetch", "audioset", "--list", str(path), "--label-table", str(table),
        "--root", str(tmp_path / "data"), "--url-template", server.template, "--jobs", "1", "--rate", "4800",
    ]  # fmt: skip
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    lines = [line for line in done.stderr.splitlines() if line.startswith("fetch audioset: ")]
    assert 2 <= len(lines) <= 1 + time.monotonic() - began
    assert all(
        re.fullmatch(
            r"fetch audioset: \d/5 clips, [\d.]+/[hs](, [\d.]+ (s|min|h) left)?, had \d, failed 0, left \d",
            line,
        )
        for line in lines
    )
    assert "\x1b" not in done.stderr
    assert "\r" not in done.stderr

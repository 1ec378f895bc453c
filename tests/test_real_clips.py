"""The real clips the whole way: ESC-10 as Ogg Vorbis, and the files that decoders are tested with."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import subprocess
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest
import soundfile
import webdataset

from clipmill import tables
from clipmill.audio import prepare_clip
from clipmill.audio.ffmpeg import ffmpeg_program
from clipmill.fetch.fetched import known
from clipmill.fetch.ledger import Ledger
from clipmill.fetch.options import SegmentOptions
from clipmill.fetch.segments import Places, fetch_segments
from clipmill.shards.job import make_shards
from clipmill.shards.plan import ShardSpec
from clipmill.shards.read import Shards
from conftest import SHARED
from misbehaving import Body, Misbehaving

pytestmark = pytest.mark.shared_data

EXTREME = {"4-164661-B-12.ogg", "5-189237-A-12.ogg"}
"""The shortest clip and the quietest."""


@pytest.fixture(scope="module")
def esc10(run, tmp_path_factory) -> Path:
    """A root with a clip of each class and fold fetched, 50 in all, and sharded as tars and as HDF5."""
    root = tmp_path_factory.mktemp("data")
    with open(SHARED / "esc10/esc10.csv", newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: (row["filename"] in EXTREME, row["filename"]))
    chosen = {(row["category"], row["fold"]): row for row in rows}.values()
    assert {row["filename"] for row in chosen} >= EXTREME
    (root / "clips").mkdir()
    for row in chosen:
        (root / "clips" / row["filename"]).symlink_to(SHARED / "esc10/audio" / row["filename"])
    with open(root / "clips.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(chosen)
    done = run(
        "fetch", "folder", "--name", "esc10", "--from", root / "clips", "--labels", root / "clips.csv", "--root", root,
        "--file-column", "filename", "--label-column", "category", "--fold-column", "fold", "--group-column", "src_file",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for form in ("webdataset", "hdf5"):
        done = run("shard", "esc10", "--root", root, "--format", form, "--clips-per-shard", 16, "--jobs", 2)
        assert done.returncode == 0, done.stderr
    return root / "esc10/shards"


def ffmpeg_decode(path: Path, rate: int) -> np.ndarray:
    """Decode by the ffmpeg program alone to mono float32 at `rate` Hz."""
    command = [
        ffmpeg_program(), "-loglevel", "error", "-i", str(path), "-ac", "1",
        "-af", f"aresample={rate}:resampler=soxr:precision=28", "-f", "f32le", "pipe:",
    ]  # fmt: skip
    return np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, np.float32)


def snr_db(reference: np.ndarray, other: np.ndarray) -> float:
    noise = float(((reference - other) ** 2).sum())
    return 10 * np.log10(float((reference**2).sum()) / max(noise, 1e-30))


def read_tars(folder: Path) -> dict[str, tuple[np.ndarray, dict]]:
    """Every clip as the webdataset library and soundfile read it."""
    found = {}
    for sample in webdataset.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False):
        wave, rate = soundfile.read(io.BytesIO(sample["flac"]), dtype="int16")
        assert rate == 44100
        found[sample["__key__"]] = wave, json.loads(sample["json"])
    return found


def test_every_clip_is_what_ffmpeg_decodes_padded_with_zeros_to_whole_seconds(esc10):
    clips = read_tars(esc10 / "webdataset-flac-44100")
    assert len(clips) == 50
    worst = np.inf
    for wave, facts in clips.values():
        oracle = ffmpeg_decode(SHARED / "esc10/audio" / facts["source"], 44100)
        assert len(wave) == facts["samples"] == -(-len(oracle) // 44100) * 44100
        assert not wave[len(oracle) :].any()
        # Rounding to 16 bits is all that differs (half a step; two Vorbis decoders, a hair), and the top of the scale.
        expected = np.clip(oracle, -1, 32767 / 32768)
        assert np.abs(wave[: len(oracle)] / 32768 - expected).max() <= 0.52 / 32768
        worst = min(worst, snr_db(expected, wave[: len(oracle)] / 32768))
    assert worst > 45  # dB; that of the quietest clip, at -47 dB RMS


def test_resampled_clips_agree_with_ffmpegs_own_resampler(run, esc10, tmp_path):
    done = run(
        "shard", "esc10", "--root", esc10.parents[1], "--sample-rate", 32000, "--out", tmp_path, "--jobs", 1
    )
    assert done.returncode == 0, done.stderr
    index = tables.read_table(tmp_path / "index.parquet", tables.INDEX).to_pylist()
    from clipmill.shards.read import Shards

    shards = Shards.open(tmp_path)
    ratios = []
    for row in range(0, 50, 2):
        oracle = ffmpeg_decode(SHARED / "esc10/audio" / index[row]["source"], 32000)
        wave = shards.read(row)[: len(oracle)] / 32768
        inner = slice(200, len(oracle) - 200)  # filters of different lengths begin and end differently
        ratios.append(snr_db(oracle[inner], wave[inner]))
    assert min(ratios) > 40
    assert np.median(ratios) > 60


def test_hdf5_holds_the_same_samples_as_the_tars(esc10):
    tars = read_tars(esc10 / "webdataset-flac-44100")
    seen = 0
    for path in sorted((esc10 / "hdf5-pcm16-44100").glob("*.h5")):
        with h5py.File(path) as file:
            labels = json.loads(file.attrs["labels"])
            for name, wave, target in zip(file["audio_name"], file["waveform"], file["target"], strict=True):
                expected, facts = tars[name.decode()]
                assert np.array_equal(wave, expected)
                assert [label for label, on in zip(labels, target, strict=True) if on] == facts["labels"]
                seen += 1
    assert seen == 50


def test_inspect_and_verify_tell_the_truth_of_them(run, esc10):
    folder = esc10 / "webdataset-flac-44100"
    said = json.loads(run("inspect", folder, "--json").stdout)
    assert said["clips"] == 50
    assert set(said["labels"].values()) == {5}
    assert said["folds"] == {str(fold): 10 for fold in range(1, 6)}
    assert said["duration_s"]["min"] == pytest.approx(3.64, abs=0.01)
    assert json.loads(run("verify", folder, "--jobs", 1, "--json").stdout)["sound"]


@pytest.fixture(scope="module")
def nasty(run, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """The nasty files, sharded by one process, and what the command said."""
    root = tmp_path_factory.mktemp("nasty")
    done = run("fetch", "folder", "--name", "nasty", "--from", SHARED / "nasty", "--root", root)
    assert done.returncode == 0
    return root / "1", run(*nasty_command(root, 1))


def nasty_command(root: Path, jobs: int) -> tuple[object, ...]:
    given = ("--root", root, "--out", root / str(jobs), "--clips-per-shard", 16)
    return ("shard", "nasty", *given, "--jobs", jobs)


def test_every_nasty_file_is_a_clip_or_a_row_with_a_reason(nasty):
    files = {
        path.relative_to(SHARED / "nasty").as_posix()
        for path in (SHARED / "nasty").rglob("*")
        if path.is_file()
    }
    shards, done = nasty
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    written = tables.read_table(shards / "index.parquet", tables.INDEX).to_pylist()
    lost = tables.read_jsonl(shards / "failures.jsonl")
    assert {row["source"] for row in written} | {row["source"] for row in lost} == files
    assert len(written) + len(lost) == len(files)
    counts = tables.read_json(shards / "dataset.json")["counts"]
    assert counts["in"] == len(files) == counts["written"] + counts["failed"] + counts["skipped"]
    assert counts["reasons"] == dict(Counter(row["reason"] for row in lost))
    assert len(written) >= 36  # decoders may learn to read more of them
    for row in written:
        assert row["samples"] % 44100 == 0


def test_nasty_files_give_the_same_account_from_any_number_of_jobs(run, nasty):
    one, _ = nasty
    two = one.with_name("2")
    run(*nasty_command(one.parent, 2))
    for path in one.iterdir():
        assert (
            hashlib.sha256(path.read_bytes()).digest()
            == hashlib.sha256((two / path.name).read_bytes()).digest()
        )


def test_stretches_fetched_one_by_one_are_those_of_the_originals(tmp_path):
    """Real Vorbis through a server, cut by packets, to the shards: the same sound, to WebM's millisecond."""
    chosen = sorted((SHARED / "esc10/audio").glob("*.ogg"))[::20]
    todo = tables.manifest_table({
        "key": [path.stem for path in chosen],
        "source": [""] * len(chosen),
        "labels": [["real"]] * len(chosen),
        "start_s": [1.25] * len(chosen),
        "end_s": [3.25] * len(chosen),
        "group": [path.stem for path in chosen],
    })  # fmt: skip
    with Misbehaving() as server, Ledger(tmp_path / "ledger.sqlite", write=True) as ledger:
        for path in chosen:
            server.behave(f"{path.stem}.ogg", Body(path.read_bytes(), "audio/ogg"))
        options = SegmentOptions(url_template=f"{server.root}/watch/{{id}}.ogg", keep_silent=True)
        places = Places(tmp_path / "media", tmp_path / "parts")
        fetch_segments(todo, ledger, places, options, lambda done, facts: None, lambda line: None)
        manifest = known(todo, ledger)
        assert ledger.counts() == {"had": len(chosen), "failed": 0, "skipped": 0}
    make_shards("real", manifest, [], places.media, tmp_path / "shards", ShardSpec(keep_silent=True))
    shards = Shards.open(tmp_path / "shards")
    for row, key in enumerate(shards.index["key"].to_pylist()):
        wave = shards.read(row).astype(np.float64)
        whole = prepare_clip(SHARED / f"esc10/audio/{key}.ogg", 44_100, 1.2, 3.3).samples.astype(np.float64)
        assert len(wave) == 88_200
        # Where it lies in what was decoded around it: 50 ms in, give or take the millisecond.
        places_found = [round(0.05 * 44_100) + lag for lag in range(-45, 46)]
        errors = [np.square(wave[:-100] - whole[at : at + 88_100]).mean() for at in places_found]
        power = max(np.square(wave).mean(), 1e-9)
        assert min(errors) <= power * 1e-4 + 1.0, key

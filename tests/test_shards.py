"""Shards: planned once, the same bytes however they are built, readable by anyone, never half finished."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pytest
import soundfile
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

import warm
from clipmill import tables
from clipmill.audio import prepare_file
from clipmill.errors import ConfigError, ShardError, TableError
from clipmill.shards.plan import ShardSpec, Unit, lay_out, plan, wanted
from clipmill.shards.read import Shards
from clipmill.shards.verify import verify
from conftest import REPO


def manifest(clips: int, splits: tuple[str, ...] = ("all",)):
    """A manifest of that many clips, dealt to the splits in turn."""
    names = [f"clip-{number:05d}" for number in range(clips)]
    return tables.manifest_table({
        "key": names,
        "source": [f"{name}.wav" for name in names],
        "labels": [["a"] if n % 2 else ["b"] for n in range(clips)],
        "split": [splits[n % len(splits)] for n in range(clips)],
    })  # fmt: skip


def units_of(table: pa.Table, gone: list[str], spec: ShardSpec) -> list[Unit]:
    """The plan of a manifest without the clips that are gone."""
    table = wanted("x", table, gone)
    return plan(lay_out("x", table, spec), table, Path("m"), Path("o"))


def tree(folder: Path) -> dict[str, str]:
    """Every file's name and sha256."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), st.integers(1, 70), st.integers(0, 5), st.sets(st.integers(0, 299)))
def test_every_clip_that_was_had_is_planned_once_and_shards_are_full(clips, per_shard, seed, lost):
    table = manifest(clips, ("train", "eval"))
    keys = table["key"].to_pylist()
    gone = [keys[place] for place in lost if place < clips]
    spec = ShardSpec(clips_per_shard=per_shard, seed=seed)
    if len(gone) == clips:
        with pytest.raises(ShardError, match="no clip is left"):
            units_of(table, gone, spec)
        return
    units = units_of(table, gone, spec)
    planned = [key for unit in units for key in unit.clips["key"].to_pylist()]
    assert sorted(planned) == sorted(set(keys) - set(gone))
    assert all(len(set(unit.clips["split"].to_pylist())) == 1 for unit in units)
    for split in ("train", "eval"):
        sizes = [u.clips.num_rows for u in units if f"-{split}-" in u.name]
        assert all(size == per_shard for size in sizes[:-1])
    assert [u.hash for u in units] == [u.hash for u in units_of(table, gone, spec)]


def test_the_order_of_clips_is_a_seeded_shuffle_that_no_version_may_change():
    units = units_of(manifest(8), [], ShardSpec(clips_per_shard=4, seed=3))
    assert [u.name for u in units] == ["x-all-000000.tar", "x-all-000001.tar"]
    assert [int(k[-1]) for u in units for k in u.clips["key"].to_pylist()] == [5, 7, 4, 6, 3, 1, 0, 2]


@pytest.mark.parametrize("settings_", [
    {"format": "tfrecord"}, {"encoding": "mp3"}, {"sample_rate": 10}, {"clips_per_shard": 0}, {"decoder": "sox"},
    {"seed": -1}, {"sample_rate": 70001},
])  # fmt: skip
def test_a_spec_that_cannot_be_is_refused(settings_):
    with pytest.raises(ConfigError):
        ShardSpec(**settings_)


@pytest.mark.parametrize("spec", [
    {"format": "webdataset", "encoding": "flac"}, {"format": "webdataset", "encoding": "pcm16"},
    {"format": "hdf5", "encoding": "pcm16"}, {"format": "hdf5", "encoding": "flac"},
])  # fmt: skip
def test_one_job_and_two_give_the_same_files_byte_for_byte(make, tmp_path, spec):
    one, two = make(tmp_path / "1", jobs=1, **spec), make(tmp_path / "2", jobs=2, **spec)
    assert one == two
    assert tree(tmp_path / "1") == tree(tmp_path / "2")
    assert verify(tmp_path / "1").problems == []


def test_the_account_reconciles_and_names_what_was_lost(make, tmp_path):
    counts = make(tmp_path)["counts"]
    assert counts == {
        "in": 24,
        "written": 22,
        "failed": 2,
        "skipped": 0,
        "reasons": {"corrupt": 1, "empty": 1},
    }
    failures = tables.read_jsonl(tmp_path / "failures.jsonl")
    assert [(f["source"], f["stage"], f["reason"]) for f in failures] == [
        ("horn/take 05.flac", "shard", "corrupt"), ("horn/take 11.wav", "shard", "empty"),
    ]  # fmt: skip


@pytest.mark.parametrize("encoding", ["flac", "pcm16"])
def test_the_webdataset_library_reads_the_tars_whole(make, tmp_path, encoding):
    make(tmp_path, encoding=encoding)
    suffix = {"flac": "flac", "pcm16": "wav"}[encoding]
    index = {
        row["key"]: row for row in tables.read_table(tmp_path / "index.parquet", tables.INDEX).to_pylist()
    }
    urls = sorted(map(str, tmp_path.glob("*.tar")))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [s["__key__"] for s in samples] == list(index)
    for sample in samples:
        row = index[sample["__key__"]]
        wave, rate = soundfile.read(io.BytesIO(sample[suffix]), dtype="int16")
        facts = json.loads(sample["json"])
        assert rate == 44100
        assert len(wave) == row["samples"] == facts["samples"]
        assert hashlib.sha256(wave.tobytes()).hexdigest() == row["sha256"]
        assert facts["labels"] == row["labels"]


def test_tar_members_carry_no_trace_of_who_made_them_or_when(make, tmp_path):
    make(tmp_path)
    with tarfile.open(sorted(tmp_path.glob("*.tar"))[0]) as tar:
        members = tar.getmembers()
    assert {(m.uid, m.gid, m.uname, m.gname, m.mode, m.mtime) for m in members} == {
        (0, 0, "clipmill", "clipmill", 0o444, 0)
    }
    stems = [m.name.rsplit(".", 1)[0] for m in members]
    assert stems[0::2] == stems[1::2]


def test_h5py_reads_the_fields_that_panns_readers_know(make, tmp_path, collection):
    make(tmp_path, format="hdf5", encoding="pcm16", clips_per_shard=100)
    index = tables.read_table(tmp_path / "index.parquet", tables.INDEX).to_pylist()
    with h5py.File(tmp_path / "small-all-000000.h5") as file:
        assert [name.decode() for name in file["audio_name"][:]] == [row["key"] for row in index]
        assert json.loads(file.attrs["labels"]) == ["bell", "drum", "horn"]
        assert file.attrs["sample_rate"] == 44100
        assert file["target"].dtype == bool
        assert file["target"].shape == (22, 3)
        for place, row in enumerate(index):
            wave = file["waveform"][place]
            assert wave.dtype == np.int16
            assert np.array_equal(wave, prepare_file(collection / row["source"], 44100))
            assert file["target"][place].tolist() == [
                label in row["labels"] for label in ("bell", "drum", "horn")
            ]


@pytest.mark.parametrize(
    "spec",
    [
        {"encoding": "flac"},
        {"encoding": "pcm16"},
        {"format": "hdf5", "encoding": "pcm16"},
        {"format": "hdf5", "encoding": "flac"},
    ],
)
def test_any_clip_is_read_back_exactly_and_its_padding_is_zero(make, tmp_path, collection, spec):
    make(tmp_path, **spec)
    shards = Shards.open(tmp_path)
    for row, entry in enumerate(shards.index.to_pylist()):
        wave = shards.read(row)
        assert np.array_equal(wave, prepare_file(collection / entry["source"], 44100))
        assert len(wave) % 44100 == 0
        assert not wave[math.ceil(entry["duration_s"] * 44100) + 1 :].any()


def test_shards_open_by_folder_by_file_and_by_range(make, tmp_path):
    make(tmp_path)
    whole = Shards.open(tmp_path)
    assert len(whole) == 22
    assert len(Shards.open(tmp_path / "small-all-000001.tar")) < 6
    assert len(Shards.open(f"{tmp_path}/small-all-{{000000..000004}}.tar")) == 22
    assert whole.labels == ["bell", "drum", "horn"]
    assert whole.targets.sum(axis=0).tolist() == [8.0, 8.0, 6.0]
    assert whole.take(np.array([3, 1])).index["key"].to_pylist() == [
        whole.index["key"][r].as_py() for r in (3, 1)
    ]


def test_what_are_no_shards_is_said_so(make, tmp_path):
    make(tmp_path / "s")
    with pytest.raises(ShardError, match="no such shard"):
        Shards.open(tmp_path / "s/small-all-000009.tar")
    with pytest.raises(ShardError, match=r"holds no dataset\.json"):
        Shards.open(tmp_path)
    with pytest.raises(ShardError, match="a range looks like"):
        Shards.open(f"{tmp_path}/s/small-{{0..3.tar")


def test_other_settings_in_the_same_folder_are_refused_by_name_until_overwritten(make, tmp_path):
    first = make(tmp_path)
    with pytest.raises(ShardError, match=r"sample_rate 44100 \(now 22050\); --overwrite .* --out DIR"):
        make(tmp_path, sample_rate=22050)
    second = make(tmp_path, overwrite=True, sample_rate=22050, clips_per_shard=9)
    assert second["root_sha256"] != first["root_sha256"]
    assert len(list(tmp_path.glob("*.tar"))) == 3
    assert verify(tmp_path).problems == []


def test_overwriting_never_touches_what_is_none_of_ours(make, tmp_path):
    (tmp_path / "backup.tar").write_bytes(b"precious")
    with pytest.raises(ShardError, match=r"backup\.tar: is no shard of small; move it away"):
        make(tmp_path, overwrite=True)
    assert (tmp_path / "backup.tar").read_bytes() == b"precious"


def test_overwriting_mends_a_damaged_shard(make, tmp_path):
    root = make(tmp_path)["root_sha256"]
    tar = tmp_path / "small-all-000001.tar"
    tar.write_bytes(tar.read_bytes().replace(b"fLaC", b"flac", 1))
    assert verify(tmp_path).problems
    assert make(tmp_path, overwrite=True)["root_sha256"] == root
    assert verify(tmp_path).problems == []


def test_a_source_that_was_mended_is_taken_up_after_another_fetch(tmp_path):
    from clipmill.datasets.folder import Folder
    from clipmill.fetch.job import fetch
    from clipmill.shards.job import make_shards

    def shard(**options: object) -> dict:
        got = fetch("folder", Folder(name="s", from_dir=tmp_path / "media"), tmp_path)
        return make_shards(
            "s", got.manifest, got.losses, got.media_root, tmp_path / "s", ShardSpec(), **options
        )

    (tmp_path / "media/x").mkdir(parents=True)
    soundfile.write(tmp_path / "media/x/1.wav", np.full(1000, 0.1), 8000)
    (tmp_path / "media/x/2.wav").write_bytes(b"")
    assert shard()["counts"]["reasons"] == {"empty": 1}
    soundfile.write(tmp_path / "media/x/2.wav", np.full(1000, 0.1), 8000)
    with pytest.raises(ShardError, match="other clips"):
        shard()
    assert shard(overwrite=True)["counts"]["written"] == 2


def test_two_runs_do_not_write_to_one_folder(make, tmp_path):
    with tables.locked(tmp_path), pytest.raises(TableError, match="another run is writing there"):
        make(tmp_path)
    make(tmp_path)


def test_planning_is_quick_because_no_unit_carries_the_whole_table():
    import pickle

    unit = units_of(manifest(5000), [], ShardSpec(clips_per_shard=10))[0]
    assert len(pickle.dumps(unit)) < 10_000


def test_silent_clips_fail_unless_kept(tmp_path):
    from clipmill.datasets.folder import Folder
    from clipmill.fetch.job import fetch
    from clipmill.shards.job import make_shards

    (tmp_path / "media/x").mkdir(parents=True)
    soundfile.write(tmp_path / "media/x/1.wav", np.zeros(1000), 8000)
    soundfile.write(tmp_path / "media/x/2.wav", np.full(1000, 0.1), 8000)
    got = fetch("folder", Folder(name="s", from_dir=tmp_path / "media"), tmp_path)

    def shard(out: str, **spec: object) -> dict:
        return make_shards("s", got.manifest, got.losses, got.media_root, tmp_path / out, ShardSpec(**spec))[
            "counts"
        ]

    assert shard("a")["reasons"] == {"silent": 1}
    assert shard("b", keep_silent=True)["written"] == 2


def test_a_damaged_clip_is_named_when_it_is_read(make, tmp_path):
    make(tmp_path)
    tar = tmp_path / "small-all-000001.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    shards = Shards.open(tmp_path / "small-all-000001.tar")
    with pytest.raises(
        ShardError, match=r"small-all-000001.tar: clip \S+ cannot be read .* `pipeline verify`"
    ):
        shards.read(len(shards) - 1)


def test_killed_at_any_moment_and_run_again_the_bytes_are_the_same_and_finished_shards_stay(
    fetched, make, tmp_path
):
    make(tmp_path / "undisturbed", clips_per_shard=2)
    out = tmp_path / "killed"
    words = ("shard", "small", "--root", fetched, "--out", out, "--clips-per-shard", 2, "--jobs", 2)
    rng = np.random.default_rng(0)
    kept: dict[Path, int] = {}
    for _ in range(6):
        process = warm.start("clipmill", *words, new_session=True)
        time.sleep(rng.uniform(0.4, 2.4))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
        kept = {p: p.stat().st_mtime_ns for p in out.glob("*.tar") if p.with_suffix(".json").exists()}
    assert warm.run("clipmill", *words).returncode == 3
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    assert tree(out) == tree(tmp_path / "undisturbed")


def test_the_root_hash_is_what_sha256sum_gives(make, tmp_path):
    root = make(tmp_path)["root_sha256"]
    command = "sha256sum *.tar | sha256sum"
    said = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert said.split()[0] == root


def test_the_example_of_reading_runs(make, tmp_path):
    make(tmp_path)
    assert "8 of 22 clips are bell" in warm.run(REPO / "examples/read_shards.py", tmp_path).stdout

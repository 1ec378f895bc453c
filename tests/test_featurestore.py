"""The feature store: what was computed, to the bit, for as long as it lies there, or a refusal that says why."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clipmill import tables
from clipmill.augment import to_float
from clipmill.errors import ClipmillError, ConfigError, FeatureError, ShardError, TableError
from clipmill.features import FEATURES, LogMel, create_feature
from clipmill.features.spec import FeatureSpec
from clipmill.featurestore import Entry, FeatureStore, StoredClips, make_features
from clipmill.featurestore.compute import batch_mates, compute
from clipmill.featurestore.files import TABLE, read_sealed, write_sealed
from clipmill.featurestore.verify import Verdict, verify
from clipmill.loader import WholeClips
from clipmill.run import Local
from clipmill.shards.read import Shards

CPU = torch.device("cpu")
LOGMEL = create_feature("logmel", sample_rate=44100)


@pytest.fixture(scope="module")
def where(make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 clips of 1 to 5 s in five shards."""
    out = tmp_path_factory.mktemp("sound") / "shards"
    make(out)
    return out


@pytest.fixture(scope="module")
def shards(where: Path) -> Shards:
    return Shards.open(where, ours=True)


@pytest.fixture(scope="module")
def kept(shards: Shards, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Entry]:
    """The log-mel of the clips in both number types, each in a store of its own; not to be changed."""
    root = tmp_path_factory.mktemp("kept")
    return {
        dtype: make_features(shards, root / dtype, LOGMEL, dtype).entry for dtype in ("float16", "float32")
    }


@pytest.fixture
def entry(kept: dict[str, Entry], tmp_path: Path) -> Entry:
    """One of float16 to be harmed."""
    folder = tmp_path / "features" / kept["float16"].id
    shutil.copytree(kept["float16"].folder, folder)
    return Entry.open(folder)


def whole(clips: Shards, row: int) -> np.ndarray:
    room = np.empty((1, int(clips.samples[row]), clips.bins or 1), clips.dtype)
    assert clips.read_into(np.array([row]), room) == []
    return room[0]


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file's bytes; of entry.json what it says, but for the date."""
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    said = read_sealed(folder / "entry.json")
    said.pop("as_of")
    return found | {"entry.json": json.dumps(said, sort_keys=True).encode()}


def again(entry: Entry, shards: Shards, **options: Any) -> Any:
    """The same build once more."""
    return make_features(shards, entry.folder.parent, LOGMEL, "float16", **options)


# What is stored


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_clip_has_the_feature_that_the_module_gives(kept, shards, dtype):
    clips = kept[dtype].clips
    assert len(clips) == len(shards) == 22
    assert (clips.bins, clips.dtype, clips.sample_rate) == (128, np.dtype(dtype), 128)
    assert np.array_equal(clips.samples, shards.samples * 128 // 44100)
    for row in range(len(shards)):
        with torch.inference_mode():
            heard = LOGMEL(to_float(torch.from_numpy(shards.read(row)))[None])[0].T.numpy()
        np.testing.assert_allclose(
            whole(clips, row), heard, rtol=2**-11 if dtype == "float16" else 0, atol=1e-3
        )


def test_float16_is_float32_rounded_to_nearest(kept):
    one, other = kept["float16"].clips, kept["float32"].clips
    for row in range(len(one)):
        assert np.array_equal(whole(one, row), whole(other, row).astype(np.float16))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_any_hdf5_reader_reads_the_same(kept, dtype):
    entry = kept[dtype]
    rows = {key: row for row, key in enumerate(entry.clips.columns["key"].to_pylist())}
    seen = set()
    for shard in entry.info["shards"]:
        with h5py.File(entry.folder / shard["file"]) as file:
            assert file.attrs["spec"] == entry.spec.json
            assert (file.attrs["unit"], file.attrs["frames_per_s"]) == ("dB", 128)
            for name in [name for name in file if name.startswith("feature_")]:
                frames = int(name.partition("_")[2])
                assert file[name].chunks == (1, frames, 128), "a clip is one chunk"
                assert file[name].compression is None
                for key, values in zip(file[f"key_{frames}"], file[name], strict=True):
                    assert np.array_equal(values, whole(entry.clips, rows[key.decode()]))
                    seen.add(key.decode())
    assert seen == set(rows)


def test_statistics_are_those_of_all_frames(kept):
    for entry in kept.values():
        every = np.concatenate([whole(entry.clips, row) for row in range(22)]).astype(np.float64)
        found = entry.statistics
        assert found.frames == len(every)
        np.testing.assert_allclose(found.mean, every.mean(0), rtol=1e-9)
        np.testing.assert_allclose(found.std, every.std(0), rtol=1e-9)


def test_what_an_entry_says_of_itself(kept, shards, where):
    info = kept["float16"].info
    assert info["lineage"] == {
        "dataset": "small", "root_sha256": shards.root_sha256, "shards": str(where.resolve()),
    }  # fmt: skip
    assert info["counts"] == {"in": 22, "written": 22, "failed": 0, "skipped": 0, "reasons": {}}
    assert info["about"]["unit"] == "dB"
    assert info["about"]["feature"] == LogMel.ABOUT
    assert [one["device"] for one in info["computed"]] == ["cpu"]
    assert {"clipmill", "numpy", "torch", "torchaudio"} == set(info["computed"][0]["versions"])
    assert info["as_of"].endswith("Z")
    assert kept["float16"].spec == FeatureSpec.of(LOGMEL, shards)


def test_a_batch_is_a_function_of_the_shard_alone(shards, monkeypatch):
    """Those that `batch_mates` says are together were computed together."""
    monkeypatch.setattr("clipmill.featurestore.compute.AT_ONCE_S", 8)
    seen = 0
    with closing(compute(LOGMEL, shards, "float16", CPU)) as made:
        for batch in made:
            for row in batch.rows:
                assert np.array_equal(batch_mates(shards.samples, int(row), 44100), batch.rows)
            seen += len(batch.rows)
    assert seen == len(shards)


# As clips


def test_labels_folds_groups_and_filters_are_those_of_the_sound(kept, shards):
    clips = kept["float16"].clips
    assert clips.labels == shards.labels
    assert np.array_equal(clips.targets, shards.targets)
    assert clips.groups.equals(shards.groups)
    assert np.array_equal(clips.folds, shards.folds)
    assert clips.index.equals(shards.index)
    kept_rows = clips.where("duration_s > 2 and 'bell' in labels")
    assert isinstance(kept_rows, StoredClips)
    assert kept_rows.keys_of(np.arange(2)) == shards.where("duration_s > 2 and 'bell' in labels").keys_of(
        np.arange(2)
    )
    for other in (clips.take([3, 1]), clips.with_labels([*clips.labels, "more"]), clips.light()):
        assert isinstance(other, StoredClips)
        assert np.array_equal(whole(other, 1), whole(clips, {2: 1}.get(len(other), 1)))
    assert np.array_equal(clips.take([3, 1]).samples, clips.samples[[3, 1]])


def test_it_travels_to_other_processes(kept):
    clips = kept["float16"].clips.take([5, 0, 7])
    there = pickle.loads(pickle.dumps(clips))
    assert isinstance(there, StoredClips)
    assert len(pickle.dumps(clips.light())) < 100_000
    for row in range(3):
        assert np.array_equal(whole(there, row), whole(clips, row))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_stretch_of_any_clips_is_that_of_the_whole_with_silence_behind(kept, data):
    entry = kept[data.draw(st.sampled_from(["float16", "float32"]))]
    clips = entry.clips
    rows = np.array(data.draw(st.lists(st.integers(0, 21), min_size=1, max_size=4)))
    frames = data.draw(st.integers(1, 800))
    starts = np.array([data.draw(st.integers(0, int(clips.samples[row]))) for row in rows])
    room = np.full((len(rows), frames, 128), np.nan, clips.dtype)
    assert clips.read_into(rows, room, starts) == []
    for row, start, found in zip(rows, starts, room, strict=True):
        wanted = whole(clips, row)[start : start + frames]
        assert np.array_equal(found[: len(wanted)], wanted)
        assert (found[len(wanted) :] == clips.silence).all()
    assert (clips.silence == -100).all(), "dB"


def test_into_other_numbers_and_other_strides_it_reads_the_same(kept):
    clips = kept["float16"].clips
    frames = int(clips.samples[0])
    wide, turned = np.empty((1, frames, 128), np.float32), np.empty((1, 128, frames), np.float16)
    assert (
        clips.read_into(np.array([0]), wide)
        == clips.read_into(np.array([0]), turned.transpose(0, 2, 1))
        == []
    )
    assert np.array_equal(wide[0], whole(clips, 0))
    assert np.array_equal(turned[0].T, whole(clips, 0))


def test_threads_read_side_by_side_with_few_files_open(kept):
    clips = kept["float16"].clips
    expected = [whole(clips, row) for row in range(22)]
    whole(clips, 0)
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(8) as pool:
        rows = list(range(22)) * 20
        for row, found in zip(rows, pool.map(lambda row: whole(clips, row), rows), strict=True):
            assert np.array_equal(found, expected[row])
    assert len(os.listdir("/proc/self/fd")) <= before


def test_whole_clips_of_the_loader_are_batches_of_features(kept):
    clips = kept["float16"].clips
    seen = 0
    for batch in WholeClips(clips, 3000, workers=2).batches():
        assert batch.waves.shape == (len(batch.rows), int(batch.lengths[0]), 128)
        for row, values in zip(batch.rows.tolist(), batch.waves, strict=True):
            assert np.array_equal(values.numpy(), whole(clips, row))
            seen += 1
    assert seen == 22


def test_what_needs_sound_says_that_there_is_none(kept):
    entry = kept["float16"]
    clips = entry.clips
    for ask in (
        lambda: clips.read(0),
        lambda: clips.facts(0),
        lambda: clips.decode_into(np.array([0]), [b""], np.empty((1, 1))),
        lambda: Shards.open(entry.folder),
    ):
        with pytest.raises(ShardError, match="features, and this needs sound"):
            ask()


def test_several_entries_are_read_as_one_where_they_hold_the_same_feature(kept):
    part = kept["float16"].part
    both = StoredClips([part, part])
    assert len(both) == 44
    assert np.array_equal(both.samples, np.tile(kept["float16"].clips.samples, 2))
    assert np.array_equal(whole(both, 30), whole(both, 8))
    with pytest.raises(ShardError, match="dtype is float32, the store has float16"):
        StoredClips([part, kept["float32"].part])


# Finding them


def test_features_are_had_by_key_without_any_sound(make, tmp_path):
    make(tmp_path / "shards")
    sound = Shards.open(tmp_path / "shards", ours=True)
    make_features(sound, tmp_path / "features", LOGMEL)
    keys = sound.keys_of(np.array([4, 2]))
    shutil.rmtree(tmp_path / "shards")
    store = FeatureStore(tmp_path / "features")
    found = store.get(keys, "logmel")
    assert [one.dtype for one in found] == [torch.float32] * 2
    clips = store.entry("logmel").clips
    for row, one in zip((4, 2), found, strict=True):
        assert np.array_equal(one.T.numpy(), whole(clips, row).astype(np.float32))
    assert store.get(keys, stored=True)[0].dtype == torch.float16
    with pytest.raises(ShardError, match="has no clip nobody"):
        store.get(["nobody"])


def test_another_spec_or_other_shards_are_refused_by_name(entry, shards, make, tmp_path):
    store = FeatureStore(entry.folder.parent)
    spec = FeatureSpec.of(LOGMEL, shards)
    assert store.entry("logmel", spec, shards).id == entry.id
    other = FeatureSpec.of(create_feature("logmel", sample_rate=44100, n_mels=64), shards, "float32")
    with pytest.raises(
        FeatureError,
        match=r"dtype is float32, the store has float16; settings.n_mels is 64, the store has 128",
    ):
        store.entry("logmel", other)
    make(tmp_path / "other", seed=1)
    with pytest.raises(ShardError, match=r"was computed from other shards.*pipeline features build .*other"):
        entry.check(shards=Shards.open(tmp_path / "other"))
    for name, said in [("cqt", "has no cqt; it has logmel-small-"), ("logme", "has no logme")]:
        with pytest.raises(FeatureError, match=said):
            store.entry(name)
    with pytest.raises(FeatureError, match="is no feature store"):
        FeatureStore(tmp_path / "nowhere")


def test_of_several_entries_one_must_be_named(entry, shards):
    few = create_feature("logmel", sample_rate=44100, n_mels=64)
    other = make_features(shards, entry.folder.parent, few, "float32").entry
    store = FeatureStore(entry.folder.parent)
    assert {one.id for one in store.entries()} == {entry.id, other.id}
    with pytest.raises(FeatureError) as refused:
        store.entry("logmel")
    for told in (entry.id, other.id, "float32, n_mels 64, of small with root_sha256"):
        assert told in str(refused.value)
    assert store.entry(other.id).id == other.id
    assert store.entry("logmel", FeatureSpec.of(few, shards, "float32")).id == other.id
    assert store.get(shards.keys_of(np.array([0])), entry=other.id)[0].shape[0] == 64
    with pytest.raises(FeatureError, match="name one of them"):
        store.drop("logmel")
    store.drop(other.id)
    assert store.ids == [entry.id]


def test_folders_that_are_no_entries_are_none_of_a_stores_business(entry):
    store = FeatureStore(entry.folder.parent)
    for name in ("hdf5-pcm16-44100", "logmel-small-x", "hdf5"):
        (store.folder / name).mkdir()
        (store.folder / name / "small-all-000000.h5").write_bytes(b"shards")
    assert store.ids == [entry.id]
    for name in ("hdf5", "hdf5-pcm16-44100", entry.id[:-1]):
        with pytest.raises(FeatureError, match=f"has no {name}"):
            store.drop(name)
    assert (store.folder / "hdf5-pcm16-44100" / "small-all-000000.h5").exists()


def test_a_drop_that_was_killed_leaves_nothing_that_looks_like_an_entry(entry):
    store = FeatureStore(entry.folder.parent)
    half = entry.folder.parent / f".{entry.id}.0123.dropped"
    shutil.copytree(entry.folder, half)
    assert store.ids == [entry.id]
    with tables.locked(entry.folder), pytest.raises(TableError, match="another run is writing there"):
        store.drop(entry.id)
    assert Entry.open(entry.folder).clips
    store.drop(entry.id)
    assert list(entry.folder.parent.iterdir()) == []


# Built again


def test_what_is_finished_is_used_again(entry, shards):
    stamps = {path: path.stat().st_mtime_ns for path in entry.folder.iterdir()}
    made = again(entry, shards, check=False)
    assert (made.files, made.stopped, made.counts["written"]) == (0, "", 22)
    assert {path: path.stat().st_mtime_ns for path in entry.folder.iterdir()} == stamps


def test_a_second_builder_in_the_same_entry_is_refused(entry, shards):
    with tables.locked(entry.folder), pytest.raises(TableError, match="another run is writing there"):
        again(entry, shards)


def test_what_tasks_of_a_killed_driver_are_writing_is_left_alone_until_they_have_ended(entry, shards):
    """As on Slurm, where they go on, and the same command waits for them."""
    written = entry.folder / ".half.h5.0123.tmp"
    written.write_text("half")
    next(entry.folder.glob("*.h5")).unlink()

    class Waiting(Local):
        def run(self, function, units):
            assert written.exists()
            return super().run(function, units)

    assert again(entry, shards, engine=Waiting()).files == 1
    assert not written.exists()


@pytest.mark.parametrize(
    "name",
    ["h5", "record", "index.parquet", "dataset.json", "features.parquet", "failures.jsonl", "entry.json"],
)
@pytest.mark.parametrize("harm", ["gone", "cut short"])
def test_what_is_gone_or_cut_short_is_refused_and_made_again_by_the_same_build(entry, shards, name, harm):
    before = files_of(entry.folder)
    file = entry.info["shards"][2]["file"]
    path = entry.folder / {"h5": file, "record": file.replace(".h5", ".json")}.get(name, name)
    if name == "failures.jsonl" and harm == "cut short":
        path.write_text("{}")  # it was empty
    elif harm == "gone":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size * 2 // 3)
    said = verify(entry.folder, sample=0).problems
    assert said
    assert any(path.name in problem for problem in said)
    if name in ("h5", "record"):  # other clips are read
        clips = Entry.open(entry.folder).clips
        rows = np.flatnonzero([one == f"{file[:-3]}.tar" for one in clips.columns["shard"].to_pylist()])
        room = np.empty((22, int(clips.samples.max()), 128), clips.dtype)
        unread = clips.read_into(np.arange(22), room)
        assert {one.place for one in unread} <= set(rows.tolist())
        assert (len(unread) > 0) == (name == "h5")
        assert {one.reason for one in unread} <= {"missing", "corrupt"}
        assert (f"{file}: is gone or of another size" in "".join(clips.notes)) == (name == "h5")
    else:
        with pytest.raises((TableError, ShardError)):
            _ = Entry.open(entry.folder).clips
    made = again(entry, shards)
    assert made.files == (1 if name in ("h5", "record") else 0)
    assert files_of(entry.folder) == before


def test_whatever_byte_is_changed_nothing_wrong_is_served(entry, shards):
    """Read, each clip is what it was, or it is refused; verify tells; build with --check-hashes mends."""
    expected = [whole(entry.clips, row) for row in range(22)]
    rng = np.random.default_rng(0)
    refused = 0
    for path in sorted(entry.folder.iterdir()):
        data = path.read_bytes()
        for place in rng.integers(0, max(len(data), 1), 6 if path.suffix != ".h5" else 4):
            if not data:
                continue
            changed = bytearray(data)
            changed[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(changed)
            with suppress(ClipmillError):
                opened = Entry.open(entry.folder)
                assert np.array_equal(opened.statistics.mean, entry.statistics.mean)
                clips = opened.clips
                room = np.empty((22, int(clips.samples.max()), 128), clips.dtype)
                lost = {one.place for one in clips.read_into(np.arange(22), room)}
                refused += len(lost)
                for row in set(range(22)) - lost:
                    assert np.array_equal(room[row, : len(expected[row])], expected[row])
            path.write_bytes(data)
    assert refused > 0


def test_entries_that_changed_their_names_are_refused_and_named(entry, shards):
    """Whoever asks for one of two would else be served the other."""
    store = FeatureStore(entry.folder.parent)
    wide = create_feature("logmel", sample_rate=shards.sample_rate, n_mels=64)
    other = make_features(shards, store.folder, wide).entry
    aside = entry.folder.with_name("aside")
    for before, after in ((entry.folder, aside), (other.folder, entry.folder), (aside, other.folder)):
        before.rename(after)
    for id, holds in ((entry.id, other.id), (other.id, entry.id)):
        with pytest.raises(TableError, match=f"{id}: was renamed, for it holds {holds}"):
            store.entry(id)
        assert verify(store.folder / id).problems
    with pytest.raises(TableError, match="was renamed"):
        store.get(shards.keys_of(np.array([0])), "logmel")
    assert make_features(shards, store.folder, LOGMEL, "float16").files == len(entry.info["shards"])
    assert store.entry(entry.id).spec == entry.spec


@pytest.mark.parametrize("place", [0.3, 0.7, 0.999])
def test_a_byte_that_flipped_is_found_by_verify_and_mended_by_build_with_hashes(entry, shards, place):
    before = files_of(entry.folder)
    path = entry.folder / entry.info["shards"][1]["file"]
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 4
    path.write_bytes(data)
    verdict = verify(entry.folder)
    assert f"{path.name}: its sha256 is not the one recorded" in verdict.problems[0]
    assert verdict.parity is None
    assert again(entry, shards).files == 0, "that takes --check-hashes"
    assert again(entry, shards, check=True).files == 1
    assert files_of(entry.folder) == before
    assert verify(entry.folder).problems == []


def test_a_build_that_was_killed_between_any_two_files_goes_on_to_the_same_bytes(kept, shards, tmp_path):
    """Every state that a killed build leaves: files without records, temporary files, tables of the old."""
    done = files_of(kept["float16"].folder)
    folder = tmp_path / kept["float16"].id
    shutil.copytree(kept["float16"].folder, folder)
    said = read_sealed(folder / "entry.json")
    for name in ("as_of", "computed", "counts", "statistics", "files", "shards", "root_sha256"):
        said.pop(name)
    write_sealed(folder / "entry.json", {**said, "finished": False})
    names = [one["file"] for one in kept["float16"].info["shards"]]
    (folder / names[0].replace(".h5", ".json")).unlink()
    (folder / names[1]).rename(folder / f".{names[1]}.0123.tmp")
    (folder / "features.parquet").unlink()
    (folder / names[3]).write_bytes(b"not this")
    with pytest.raises(
        ShardError,
        match=r"is not finished; to finish it: pipeline features build .* --feature logmel --dtype float16 --store",
    ):
        _ = Entry.open(folder).clips
    with pytest.raises(ShardError, match="is not finished"):
        FeatureStore(tmp_path).entry("logmel")
    assert FeatureStore(tmp_path).entries() == []
    assert "is not finished" in verify(folder).problems[0]
    made = make_features(shards, tmp_path, LOGMEL, engine=Local(1))
    assert made.files == 3
    assert files_of(folder) == done


# Clips that cannot be


def flip(path: Path, row: dict[str, Any]) -> None:
    """Damage the sound of a clip."""
    data = bytearray(path.read_bytes())
    data[row["offset"] + row["length"] // 2] ^= 255
    path.write_bytes(data)


def test_damaged_sound_costs_that_clip_and_is_computed_once_it_is_mended(kept, make, tmp_path):
    make(tmp_path / "shards")
    sound = Shards.open(tmp_path / "shards", ours=True)
    row = sound.index.slice(7, 1).to_pylist()[0]
    path = tmp_path / "shards" / row["shard"]
    data = path.read_bytes()
    flip(path, row)
    made = make_features(sound, tmp_path / "features", LOGMEL)
    assert made.counts == {"in": 22, "written": 21, "failed": 1, "skipped": 0, "reasons": {"corrupt": 1}}
    (lost,) = tables.read_jsonl(made.entry.folder / "failures.jsonl")
    assert (lost["key"], lost["source"], lost["stage"], lost["reason"]) == (
        row["key"], row["source"], "features", "corrupt",
    )  # fmt: skip
    table = tables.read_table(made.entry.folder / "features.parquet", TABLE).slice(7, 1).to_pylist()[0]
    assert (table["key"], table["offset"], table["reason"]) == (row["key"], None, "corrupt")
    clips = made.entry.clips
    room = np.empty((1, int(clips.samples[7]), 128), clips.dtype)
    (bad,) = clips.read_into(np.array([7]), room)
    assert (bad.key, bad.reason) == (row["key"], "corrupt")
    assert "1 clips have no feature" in "".join(clips.notes)
    with pytest.raises(ShardError, match=f"the feature of {row['key']} cannot be read"):
        FeatureStore(tmp_path / "features").get([row["key"]])
    verdict = verify(made.entry.folder, sample=None)
    assert (verdict.problems, verdict.parity and verdict.parity.clips) == ([], 21)
    assert make_features(sound, tmp_path / "features", LOGMEL).files == 0
    path.write_bytes(data)
    mended = make_features(sound, tmp_path / "features", LOGMEL)
    assert (mended.files, mended.counts["written"]) == (1, 22)
    for name, found in files_of(mended.entry.folder).items():
        if name != "entry.json":  # which says where the shards lay
            assert found == files_of(kept["float16"].folder)[name], name


def test_a_shard_that_is_gone_ends_the_build_and_is_not_written_down_as_lost_clips(make, tmp_path):
    make(tmp_path / "shards")
    sound = Shards.open(tmp_path / "shards", ours=True)
    path = tmp_path / "shards" / sound.files[3]
    path.rename(tmp_path / "away")
    made = make_features(sound, tmp_path / "features", LOGMEL)
    assert f"{path}: cannot be read (missing" in made.stopped
    assert made.counts["in"] == 22 == made.counts["written"] + made.counts["failed"]
    assert set(made.counts["reasons"]) == {"not-built"}
    assert not made.entry.finished
    (tmp_path / "away").rename(path)
    made = make_features(sound, tmp_path / "features", LOGMEL)
    assert (made.stopped, made.counts["written"]) == ("", 22)


class Loud(LogMel):
    """A log-mel in a unit in which half of the clips are out of float16's range, and silence is 0."""

    NAME = "loud"
    SCALE = 1.0

    def extract(self, wave: Tensor) -> Tensor:
        return (super().extract(wave) + 100) * self.SCALE


def test_values_that_float16_does_not_hold_cost_the_clip_and_never_become_infinite(
    kept, shards, tmp_path, monkeypatch
):
    tops = np.array([whole(kept["float32"].clips, row).max() for row in range(22)]) + 100
    monkeypatch.setitem(FEATURES, "loud", Loud)
    monkeypatch.setattr(Loud, "SCALE", 65504 / float(np.median(tops)))
    over = tops > np.median(tops)
    loud = create_feature("loud", sample_rate=44100)
    assert make_features(shards, tmp_path, loud, "float32").counts["written"] == 22
    made = make_features(shards, tmp_path, loud, "float16")
    assert made.counts["reasons"] == {"out-of-range": 11} == {"out-of-range": over.sum()}
    assert made.counts["written"] == 11
    clips = made.entry.clips
    room = np.empty((22, int(clips.samples.max()), 128), np.float16)
    unread = clips.read_into(np.arange(22), room)
    assert [one.place for one in unread] == np.flatnonzero(over).tolist()
    assert {one.reason for one in unread} == {"out-of-range"}
    assert np.isfinite(room[~over]).all()
    assert np.isfinite(made.entry.statistics.std).all()
    assert verify(made.entry.folder, sample=None).problems == []
    assert make_features(shards, tmp_path, loud, "float16").files == 0


def test_a_number_type_that_does_not_even_hold_silence_is_refused(shards, tmp_path, monkeypatch):
    class Louder(Loud):
        NAME = "louder"

        def extract(self, wave: Tensor) -> Tensor:
            return super().extract(wave) + 1e6

    monkeypatch.setitem(FEATURES, "louder", Louder)
    with pytest.raises(
        FeatureError, match="--dtype float16: cannot hold louder of silence; --dtype float32 does"
    ):
        make_features(shards, tmp_path, create_feature("louder", sample_rate=44100), "float16")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_stored_is_refused_before_anything_is_written(shards, where, tmp_path):
    for sound, feature, said in [
        (shards, create_feature("logmel", sample_rate=44100, hop=320), "has not 128 frames a second"),
        (shards, create_feature("logmel", sample_rate=32000), "allowed is 44100"),
        (Shards.open(where / shards.files[0]), LOGMEL, "allowed is the whole folder"),
        (Shards.open([where, where]), LOGMEL, "2 sets of shards"),
    ]:
        with pytest.raises((FeatureError, ShardError), match=said):
            make_features(sound, tmp_path / "features", feature)
    assert not (tmp_path / "features").exists()
    with pytest.raises(ConfigError, match="there is no CUDA device"):
        make_features(shards, tmp_path / "features", LOGMEL, device="cuda:7")


# Verified


def tampered(entry: Entry, change: Callable[[dict[str, Any]], None]) -> Verdict:
    """What verify says where entry.json says something else, under a seal that fits."""
    said = json.loads(json.dumps(entry.info))
    change(said)
    write_sealed(entry.folder / "entry.json", said)
    return verify(entry.folder, sample=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda info: info["counts"].update(written=21), "counts do not reconcile"),
        (lambda info: info["counts"].update(written=21, failed=1), "counts of written are not those"),
        (lambda info: info["statistics"]["mean"].__setitem__(3, 1.0), "its statistics are not those"),
        (lambda info: info["shards"][0].update(written=4), "its record and entry.json disagree"),
        (lambda info: info.update(root_sha256="0" * 64), "root_sha256 is not that of its files"),
        (lambda info: info["lineage"].update(root_sha256="0" * 64), "was renamed, for it holds logmel-"),
        (lambda info: info["files"].update({"failures.jsonl": "0" * 64}), "failures.jsonl: was changed"),
    ],
)
def test_counts_hashes_and_statistics_that_do_not_fit_are_named(entry, change, said):
    assert any(said in problem for problem in tampered(entry, change).problems)


def test_tables_that_do_not_fit_the_files_are_named(entry):
    path = entry.folder / "features.parquet"
    table = tables.read_table(path, TABLE)
    swapped = table.take([1, 0, *range(2, 22)])
    columns = {name: (swapped if name in ("offset", "crc32") else table)[name] for name in TABLE.names}
    tables.write_table(path, pa.table(columns, schema=TABLE))
    said = tampered(entry, lambda info: info["files"].update({path.name: tables.sha256_of(path)[0]})).problems
    assert any("disagree on what it holds" in problem for problem in said)
    assert any("is not laid out as features.parquet says" in problem for problem in said)


def test_files_that_do_not_belong_are_named(entry):
    (entry.folder / "notes.txt").write_text("mine")
    assert verify(entry.folder, sample=0).problems == [
        "notes.txt: does not belong to the entry; move it away"
    ]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_computed_again_on_the_same_device_it_is_the_same_to_the_bit(kept, dtype):
    verdict = verify(kept[dtype].folder, sample=None)
    assert verdict.problems == []
    assert verdict.parity is not None
    assert (verdict.parity.clips, verdict.parity.alike, verdict.parity.equal) == (22, 22, 1.0)
    some = verify(kept[dtype].folder, sample=3).parity
    assert some is not None
    assert 3 <= some.clips < 22


def forge(entry: Entry, shards: Shards, off: float, computed: Any = None) -> None:
    """An entry whole in itself whose numbers are not those of the sound, by a factor."""
    real = LogMel.extract
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LogMel, "extract", lambda self, wave: real(self, wave) * (1 + off))
        if computed is not None:
            patch.setattr("clipmill.featurestore.build.computed_by", lambda device: computed)
        shutil.rmtree(entry.folder)
        again(entry, shards)


def test_numbers_that_are_not_those_of_the_sound_are_found(entry, shards):
    forge(entry, shards, 2e-4)
    (said,) = verify(entry.folder).problems
    assert "allowed is half a unit in float16's last place" in said


@pytest.mark.parametrize(("off", "sound"), [(0.0, True), (1e-6, True), (0.01, False)])
def test_on_another_device_or_version_a_tolerance_is_allowed_and_said(entry, shards, off, sound):
    forge(entry, shards, off, {"device": "cuda", "kind": "of another age", "versions": {}})
    verdict = verify(entry.folder)
    assert verdict.parity is not None
    assert verdict.parity.alike == 0
    assert "dB in the mean" in verdict.parity.allowed
    assert (verdict.problems == []) is sound, verdict
    assert all("computed again elsewhere, values differ by" in problem for problem in verdict.problems)


def test_where_the_sound_is_gone_all_else_is_checked_and_that_is_said(make, tmp_path):
    make(tmp_path / "shards")
    made = make_features(Shards.open(tmp_path / "shards", ours=True), tmp_path / "features", LOGMEL)
    (tmp_path / "shards").rename(tmp_path / "elsewhere")
    verdict = verify(made.entry.folder)
    assert (verdict.problems, verdict.parity) == ([], None)
    assert any("nothing was computed again" in note for note in verdict.notes)
    found = verify(made.entry.folder, shards=Shards.open(tmp_path / "elsewhere", ours=True))
    assert found.parity is not None
    make(tmp_path / "other", seed=1)
    with pytest.raises(ShardError, match="was computed from other shards"):
        verify(made.entry.folder, shards=Shards.open(tmp_path / "other", ours=True))


def test_features_of_shards_at_a_url_are_the_same(kept, where, bucket, tmp_path):
    url = bucket.fill(where)
    made = make_features(Shards.open(url, ours=True), tmp_path, LOGMEL)
    assert made.entry.info["lineage"]["shards"] == url
    for name, found in files_of(made.entry.folder).items():
        assert found == files_of(kept["float16"].folder)[name] or name == "entry.json", name
    verdict = verify(made.entry.folder, sample=3)
    assert verdict.parity is not None, verdict


def test_readers_in_threads_share_what_they_know(kept):
    clips = kept["float16"].clips
    barrier, found = threading.Barrier(4), []

    def read() -> None:
        barrier.wait()
        found.append(clips.take([3, 4]).samples.sum())

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1

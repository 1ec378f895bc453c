"""`--from DIR`: media already on disk are found by any usual name, checked, and read where they stand."""

from __future__ import annotations

import os
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from clipmill import tables
from clipmill.audio.media import encode_media
from clipmill.errors import DecodeError, FetchError
from clipmill.fetch.adopt import Adoption, adopt, adopt_media
from clipmill.fetch.fetched import known
from clipmill.fetch.find import find_media
from clipmill.fetch.ledger import Ledger, Outcome
from clipmill.fetch.options import SegmentOptions
from clipmill.fetch.recheck import gone
from clipmill.fetch.watch import Watch
from clipmill.shards.job import make_shards
from clipmill.shards.plan import ShardSpec
from clipmill.sources import opened
from conftest import sound
from test_sources import flac, make_parquet, make_tar

RATE = 8000
ID, OTHER = "--PJHxphWEs", "Y_b-0123456"
LETTERS = "ABCXYZabcxyz0189-_"


def wanted(*clips: tuple[str, float, float]) -> pa.Table:
    """A manifest of stretches of videos."""
    return tables.manifest_table({
        "key": [f"{video}_{round(start_s * 1000)}" for video, start_s, _ in clips],
        "source": [""] * len(clips),
        "labels": [["a"]] * len(clips),
        "split": ["train"] * len(clips),
        "start_s": [start_s for _, start_s, _ in clips],
        "end_s": [end_s for _, _, end_s in clips],
        "group": [video for video, _, _ in clips],
    })  # fmt: skip


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def found(root: Path, *clips: tuple[str, float, float]) -> dict[str, tuple[str, str]]:
    """Key -> the source found for it, relative to `root`, and its kind."""
    media = find_media([root], wanted(*clips)).media.to_pylist()
    return {
        row["key"]: (row["source"].removeprefix(f"{root}/"), row["kind"]) for row in media if not row["turn"]
    }


def write(path: Path, seconds: float, rate: int = RATE, seed: int = 0) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = sound(seconds, rate, seed=seed)
    soundfile.write(path, samples, rate, "PCM_16")
    return soundfile.read(path, dtype="int16")[0]


def names_of(video: str, start_s: int, end_s: int) -> dict[str, str]:
    """Every name that a clip goes by, and what it agrees with."""
    ms = f"{video}_{start_s * 1000}_{end_s * 1000}", f"{video}_{start_s * 1000}"
    whole = f"{video}", f"Y{video}", f"A clip [{video}]", f"Some - clip-{video}"
    exact = (
        f"{video}_{start_s}_{end_s}",
        f"{video}_{start_s}.000_{end_s}.000",
        f"{video}-{start_s}-{end_s}",
        ms[0],
    )
    start = f"{video}_{start_s}", f"Y{video}_{start_s}", f"{video}_{start_s}.000"
    stretch = *exact, f"Y{video}_{start_s}_{end_s}", f"Y{video}_{start_s}.000_{end_s}.000"
    kinds = {"id": whole, "start": start, "stretch": stretch, "key": ms[1:]}
    # At 0 s the name in seconds and the name in milliseconds, the key, are one.
    return {name: "key" if name == ms[1] else kind for kind, names in kinds.items() for name in names}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.text(LETTERS, min_size=11, max_size=11), min_size=6, max_size=6, unique=True),
    st.integers(0, 700),
    st.integers(1, 20),
)
def test_every_name_gives_its_video_and_no_other(videos, start_s, length_s):
    end_s = start_s + length_s
    clips = [(video, float(start_s), float(end_s)) for video in videos]
    for place, kind in enumerate(names_of(videos[0], start_s, end_s).values()):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            stems = {video: list(names_of(video, start_s, end_s))[place] for video in videos[:5]}
            touch(root, *(f"sub/{stem}.wav" for stem in stems.values()))
            expected = {f"{v}_{start_s * 1000}": (f"sub/{stem}.wav", kind) for v, stem in stems.items()}
            assert found(root, *clips) == expected


@pytest.mark.parametrize("stem", [
    f"{ID}_31_41", f"{ID}_31", f"{ID}_31000_41000", f"Y{ID}_31.wav", f"{ID}_0_10", f"{ID}x", f"x{ID}", f"{ID[:10]}", f"{ID}_30_", f"{ID}_-30",
    f"[{ID}] x", f"{ID.lower()}_30_40", f"{ID}_30,000",
])  # fmt: skip
def test_a_name_that_disagrees_is_no_candidate(tmp_path, stem):
    touch(tmp_path, f"{stem}.wav")
    assert found(tmp_path, (ID, 30.0, 40.0)) == {}


def test_the_most_telling_name_is_preferred_then_the_first_and_duplicates_are_counted(tmp_path):
    clips = (ID, 30.0, 40.0), (OTHER, 5.0, 15.0), ("aaaaaaaaaaa", 0.0, 10.0)
    touch(
        tmp_path,
        f"a/{ID}.wav",
        f"b/{ID}_30.wav",
        f"c/{ID}_30_40.flac",
        f"z/{OTHER}.ogg",
        f"y/Y{OTHER}.wav",
        "aaaaaaaaaaa.wav",
    )
    got = find_media([tmp_path], wanted(*clips))
    assert got.duplicates == 2
    assert got.seen == 6
    assert got.warnings == []
    assert found(tmp_path, *clips) == {
        f"{ID}_30000": (f"c/{ID}_30_40.flac", "stretch"),
        f"{OTHER}_5000": (f"y/Y{OTHER}.wav", "id"),
        "aaaaaaaaaaa_0": ("aaaaaaaaaaa.wav", "id"),
    }


def test_clips_of_one_video_are_told_apart_by_their_start_or_share_the_whole_video(tmp_path):
    clips = (ID, 30.0, 40.0), (ID, 50.0, 60.0), (ID, 70.0, 80.0)
    touch(tmp_path, f"{ID}_30.wav", f"{ID}_50000.wav", f"{ID}.webm")
    assert {key: source for key, (source, _) in found(tmp_path, *clips).items()} == {
        f"{ID}_30000": f"{ID}_30.wav",
        f"{ID}_50000": f"{ID}_50000.wav",
        f"{ID}_70000": f"{ID}.webm",
    }


def test_folders_are_walked_through_links_once_and_past_what_is_no_sound(tmp_path):
    root = tmp_path / "root"
    touch(root, f"deep/er/{ID}.wav", f".{OTHER}.wav", f".hidden/{OTHER}.wav", f"{OTHER}.txt", f"{OTHER}.json")
    touch(tmp_path, "elsewhere/ccccccccccc.opus")
    (root / "loop").symlink_to(root)
    (root / "self").symlink_to("self")
    (root / "gone").symlink_to("nowhere")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    got = found(root, (ID, 0.0, 10.0), (OTHER, 0.0, 10.0), ("ccccccccccc", 0.0, 10.0))
    assert got == {f"{ID}_0": (f"deep/er/{ID}.wav", "id"), "ccccccccccc_0": ("link/ccccccccccc.opus", "id")}


def test_names_that_no_table_can_hold_are_counted_and_the_others_found(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9 [" + OTHER.encode() + b"].wav")).touch()
    touch(tmp_path, f"café [{ID}].wav")
    got = find_media([tmp_path], wanted((ID, 0.0, 10.0), (OTHER, 0.0, 10.0)))
    assert got.media["key"].to_pylist() == [f"{ID}_0"]
    assert got.warnings == [f"{tmp_path}: 1 names are not valid UTF-8, and not read"]


def test_a_folder_that_is_none_is_refused_and_names_the_flag(tmp_path):
    with pytest.raises(FetchError, match=r"--from .*gone: is no folder"):
        find_media([tmp_path, tmp_path / "gone"], wanted((ID, 0.0, 10.0)))


def test_a_folder_with_nothing_wanted_says_what_it_holds_and_what_is_known(tmp_path):
    (tmp_path / "empty").mkdir()
    touch(tmp_path / "full", "drum.wav")
    got = find_media([tmp_path / "empty", tmp_path / "full"], wanted((ID, 0.0, 10.0)))
    assert got.media.num_rows == 0
    assert got.barren[0].startswith(
        f"--from {tmp_path}/empty: holds none of the clips still wanted (no sound files)"
    )
    assert "(1 names seen, such as 'drum'); known are ID.ext, YID.ext" in got.barren[1]


def test_a_folder_that_may_not_be_read_is_named_and_the_rest_is_found():
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        touch(root, f"{ID}.wav", f"shut/{OTHER}.wav")
        (root / "shut").chmod(0)
        before = os.geteuid()
        try:
            if before == 0:
                os.seteuid(65534)  # root may read everything
            got = find_media([root], wanted((ID, 0.0, 10.0), (OTHER, 0.0, 10.0)))
        finally:
            os.seteuid(before)
            (root / "shut").chmod(0o755)
    assert got.media["key"].to_pylist() == [f"{ID}_0"]
    assert got.warnings == [f"{root}/shut: cannot be read: Permission denied"]


def test_folders_are_not_looked_through_when_nothing_is_wanted(tmp_path):
    touch(tmp_path, f"{ID}.wav")
    got = find_media([tmp_path], wanted())
    assert (got.media.num_rows, got.seen, got.warnings, got.barren) == (0, 0, [], [])
    assert got.media.column_names == ["key", "source", "kind", "turn"]


def test_tars_and_parquet_files_are_found_in_place(tmp_path):
    make_tar(
        tmp_path / "bal_train00.tar",
        {f"audio/bal_train/{ID}.flac": b"1", f"audio/bal_train/{ID}.json": b"{}"},
    )
    (tmp_path / "data/eval").mkdir(parents=True)
    make_parquet(tmp_path / "data/eval/00.parquet", {"ddddddddddd": b"0", OTHER: b"1"})
    assert found(tmp_path, (ID, 30.0, 40.0), (OTHER, 0.0, 10.0)) == {
        f"{ID}_30000": ("bal_train00.tar#bytes=512+1", "id"),
        f"{OTHER}_0": ("data/eval/00.parquet#row=1&column=audio", "id"),
    }


@pytest.mark.parametrize("cut", [512 + 599, 512, 200])
def test_a_damaged_tar_is_named_and_what_stands_before_the_damage_is_used(tmp_path, cut):
    path = tmp_path / "a.tar"
    make_tar(path, {f"{ID}.flac": bytes(600), f"{OTHER}.flac": bytes(600)}, tarfile.USTAR_FORMAT)
    os.truncate(path, 512 + 1024 + cut)
    got = find_media([tmp_path], wanted((ID, 0.0, 10.0), (OTHER, 0.0, 10.0)))
    assert got.media["key"].to_pylist() == [f"{ID}_0"]
    assert len(got.warnings) == 1
    assert f"{path}: is damaged or cut short" in got.warnings[0]


def test_archives_that_cannot_be_used_are_named(tmp_path):
    (tmp_path / "junk.tar").write_bytes(os.urandom(3000))
    (tmp_path / "junk.parquet").write_bytes(b"PAR1junkPAR1")
    pq.write_table(pa.table({"video_id": [ID], "label": ["x"]}), tmp_path / "lists.parquet")
    pq.write_table(pa.table({"video_id": [[1]], "audio": [b""]}), tmp_path / "odd.parquet")
    touch(tmp_path, "a.tar.gz", "b.zip", f"{ID}.wav")
    got = find_media([tmp_path], wanted((ID, 0.0, 10.0)))
    assert got.media["source"].to_pylist() == [f"{tmp_path}/{ID}.wav"]
    said = "\n".join(sorted(got.warnings))
    assert len(got.warnings) == 6
    for text in (
        "junk.tar: is damaged", "junk.parquet: cannot be read as Parquet", "a.tar.gz: is compressed", "b.zip: is compressed",
        "lists.parquet: lacks the columns audio; it has video_id, label", "odd.parquet: cannot be read as Parquet",
    ):  # fmt: skip
        assert text in said


def job(source: object, start_s: float = 30.0, end_s: float = 40.0, **more: object) -> Adoption:
    return Adoption("k", str(source), start_s, end_s, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(("seconds", "stretch"), [
    (9.6, (None, None)), (10.0, (None, None)), (10.4, (None, 10.0)), (11.0, (None, 10.0)), (39.6, (30.0, 40.0)), (45.0, (30.0, 40.0)),
])  # fmt: skip
def test_a_file_as_long_as_the_clip_is_the_clip_and_a_longer_one_the_whole_video(tmp_path, seconds, stretch):
    write(tmp_path / "x.wav", seconds)
    outcome = adopt(job(tmp_path / "x.wav"))
    assert outcome.had, outcome
    assert (outcome.start_s, outcome.end_s) == stretch
    assert outcome.duration_s == pytest.approx(min(10.0, seconds if seconds < 30 else seconds - 30))
    assert outcome.bytes == (tmp_path / "x.wav").stat().st_size
    assert outcome.source == str(tmp_path / "x.wav")


def test_what_a_copy_lacks_is_a_reason(tmp_path):
    for name, seconds in (("short", 9.3), ("neither", 20.0), ("nearly", 39.3)):
        write(tmp_path / f"{name}.wav", seconds)
    (tmp_path / "cut.flac").write_bytes(flac(10.0)[:50_000])
    soundfile.write(tmp_path / "silent.wav", np.zeros(10 * RATE), RATE)
    (tmp_path / "page.wav").write_text("<html>not found</html>")
    (tmp_path / "empty.wav").touch()
    reasons = {
        "short.wav": "too-short", "neither.wav": "too-short", "nearly.wav": "too-short", "cut.flac": "corrupt",
        "silent.wav": "silent", "page.wav": "corrupt", "empty.wav": "empty", "gone.wav": "missing",
        "gone.tar#bytes=512+9": "missing",
    }  # fmt: skip
    for name, reason in reasons.items():
        outcome = adopt(job(tmp_path / name))
        assert (outcome.reason, outcome.had) == (reason, False), name
    assert "lasts 20.00 s: more than the clip of 10 s" in adopt(job(tmp_path / "neither.wav")).message
    assert adopt(job(tmp_path / "short.wav", short_s=1.0)).had
    assert adopt(job(tmp_path / "silent.wav", keep_silent=True)).had


def adopted(
    root: Path, clips: pa.Table, *dirs: Path, jobs: int = 1, timeout: float = 60.0
) -> tuple[pa.Table, list[str]]:
    """Adopt from folders into a new ledger: the manifest as it is then known, and what was said."""
    said: list[str] = []
    with Ledger(root / "ledger.sqlite", write=True) as ledger:
        options = SegmentOptions(from_dirs=dirs, jobs=jobs, offline=True, timeout=timeout)
        adopt_media(clips, ledger, root, options, root / "unfit.jsonl", Watch(say=said.append))
        return known(clips, ledger), said


def test_adopted_media_go_through_to_shards_from_wherever_they_stand(tmp_path):
    source = tmp_path / "copy"
    videos = [f"{n:011d}" for n in range(5)]
    truth = {}
    truth[videos[0]] = write(source / f"wav/Y{videos[0]}.wav", 10.0, 44100, seed=1)
    truth[videos[1]] = write(source / f"videos/A [{videos[1]}].flac", 50.0, 44100, seed=2)[
        30 * 44100 : 40 * 44100
    ]
    truth[videos[2]] = write(source / f"cut/{videos[2]}_30.000_40.000.flac", 10.02, 44100, seed=3)[
        : 10 * 44100
    ]
    for n in (3, 4):
        truth[videos[n]] = write(tmp_path / "scratch.flac", 10.0, 44100, seed=n)
        data = (tmp_path / "scratch.flac").read_bytes()
        if n == 3:
            make_tar(source / "bal_train00.tar", {f"audio/bal_train/{videos[n]}.flac": data})
        else:
            make_parquet(source / "00.parquet", {"x": None, videos[n]: data})
    manifest, said = adopted(tmp_path, wanted(*((video, 30.0, 40.0) for video in videos)), source)
    assert said == ["adopted 5 of 5 clips wanted, read where they stand"]
    out = tmp_path / "shards"
    made = make_shards("x", manifest, [], tmp_path, out, ShardSpec(format="hdf5", encoding="pcm16"))
    assert made["counts"]["written"] == 5
    import h5py

    with h5py.File(next(out.glob("*.h5"))) as file:
        for key, waveform in zip(file["audio_name"][:], file["waveform"][:], strict=True):
            assert np.array_equal(waveform, truth[key.decode()[:11]]), key
    # The copy moves away: the next shards say so, clip by clip.
    (source / "bal_train00.tar").rename(tmp_path / "moved.tar")
    (source / f"wav/Y{videos[0]}.wav").unlink()
    made = make_shards("x", manifest, [], tmp_path, tmp_path / "again", ShardSpec())
    assert made["counts"]["reasons"] == {"missing": 2}


def test_a_copy_that_is_unfit_is_told_and_left_to_be_fetched(tmp_path):
    source = tmp_path / "copy"
    write(source / f"{ID}.wav", 10.0)
    write(source / f"{OTHER}.wav", 3.0)
    write(source / f"b/{ID}.wav", 10.0)
    manifest, said = adopted(
        tmp_path, wanted((ID, 30.0, 40.0), (OTHER, 30.0, 40.0), ("absent-----", 0.0, 10.0)), source
    )
    assert manifest["key"].to_pylist() == [f"{ID}_30000"]
    assert said[0] == "1 clips have several sources; the first that is fit is taken"
    assert said[1] == "adopted 1 of 3 clips wanted, read where they stand"
    assert said[2] == f"  1 sources cannot be used (too-short 1): {tmp_path}/unfit.jsonl"
    row = tables.read_jsonl(tmp_path / "unfit.jsonl")[0]
    assert (row["key"], row["source"], row["reason"]) == (
        f"{OTHER}_30000",
        f"{source}/{OTHER}.wav",
        "too-short",
    )


def test_a_copy_that_is_unfit_gives_way_to_the_next(tmp_path):
    source = tmp_path / "copy"
    write(source / f"a/{ID}.wav", 3.0)
    write(source / f"b/{ID}.wav", 10.0)
    manifest, _ = adopted(tmp_path, wanted((ID, 30.0, 40.0)), source)
    assert manifest["source"].to_pylist() == [f"{source}/b/{ID}.wav"]


@pytest.mark.parametrize(
    ("name", "seconds", "stretch"),
    [
        (f"{ID}_30_40", 12.0, (None, 10.0)),  # cut at key frames: the clip, and some more
        (f"{ID}_30_40", 45.0, (None, 10.0)),
        (f"{ID}_30", 45.0, (None, 10.0)),
        (f"{ID}", 45.0, (30.0, 40.0)),  # nothing says that it was cut
    ],
)
def test_a_name_that_tells_the_start_says_where_in_the_file_the_clip_is(tmp_path, name, seconds, stretch):
    write(tmp_path / "copy" / f"{name}.wav", seconds)
    manifest, _ = adopted(tmp_path, wanted((ID, 30.0, 40.0)), tmp_path / "copy")
    row = manifest.to_pylist()[0]
    assert (row["start_s"], row["end_s"]) == stretch


def test_many_clips_are_adopted_in_batches_each_once(tmp_path):
    videos = [f"{n:011d}" for n in range(150)]
    sounds = {video: flac(0.3, seed=n, rate=RATE) for n, video in enumerate(videos)}
    (tmp_path / "copy").mkdir()
    make_parquet(tmp_path / "copy/0.parquet", sounds, group=40)
    manifest, _ = adopted(
        tmp_path, wanted(*((video, 1.0, 1.3) for video in videos)), tmp_path / "copy", jobs=2
    )
    rows = {row["group"]: row["source"] for row in manifest.to_pylist()}
    assert rows == {
        video: f"{tmp_path}/copy/0.parquet#row={n}&column=audio&bytes={len(sounds[video])}"
        for n, video in enumerate(videos)
    }


def test_a_whole_video_in_a_lossy_container_gives_its_stretch(tmp_path):
    wave = sound(20.0, 48000, seed=5)[None].astype(np.float32)
    (tmp_path / "x.webm").write_bytes(encode_media(wave, 48000, "webm", "libopus"))
    outcome = adopt(job(tmp_path / "x.webm", 8.0, 12.0))
    assert (outcome.start_s, outcome.end_s, outcome.duration_s) == (8.0, 12.0, pytest.approx(4.0, abs=0.002))


def test_what_another_fetch_had_is_taken_by_its_ledger_to_the_sample(tmp_path):
    # A file that holds more than the clip, as a cut does: only the ledger knows where in it the clip lies.
    wave = sound(12.0, RATE, seed=9)
    other = tmp_path / "second-machine/audioset"
    write_wave(other / "media/ab" / f"{ID}_30000.wav", wave)
    tables.write_json(other / "fetch.json", {"media_root": "/moved/since"})
    with Ledger(other / "ledger.sqlite", write=True) as ledger:
        ledger.record(Outcome(f"{ID}_30000", source=f"ab/{ID}_30000.wav", start_s=0.25, end_s=10.25), "train")
    write_wave(other / "media/ab" / f"{OTHER}_30000.wav", wave)  # in flight when that machine stopped
    for number, place in enumerate((other, other / "media", other.parent)):
        root = tmp_path / f"here-{number}"
        root.mkdir()
        manifest, said = adopted(root, wanted((ID, 30.0, 40.0), (OTHER, 30.0, 40.0)), place)
        row = manifest.to_pylist()[0]
        assert manifest.num_rows == 1
        assert (row["source"], row["start_s"], row["end_s"]) == (
            f"{other}/media/ab/{ID}_30000.wav", 0.25, 10.25,
        )  # fmt: skip
        assert said == ["adopted 1 of 2 clips wanted, read where they stand"]


def write_wave(path: Path, wave: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, RATE)


def test_a_fetch_whose_media_are_gone_gives_way_to_files(tmp_path):
    other = tmp_path / "copied"
    other.mkdir()
    tables.write_json(other / "fetch.json", {"media_root": "media"})
    with Ledger(other / "ledger.sqlite", write=True) as ledger:
        ledger.record(Outcome(f"{ID}_30000", source="ab/x.wav", start_s=0.25, end_s=10.25), "train")
    write(tmp_path / "files" / f"{ID}.wav", 10.0)
    manifest, _ = adopted(tmp_path, wanted((ID, 30.0, 40.0)), other, tmp_path / "files")
    assert manifest["source"].to_pylist() == [f"{tmp_path}/files/{ID}.wav"]


def test_a_parquet_file_that_was_packed_anew_is_noticed(tmp_path):
    sounds = {ID: flac(0.3, seed=1, rate=RATE), OTHER: flac(0.3, seed=2, rate=RATE)}
    assert len(sounds[ID]) != len(sounds[OTHER])
    (tmp_path / "copy").mkdir()
    path = tmp_path / "copy/0.parquet"
    make_parquet(path, sounds)
    manifest, _ = adopted(tmp_path, wanted((ID, 1.0, 1.3), (OTHER, 1.0, 1.3)), tmp_path / "copy")
    make_parquet(path, dict(reversed(sounds.items())))
    assert gone(tmp_path, manifest, 1) == sorted(manifest["key"].to_pylist())
    with (
        pytest.raises(DecodeError, match="fetch again with --recheck"),
        opened(tmp_path, manifest["source"][0].as_py()),
    ):
        pass


def test_a_source_that_hangs_its_worker_costs_itself_alone(tmp_path):
    source = tmp_path / "copy"
    for video in (ID, OTHER):
        write(source / f"{video}.wav", 10.0)
    os.mkfifo(source / "dead_______.wav")  # whoever opens it waits for good
    clips = wanted((ID, 30.0, 40.0), (OTHER, 30.0, 40.0), ("dead_______", 0.0, 10.0))
    manifest, said = adopted(tmp_path, clips, source, timeout=2.0)
    assert manifest.num_rows == 2
    assert "1 sources cannot be used (timeout 1)" in said[-1]

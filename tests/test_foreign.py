"""Shards that others made: where clips lie in HDF5, what a tar's headers say, and the index made of both."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import soundfile
import webdataset
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clipmill.audio import encode, prepare_bytes
from clipmill.audio.header import read_header
from clipmill.audio.media import encode_media
from clipmill.errors import ShardError
from clipmill.shards.foreign.described import Described, described
from clipmill.shards.foreign.indexing import Foreign, index_foreign
from clipmill.shards.foreign.tars import members
from clipmill.shards.formats import Hdf5Shard
from clipmill.shards.hdf5 import places
from clipmill.shards.read import Shards
from clipmill.stores.store import open_store
from conftest import sound

RATE = 8000


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPMILL_CACHE", str(tmp_path / "cache"))


def wave(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-3000, 3000, samples).astype("<i2")


def sounds(
    kind: str, samples: int, rate: int = RATE, channels: int = 1, subtype: str = "PCM_16", seed: int = 0
) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, sound(samples / rate, rate, channels, seed=seed), rate, subtype, format=kind)
    return buffer.getvalue()


def tar(path: Path, files: dict[str, bytes], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as out:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


def index(folder: Path, *names: str, **options) -> Foreign:
    store = open_store(str(folder))
    return index_foreign(
        store, list(names) or [name for name in store.names() if name.endswith((".tar", ".h5"))], **options
    )


def said_of(found: Foreign) -> str:
    """All of an index as text, in which nan is nan."""
    return json.dumps([found.index.table().to_pydict(), found.info, found.notes], sort_keys=True)


def column(found: Foreign, name: str) -> list:
    return found.index[name].to_pylist()


# Where clips lie in HDF5.


def read_by_places(path: Path) -> list[bytes] | None:
    with open(path, "rb") as file:
        found = places(file)
        return found and [os.pread(file.fileno(), length, offset) for offset, length in found]


@pytest.mark.parametrize("encoding", ["pcm16", "flac"])
@settings(max_examples=25, deadline=None)
@example([0, 1, 2, 3, 300_000, 0, 5, 2040, 2041, 2042])
@example([1] * 700)
@given(lengths=st.lists(st.one_of(st.integers(0, 40), st.integers(0, 5000)), max_size=300))
def test_in_our_hdf5_shards_every_place_holds_what_h5py_reads(tmp_path_factory, encoding, lengths):
    path = tmp_path_factory.mktemp("ours") / "x.h5"
    shard = Hdf5Shard(path, RATE, encoding, ())
    for number, length in enumerate(lengths):
        shard.add(str(number), Hdf5Shard.encoded(wave(length, number), RATE, encoding), {"labels": []})
    shard.close()
    with h5py.File(path) as file:
        expected = [clip.tobytes() for clip in file["waveform" if encoding == "pcm16" else "flac"]]
    assert (read_by_places(path) or []) == expected


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"chunks": (1, 50)},
        {"chunks": (7, 50)},
        {"chunks": (7, 80), "maxshape": (None, None)},
        {"chunks": (40, 64), "maxshape": (None, 64)},
    ],
    ids=str,
)
@pytest.mark.parametrize("version", ["earliest", "v110", "latest"])
def test_a_row_of_an_array_that_is_one_stretch_has_a_place(tmp_path, layout, version):
    waves = wave(23 * 50).reshape(23, 50)
    with h5py.File(tmp_path / "x.h5", "w", libver=(version, "latest")) as file:
        file.create_dataset("waveform", data=waves, **layout)
    assert read_by_places(tmp_path / "x.h5") == [row.tobytes() for row in waves]


@pytest.mark.parametrize(
    ("kind", "layout", "whole"),
    [
        ("<i2", {"compression": "gzip"}, {}),
        ("<i2", {"chunks": (3, 50), "shuffle": True}, {}),
        ("<i2", {"chunks": (3, 49)}, {}),
        ("<i2", {"external": [("raw.bin", 0, h5py.h5f.UNLIMITED)]}, {}),
        (">i2", {}, {}),
        ("f4", {}, {}),
        ("<i2", {}, {"userblock_size": 512}),
    ],
    ids=str,
)
def test_rows_that_are_no_stretch_of_samples_have_no_places(tmp_path, monkeypatch, kind, layout, whole):
    monkeypatch.chdir(tmp_path)
    with h5py.File("x.h5", "w", **whole) as file:
        file.create_dataset("waveform", data=wave(23 * 50).reshape(23, 50).astype(kind), **layout)
    assert read_by_places(Path("x.h5")) is None


def test_chunks_that_were_never_written_have_no_places(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("waveform", (20, 50), "<i2", chunks=(1, 50))[3] = 7
    assert read_by_places(tmp_path / "x.h5") is None


def test_lists_of_variable_length_need_no_chunks(tmp_path):
    clips = [wave(length, length) for length in (3, 0, 5000)]
    with h5py.File(tmp_path / "x.h5", "w") as file:
        lists = file.create_dataset("waveform", (3,), h5py.vlen_dtype(np.dtype("<i2")))
        for row, clip in enumerate(clips):
            lists[row] = clip
    assert read_by_places(tmp_path / "x.h5") == [clip.tobytes() for clip in clips]


def test_a_heap_that_is_not_what_it_should_be_gives_no_places(tmp_path):
    shard = Hdf5Shard(tmp_path / "x.h5", RATE, "pcm16", ())
    shard.add("a", wave(5000).tobytes(), {"labels": []})
    shard.close()
    whole = (tmp_path / "x.h5").read_bytes()
    assert whole.count(b"GCOL") == 2  # the clip's, and that of its facts
    (tmp_path / "x.h5").write_bytes(whole.replace(b"GCOL", b"LOCG", 1))
    assert read_by_places(tmp_path / "x.h5") is None


# What a tar's headers say.


def found_in(data: bytes) -> tuple[list[tuple[str, bytes]], str | None]:
    """Names and contents, and what was wrong."""
    found = []
    try:
        for member in members(io.BytesIO(data)):
            assert data[member.offset :][: len(member.head)] == member.head
            assert len(member.head) >= min(member.size, 512)
            found.append((member.name, data[member.offset : member.offset + member.size]))
    except tarfile.ReadError as error:
        return found, str(error)
    return found, None


def packed(files: list[tuple[str, bytes]], form: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as out:
        for kind, target in ((tarfile.DIRTYPE, ""), (tarfile.SYMTYPE, "x"), (tarfile.LNKTYPE, "y" * 90)):
            info = tarfile.TarInfo(f"no-file-{kind.decode()}")
            info.type, info.linkname = kind, target
            out.addfile(info)
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5  # which pax writes as a record, and ustar rounds
            out.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


NAMES = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1, max_size=60).filter(
    lambda s: not s.endswith("/")
)
FILES = st.lists(
    st.tuples(st.one_of(NAMES, NAMES.map(lambda s: f"{'folder/' * 20}{s}")), st.binary(max_size=1500)),
    max_size=6,
)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@settings(max_examples=60, deadline=None)
@given(files=FILES)
def test_what_tarfile_wrote_is_found_whatever_the_names(form, files):
    assert found_in(packed(files, form)) == (files, None)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_of_a_tar_cut_anywhere_what_stands_before_is_found_and_the_cut_is_told(form, data):
    files = [(f"{'long/' * 30}{number}.txt", bytes([65 + number]) * 700) for number in range(4)]
    whole = packed(files, form)
    ends = [whole.rindex(contents) + len(contents) for _, contents in files]
    cut = data.draw(st.integers(0, -(-ends[-1] // 512) * 512))
    found, wrong = found_in(whole[:cut])
    assert found == files[: sum(end <= cut for end in ends)]
    assert wrong


@settings(max_examples=100, deadline=None)
@given(
    at=st.integers(0, 6000),
    junk=st.one_of(
        st.binary(min_size=1, max_size=40),
        st.sampled_from([b"-1", b"\xff" * 12, b"0 =", b"9999999 size=1\n"]),
    ),
)
def test_whatever_bytes_a_tar_holds_it_is_read_to_an_end(at, junk):
    whole = packed([("a" * 200, b"1" * 600), ("b", b"2")], tarfile.PAX_FORMAT)
    found_in(whole[:at] + junk + whole[at + len(junk) :])


def test_members_of_more_than_8_gib_are_passed_over_in_both_formats(tmp_path):
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with open(tmp_path / "x.tar", "wb") as file:
            size = (8 << 30) + 5
            for name, length in (("big", size), ("small", 3)):
                info = tarfile.TarInfo(name)
                info.size = length
                file.write(info.tobuf(form))
                file.seek(-(-length // 512) * 512, os.SEEK_CUR)  # nothing is written: the file has a hole
            file.write(bytes(1024))
        with open(tmp_path / "x.tar", "rb") as file:
            assert [(one.name, one.size) for one in members(file)] == [("big", size), ("small", 3)]


# What a sound file's first bytes say.


@pytest.mark.parametrize(
    ("kind", "subtype", "channels", "plain"),
    [
        ("FLAC", "PCM_16", 1, "flac"),
        ("FLAC", "PCM_16", 2, None),
        ("FLAC", "PCM_24", 1, None),
        ("WAV", "PCM_16", 1, "pcm16"),
        ("WAVEX", "PCM_16", 1, "pcm16"),
        ("WAV", "PCM_16", 2, None),
        ("WAV", "PCM_24", 1, None),
        ("WAV", "FLOAT", 1, None),
    ],
)
def test_a_header_says_what_libsndfile_says(kind, subtype, channels, plain):
    data = sounds(kind, 1234, 11025, channels, subtype)
    header = read_header(data[:512], len(data))
    assert (header.rate, header.channels, header.frames, header.plain) == (11025, channels, 1234, plain)
    if plain == "pcm16":
        samples = soundfile.read(io.BytesIO(data), dtype="int16")[0]
        assert data[header.offset : header.offset + header.length] == samples.tobytes()


@pytest.mark.parametrize(("kind", "subtype"), [("WAV", "ULAW"), ("OGG", "VORBIS"), ("AIFF", "PCM_16")])
def test_what_no_header_says_is_left_to_decoding(kind, subtype):
    data = sounds(kind, 1234, RATE, 1, subtype)
    assert read_header(data[:512], len(data)) is None


def test_a_wav_that_is_cut_or_says_no_length_is_told_from_a_whole_one():
    data = encode(wave(1000), RATE, "pcm16")
    assert read_header(data[:512], len(data) - 2) is None
    streamed = data[:40] + b"\xff\xff\xff\xff" + data[44:]
    assert read_header(streamed[:512], len(data)).frames == 1000


@settings(deadline=None)
@given(
    start=st.sampled_from([b"", b"fLaC", b"RIFF\0\0\0\0WAVE", b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0"]),
    rest=st.binary(max_size=80),
)
def test_no_header_breaks_the_reader_of_headers(start, rest):
    read_header(start + rest, len(start + rest))


# What stands beside a clip.


@pytest.mark.parametrize(
    ("texts", "labels"),
    [
        ({"json": b'{"label": "dog", "labels": ["cat"]}'}, ("dog",)),
        ({"json": b'{"label": null, "tags": ["b", "a", "a", " "]}'}, ("a", "b")),
        ({"json": b'{"labels": []}', "cls": b"3"}, ()),
        ({"json": b'{"target": [3, 1]}'}, ("1", "3")),
        ({"json": b'{"text": "a dog barks"}'}, ("a dog barks",)),
        ({"json": b'{"name": "x"}', "cls": b"7\n", "txt": b"dog"}, ("7",)),
        ({"cls": b"dog"}, ("dog",)),
        ({"txt": "hund\nkatze ü\n".encode()}, ("hund", "katze ü")),
        ({"json": b'{"label": "\\ud800"}'}, ("?",)),
        ({}, ()),
    ],
    ids=str,
)
def test_labels_are_those_of_the_first_that_has_any(texts, labels):
    assert described(texts) == Described(labels)


def test_numbers_become_names_where_these_are_known():
    classes = ["dog", "cat"]
    assert described({"cls": b"1"}, classes).labels == ("cat",)
    assert described({"json": b'{"class": [0, 2]}'}, classes).labels == ("2", "dog")
    assert described({"json": b'{"label": "1"}'}, classes).labels == ("1",)


def test_fold_split_and_group_are_taken_where_they_are_valid_and_else_told():
    good = described({"json": b'{"fold": 3, "split": "Test", "group": 17}'})
    assert (good.fold, good.split, good.group, good.strange) == (3, "eval", "17", ())
    bad = described({"json": b'{"fold": "a", "split": "mine", "group": [], "label": {}}'})
    assert (bad.fold, bad.split, bad.group, bad.labels) == (None, "all", None, ())
    assert len(bad.strange) == 4
    assert described({"json": b"[1]"}).strange == described({"json": b"\xff"}).strange != ()


# The index.


def test_tars_of_the_webdataset_library_are_indexed_with_how_to_read_each_clip(tmp_path):
    clips = {
        "a/one": {"flac": encode(wave(2 * RATE), RATE, "flac"), "json": {"labels": ["dog"], "fold": 2, "split": "val", "group": "g"}},
        "a/two": {"cls": 1, "wav": encode(wave(RATE // 2, 1), RATE, "pcm16")},
        "b/three": {"flac": sounds("FLAC", 48_000, 48_000, 2), "txt": "dog"},
        "b/four": {"wav": sounds("WAV", 3 * RATE, RATE, 1, "FLOAT")},
    }  # fmt: skip
    with webdataset.TarWriter(str(tmp_path / "x-000.tar")) as out:
        for key, parts in clips.items():
            out.write({"__key__": key, **parts})
    found = index(tmp_path)
    assert column(found, "key") == list(clips)
    assert column(found, "codec") == ["flac", "pcm16", ".flac", ".wav"]
    assert column(found, "labels") == [["dog"], ["1"], ["dog"], []]
    assert column(found, "samples") == [2 * RATE, RATE, RATE, 3 * RATE]
    assert column(found, "duration_s") == [2.0, 0.5, 1.0, 3.0]
    assert column(found, "source_rate") == [RATE, RATE, 48_000, RATE]
    assert column(found, "source_channels") == [1, 1, 2, 1]
    assert [column(found, name)[0] for name in ("fold", "split", "group", "row")] == [2, "valid", "g", 0]
    data = (tmp_path / "x-000.tar").read_bytes()
    stretches = [
        data[a : a + n] for a, n in zip(column(found, "offset"), column(found, "length"), strict=True)
    ]
    assert stretches == [
        clips["a/one"]["flac"],
        wave(RATE // 2, 1).tobytes(),
        clips["b/three"]["flac"],
        clips["b/four"]["wav"],
    ]
    assert found.info["labels"] == ["1", "dog"]
    assert found.info["spec"]["sample_rate"] == RATE
    assert found.info["shards"] == [{"shard": "x-000.tar", "bytes": len(data), "written": 4}]
    assert any("1 of 4 clips are not at 8000 Hz" in note for note in found.notes)


def test_the_clips_of_others_are_read_like_our_own(tmp_path):
    files = {
        "a.flac": encode(wave(2 * RATE), RATE, "flac"),
        "b.wav": encode(wave(RATE, 1), RATE, "pcm16"),
        "c.flac": sounds("FLAC", 24_000, 16_000, 2),
        "d.ogg": sounds("OGG", 1000, RATE, 1, "VORBIS"),
        "e.mp3": encode_media(sound(1.3, 16_000)[None].astype(np.float32), 16_000, "mp3", "libmp3lame"),
        "f.flac": encode(wave(RATE + 123), RATE, "flac"),
        "g.wav": encode(wave(2 * RATE - 7, 1), RATE, "pcm16"),
    }
    tar(tmp_path / "x.tar", files)
    shards = Shards.open(tmp_path)
    assert shards.sample_rate == RATE
    for row, data in enumerate(files.values()):
        assert (shards.read(row) == prepare_bytes(data, RATE)).all()
    assert any("2 clips were decoded once" in note for note in shards.notes)


@pytest.mark.parametrize("layout", [{}, {"chunks": (1, RATE)}, {"compression": "gzip"}], ids=str)
@pytest.mark.parametrize("kind", ["i2", "f4"])
def test_hdf5_files_packed_as_panns_does_are_indexed_and_read(tmp_path, layout, kind):
    waves = wave(6 * RATE).reshape(6, RATE)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["audio_name"] = np.array([f"Y{number}.wav".encode() for number in range(6)], "S20")
        file.create_dataset(
            "waveform", data=waves if kind == "i2" else (waves / 32768).astype("f4"), **layout
        )
        file["target"] = np.eye(6, 4, dtype=bool)
        file.attrs["sample_rate"] = RATE
    shards = Shards.open(tmp_path)
    assert shards.index["key"].to_pylist() == [f"Y{number}" for number in range(6)]
    assert (shards.targets == np.eye(6, 4)).all()
    assert shards.labels == ["0", "1", "2", "3"]
    straight = kind == "i2" and "compression" not in layout
    assert set(shards.index["codec"].to_pylist()) == {"pcm16" if straight else "hdf5"}
    assert all((shards.read(row) == waves[row]).all() for row in range(6))
    assert shards.notes == []


def test_hdf5_without_a_rate_is_taken_for_panns_and_its_classes_may_have_names(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["waveform"] = wave(2 * 500).reshape(2, 500)
        file["target"] = np.array([[0, 1], [1, 1]])
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    found = index(tmp_path)
    assert found.info["spec"]["sample_rate"] == 32_000
    assert "32000 Hz, as PANNs' are" in found.notes[0]
    assert column(found, "samples") == [32_000, 32_000]
    assert column(found, "labels") == [["cat"], ["cat", "dog"]]
    assert found.info["labels"] == ["dog", "cat"]


def test_hdf5_at_another_rate_than_the_rest_is_refused(tmp_path):
    for name, rate in (("a", 8000), ("b", 16_000)):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["waveform"], file.attrs["sample_rate"] = wave(100).reshape(1, 100), rate
    with pytest.raises(ShardError, match=r"b\.h5: is at 16000 Hz, most clips are at 8000 Hz"):
        index(tmp_path)


@pytest.mark.parametrize(
    "spec", [{}, {"encoding": "pcm16"}, {"format": "hdf5"}, {"format": "hdf5", "encoding": "pcm16"}], ids=str
)
def test_our_own_shards_without_their_tables_are_found_again(make, tmp_path, spec):
    make(tmp_path, **spec)
    ours = Shards.open(tmp_path)
    table, expected = ours.index, [ours.read(row) for row in range(len(ours))]
    for beside in ("dataset.json", "index.parquet", "plan.parquet"):
        (tmp_path / beside).unlink()
    again = Shards.open(tmp_path)
    for name in ("key", "shard", "row", "samples", "labels", "split", "fold"):
        assert again.index[name].to_pylist() == table[name].to_pylist(), name
    assert again.labels == ours.labels
    assert all((again.read(row) == clip).all() for row, clip in enumerate(expected))
    assert set(again.index["codec"].to_pylist()) == {spec.get("encoding", "flac")}


def test_members_may_stand_in_any_order_and_what_is_no_clip_is_told(tmp_path):
    clip = encode(wave(RATE), RATE, "flac")
    files = {
        "./a.flac": clip, "./sub/b.c.flac": clip, "./._a.flac": b"junk", "./a.wav": clip, "./a.json": b'{"label": "dog"}',
        "./sub/b.txt": b"cat", "./c.json": b"{}", "./d.jpg": b"", "./bad.flac": b"fLaC and no more",
    }  # fmt: skip
    tar(tmp_path / "x.tar", files, tarfile.GNU_FORMAT)
    found = index(tmp_path)
    assert column(found, "key") == ["./a", "./sub/b"]
    assert column(found, "labels") == [["dog"], ["cat"]]
    said = "\n".join(found.notes)
    assert "x.tar: ./a.wav: more sounds of a key that has one are left out" in said
    assert "x.tar: ./c: samples have no sound" in said
    assert "1 clips are left out: corrupt" in said


def test_keys_that_shards_have_in_common_get_the_shards_names(tmp_path):
    for name in ("a", "b"):
        tar(tmp_path / f"{name}.tar", {"000.flac": encode(wave(RATE), RATE, "flac")})
    found = index(tmp_path)
    assert column(found, "key") == ["a/000", "b/000"]
    assert "as in a/000" in found.notes[-1]


def test_a_tar_cut_short_is_used_up_to_the_cut_and_named(tmp_path):
    path = tar(tmp_path / "x.tar", {f"{n}.wav": encode(wave(RATE, n), RATE, "pcm16") for n in range(5)})
    with open(path, "r+b") as file:
        file.truncate(50_000)
    found = index(tmp_path)
    assert column(found, "key") == ["0", "1"] + ["2"] * (50_000 >= 3 * (512 + 16_384))
    assert "x.tar: is damaged and was used up to there: is cut short: 2.wav has 16044 bytes" in found.notes[0]


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        (b"no tar at all, but a text\n" * 100, "is no tar: has no header of a member at byte 0"),
        (b"", "is no tar: ends at byte 0"),
        (b"\x1f\x8b" + bytes(600), "is compressed"),
        (bytes(10_240), "holds no sound: nothing"),
        (
            packed([("a.jpg", b"x"), ("b.jpg", b"x"), ("c.json", b"{}")], tarfile.PAX_FORMAT),
            "holds no sound: 2 .jpg, 1 .json",
        ),
    ],
    ids=["text", "empty", "gzip", "no members", "no sound"],
)
def test_what_gives_no_clip_is_an_error_alone_and_a_note_beside_others(tmp_path, contents, says):
    (tmp_path / "x.tar").write_bytes(contents)
    with pytest.raises(ShardError, match=r"x\.tar: ") as raised:
        index(tmp_path)
    assert says in str(raised.value)
    tar(tmp_path / "y.tar", {"a.flac": encode(wave(RATE), RATE, "flac")})
    found = index(tmp_path)
    assert found.index.num_rows == 1
    assert found.notes[0].startswith(f"{tmp_path / 'x.tar'}: left out: {says}")


@pytest.mark.parametrize("contents", [b"no HDF5", None])
def test_hdf5_files_without_audio_are_refused_with_what_they_hold(tmp_path, contents):
    if contents is None:
        with h5py.File(tmp_path / "x.h5", "w") as file:
            file["mel"] = [1.0]
    else:
        (tmp_path / "x.h5").write_bytes(contents)
    with pytest.raises(ShardError, match=r"x\.h5: .*" + ("HDF5" if contents else "holds mel")):
        index(tmp_path)


def test_conditions_on_what_is_not_known_keep_no_clip(tmp_path):
    tar(tmp_path / "x.tar", {"a.flac": encode(wave(RATE), RATE, "flac")})
    shards = Shards.open(tmp_path)
    for condition in (
        "silent < 0.9",
        "silent >= 0.9",
        "loudness_lufs > -70",
        "bandwidth_hz > 0",
        "start_s >= 0",
    ):
        with pytest.raises(ShardError, match="keeps none"):
            shards.where(condition)
    assert len(shards.where("duration_s == 1 and source_rate == 8000")) == 1


def test_captions_are_not_taken_for_classes(tmp_path):
    clip = encode(wave(4), RATE, "pcm16")
    files = {
        f"{n}.{kind}": data
        for n in range(1200)
        for kind, data in (("wav", clip), ("txt", f"sound {n}".encode()))
    }
    tar(tmp_path / "x.tar", files)
    found = index(tmp_path)
    assert found.info["labels"] == []
    assert column(found, "labels") == [[]] * 1200
    assert "1200 labels on 1200 clips" in found.notes[-1]


def test_an_index_is_kept_until_a_shard_changes_and_made_anew_where_it_was_damaged(tmp_path):
    def opened() -> tuple[Foreign, bool]:
        said: list[str] = []
        found = index(tmp_path, say=said.append)
        return found, bool(said)

    path = tar(tmp_path / "x.tar", {"a.flac": encode(wave(RATE), RATE, "flac"), "b.ogg": b"junk"})
    first, scanned = opened()
    assert scanned
    assert first.notes
    again, scanned = opened()
    assert not scanned
    assert said_of(again) == said_of(first)
    (kept,) = (tmp_path / "cache" / "indexes").glob("*.parquet")
    for file in (kept, kept.with_suffix(".json")):
        data = file.read_bytes()
        for damaged in (data[:100] + bytes([data[100] ^ 1]) + data[101:], b""):
            file.write_bytes(damaged)
            again, scanned = opened()
            assert scanned
            assert said_of(again) == said_of(first)
    tar(path, {"c.flac": encode(wave(RATE), RATE, "flac")})
    changed, scanned = opened()
    assert scanned
    assert column(changed, "key") == ["c"]
    assert changed.info["root_sha256"] != first.info["root_sha256"]


def test_a_cache_that_cannot_be_written_costs_a_note_alone(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("CLIPMILL_CACHE", str(tmp_path / "file" / "cache"))
    tar(tmp_path / "x.tar", {"a.flac": encode(wave(RATE), RATE, "flac")})
    assert "CLIPMILL_CACHE names another folder" in index(tmp_path).notes[-1]


def test_a_far_tar_gives_the_same_index_for_a_small_part_of_its_bytes(tmp_path):
    import fsspec

    files = {f"{n:02}.{kind}": data for n in range(20) for kind, data in (("wav", encode(wave(20 * RATE, n), RATE, "pcm16")), ("json", json.dumps({"label": n}).encode()))}  # fmt: skip
    data = tar(tmp_path / "x.tar", files).read_bytes()
    fsspec.filesystem("memory").pipe("/foreign/x.tar", data)
    store = open_store("memory://foreign")
    asked: list[int] = []
    fetch = store.fetch
    store.fetch = lambda wanted: asked.extend(length for _, _, length in wanted) or fetch(wanted)  # type: ignore[method-assign]
    far, near = index_foreign(store, ["x.tar"]), index(tmp_path)
    assert repr(far.index.table().to_pydict()) == repr(near.index.table().to_pydict())
    assert far.info["labels"] == [str(n) for n in range(20)]
    assert far.info["root_sha256"] == near.info["root_sha256"]
    assert len(asked) <= 22
    assert sum(asked) < len(data) / 50


def test_a_shard_that_is_not_there_is_said_so(tmp_path):
    with pytest.raises(ShardError, match=r"none\.tar: is not there"):
        index(tmp_path, "none.tar")

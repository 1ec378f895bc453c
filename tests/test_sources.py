"""Sources: a clip is read from a file or from inside an archive, by every decoder, and a change is noticed."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from clipmill import sources, tables
from clipmill.audio import DECODERS, prepare_clip, prepare_file
from clipmill.audio.duration import stated_s
from clipmill.audio.media import encode_media
from clipmill.errors import DecodeError
from clipmill.run import Local
from clipmill.shards.job import make_shards
from clipmill.shards.plan import ShardSpec
from clipmill.sources import in_place_order, is_there, opened, row_parts, tar_part
from conftest import sound

RATE = 44100


def flac(seconds: float = 1.0, seed: int = 0, rate: int = RATE) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, sound(seconds, rate, seed=seed), rate, "PCM_16", format="FLAC")
    return buffer.getvalue()


def make_tar(path: Path, members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> dict[str, str]:
    """A tar of these members; the source of each."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with tarfile.open(path) as tar:
        return {m.name: tar_part(str(path), m.offset_data, m.size) for m in tar}


AUDIO = {
    "struct": pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    "binary": pa.binary(),
    "large": pa.large_binary(),
}


def make_parquet(
    path: Path, clips: dict[str, bytes | None], kind: str = "struct", group: int = 3
) -> list[str]:
    """A Parquet file of video_id and audio, `group` rows in a row group; the source of each row."""
    struct = kind == "struct"
    audio = [{"bytes": data, "path": f"{name}.flac"} if struct else data for name, data in clips.items()]
    table = pa.table(
        {"video_id": list(clips), "audio": pa.array(audio, AUDIO[kind]), "labels": [["a"]] * len(clips)}
    )
    pq.write_table(table, path, row_group_size=group)
    return row_parts(str(path), pa.array(range(len(clips))), "audio").to_pylist()


def contents(source: str, root: Path = Path("/")) -> bytes:
    with opened(root, source) as path:
        return path.read_bytes()


def test_a_file_is_its_own_path_relative_or_absolute_there_or_not(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"1234")
    for source in ("a.wav", str(tmp_path / "a.wav")):
        with opened(tmp_path, source) as path:
            assert path == tmp_path / "a.wav"
        assert is_there(tmp_path, source, 4)
        assert not is_there(tmp_path, source, 5)
    with opened(tmp_path, "gone.wav") as path:
        assert path == tmp_path / "gone.wav"
    assert not is_there(tmp_path, "gone.wav", None)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_a_tar_are_read_from_where_they_stand(tmp_path, form):
    clips = {"audio/-a.flac": b"one", "audio/empty.flac": b"", f"{'deep/' * 30}é.flac": bytes(range(256)) * 9}
    if form == tarfile.USTAR_FORMAT:
        clips = {name: data for name, data in clips.items() if len(name) < 100}
    parts = make_tar(tmp_path / "a b.tar", clips, form)
    for name, data in clips.items():
        assert contents(parts[name]) == data
        assert is_there(tmp_path, parts[name], len(data))
    relative = parts["audio/-a.flac"].removeprefix(f"{tmp_path}/")
    assert contents(relative, tmp_path) == b"one"


@pytest.mark.parametrize("kind", AUDIO)
def test_rows_of_a_parquet_file_are_read_in_any_order(tmp_path, kind):
    clips = {f"id{n}": bytes([n]) * (100 + n) for n in range(10)}
    parts = make_parquet(tmp_path / "0.parquet", clips, kind)
    for n in (9, 0, 4, 3, 3, 8, 1):
        assert contents(parts[n]) == clips[f"id{n}"]
        assert is_there(tmp_path, parts[n], 100 + n)
    assert not is_there(tmp_path, parts[9].replace("row=9", "row=10"), None)
    (tmp_path / "0.parquet").write_bytes(b"something else")
    assert not is_there(tmp_path, parts[0], None)


def test_row_groups_kept_stay_below_the_bound_and_the_last_is_always_kept(tmp_path, monkeypatch):
    clips = {f"id{n}": bytes([n]) * 1000 for n in range(12)}
    parts = make_parquet(tmp_path / "0.parquet", clips)
    for bound, most in ((7000, 2), (10, 1)):
        monkeypatch.setattr(sources, "_CACHE_BYTES", bound)
        sources._groups.clear()
        for part, data in zip(parts, clips.values(), strict=True):
            assert contents(part) == data
            assert len(sources._groups) <= most
    assert len(sources._groups) == 1


def test_a_file_whose_name_looks_like_a_part_is_that_file(tmp_path):
    parts = make_tar(tmp_path / "a.tar", {"x.flac": b"member"})
    (tmp_path / Path(parts["x.flac"]).name).write_bytes(b"the file itself")
    assert contents(parts["x.flac"]) == b"the file itself"
    for name in ("a.tar#bytes=12+.flac", "a#row=1", "take #3.flac", "a.tar#bytes=1+2&x"):
        with opened(tmp_path, name) as path:
            assert path == tmp_path / name


def test_an_archive_whose_own_name_holds_a_number_sign_is_read(tmp_path):
    clips = {"x": b"1", "y": b"22"}
    parts = make_parquet(tmp_path / "a#row=1&column=b#.parquet", clips)
    assert contents(parts[1]) == b"22"


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("form", ["flac", "webm", "m4a"])
def test_every_decoder_reads_a_part_as_it_reads_the_file(tmp_path, decoder, form):
    wave = sound(2.0, 48000, seed=3)[None].astype(np.float32)
    data = (
        flac(2.0)
        if form == "flac"
        else encode_media(
            wave, 48000, {"webm": "webm", "m4a": "mp4"}[form], {"webm": "libopus", "m4a": "aac"}[form]
        )
    )
    file = tmp_path / f"x.{form}"
    file.write_bytes(data)
    parts = [
        make_tar(tmp_path / "a.tar", {file.name: data})[file.name],
        make_parquet(tmp_path / "a.parquet", {"x": data})[0],
    ]
    for start_s, end_s in ((None, None), (0.5, 1.5)):
        plain = prepare_clip(file, RATE, start_s, end_s, decoder)
        for part in parts:
            with opened(tmp_path, part) as path:
                assert stated_s(path) == stated_s(file)
                found = prepare_clip(path, RATE, start_s, end_s, decoder)
            assert np.array_equal(found.samples, plain.samples)
            assert found.duration_s == plain.duration_s


@pytest.mark.parametrize("decoder", DECODERS)
def test_what_is_said_of_a_damaged_part_names_the_part_and_is_the_same_each_time(tmp_path, decoder):
    part = make_tar(tmp_path / "a.tar", {"x.flac": b"no sound at all " * 40})["x.flac"]
    said, held = set(), []
    for _ in range(3):
        held.append(os.open(os.devnull, os.O_RDONLY))  # so that the part gets another descriptor each time
        with pytest.raises(DecodeError) as caught, opened(tmp_path, part) as path:
            prepare_clip(path, RATE, decoder=decoder)
        said.add(str(caught.value))
        assert caught.value.reason == "corrupt"
    assert len(said) == 1
    assert "/proc/" not in said.pop()
    for descriptor in held:
        os.close(descriptor)


def test_the_path_in_memory_never_gets_into_a_message(tmp_path):
    part = make_tar(tmp_path / "a.tar", {"x.flac": b"one"})["x.flac"]
    with pytest.raises(DecodeError) as caught, opened(tmp_path, part) as path:
        raise DecodeError("corrupt", f"{path}: does not decode")
    assert (caught.value.reason, str(caught.value)) == ("corrupt", f"{part}: does not decode")


def test_nothing_stays_open_whatever_happens(tmp_path):
    part = make_tar(tmp_path / "a.tar", {"x.flac": b"one"})["x.flac"]
    before = os.listdir("/proc/self/fd")
    contents(part)
    with pytest.raises(KeyError), opened(tmp_path, part):
        raise KeyError
    with pytest.raises(DecodeError), opened(tmp_path, part.replace("a.tar", "b.tar")):
        pass
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_an_archive_that_is_gone_is_missing(tmp_path):
    for part in ("gone.tar#bytes=512+10", "gone.parquet#row=0&column=audio"):
        with pytest.raises(DecodeError, match=r"gone\.\w+: no such file") as caught:
            contents(part, tmp_path)
        assert caught.value.reason == "missing"
        assert not is_there(tmp_path, part, None)


def unreadable(part: str, match: str) -> None:
    with pytest.raises(DecodeError, match=match) as caught:
        contents(part)
    assert caught.value.reason == "unreadable"


def test_a_tar_that_was_cut_short_or_replaced_is_unreadable(tmp_path):
    path = tmp_path / "a.tar"
    part = make_tar(path, {"x.flac": bytes(5000)})["x.flac"]
    os.truncate(path, 3000)
    unreadable(part, "5000 bytes from byte 512 wanted, 2488 there.*changed since.*--from")
    os.truncate(path, 100)
    unreadable(part, "no member of 5000 bytes at byte 512")
    make_tar(path, {"y.flac": bytes(4999)})
    unreadable(part, "no member of 5000 bytes at byte 512.*changed since.*--from")
    path.write_bytes(os.urandom(9000))
    unreadable(part, "no member of 5000 bytes")
    path.unlink()
    path.mkdir()
    unreadable(part, "directory")


def test_a_parquet_file_that_was_replaced_is_unreadable(tmp_path):
    path = tmp_path / "0.parquet"
    part = make_parquet(path, {f"id{n}": b"sound" for n in range(7)})[6]
    assert contents(part) == b"sound"
    make_parquet(path, {"id0": b"sound"})
    unreadable(part, "row 6 wanted, 1 there.*changed since")
    pq.write_table(pa.table({"other": list(range(7))}), path)
    unreadable(part, "audio")
    pq.write_table(pa.table({"audio": list(range(7))}), path)
    unreadable(part, "holds int64; bytes are needed")
    pq.write_table(pa.table({"audio": [{"path": "x"}] * 7}), path)
    unreadable(part, "cannot be read as Parquet")
    path.write_bytes(b"PAR1" + os.urandom(500) + b"PAR1")
    unreadable(part, "cannot be read as Parquet")


def test_a_row_without_bytes_is_missing(tmp_path):
    for kind in AUDIO:
        part = make_parquet(tmp_path / "0.parquet", {"a": b"1", "b": None}, kind)[1]
        with pytest.raises(DecodeError, match="row 1 holds no bytes in column 'audio'") as caught:
            contents(part)
        assert caught.value.reason == "missing"


def test_sources_sort_by_their_place_in_the_archive():
    rows = [
        "b.tar#bytes=9+1",
        "a#row=10&column=x",
        "c.wav",
        "a#row=2&column=x",
        "b.tar#bytes=1000+1",
        "a#row=1&column=x",
    ]
    order = in_place_order(pa.chunked_array([rows[:2], rows[2:]])).to_pylist()
    assert [rows[n] for n in order] == [rows[5], rows[3], rows[1], rows[0], rows[4], rows[2]]


def test_shards_of_parts_hold_what_shards_of_the_files_hold(tmp_path):
    clips = {f"clip-{n}": flac(0.5 + 0.3 * n, seed=n) for n in range(6)}
    tar = make_tar(tmp_path / "a.tar", {f"audio/{name}.flac": data for name, data in clips.items()})
    rows = make_parquet(tmp_path / "a.parquet", clips, group=2)
    for name, data in clips.items():
        (tmp_path / f"{name}.flac").write_bytes(data)
    kinds = {
        "file": [f"{name}.flac" for name in clips],
        "tar": [tar[f"audio/{name}.flac"] for name in clips],
        "parquet": rows,
    }
    digests = {}
    for kind, places in kinds.items():
        manifest = tables.manifest_table(
            {"key": list(clips), "source": places, "labels": [["a"]] * len(clips)}
        )
        made = make_shards(
            "x", manifest, [], tmp_path, tmp_path / kind, ShardSpec(clips_per_shard=4), engine=Local(2)
        )
        assert made["counts"] == {"in": 6, "written": 6, "failed": 0, "skipped": 0, "reasons": {}}
        index = tables.read_table(tmp_path / kind / "index.parquet", tables.INDEX)
        digests[kind] = dict(zip(index["key"].to_pylist(), index["sha256"].to_pylist(), strict=True))
    assert digests["file"] == digests["tar"] == digests["parquet"]


def test_a_part_that_vanished_is_a_row_of_the_account(tmp_path):
    clips = {f"clip-{n}": flac(seed=n) for n in range(3)}
    parts = make_tar(tmp_path / "a.tar", {f"{name}.flac": data for name, data in clips.items()})
    rows = make_parquet(tmp_path / "a.parquet", clips)
    source = [parts["clip-0.flac"], parts["clip-1.flac"].replace("a.tar", "b.tar"), rows[2]]
    manifest = tables.manifest_table({"key": list(clips), "source": source, "labels": [["a"]] * 3})
    (tmp_path / "a.parquet").unlink()
    made = make_shards("x", manifest, [], tmp_path, tmp_path / "out", ShardSpec())
    assert made["counts"]["reasons"] == {"missing": 2}
    failures = tables.read_jsonl(tmp_path / "out" / "failures.jsonl")
    assert [row["message"] for row in failures] == [
        f"{tmp_path}/b.tar: no such file",
        f"{tmp_path}/a.parquet: no such file",
    ]


def test_sources_are_cheap_to_import():
    code = "import sys, clipmill.sources; assert not {'pyarrow', 'numpy', 'soundfile'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_stream_without_a_stated_length_is_measured_by_its_packets(tmp_path):
    whole = encode_media(sound(3.0, 48000)[None].astype(np.float32), 48000, "webm", "libopus")
    path = tmp_path / "x.webm"
    path.write_bytes(whole)
    stated = stated_s(path)
    # The element Duration (0x4489, 8 bytes long) becomes a Void element, as in a WebM that was written to a pipe.
    place = whole.index(b"\x44\x89\x88")
    path.write_bytes(whole[:place] + b"\xec\x89" + bytes(9) + whole[place + 11 :])
    assert stated_s(path) == pytest.approx(stated, abs=0.03)
    assert stated == pytest.approx(3.0, abs=0.03)
    assert len(prepare_file(path, RATE)) >= 3 * RATE


def test_what_is_no_sound_has_no_length(tmp_path):
    path = tmp_path / "x.wav"
    path.write_bytes(b"RIFF junk")
    assert stated_s(path) is None
    assert stated_s(tmp_path / "gone.wav") is None

"""`--access stream`: tars read from front to back, dealt out to ranks and threads, shuffled, and never running dry."""

from __future__ import annotations

import io
import json
import os
import struct
import threading
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset import TarWriter

from clipmill.errors import ConfigError, ShardError
from clipmill.loader import streaming
from clipmill.loader.batches import Batch, Digest
from clipmill.loader.damage import Bad
from clipmill.loader.streaming import StreamLoader
from clipmill.shards.convert import convert
from clipmill.shards.read import Shards
from clipmill.stores.store import ReadFailure, open_store
from conftest import sound
from misbehaving import Body, Misbehaving, Status
from test_train import RATE, shards_of


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPMILL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def easy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty clips of 1 and 2 s in four shards."""
    return shards_of(tmp_path_factory.mktemp("easy"), 40)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Twenty-four clips in three shards that a test may damage: 10, 10 and 4."""
    return shards_of(tmp_path / "own", 24)


def rows_of(batches: Iterable[Batch]) -> list[int]:
    return [row for batch in batches for row in batch.rows.tolist()]


def digests(shards: Shards, steps: int, start: int = 0, **options) -> list[Digest]:
    seen: list[tuple[int, Digest]] = []
    loader = StreamLoader(shards, 4, watch=lambda *one: seen.append(one), **options)
    list(loader.batches(start, start + steps))
    assert [step for step, _ in seen] == list(range(start, start + steps))
    return [digest for _, digest in seen]


def check_samples(shards: Shards, batches: Iterable[Batch]) -> None:
    for batch in batches:
        assert (batch.targets.numpy() == shards.targets_of(batch.rows.numpy())).all()
        for wave, length, row in zip(
            batch.waves.numpy(), batch.lengths.tolist(), batch.rows.tolist(), strict=True
        ):
            whole = shards.read(row)
            assert (wave[:length] == whole).all()
            assert length == len(whole)
            assert not wave[length:].any()
        assert batch.waves.shape[1] == batch.lengths.max()


def loader_threads() -> int:
    return sum(thread.name.startswith("clipmill-loader") for thread in threading.enumerate())


def open_in(folder: Path) -> int:
    links = [Path("/proc/self/fd", number) for number in os.listdir("/proc/self/fd")]
    return sum(str(link.resolve()).startswith(str(folder)) for link in links if link.exists())


# What a stream gives


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_gives_the_samples_lengths_and_classes_that_random_access_gives(easy, workers):
    shards = Shards.open(easy)
    loader = StreamLoader(shards, 8, workers=workers)
    assert len(loader) == 5
    batches = list(loader.batches(0, 5))
    check_samples(shards, batches)
    assert len({batch.waves.shape[1] for batch in batches} | {RATE, 2 * RATE}) == 2


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**63), st.integers(0, 6), st.integers(0, 60), st.sampled_from([1, 2, 5, 7]))
def test_every_clip_comes_once_in_each_pass_for_any_seed_threads_and_buffer(
    easy, seed, workers, buffer, size
):
    shards = Shards.open(easy)
    loader = StreamLoader(shards, size, seed=seed, workers=workers, buffer=buffer)
    rows = rows_of(loader.batches(0, -(-80 // size)))
    assert sorted(rows[:40]) == sorted(rows[40:80]) == list(range(40))


def test_clips_that_were_not_chosen_never_come(easy):
    shards = Shards.open(easy)
    chosen = np.random.default_rng(0).permutation(40)[:13]
    some = shards.take(chosen)
    batches = list(StreamLoader(some, 1, workers=2).batches(0, 26))
    assert Counter(rows_of(batches)) == dict.fromkeys(range(13), 2)
    check_samples(some, batches)


def test_shards_without_a_chosen_clip_are_not_opened(own):
    shards = Shards.open(own)
    kept = np.flatnonzero(shards.columns["shard"].to_numpy() != shards.files[1])
    (own / shards.files[1]).unlink()
    assert sorted(rows_of(StreamLoader(shards.take(kept), 1).batches(0, 14))) == list(range(14))


def test_clips_are_shuffled_across_shards_and_anew_in_each_pass(easy):
    shards = Shards.open(easy)
    rows = rows_of(StreamLoader(shards, 8).batches(0, 10))
    assert rows[:40] != rows[40:]
    assert len({row // 10 for row in rows[:8]}) > 1
    assert rows != rows_of(StreamLoader(shards, 8, seed=1).batches(0, 10))


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_runs_with_the_same_arguments_see_the_same_batches(easy, workers):
    shards = Shards.open(easy)
    first = digests(shards, 25, workers=workers)
    assert first == digests(Shards.open(easy), 25, workers=workers)
    assert (first == digests(shards, 25)) == (workers < 2)


def test_a_run_begun_later_has_its_pass_anew_in_another_order(easy):
    shards = Shards.open(easy)
    whole = rows_of(StreamLoader(shards, 8).batches(0, 10))
    resumed = rows_of(StreamLoader(shards, 8).batches(7, 12))
    assert sorted(resumed) == list(range(40))
    assert resumed != whole[40:]
    unshuffled = StreamLoader(shards, 10, buffer=1)
    assert len({tuple(rows_of(unshuffled.batches(step, step + 4))) for step in (4, 5, 6, 7)}) > 1


def test_a_stream_without_a_last_step_does_not_end(easy):
    assert len(list(islice(StreamLoader(Shards.open(easy), 8, workers=2).batches(), 30))) == 30


def test_several_sets_are_streamed_together(easy, own):
    both = Shards.open([easy, own])
    batches = list(StreamLoader(both, 16, workers=2).batches(0, 4))
    assert sorted(rows_of(batches)) == list(range(64))
    check_samples(both, batches)


def test_raw_samples_are_streamed_too(easy, tmp_path):
    convert(easy, tmp_path / "raw", "webdataset", "pcm16")
    shards = Shards.open(tmp_path / "raw")
    check_samples(shards, StreamLoader(shards, 8).batches(0, 5))


# Ranks


@pytest.mark.parametrize("workers", [0, 2])
def test_two_ranks_have_different_shards_and_share_a_pass_evenly(easy, workers):
    shards = Shards.open(easy)
    parts = [
        list(StreamLoader(shards, 8, workers=workers, rank=rank, ranks=2).batches(0, 10)) for rank in (0, 1)
    ]
    assert {len(batch.rows) for part in parts for batch in part} == {4}
    first, second = (rows_of(part) for part in parts)
    for start in (0, 20):
        one, other = set(first[start : start + 20]), set(second[start : start + 20])
        assert sorted(one | other) == list(range(40))
        assert not {row // 10 for row in one} & {row // 10 for row in other}


@pytest.mark.parametrize("workers", [0, 1])
def test_three_shards_dealt_to_two_ranks_give_every_clip_twice_in_two_passes(tmp_path, workers):
    shards = Shards.open(shards_of(tmp_path, 30))
    options = {"workers": workers, "ranks": 2}
    parts = [StreamLoader(shards, 12, rank=rank, **options).batches(0, 5) for rank in (0, 1)]
    both = [rows_of(part) for part in parts]
    assert [len(rows) for rows in both] == [30, 30]
    assert Counter(both[0] + both[1]) == dict.fromkeys(range(30), 2)


def test_fewer_shards_than_ranks_are_refused_with_their_number(easy):
    shards = Shards.open(easy)
    with pytest.raises(
        ConfigError, match=r"4 shards hold the clips to read, and there are 5 ranks.*--access random"
    ):
        StreamLoader(shards, 10, rank=0, ranks=5)
    with pytest.raises(ConfigError, match="1 shards"):
        StreamLoader(shards.take(range(10)), 10, rank=0, ranks=2)
    with pytest.raises(ConfigError, match="--batch-size 9 cannot be shared"):
        StreamLoader(shards, 9, rank=0, ranks=2)
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        StreamLoader(shards, 8, rank=2, ranks=2)


def test_hdf5_is_refused_with_what_reads_it(easy, tmp_path):
    convert(easy, tmp_path / "h5", "hdf5")
    with pytest.raises(ConfigError, match=r"\.h5: --access stream reads tars alone; `--access random`"):
        StreamLoader(Shards.open(tmp_path / "h5"), 4)


# Tars that others made


def encoded(kind: str, seconds: float, rate: int, channels: int = 1, seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, sound(seconds, rate, channels, seed=seed), rate, format=kind)
    return buffer.getvalue()


def remarked(wav: bytes, size: int) -> bytes:
    """The same WAV with so many bytes of remarks before its samples, as many programs write."""
    chunk = b"LIST" + struct.pack("<I", size) + bytes(size)
    return b"RIFF" + struct.pack("<I", len(wav) - 8 + len(chunk)) + wav[8:36] + chunk + wav[36:]


def test_tars_of_others_are_streamed_whatever_they_hold_and_however_their_keys_repeat(tmp_path):
    wav = encoded("WAV", 1, RATE)
    contents = [
        {"wav": wav}, {"wav": remarked(wav, 100)}, {"wav": remarked(wav, 700)}, {"wav": encoded("WAV", 1.3, RATE)},
        {"flac": encoded("FLAC", 2, RATE)},
        {"flac": encoded("FLAC", 0.4, RATE)}, {"flac": encoded("FLAC", 1.3, 22050, 2), "wav": wav}, {"txt": b"no sound"},
        {"sub.WAV": encoded("WAV", 1, RATE, 2)}, {"ogg": encoded("OGG", 0.7, RATE)},
    ]  # fmt: skip
    for shard in range(2):
        with TarWriter(str(tmp_path / f"theirs-{shard}.tar")) as out:
            for number, members in enumerate(contents):
                out.write(
                    {
                        "__key__": f"part/{number:04d}",
                        **members,
                        "json": json.dumps({"label": f"c{number}"}).encode(),
                    }
                )
    shards = Shards.open(tmp_path)
    assert len(shards) == 18
    assert set(shards.columns["codec"].to_pylist()) == {"pcm16", "flac", ".wav", ".flac", ".ogg"}
    batches = list(StreamLoader(shards, 6, workers=1).batches(0, 3))
    assert sorted(rows_of(batches)) == list(range(18))
    check_samples(shards, batches)


# Damage


def told_by(shards: Shards, steps: int, size: int = 1, **options) -> tuple[list[int], list[Bad]]:
    told: list[Bad] = []
    loader = StreamLoader(shards, size, tell=told.append, **{"max_bad": 0.9, **options})
    batches = list(loader.batches(0, steps))
    assert {len(batch.rows) for batch in batches} == {size}
    check_samples(shards, batches)
    assert {(bad.shard, bad.key) for bad in told} == {(bad.shard, bad.key) for bad in loader.damage.found}
    return rows_of(batches), told


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("harm", ["cut", "cut between members", "garbage"])
def test_a_damaged_tar_gives_what_stands_before_and_each_clip_after_counts_as_bad(own, harm, workers):
    shards = Shards.open(own)
    path = own / shards.files[0]
    clip = next(row for row in range(24) if shards.columns["shard"][row].as_py() == path.name and
                shards.columns["row"][row].as_py() == 6)  # fmt: skip
    offset = shards.columns["offset"][clip].as_py()
    data = bytearray(path.read_bytes())
    if harm == "garbage":
        data[offset - 512 : offset + 5000] = np.random.default_rng(0).bytes(5512)
    else:
        del data[offset - 512 if harm == "cut between members" else offset + 700 :]
    path.write_bytes(data)
    lost = {
        row for row in range(24) if shards.columns["shard"][row].as_py() == path.name and
        shards.columns["row"][row].as_py() >= 6
    }  # fmt: skip
    rows, told = told_by(shards, 20 + 20, workers=workers)
    assert sorted(rows[:20]) == sorted(rows[20:]) == sorted(set(range(24)) - lost)
    keys = set(shards.keys_of(np.array(sorted(lost))))
    assert {bad.key for bad in told} == keys
    assert {(bad.shard, bad.reason) for bad in told} == {(str(path), "corrupt")}
    assert all("@" not in bad.message and "its shard" in bad.message for bad in told)


def test_clips_that_were_not_chosen_do_not_count_as_bad(own):
    shards = Shards.open(own)
    kept = np.flatnonzero(shards.columns["row"].to_numpy() < 3)
    for name in shards.files:
        path = own / name
        inside = shards.columns["shard"].to_numpy() == name
        fourth = np.flatnonzero(inside & (shards.columns["row"].to_numpy() == 3))[0]
        os.truncate(path, shards.columns["offset"][int(fourth)].as_py())
    rows, told = told_by(shards.take(kept), 9)
    assert sorted(rows) == list(range(9))
    assert not told


@pytest.mark.parametrize("workers", [0, 2])
def test_a_clip_that_does_not_decode_is_told_and_the_batch_is_filled_up(own, workers):
    shards = Shards.open(own)
    offset, length = (shards.columns[name][5].as_py() for name in ("offset", "length"))
    path = own / shards.columns["shard"][5].as_py()
    data = bytearray(path.read_bytes())
    data[offset + length // 2] ^= 0x10
    path.write_bytes(data)
    rows, told = told_by(shards, 23, size=4, workers=workers)
    assert 5 not in rows
    assert set(rows) == set(range(24)) - {5}
    assert {bad.key for bad in told} == set(shards.keys_of(np.array([5])))
    assert told[0].reason == "corrupt"


def test_a_shard_that_is_gone_counts_with_all_its_clips_and_the_others_come(own):
    shards = Shards.open(own)
    gone = shards.files[1]
    (own / gone).unlink()
    rows, told = told_by(shards, 28)
    there = np.flatnonzero(shards.columns["shard"].to_numpy() != gone)
    assert sorted(rows) == sorted([*there, *there])
    assert Counter(bad.reason for bad in told) == {"missing": 20}
    assert len({bad.key for bad in told}) == 10


def test_a_file_that_is_no_tar_is_told_and_does_not_end_the_stream(own):
    shards = Shards.open(own)
    for number, contents in enumerate((b"\x1f\x8b\x08" + bytes(range(256)) * 80, b"")):
        (own / shards.files[number]).write_bytes(contents)
    _, told = told_by(shards, 12)
    assert len({bad.key for bad in told}) == 20
    assert {bad.reason for bad in told} == {"corrupt"}


@pytest.mark.parametrize("workers", [0, 2])
def test_too_much_damage_ends_the_stream_with_an_error_and_no_thread_left(own, workers):
    shards = Shards.open(own)
    (own / shards.files[0]).unlink()
    with pytest.raises(ShardError, match=r"clips cannot be read, more than --max-bad 0\.01 allows"):
        list(StreamLoader(shards, 4, workers=workers).batches(0, 100))
    assert not loader_threads()


@pytest.mark.parametrize("harm", ["gone", "not decoding"])
def test_a_stream_of_which_nothing_can_be_read_ends_whatever_is_allowed(own, harm):
    shards = Shards.open(own)
    if harm == "gone":
        for name in shards.files:
            (own / name).unlink()
    else:
        for shard, offset in zip(
            *(shards.columns[name].to_pylist() for name in ("shard", "offset")), strict=True
        ):
            with open(own / shard, "r+b") as file:
                file.seek(offset)
                file.write(bytes(60))
    with pytest.raises(ShardError, match="none of the 24 clips can be read; the first"):
        list(StreamLoader(shards, 4, max_bad=1.0).batches(0, 1000))


# Far stores


def serve(server: Misbehaving, folder: Path) -> None:
    for path in folder.iterdir():
        server.behave(path.name, Body(path.read_bytes(), "application/octet-stream"))


def test_s3_gives_the_same_batches_as_a_folder_until_a_shard_vanishes(own, bucket, monkeypatch):
    far = Shards.open(bucket.fill(own))
    assert digests(far, 12, workers=2) == digests(Shards.open(own), 12, workers=2)
    monkeypatch.setattr(streaming, "_PIECE", 40_000)  # several pieces, the last not whole
    assert digests(far, 12, workers=2) == digests(Shards.open(own), 12, workers=2)
    bucket.client.delete_object(Bucket=bucket.name, Key=f"set/{far.files[0]}")
    rows, told = told_by(far, 14, workers=1)
    assert sorted(rows) == sorted(np.flatnonzero(far.columns["shard"].to_numpy() != far.files[0]))
    assert {bad.reason for bad in told} == {"missing"}
    far.close()


def test_a_far_shard_costs_one_request_for_what_it_is_and_one_for_its_bytes(own, monkeypatch):
    monkeypatch.setattr(streaming, "_AT_ONCE", 1)
    with Misbehaving() as server:
        serve(server, own)
        shards = Shards.open(f"{server.root}/watch")
        assert sorted(rows_of(StreamLoader(shards, 8).batches(0, 3))) == list(range(24))
        assert [len(server.asked(name)) for name in shards.files] == [2, 2, 2]
        shards.close()


def test_a_server_that_fails_within_a_shard_costs_the_rest_of_that_shard(own, monkeypatch):
    monkeypatch.setattr(streaming, "_PIECE", 20_000)
    with Misbehaving() as server:
        serve(server, own)
        shards = Shards.open(f"{server.root}/watch")
        broken = shards.files[0]
        server.behave_from(broken, Status(500), len(server.asked(broken)) + 1 + 1 + streaming._PIECES)
        told: list[Bad] = []
        loader = StreamLoader(shards, 1, tell=told.append, max_bad=0.9)
        rows = rows_of(loader.batches(0, 24 - 10 + 1))
        shards.close()
    assert len(set(rows)) == 15
    lost = {bad.key for bad in told}
    assert 0 < len(lost) < 10
    assert {(bad.shard, bad.reason) for bad in told} == {(f"{server.root}/watch/{broken}", "network")}
    assert not lost & set(shards.keys_of(np.array(rows)))


def test_of_a_far_file_that_shrinks_under_way_all_that_is_there_comes_before_the_failure(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(streaming, "_PIECE", 20_000)
    (tmp_path / "a.tar").write_bytes(body := np.random.default_rng(0).bytes(110_000))
    file = io.BufferedReader(streaming._FarTar(open_store(str(tmp_path)), "a.tar", 150_000), 80_000)
    assert b"".join(file.read(10_000) for _ in range(10)) == body[:100_000]
    with pytest.raises(ReadFailure, match="10000 of 20000 bytes are there"):
        file.read(10_000)


# What is left behind


@pytest.mark.parametrize("workers", [0, 3])
def test_closing_a_stream_leaves_no_thread_and_no_open_file(easy, workers):
    shards = Shards.open(easy)
    shards.close()  # what other tests read of the same folder at random stays open in this process until then
    batches = StreamLoader(shards, 4, workers=workers).batches()
    next(batches)
    assert bool(loader_threads()) == bool(workers)
    assert workers or open_in(easy) == 1
    batches.close()  # type: ignore[attr-defined]
    assert loader_threads() == 0
    assert open_in(easy) == 0


def test_threads_read_no_further_than_what_may_wait(easy, monkeypatch):
    monkeypatch.setattr(streaming, "_AT_ONCE", 1)
    with Misbehaving() as server:
        serve(server, easy)
        shards = Shards.open(f"{server.root}/watch")
        batches = StreamLoader(shards, 1, buffer=2, workers=1).batches()
        next(batches)
        threading.Event().wait(0.3)
        assert sum(bool(server.asked(name)) for name in shards.files) == 1
        batches.close()  # type: ignore[attr-defined]
        shards.close()


def test_what_a_stream_cannot_promise_is_said():
    for word in ("buffer", "workers", "ranks", "resumed", "--access random"):
        assert word in streaming.NO_PROMISE

"""The loader: the batch of any step, exactly, whatever reads it; and what becomes of damage."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import warm
from clipmill.audio import decode_flac_into, encode
from clipmill.errors import ConfigError, DecodeError, ShardError
from clipmill.loader import (
    Bad,
    Balanced,
    Batch,
    Digest,
    Loader,
    Sequential,
    Shuffled,
    WholeClips,
    choose_sampler,
)
from clipmill.loader.ahead import in_order
from clipmill.loader.loader import TRIES
from clipmill.loader.sampler import crop_starts
from clipmill.shards.convert import convert
from clipmill.shards.read import Shards
from clipmill.train.split import choose_split
from conftest import REPO, sound
from misbehaving import Body, Misbehaving, Reset, Stall, Status
from test_train import CLASSES, RATE, shards_of

LAYOUTS = [("webdataset", "flac"), ("webdataset", "pcm16"), ("hdf5", "pcm16"), ("hdf5", "flac")]


@pytest.fixture(scope="module")
def easy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shards_of(tmp_path_factory.mktemp("easy"))


@pytest.fixture(scope="module")
def layouts(easy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """The same clips in every layout."""
    root = tmp_path_factory.mktemp("layouts")
    found = {("webdataset", "flac"): easy}
    for layout, encoding in LAYOUTS[1:]:
        out = root / f"{layout}-{encoding}"
        convert(easy, out, layout, encoding)
        found[layout, encoding] = out
    return found


def digests(where: Path | Shards, start: int, stop: int, **options: Any) -> list[Digest]:
    found: list[tuple[int, Digest]] = []
    shards = where if isinstance(where, Shards) else Shards.open(where)
    loader = Loader(shards, 6, watch=lambda step, digest: found.append((step, digest)), **options)
    assert len(list(loader.batches(start, stop))) == stop - start
    assert [step for step, _ in found] == list(range(start, stop))
    return [digest for _, digest in found]


# What a batch is


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
def test_a_batch_is_the_clips_of_its_step_whatever_the_layout_and_the_workers(layouts, layout, workers):
    shards = Shards.open(layouts[layout])
    loader = Loader(shards, 7, seed=5, workers=workers)
    batches = list(loader.batches(2, 6))
    assert len(batches) == 4
    for step, batch in enumerate(batches, 2):
        assert batch.rows.tolist() == Shuffled(24, 5).rows(np.arange(step * 7, step * 7 + 7)).tolist()
        assert batch.waves.dtype == torch.int16
        assert batch.waves.shape == (7, int(batch.lengths.max()))
        for wave, length, target, row in zip(*batch, strict=True):
            np.testing.assert_array_equal(wave[: int(length)], Shards.open(layouts[layout]).read(int(row)))
            assert not wave[int(length) :].any()
            assert target.tolist() == [
                float(name in shards.columns["labels"][int(row)].as_py()) for name in CLASSES
            ]


@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
def test_a_crop_is_a_stretch_of_the_clip_that_the_seed_and_the_position_decide(layouts, layout):
    shards = Shards.open(layouts[layout])
    crop = RATE * 5 // 4
    batch = next(Loader(shards, 24, seed=3, crop=crop).batches())
    starts = crop_starts(3, np.arange(24), shards.samples[batch.rows.numpy()], crop)
    assert len(set(starts.tolist())) > 5
    for wave, length, start, row in zip(batch.waves, batch.lengths, starts, batch.rows, strict=True):
        whole = shards.read(int(row))
        assert int(length) == min(len(whole), crop)
        np.testing.assert_array_equal(wave[: int(length)], whole[start : start + crop])
        assert not wave[int(length) :].any()


def test_every_layout_gives_the_same_batches(layouts):
    found = [digests(where, 0, 5, seed=1, crop=RATE) for where in layouts.values()]
    assert all(one == found[0] for one in found)


def test_whole_clips_come_once_each_and_never_padded(easy):
    shards = Shards.open(easy)
    rows = []
    for batch in WholeClips(shards, 3 * RATE, workers=2).batches():
        assert set(batch.lengths.tolist()) == {batch.waves.shape[1]}
        assert batch.waves.numel() <= 3 * RATE
        rows += batch.rows.tolist()
    assert sorted(rows) == list(range(len(shards)))


# The same again


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_resumed_at_any_step_it_goes_on_as_if_nothing_had_been(easy, workers):
    straight = digests(easy, 0, 9, seed=4, crop=RATE // 2)
    for start in range(9):
        assert digests(easy, start, 9, seed=4, crop=RATE // 2, workers=workers) == straight[start:]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_each_step_evenly_and_together_see_what_one_sees(easy, ranks):
    shards = Shards.open(easy)
    whole = list(Loader(shards, 12, seed=2, crop=RATE).batches(0, 5))
    parts = [
        list(Loader(shards, 12, seed=2, crop=RATE, rank=r, ranks=ranks).batches(0, 5)) for r in range(ranks)
    ]
    for step, batch in enumerate(whole):
        for rank in range(ranks):
            assert torch.equal(parts[rank][step].waves, batch.waves[rank::ranks])
            assert torch.equal(parts[rank][step].rows, batch.rows[rank::ranks])


def test_a_batch_that_ranks_cannot_share_is_refused_at_once(easy):
    with pytest.raises(ConfigError, match=r"--batch-size 5 cannot be shared by 2 ranks"):
        Loader(Shards.open(easy), 5, ranks=2)
    with pytest.raises(ConfigError, match="rank 2 of 2: allowed is 0 to 1"):
        Loader(Shards.open(easy), 4, rank=2, ranks=2)


def test_what_is_asked_for_ahead_comes_in_order_and_stops_where_it_fails():
    def work(number: int) -> int:
        time.sleep(0.01 * (number % 3))
        return 10 // (7 - number)

    found = []
    with pytest.raises(ZeroDivisionError):
        found.extend(in_order(work, range(20), 4))
    assert found == [10 // (7 - number) for number in range(7)]
    got = in_order(work, range(7), 4)
    assert list(got) == [work(number) for number in range(7)]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("clipmill-loader")]


# Which clips


def test_samplers_are_made_by_name(easy):
    shards = Shards.open(easy)
    assert isinstance(choose_sampler(shards, "sequential", 0), Sequential)
    balanced = choose_sampler(shards.where("'hiss' not in labels or key < 'clip-003'"), "balanced", 0)
    assert isinstance(balanced, Balanced)
    labels = shards.where("'hiss' not in labels or key < 'clip-003'").columns["labels"].to_pylist()
    drawn = [labels[row][0] for row in balanced.rows(np.arange(300))]
    assert {name: drawn.count(name) for name in CLASSES} == dict.fromkeys(CLASSES, 100)
    weighted = choose_sampler(shards.where("'hiss' not in labels or key < 'clip-003'"), "weighted", 0)
    drawn = [labels[row][0] for row in weighted.rows(np.arange(17 * 60))]
    assert all(abs(drawn.count(name) - 340) <= 60 for name in CLASSES)
    with pytest.raises(ConfigError, match="allowed are shuffled, balanced, weighted, sequential"):
        choose_sampler(shards, "random", 0)


def test_several_sets_are_one_collection_or_are_mixed_by_weight(easy, tmp_path):
    other = shards_of(tmp_path, 9, labels=[["hum"], ["horn"], ["hiss", "horn"]] * 3)
    both = Shards.open([easy, other])
    assert (len(both), both.labels) == (33, [*CLASSES, "horn"])
    named = {"clip-000": [0, 1, 0, 0], "clip-001": [0, 0, 0, 1], "clip-002": [1, 0, 0, 1]}
    rows = [24 + Shards.open(other).columns["key"].to_pylist().index(key) for key in named]
    assert both.targets_of(np.array(rows)).tolist() == list(named.values())
    np.testing.assert_array_equal(both.read(24), Shards.open(other).read(0))
    batch = next(Loader(both, 33).batches())
    assert sorted(batch.rows.tolist()) == list(range(33))
    mixed = choose_sampler(both, "shuffled", 0, (3, 1))
    assert (both.set_of[mixed.rows(np.arange(4000))] == 1).sum() == 1000
    # A filter thins out both, and weights still mean the sets.
    short = both.where("fold in [1, 2]")
    mixed = choose_sampler(short, "balanced", 0, (1, 1))
    assert (short.set_of[mixed.rows(np.arange(2000))] == 1).sum() == 1000
    with pytest.raises(ConfigError, match=r"--set-weights: 3 for 2 sets"):
        choose_sampler(both, "shuffled", 0, (1, 1, 1))
    with pytest.raises(ConfigError, match=r"no clip of it is to train on"):
        choose_sampler(both.take(np.arange(5)), "shuffled", 0, (1, 1))


def test_sets_of_different_rates_are_refused(easy, make, tmp_path):
    make(tmp_path / "small")
    with pytest.raises(
        ShardError, match=r"at 16000 Hz; .* at 44100 Hz: allowed is one rate; .*--sample-rate"
    ):
        Shards.open([easy, tmp_path / "small"])


def test_the_example_of_a_training_loop_learns(easy):
    done = warm.run(REPO / "examples/train_loop.py", easy)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "6 of 6 clips held out are right"


# Damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path, shards: Shards, row: int) -> None:
    data = bytearray(path.read_bytes())
    offset, length = (shards.columns[name][row].as_py() for name in ("offset", "length"))
    data[offset + length // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path, Shards], None], set[str], str]] = {
    "cut short": (lambda path, _: cut(path), {"corrupt"}, "bytes are there"),
    "a flipped byte": (lambda path, shards: flip(path, shards, 12), {"corrupt"}, "samples decode"),
    "zeros": (lambda path, _: path.write_bytes(bytes(path.stat().st_size)), {"corrupt"}, ""),
    "gone": (lambda path, _: path.unlink(), {"missing"}, "is not there"),
    "a folder in its place": (lambda path, _: (path.unlink(), path.mkdir()), {"unreadable"}, ""),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_clips_that_cannot_be_read_are_told_and_others_stand_in_the_same_each_time(easy, tmp_path, kind):
    where = Path(shutil.copytree(easy, tmp_path / "shards"))
    shards = Shards.open(where)
    harm, reasons, message = DAMAGE[kind]
    harm(where / "easy-all-000001.tar", shards)
    told: list[Bad] = []
    straight = digests(Shards.open(where), 0, 8, max_bad=0.5, tell=told.append)
    assert told
    assert {bad.reason for bad in told} <= reasons
    assert all(bad.shard == str(where / "easy-all-000001.tar") for bad in told)
    assert message in str(told[0])
    assert {bad.key for bad in told} <= set(shards.keys_of(np.arange(10, 20)))
    again: list[Bad] = []
    assert digests(Shards.open(where), 3, 8, max_bad=0.5, workers=2, tell=again.append) == straight[3:]
    assert again == told[len(told) - len(again) :]
    clean = digests(easy, 0, 8)
    changed = [step for step in range(8) if straight[step] != clean[step]]
    assert 0 < len(changed) <= len(told)


def test_ranks_stay_even_when_clips_are_lost(easy, tmp_path):
    where = Path(shutil.copytree(easy, tmp_path / "shards"))
    (where / "easy-all-000000.tar").unlink()
    whole = list(Loader(Shards.open(where), 8, max_bad=0.5).batches(0, 6))
    for rank in range(2):
        part = list(Loader(Shards.open(where), 8, max_bad=0.5, rank=rank, ranks=2).batches(0, 6))
        assert [batch.rows.tolist() for batch in part] == [batch.rows[rank::2].tolist() for batch in whole]


def test_a_longer_stand_in_is_whole(tmp_path):
    where = shards_of(tmp_path, 12)
    shards = Shards.open(where)
    short = np.flatnonzero(shards.samples == RATE)[:1]
    longer = np.flatnonzero(shards.samples == 2 * RATE)
    flip(where / "easy-all-000000.tar", shards, int(short[0]))
    chosen = shards.take([*short, *longer[:3]])
    sampler = Sequential(4)
    batch = next(Loader(chosen, 1, sampler=sampler, max_bad=0.5).batches())
    assert batch.waves.shape == (1, 2 * RATE)
    np.testing.assert_array_equal(batch.waves[0], chosen.read(int(batch.rows[0])))


def test_more_damage_than_is_allowed_ends_with_what_mends_it(easy, tmp_path):
    where = Path(shutil.copytree(easy, tmp_path / "shards"))
    (where / "easy-all-000001.tar").unlink()
    loader = Loader(Shards.open(where), 6, max_bad=0.1)
    with pytest.raises(ShardError, match=r"3 of 24 clips cannot be read, more than --max-bad 0\.1 allows; the first: "
                       r".*easy-all-000001\.tar: clip clip-0\d\d cannot be read: missing: .*`pipeline verify`.*--max-bad"):  # fmt: skip
        list(loader.batches(0, 8))
    assert len(loader.damage.found) == 3


def test_a_store_that_gives_nothing_any_more_ends_at_once(easy, tmp_path):
    where = Path(shutil.copytree(easy, tmp_path / "shards"))
    batches = Loader(Shards.open(where), 4, max_bad=1.0).batches()
    next(batches)
    for shard in where.glob("*.tar"):
        os.truncate(shard, 0)
    with pytest.raises(ShardError, match=rf"0 of \d+ bytes are there\), nor can {TRIES} others in its place"):
        next(batches)


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [(Status(500), "network"), (Stall(300), "timeout"), (Status(404), "missing"), (Reset(100), "network")],
    ids=lambda value: str(value),
)
def test_a_far_store_that_fails_in_mid_epoch_costs_clips_and_not_the_run(easy, trouble, reason):
    with Misbehaving((easy / "easy-all-000001.tar").read_bytes()) as web:
        for path in easy.iterdir():
            web.behave(path.name, Body(path.read_bytes(), "application/octet-stream"))
        place = web.url("")
        shards = Shards.open(place, settings={"timeout_s": 1.5})
        told: list[Bad] = []
        loader = Loader(shards, 6, max_bad=0.9, tell=told.append)
        near = list(Loader(Shards.open(easy), 6).batches(0, 4))
        batches = loader.batches(0, 4)
        found = [next(batches)]
        web.behave("easy-all-000001.tar", trouble)
        found += batches
    gone = set(shards.keys_of(np.arange(10, 20)))
    assert told
    assert {bad.reason for bad in told} == {reason}
    assert {bad.key for bad in told} <= gone
    for here, there in zip(near, found, strict=True):
        for row, other, wave, same in zip(here.rows, there.rows, here.waves, there.waves, strict=True):
            if int(row) == int(other):
                n = int(shards.samples[int(row)])
                assert torch.equal(wave[:n], same[:n])
            else:
                assert shards.keys_of(np.array([int(row)]))[0] in {bad.key for bad in told}


@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
def test_a_changed_sample_is_noticed_by_its_hash_where_the_encoding_has_no_checksum(
    layouts, layout, tmp_path
):
    where = Path(shutil.copytree(layouts[layout], tmp_path / "shards"))
    shards = Shards.open(where)
    flip(where / shards.columns["shard"][3].as_py(), shards, 3)
    three = shards.take([3])
    for check, crop in ((False, 0), (False, 400), (True, 0), (True, 400)):
        whole = WholeClips(three, RATE, max_bad=1.0, check=check)
        loader = Loader(shards.take([3, 5]), 2, sampler=Sequential(2), crop=crop, max_bad=1.0, check=check)
        found = len(list(whole.batches())) == 1
        next(loader.batches())
        noticed = check or layout[1] == "flac"
        assert found is not noticed
        assert [bad.key for bad in loader.damage.found] == (three.keys_of(np.array([0])) if noticed else [])


def test_no_flipped_bit_of_flac_passes_wherever_the_crop_is():
    rng = np.random.default_rng(0)
    wave = (sound(2.0, RATE) * 20000).astype(np.int16)
    data = encode(wave, RATE, "flac")
    told = 0
    for _ in range(400):
        harmed = bytearray(data)
        harmed[rng.integers(60, len(data))] ^= 1 << rng.integers(8)
        start = int(rng.integers(0, len(wave) - 8000))
        out = np.empty(8000, np.int16)
        try:
            decode_flac_into(bytes(harmed), out, start, len(wave))
        except DecodeError:
            told += 1
        else:
            np.testing.assert_array_equal(out, wave[start : start + 8000])
    assert told > 150


def test_two_sets_of_others_whose_keys_are_the_same_numbers_are_no_leak(tmp_path):
    for name, split in (("a", "train"), ("b", "test")):
        (tmp_path / name).mkdir()
        with tarfile.open(tmp_path / name / "x.tar", "w") as tar:
            for number in range(6):
                audio = encode((sound(1.0, RATE, seed=number) * 9000).astype(np.int16), RATE, "flac")
                facts = json.dumps({"label": CLASSES[number % 3], "split": split}).encode()
                for suffix, data in (("flac", audio), ("json", facts)):
                    info = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    both = Shards.open([tmp_path / "a", tmp_path / "b"])
    assert len(set(both.groups.to_pylist())) == 12
    split = choose_split(both, None, 0)
    assert (split.train.tolist(), split.held_out.tolist()) == (list(range(6)), list(range(6, 12)))
    with pytest.raises(ShardError, match=r"others made these shards: they can be trained on"):
        Shards.open(tmp_path / "a", ours=True)


def test_threads_that_ask_together_get_one_and_the_same(easy):
    shards = Shards.open(easy)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: (shards.samples, shards.label_ids, shards.columns["key"]), range(8)))
    assert all(one[0] is found[0][0] and one[1] is found[0][1] for one in found)


def test_a_mask_takes_the_clips_where_it_is_true(easy):
    shards = Shards.open(easy)
    mask = shards.folds == 2
    assert shards.take(mask).keys_of(np.arange(mask.sum())) == shards.keys_of(np.flatnonzero(mask))


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"workers": -1}, {"crop": -5}, {"crop": 0.5}])
def test_what_a_loader_cannot_be_given_is_said(easy, wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ConfigError, match=f"{name} {value}: allowed is any whole number from"):
        Loader(Shards.open(easy), **{"batch_size": 4, **wrong})


FEW_FILES = """
import resource, sys
import numpy as np
from clipmill.loader import WholeClips
from clipmill.shards.read import Shards
shards = Shards.open(sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (70, 70))
clips = WholeClips(shards, 8000, workers=2, max_bad=0.0)
assert sum(len(batch.rows) for batch in clips.batches()) == len(shards)
"""


def test_more_shards_of_several_folders_and_kinds_than_files_may_be_open_are_read(tmp_path):
    """Compressed HDF5, which the library opens, and two folders of tars."""
    for folder in ("one", "two", "packed"):
        (tmp_path / folder).mkdir()
    wave = (sound(0.5, 8000) * 9000).astype(np.int16)
    for number in range(45):
        audio = encode(wave, 8000, "flac")
        for folder in ("one", "two"):
            with tarfile.open(tmp_path / folder / f"{number:03d}.tar", "w") as tar:
                info = tarfile.TarInfo(f"k{number}.flac")
                info.size = len(audio)
                tar.addfile(info, io.BytesIO(audio))
        with h5py.File(tmp_path / "packed" / f"{number:03d}.h5", "w") as file:
            file["audio_name"] = np.array([f"h{number}".encode()])
            file.create_dataset("waveform", data=wave[None], compression="gzip")
            file.attrs["sample_rate"] = 8000
    command = [sys.executable, "-c", FEW_FILES, *(str(tmp_path / name) for name in ("one", "two", "packed"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr


def test_compressed_hdf5_is_read_from_afar_by_threads_too(bucket, tmp_path):
    """By way of a copy: the HDF5 library lets one thread in, and must not wait for a store with its lock held."""
    waves = (sound(3.0, 8000) * 9000).astype(np.int16).reshape(6, 4000)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["audio_name"] = np.array([f"h{number}".encode() for number in range(6)])
        file.create_dataset("waveform", data=waves, compression="gzip")
        file.attrs["sample_rate"] = 8000
    shards = Shards.open(bucket.fill(tmp_path))
    for batch in Loader(shards, 2, workers=3).batches(0, 9):
        for wave, row in zip(batch.waves, batch.rows, strict=True):
            np.testing.assert_array_equal(wave[:4000], waves[int(row)])


def test_a_far_store_that_answers_nothing_any_more_is_named_within_two_time_limits(easy):
    with Misbehaving(b"") as web:
        for path in easy.iterdir():
            web.behave(path.name, Body(path.read_bytes(), "application/octet-stream"))
        batches = Loader(Shards.open(web.url(""), settings={"timeout_s": 1.0}), 6, max_bad=1.0).batches()
        next(batches)
        for path in easy.glob("*.tar"):
            web.behave(path.name, Status(503))
        with pytest.raises(
            ShardError, match=r"the store does not answer: .*network.*--read-timeout.*--resume"
        ):
            next(batches)


def test_a_shard_that_is_gone_or_of_another_size_is_said_when_it_is_opened(easy, tmp_path):
    where = Path(shutil.copytree(easy, tmp_path / "shards"))
    assert Shards.open(where).notes == []
    cut(where / "easy-all-000001.tar")
    (where / "easy-all-000002.tar").unlink()
    (note,) = Shards.open(where).notes
    assert re.search(
        r"easy-all-000001.tar: is of \d+ bytes where \d+ are recorded, and 1 more are gone", note
    )


def test_what_is_scored_is_what_can_be_read(easy, tmp_path):
    where = Path(shutil.copytree(easy, tmp_path / "shards"))
    shards = Shards.open(where)
    flip(where / "easy-all-000000.tar", shards, 4)
    told: list[Bad] = []
    clips = WholeClips(shards, 8 * RATE, max_bad=0.1, tell=told.append)
    rows = [row for batch in clips.batches() for row in batch.rows.tolist()]
    assert sorted(rows) == [n for n in range(24) if n != 4]
    assert [(bad.key, bad.instead) for bad in told] == [(*shards.keys_of(np.array([4])), None)]


# What is left behind


def descriptors(folder: Path) -> list[str]:
    """The open files of this process under a folder."""
    files = [Path(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    names = [os.readlink(file) for file in files if file.is_symlink()]
    return [name for name in names if name.startswith(str(folder))]


def test_a_loader_that_is_dropped_half_way_leaves_no_thread_and_no_open_file(layouts):
    for layout in LAYOUTS:
        shards = Shards.open(layouts[layout])
        batches = Loader(shards, 4, workers=3).batches()
        next(batches)
        assert descriptors(layouts[layout])
        batches.close()
        shards.close()
        assert not descriptors(layouts[layout])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("clipmill-loader")]


ENDLESS = """
import sys, time
from clipmill.loader import Loader
from clipmill.shards.read import Shards
print("ready", flush=True)
for step, batch in enumerate(Loader(Shards.open(sys.argv[1]), 4, workers=3).batches()):
    if step == 20:
        print("going", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_or_killed_it_leaves_no_process_and_no_shared_memory(easy, number):
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(easy)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert [process.stdout.readline().strip() for _ in range(2)] == ["ready", "going"]
    assert not list(Path(f"/proc/{process.pid}/task/{process.pid}").joinpath("children").read_text().split())
    # Whatever is in memory that outlives a process is mapped from there.
    shared = [
        line for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines() if "/dev/shm" in line
    ]
    process.send_signal(number)
    errors = process.communicate(timeout=20)[1]
    assert process.returncode == -number or (number == signal.SIGINT and "KeyboardInterrupt" in errors)
    mine = [name for name in os.listdir("/proc") if name.isdigit() and session_of(name) == process.pid]
    assert not mine
    assert not shared


def session_of(process: str) -> int | None:
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[3])
    except (OSError, IndexError):
        return None


FLAT = """
import gc, json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from clipmill.loader import Loader
from clipmill.shards.read import Shards
def resident():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
found = []
for step, batch in enumerate(Loader(Shards.open(sys.argv[1]), 8, workers=2, crop=8000).batches(0, 600)):
    if step % 100 == 99:
        found.append(resident())
print(json.dumps(found))
"""


def test_memory_is_flat_over_many_epochs(easy):
    done = subprocess.run(
        [sys.executable, "-c", FLAT, str(easy)], capture_output=True, text=True, check=True, timeout=200
    )
    found = json.loads(done.stdout)
    assert max(found[2:]) - found[1] < 12e6  # bytes, of 4,800 clips read


# The device


@pytest.mark.gpu
def test_batches_on_the_device_are_those_of_the_cpu(easy):
    shards = Shards.open(easy)
    cuda = torch.device("cuda")
    on_cpu = list(Loader(shards, 6, workers=2, crop=RATE).batches(0, 30))
    for here, there in zip(
        on_cpu, Loader(shards, 6, workers=2, crop=RATE, device=cuda).batches(0, 30), strict=True
    ):
        assert there.waves.device.type == there.targets.device.type == there.lengths.device.type == "cuda"
        assert there.rows.device.type == "cpu"
        assert all(torch.equal(one, other.cpu()) for one, other in zip(here, there, strict=True))


@pytest.mark.gpu
def test_copies_overlap_with_work_and_a_batch_in_use_is_not_overwritten(easy):
    """Each batch is looked at late, on a stream that is kept busy, while the next ones are copied."""
    shards = Shards.open(easy)
    cuda = torch.device("cuda")
    heavy = torch.randn(2048, 2048, device=cuda)
    sums = []
    for batch in Loader(shards, 6, workers=2, device=cuda).batches(0, 40):
        for _ in range(20):
            heavy = heavy @ heavy * 1e-3
        sums.append(batch.waves.long().sum())
    expected = [int(batch.waves.long().sum()) for batch in Loader(shards, 6).batches(0, 40)]
    assert [int(one) for one in sums] == expected


def test_a_batch_moves_as_a_whole(easy):
    batch = next(Loader(Shards.open(easy), 4).batches())
    moved = batch.to(torch.device("meta"))
    assert isinstance(moved, Batch)
    assert [part.device.type for part in moved] == ["meta", "meta", "meta", "cpu"]

"""`pipeline leaks`: groups, copies and near copies on both sides of a fold, a split or a dataset."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from clipmill import tables
from clipmill.audio.ffmpeg import ffmpeg_program
from clipmill.audio.fingerprint import LEAST_WORDS, NEIGHBOURS, fingerprint, match
from clipmill.datasets.folder import Folder
from clipmill.fetch.job import fetch
from clipmill.shards.job import make_shards
from clipmill.shards.leaks import Collection, find_leaks
from clipmill.shards.plan import ShardSpec
from conftest import SHARED

RATE = 22050


def tune(seed: int, seconds: float = 4.0, rate: int = RATE) -> np.ndarray:
    """Ten chords a second over some noise, float64 `[samples]`: no two seconds of it are alike."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(0.1 * rate)) / rate
    steps = [
        sum(np.sin(2 * np.pi * f * time + rng.uniform(0, 6)) for f in rng.uniform(200, 3600, 4))
        * rng.uniform(0.3, 1)
        for _ in range(round(seconds * 10))
    ]
    wave = np.concatenate(steps)
    return 0.1 * wave + 0.002 * rng.standard_normal(len(wave))


def coded(wave: np.ndarray, path: Path, *arguments: str) -> None:
    """Write a lossy file by the ffmpeg program."""
    source = path.with_suffix(".source.wav")
    soundfile.write(source, wave, RATE)
    command = [ffmpeg_program(), "-loglevel", "error", "-i", str(source), *arguments, str(path)]
    subprocess.run(command, check=True)
    source.unlink()


def wav(change: Callable[[np.ndarray], np.ndarray], rate: int = RATE) -> Callable[[np.ndarray, Path], None]:
    return lambda wave, path: soundfile.write(path.with_suffix(".wav"), change(wave), rate)


def noisy(wave: np.ndarray) -> np.ndarray:
    return wave + 0.1 * wave.std() * np.random.default_rng(1).standard_normal(len(wave))


COPIES: dict[str, Callable[[np.ndarray, Path], None]] = {
    "mp3": lambda wave, path: coded(wave, path.with_suffix(".mp3"), "-b:a", "64k"),
    "opus": lambda wave, path: coded(wave, path.with_suffix(".opus"), "-c:a", "libopus", "-b:a", "32k"),
    "vorbis": lambda wave, path: coded(wave, path.with_suffix(".ogg"), "-c:a", "libvorbis"),
    "softer": wav(lambda wave: wave / 4),
    "shifted": wav(lambda wave: np.pad(wave, (round(0.3 * RATE), 0))),
    "trimmed": wav(lambda wave: wave[RATE:]),
    "telephone": lambda wave, path: coded(wave, path.with_suffix(".wav"), "-ar", "8000"),
    "noisy": wav(noisy),
    "overlapping": wav(lambda wave: np.concatenate([wave[2 * RATE :], tune(999, 2.0)])),
}


@pytest.fixture(scope="module")
def sharded(run, tmp_path_factory) -> Callable[..., Path]:
    """Shards of a folder: `sharded(folder, rows)`, each row with the columns of its labels.csv."""

    def shard(folder: Path, rows: list[dict], *flags: object) -> Path:
        root = tmp_path_factory.mktemp("root")
        names = ["filename", "label", "fold", "group", "split"]
        with open(root / "labels.csv", "w", newline="") as file:
            table = csv.DictWriter(file, names)
            table.writeheader()
            table.writerows(rows)
        columns = {f"{n}_column": n for n in names[2:] if any(n in row for row in rows)}
        labels = root / "labels.csv"
        fetch("folder", Folder(folder.name, folder, labels, allow_leak=True, **columns), root)
        out = root / "shards"
        where = ("--root", root, "--out", out)
        done = run("shard", folder.name, *where, "--clips-per-shard", 8, "--jobs", 1, *flags)
        assert done.returncode == 0, done.stderr
        return out

    return shard


@pytest.fixture(scope="module")
def mixed(sharded, tmp_path_factory) -> Path:
    """Tunes in fold 1, their copies in fold 2, and some of what does not leak."""
    folder = tmp_path_factory.mktemp("media") / "mixed"
    folder.mkdir()
    rows = []

    def add(name: str, fold: int, label: str = "tune", group: str | None = None) -> Path:
        path = folder / name
        rows.append({"filename": path, "label": label, "fold": fold, "group": group or f"g-{name}"})
        return path

    for number, (kind, copy) in enumerate(COPIES.items()):
        soundfile.write(add(f"original_{kind}.wav", 1), tune(number), RATE)
        copy(tune(number), add(f"copy_{kind}", 2))
    soundfile.write(add("same_a.wav", 1), tune(100), RATE)
    soundfile.write(add("same_b.wav", 2, label="other"), tune(100), RATE)
    soundfile.write(add("near_a.wav", 1), tune(101), RATE)
    soundfile.write(add("near_b.wav", 1), tune(101) / 2, RATE)
    soundfile.write(add("take_1.wav", 1, group="speaker"), tune(102), RATE)
    soundfile.write(add("take_2.wav", 2, group="speaker"), tune(103), RATE)
    soundfile.write(add("click.wav", 1), tune(104)[: RATE // 10], RATE)
    for row in rows:  # the coders chose the extensions
        row["filename"] = next(folder.glob(f"{row['filename'].stem}.*")).name
    return sharded(folder, rows)


@pytest.fixture(scope="module")
def said(run, mixed) -> dict:
    done = run("leaks", mixed, "--json", "--jobs", 2)
    assert done.returncode == 1, done.stderr
    return json.loads(done.stdout)


def pairs(copies: list[dict]) -> set[frozenset[str]]:
    return {frozenset(clip["key"] for clip in entry["clips"]) for entry in copies}


def test_a_group_in_two_folds_is_a_leak(said):
    assert said["groups"]["leaks"] == [
        {
            "group": "speaker",
            "across": ["fold"],
            "where": [
                {"dataset": "mixed", "split": "all", "fold": fold, "clips": 1} for fold in (1, 2)
            ],
        }
    ]  # fmt: skip


def test_equal_samples_in_two_folds_are_a_leak_and_it_is_told_that_the_labels_differ(said):
    (found,) = said["exact"]["leaks"]
    assert found["across"] == ["fold"]
    assert found["labels_agree"] is False
    assert {clip["key"] for clip in found["clips"]} == {"same_a", "same_b"}
    assert {clip["fold"] for clip in found["clips"]} == {1, 2}


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_of_each_kind_in_another_fold_is_found(said, kind):
    assert frozenset({f"original_{kind}", f"copy_{kind}"}) in pairs(said["near"]["leaks"])


def test_nothing_else_is_called_a_copy(said):
    assert len(said["near"]["leaks"]) == len(COPIES)
    assert pairs(said["near"]["harmless"]) == {frozenset({"near_a", "near_b"})}


@pytest.mark.parametrize(("kind", "shift_s"), [("shifted", 0.3), ("trimmed", -1.0), ("overlapping", -2.0)])
def test_the_offset_says_where_the_sound_of_the_first_lies_in_the_second(said, kind, shift_s):
    (found,) = [e for e in said["near"]["leaks"] if any(c["key"] == f"copy_{kind}" for c in e["clips"])]
    sign = 1 if found["clips"][0]["key"].startswith("original") else -1
    assert found["offset_s"] == pytest.approx(sign * shift_s, abs=0.02)
    assert found["similarity"] > 0.7


def test_every_clip_is_accounted_for(said):
    near = said["near"]
    assert said["clips"] == said["exact"]["clips"] + said["silent"] == 2 * len(COPIES) + 7
    assert near["fingerprinted"] + len(near["not_fingerprinted"]) + said["silent"] == said["clips"]
    assert [clip["key"] for clip in near["not_fingerprinted"]] == ["click"]
    assert said["leaks"] == 1 + 1 + len(COPIES)


def test_a_person_is_told_the_same(here, mixed):
    done = here("leaks", mixed, "--jobs", 1)
    assert done.returncode == 1
    assert "speaker, across folds: 1 in mixed all fold 1, 1 in mixed all fold 2" in done.stdout
    assert "their labels differ" in done.stdout
    assert f"{len(COPIES)} pairs leak, 1 do not" in done.stdout
    assert "1 too short, too quiet or too steady" in done.stdout


def test_kept_fingerprints_are_used_again_and_say_the_same(here, mixed, said):
    before = (mixed / "fingerprints.parquet").stat().st_mtime_ns
    again = json.loads(here("leaks", mixed, "--jobs", 1, "--json").stdout)
    assert again["near"].pop("reused") == said["clips"]
    assert again["near"] == {name: value for name, value in said["near"].items() if name != "reused"}
    assert (mixed / "fingerprints.parquet").stat().st_mtime_ns == before


def test_fingerprints_of_another_shard_or_version_are_made_anew(here, mixed, said, tmp_path):
    folder = shutil.copytree(mixed, tmp_path / "s")
    kept = pq.read_table(folder / "fingerprints.parquet")
    strange = ["0" * 64 if sha == kept["sha256"][0].as_py() else sha for sha in kept["sha256"].to_pylist()]
    pq.write_table(kept.set_column(0, kept.schema.field(0), [strange]), folder / "fingerprints.parquet")
    again = json.loads(here("leaks", folder, "--jobs", 1, "--json").stdout)
    assert 0 < again["near"]["reused"] < said["clips"]
    assert pairs(again["near"]["leaks"]) == pairs(said["near"]["leaks"])
    assert sorted(pq.read_table(folder / "fingerprints.parquet")["sha256"].to_pylist()) == sorted(
        kept["sha256"].to_pylist()
    )


def test_a_folder_that_cannot_be_written_to_is_said_so_and_searched_all_the_same(here, mixed, said, tmp_path):
    folder = shutil.copytree(mixed, tmp_path / "s", ignore=shutil.ignore_patterns("fingerprints.parquet"))
    (folder / "fingerprints.parquet").mkdir()  # nothing can be read from there, or renamed onto it
    done = here("leaks", folder, "--jobs", 1, "--json")
    assert done.returncode == 1
    assert "cannot be written" in done.stderr
    assert pairs(json.loads(done.stdout)["near"]["leaks"]) == pairs(said["near"]["leaks"])
    assert not list(folder.glob(".*.tmp"))


def test_one_shard_alone_keeps_what_is_known_of_the_others(here, mixed, said, tmp_path):
    folder = shutil.copytree(mixed, tmp_path / "s")
    (folder / "fingerprints.parquet").unlink()
    shards = sorted(folder.glob("*.tar"))
    first = json.loads(here("leaks", shards[0], "--jobs", 1, "--json").stdout)
    again = json.loads(here("leaks", *shards[1:], "--jobs", 1, "--json").stdout)
    assert (first["near"]["reused"], again["near"]["reused"]) == (0, 0)
    again = json.loads(here("leaks", *shards, "--jobs", 1, "--json").stdout)
    assert again["near"]["reused"] == said["clips"]
    assert pairs(again["near"]["leaks"]) == pairs(said["near"]["leaks"])


def test_exact_only_decodes_nothing_and_finds_no_near_copies(here, mixed, tmp_path):
    folder = shutil.copytree(mixed, tmp_path / "s", ignore=shutil.ignore_patterns("fingerprints.parquet"))
    for shard in folder.glob("*.tar"):
        shard.write_bytes(b"")
    done = here("leaks", folder, "--exact-only", "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found["near"] is None
    assert len(found["exact"]["leaks"]) == len(found["groups"]["leaks"]) == 1
    assert not (folder / "fingerprints.parquet").exists()


def test_a_damaged_shard_is_named(here, mixed, tmp_path):
    folder = shutil.copytree(mixed, tmp_path / "s", ignore=shutil.ignore_patterns("fingerprints.parquet"))
    sorted(folder.glob("*.tar"))[0].write_bytes(b"")
    done = here("leaks", folder, "--jobs", 1)
    assert done.returncode == 1
    assert "cannot be read" in done.stderr
    assert "pipeline verify" in done.stderr
    assert "Traceback" not in done.stderr


def test_copies_in_one_fold_are_told_and_are_no_failure(here, sharded, tmp_path):
    folder = tmp_path / "calm"
    folder.mkdir()
    for name in ("a", "b"):
        soundfile.write(folder / f"{name}.wav", tune(1), RATE)
    soundfile.write(folder / "c.wav", tune(1) / 3, RATE)
    soundfile.write(folder / "d.wav", tune(2), RATE)
    folds = {"a": 1, "b": 1, "c": 1, "d": 2}
    out = sharded(folder, [{"filename": f"{n}.wav", "label": "x", "fold": f} for n, f in folds.items()])
    done = here("leaks", out, "--jobs", 1, "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0
    assert found["leaks"] == 0
    assert pairs(found["exact"]["harmless"]) == {frozenset({"a", "b"})}
    assert len(found["near"]["harmless"]) == 1


def test_splits_and_datasets_are_borders_too_and_a_folder_given_twice_is_one(here, sharded, tmp_path):
    for name, seeds in (("first", (1, 2)), ("second", (1, 3))):
        (tmp_path / name).mkdir()
        for place, seed in enumerate(seeds):
            soundfile.write(
                tmp_path / name / f"{place}.wav", tune(seed) / (2 if name == "second" else 1), RATE
            )
    soundfile.write(tmp_path / "first/2.wav", tune(2), RATE)
    splits = ("train", "train", "eval")
    first = sharded(
        tmp_path / "first",
        [{"filename": f"{n}.wav", "label": "x", "split": s, "group": "site-7"} for n, s in enumerate(splits)],
    )
    second = sharded(
        tmp_path / "second",
        [{"filename": f"{n}.wav", "label": "x", "group": ("site-7", "9")[n]} for n in range(2)],
        "--format",
        "hdf5",
    )
    found = json.loads(here("leaks", first, second, first, "--jobs", 1, "--json").stdout)
    assert found["clips"] == 5
    assert [entry["across"] for entry in found["exact"]["leaks"]] == [["split"]]
    assert [entry["across"] for entry in found["near"]["leaks"]] == [["dataset"]]
    assert found["near"]["leaks"][0]["offset_s"] == 0
    assert [(entry["group"], entry["across"]) for entry in found["groups"]["leaks"]] == [
        ("site-7", ["split", "dataset"])
    ]
    assert json.loads(here("leaks", second, "--jobs", 1, "--json").stdout)["leaks"] == 0


def test_the_splits_that_are_trained_on_are_one_side(tmp_path):
    splits = ("balanced_train", "unbalanced_train", "noise", "eval")
    for number in range(len(splits)):
        soundfile.write(tmp_path / f"{number}.wav", tune(1), RATE)

    def leaks(count: int) -> list[list[str]]:
        manifest = tables.manifest_table({
            "key": [f"k{n}" for n in range(count)],
            "source": [f"{n}.wav" for n in range(count)],
            "labels": [["x"]] * count,
            "split": splits[:count],
            "group": ["video"] * count,
        })  # fmt: skip
        make_shards("s", manifest, [], tmp_path, tmp_path / f"{count}", ShardSpec())
        found = find_leaks(Collection.open([tmp_path / f"{count}"]), exact_only=True)
        return [entry["across"] for kind in ("groups", "exact") for entry in found[kind]["leaks"]]

    assert leaks(3) == []
    assert leaks(4) == [["split"], ["split"]]


def test_silence_hum_and_noise_match_nothing(here, sharded, tmp_path):
    folder = tmp_path / "quiet"
    folder.mkdir()
    time = np.arange(3 * RATE) / RATE
    waves = {}
    for number in range(4):
        rng = np.random.default_rng(number)
        waves[f"silence{number}"] = np.zeros(RATE * (number + 1))
        waves[f"hush{number}"] = rng.integers(-1, 2, len(time)) / 32768
        waves[f"noise{number}"] = 0.1 * rng.standard_normal(len(time))
        hum = sum(np.sin(2 * np.pi * f * time + rng.uniform(0, 6)) / f for f in range(50, 2000, 100))
        waves[f"hum{number}"] = hum + 0.001 * rng.standard_normal(len(time))
        waves[f"pure{number}"] = (0.1 + 0.1 * number) * np.sin(2 * np.pi * 1000 * time)
    for name, wave in waves.items():
        soundfile.write(folder / f"{name}.wav", wave, RATE)
    rows = [{"filename": f"{name}.wav", "label": "x", "fold": place % 2} for place, name in enumerate(waves)]
    done = here("leaks", sharded(folder, rows, "--keep-silent"), "--jobs", 1, "--json")
    found = json.loads(done.stdout)
    assert found["silent"] == 4
    assert found["leaks"] == 0, found["near"]["leaks"]
    assert found["near"]["harmless"] == found["exact"]["harmless"] == []
    left_out = {clip["key"] for clip in found["near"]["not_fingerprinted"]}
    assert left_out >= {f"{kind}{number}" for kind in ("hush", "pure") for number in range(4)}
    assert done.returncode == 0


def test_a_fingerprint_is_of_what_is_heard_and_not_of_the_level():
    wave = tune(5)
    loud, soft = (fingerprint((gain * wave * 32767).astype(np.int16), RATE) for gain in (1.0, 0.1))
    assert loud.dtype == np.uint16
    assert len(loud) == pytest.approx(4 * 62.5, abs=3)
    agree = 1 - np.unpackbits((loud ^ soft).view(np.uint8)).mean()
    assert agree > 0.97
    assert not fingerprint(np.zeros(RATE, np.int16), RATE).any()
    assert len(fingerprint(np.ones(1, np.int16), RATE)) < LEAST_WORDS


def test_a_sound_in_more_clips_than_are_all_compared_still_joins_them_all():
    rng = np.random.default_rng(0)
    count = 3 * NEIGHBOURS
    words = np.tile(rng.integers(1, 1 << 16, 100, dtype=np.uint16), count)
    found = match(words, np.arange(count + 1) * 100)
    assert found.crowded > 0
    assert {(place, place + 1) for place in range(count - 1)} <= set(zip(found.one, found.other, strict=True))


def test_copies_are_found_in_a_collection_too_large_for_short_keys_and_for_one_pass():
    rng = np.random.default_rng(0)
    words = np.zeros((86_000, 200), np.uint16)
    words[3::8] = rng.integers(
        1, 1 << 16, words[3::8].shape
    )  # the others tell nothing, and are soon done with
    words[7, :150] = words[80_123, 50:]
    found = match(words.reshape(-1), np.arange(len(words) + 1) * 200)
    assert (found.one.tolist(), found.other.tolist(), found.shift.tolist()) == ([7], [80_123], [50])
    assert (found.errors.tolist(), found.words.tolist()) == ([0.0], [150])


def test_nothing_to_compare_is_no_copy():
    assert len(match(np.zeros(0, np.uint16), np.zeros(1, np.int64)).one) == 0
    assert len(match(np.zeros(50, np.uint16), np.array([0, 50, 50])).one) == 0


@pytest.mark.shared_data
def test_real_clips_recoded_in_another_fold_are_found_and_so_is_a_recording_that_stands_in_two_folds_of_esc10(
    here, sharded, tmp_path
):
    folder = tmp_path / "real"
    folder.mkdir()
    with open(SHARED / "esc10/esc10.csv", newline="") as file:
        every = {row["filename"]: row for row in csv.DictReader(file)}
    same = {"3-151080-A-20", "5-151085-A-20"}  # two cuts of one recording, by one uploader
    listed = {name: every[name] for name in sorted({*sorted(every)[1::4], *(f"{stem}.ogg" for stem in same)})}
    rows = [
        {"filename": n, "label": r["category"], "fold": r["fold"], "group": r["src_file"]}
        for n, r in listed.items()
    ]
    for name in listed:
        shutil.copy(SHARED / "esc10/audio" / name, folder / name)
    expected = {frozenset(same)}
    for name in sorted(every)[5::20]:
        stem = Path(name).stem
        command = [
            ffmpeg_program(),
            "-loglevel",
            "error",
            "-i",
            str(folder / name),
            "-b:a",
            "64k",
            str(folder / f"x{stem}.mp3"),
        ]
        subprocess.run(command, check=True)
        rows.append(
            {"filename": f"x{stem}.mp3", "label": listed[name]["category"], "fold": 6, "group": f"x{stem}"}
        )
        expected.add(frozenset({stem, f"x{stem}"}))
    done = here("leaks", sharded(folder, rows, "--clips-per-shard", 64), "--jobs", 1, "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert pairs(found["near"]["leaks"]) == expected
    assert found["near"]["not_fingerprinted"] == []

"""The synthetic collection: what it promises, that its mess is real, and that it is made the same every time."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from sklearn.ensemble import ExtraTreesClassifier

from clipmill import audio
from clipmill.datasets import Prepared, dataset_class
from clipmill.datasets.tones import FOLDS, LABELS, TAKES, Tones, broken, synthesize, write_unseen
from clipmill.errors import ConfigError, DecodeError, FetchError, TableError
from clipmill_manifests import facts


def decode(path: Path) -> tuple[np.ndarray, int]:
    """Any of the files by libsndfile, else by FFmpeg's libraries: `[channels, samples]` and its rate in Hz."""
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.SoundFileError:
        with av.open(str(path)) as file:
            frames = [frame.to_ndarray() for frame in file.decode(audio=0)]
            rate = file.streams.audio[0].rate
        return np.concatenate(frames, axis=1), rate
    return samples.T, rate


def pcm(prepared: Prepared) -> dict[str, bytes]:
    """What every clip that can be decoded decodes to, by key."""
    rows = prepared.manifest.to_pylist()
    bad = broken(len(rows), int(prepared.media_root.parent.name))
    whole = [row for row in rows if row["key"] not in bad]
    return {row["key"]: decode(prepared.media_root / row["source"])[0].tobytes() for row in whole}


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def finished(folder: Path) -> dict[Path, int]:
    """The files that bear their own name, and when each was written in ns."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {path: path.stat().st_mtime_ns for path in paths}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Prepared:
    return Tones(clips=50, seed=1).prepare(tmp_path_factory.mktemp("tones") / "1")


@pytest.fixture(scope="module")
def decoded(prepared) -> list[tuple[str, np.ndarray, int]]:
    """Source, samples and rate of every clip that is whole."""
    bad = broken(50, 1)
    sources = [row["source"] for row in prepared.manifest.to_pylist() if row["key"] not in bad]
    return [(source, *decode(prepared.media_root / source)) for source in sources]


def test_by_default_it_has_300_clips_of_10_classes_in_5_folds_that_keep_groups_together():
    rows = dataset_class("tones")().manifest().to_pylist()
    assert len(rows) == 300
    assert set(Counter(row["labels"][0] for row in rows).items()) == {(label, 30) for label in LABELS}
    assert set(Counter((row["labels"][0], row["fold"]) for row in rows).values()) == {6}
    assert {row["fold"] for row in rows} == set(range(1, FOLDS + 1))
    folds, labels = defaultdict(set), defaultdict(set)
    for row in rows:
        folds[row["group"]].add(row["fold"])
        labels[row["group"]].add(row["labels"][0])
    assert all(len(seen) == 1 for seen in (*folds.values(), *labels.values()))
    assert len(folds) == 300 // TAKES
    assert {row["split"] for row in rows} == {"all"}
    assert len({row["source"] for row in rows}) == 300


@pytest.mark.parametrize("clips", [10, 11, 40, 333])
def test_any_number_of_clips_spreads_evenly_over_classes_and_folds(clips):
    rows = Tones(clips=clips).manifest().to_pylist()
    assert len(rows) == clips
    for counts in (Counter(row["labels"][0] for row in rows), Counter(row["fold"] for row in rows)):
        assert max(counts.values()) - min(counts.values()) <= 2
    assert len({row["fold"] for row in rows}) == FOLDS


def test_a_file_format_tells_nothing_of_the_class():
    rows = Tones(clips=3000).manifest().to_pylist()
    kinds = Counter((Path(row["source"]).suffix, row["labels"][0]) for row in rows)
    totals = Counter(Path(row["source"]).suffix for row in rows)
    assert all(0.05 < count / totals[suffix] < 0.16 for (suffix, _), count in kinds.items())


def test_the_facts_are_those_of_the_collection():
    about = facts("tones")
    assert (about["clips"], about["classes"], about["folds"]) == (Tones().clips, len(LABELS), FOLDS)
    assert about["targets"] == {label: place for place, label in enumerate(sorted(LABELS))}


def test_esc50_has_its_fifty_official_targets_and_the_ten_of_esc10():
    about = facts("esc50")
    assert sorted(about["targets"].values()) == list(range(50))
    targets = [about["targets"][name] for name in about["esc10_classes"]]
    assert targets == [0, 1, 10, 11, 12, 20, 21, 38, 40, 41]


@pytest.mark.parametrize(("options", "flag"), [({"clips": 9}, "--clips"), ({"seed": -1}, "--seed")])
def test_options_that_cannot_be_are_refused_with_the_flag_that_mends_them(options, flag):
    with pytest.raises(ConfigError, match=flag):
        Tones(**options)


def test_clips_last_from_0_3_to_5_seconds_and_sound_throughout(decoded):
    for source, samples, rate in decoded:
        assert 0.3 <= samples.shape[1] / rate <= 5.0, source
        mono = samples.mean(axis=0)
        # AAC begins with 1024 samples of nothing, and lossy codecs may end with some.
        tenths = [np.abs(part).max() for part in np.array_split(mono[1024 : -(rate // 10)], 8)]
        assert min(tenths) > 0.02 * np.abs(mono).max(), source
        assert -40 < 20 * np.log10(np.abs(samples).max()) < 0.5, source


def test_formats_rates_channels_and_encodings_are_a_real_mess(prepared, decoded):
    suffixes = {Path(source).suffix for source, _, _ in decoded}
    assert suffixes == {".WAV", ".flac", ".ogg", ".mp3", ".webm", ".m4a"}
    assert {len(samples) for _, samples, _ in decoded} == {1, 2, 6}
    rates = {rate for _, _, rate in decoded}
    assert {8000, 16000, 22050, 24000, 32000, 44100, 48000, 88200, 96000} == rates
    paths = [prepared.media_root / source for source, _, _ in decoded]
    said = [soundfile.info(path) for path in paths if path.suffix not in (".webm", ".m4a")]
    assert {f"{info.format} {info.subtype}" for info in said} >= {
        "WAV PCM_U8", "WAV PCM_16", "WAV PCM_24", "WAV FLOAT", "WAVEX PCM_24",
        "FLAC PCM_16", "FLAC PCM_24", "OGG VORBIS", "MP3 MPEG_LAYER_III",
    }  # fmt: skip
    codecs = set()
    for path in paths:
        if path.suffix in (".webm", ".m4a"):
            with av.open(str(path)) as file:
                codecs.add(file.streams.audio[0].codec_context.name.removeprefix("lib"))
    assert codecs == {"opus", "aac"}


def test_names_hold_spaces_dots_accents_capitals_and_a_leading_dash(prepared):
    names = "\n".join(prepared.manifest["source"].to_pylist())
    assert all(sign in names for sign in (" ", "Å", "é", "(", ".WAV", "/-", "take"))
    assert any(Path(name).stem.count(".") for name in names.splitlines())


def test_three_hundred_clips_have_eight_broken_ones_and_thirty_have_one_for_each_reason():
    assert Counter(broken().values()) == {"corrupt": 3, "empty": 3, "silent": 2}
    assert Counter(broken(30).values()) == {"corrupt": 1, "empty": 1, "silent": 1}
    assert broken(40, seed=1) != broken(40, seed=2)
    assert len(broken(4000)) == 100


def test_broken_clips_are_wanted_like_all_others_and_prepare_says_nothing_of_them(prepared):
    assert set(broken(50, 1)) <= set(prepared.manifest["key"].to_pylist())
    assert not prepared.failures


def test_every_way_to_be_broken_is_found_out_for_the_reason_announced(tmp_path):
    # 300 clips have all eight ways; only the broken ones are made here, since the rest would take long.
    from clipmill.datasets.tones import _file_bytes, _plan

    jobs = [job for job in _plan(300, 5) if job.breakage]
    assert {job.clip.key for job in jobs} == set(broken(300, 5))
    for job in jobs:
        path = tmp_path / Path(job.clip.source).name
        path.write_bytes(_file_bytes(job, 5))
        reason = broken(300, 5)[job.clip.key]
        if reason == "silent":
            samples, _ = decode(path)
            assert samples.size
            assert not samples.any()
            continue
        with pytest.raises(DecodeError) as caught:
            audio.decode(path)
        assert caught.value.reason == reason, job.breakage
        if reason == "corrupt":
            with pytest.raises(av.FFmpegError):
                decode(path)


def test_equal_seeds_give_equal_samples_and_others_do_not(tmp_path):
    one, two = (Tones(clips=20, seed=4).prepare(tmp_path / where / "4") for where in "ab")
    other = Tones(clips=10, seed=5).prepare(tmp_path / "5")
    assert one.manifest == two.manifest
    assert pcm(one) == pcm(two)
    assert not set(pcm(one).values()) & set(pcm(other).values())


def test_killed_halfway_and_run_again_it_is_as_if_never_killed(tmp_path):
    dest = tmp_path / "killed" / "7"
    code = (
        "from pathlib import Path; from clipmill.datasets.tones import Tones;"
        f"Tones(clips=30, seed=7).prepare(Path({str(dest)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    until = time.monotonic() + 60
    while len(finished(dest)) < 6:
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = finished(dest)
    assert 6 <= len(before) < 30
    # What a kill leaves when it comes in the middle of a file.
    (next(iter(before)).parent / f".{next(iter(before)).name}.1.tmp").write_bytes(b"half")

    again = Tones(clips=30, seed=7).prepare(dest)
    whole = Tones(clips=30, seed=7).prepare(tmp_path / "whole" / "7")
    assert files(again.media_root) == {".tones.json", *again.manifest["source"].to_pylist()}
    assert again.manifest == whole.manifest
    assert pcm(again) == pcm(whole)
    assert before.items() <= finished(dest).items(), "finished files were made again"


def test_a_finished_folder_is_left_as_it_is_at_once(prepared):
    before = finished(prepared.media_root)
    start = time.monotonic()
    again = Tones(clips=50, seed=1).prepare(prepared.media_root.parent)
    assert time.monotonic() - start < 1
    assert again.manifest == prepared.manifest
    assert before == finished(prepared.media_root)


def test_other_options_make_the_folder_anew_and_leave_what_is_not_theirs(tmp_path):
    media = Tones(clips=20, seed=1).prepare(tmp_path).media_root
    (media / "recorder" / "my notes.txt").write_text("mine")
    old = {path.relative_to(media): path.read_bytes() for path in media.rglob("*") if path.is_file()}
    new = Tones(clips=12, seed=2).prepare(tmp_path)
    assert files(media) == {".tones.json", "recorder/my notes.txt", *new.manifest["source"].to_pylist()}
    kept = [
        name for name in old if (media / name).exists() and (media / name).read_bytes() == old[name] != b""
    ]
    assert kept == [Path("recorder/my notes.txt")]


@pytest.mark.parametrize("name", ["media", "media/mine.wav"])
def test_files_of_others_in_the_folder_or_its_place_are_not_touched(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(FetchError, match="--root"):
        Tones(clips=10).prepare(tmp_path)
    assert files(tmp_path) == {name}


def test_a_marker_that_names_files_elsewhere_removes_none_of_them(tmp_path):
    (tmp_path / "media").mkdir()
    (tmp_path / "precious.wav").write_bytes(b"precious")
    marker = tmp_path / "media" / ".tones.json"
    marker.write_text('{"options": {}, "files": ["../precious.wav"]}')
    Tones(clips=10).prepare(tmp_path)
    assert (tmp_path / "precious.wav").read_bytes() == b"precious"
    marker.write_text("[]")
    with pytest.raises(TableError, match=r"\.tones\.json"):
        Tones(clips=10).prepare(tmp_path)


def test_unseen_files_are_new_one_a_class_and_tell_nothing_by_name(tmp_path):
    written = write_unseen(tmp_path / "a")
    assert sorted(label for _, label in written) == sorted(LABELS)
    assert len({path.suffix for path, _ in written}) == 6
    assert not any(label in path.name for path, _ in written for label in LABELS)
    again = write_unseen(tmp_path / "b")
    assert [label for _, label in again] == [label for _, label in written]
    for (one, _), (two, _) in zip(written, again, strict=True):
        np.testing.assert_array_equal(decode(one)[0], decode(two)[0])
    assert [label for _, label in write_unseen(tmp_path / "c", seed=3)] != [label for _, label in written]


def features(mono: np.ndarray) -> np.ndarray:
    """Timbre and movement of 0.3 s at 8 kHz, apart from level and, largely, from pitch."""
    frames = np.lib.stride_tricks.sliding_window_view(mono, 256)[::32] * np.hanning(256)
    spectrum = np.log(np.abs(np.fft.rfft(frames))[:, 2:112] + 1e-5)
    spectrum -= spectrum.mean()
    later, sooner = spectrum[4:], spectrum[:-4]
    moves = [
        np.mean(later[:, k:] * sooner[:, :-k]) - np.mean(sooner[:, k:] * later[:, :-k]) for k in (1, 2, 4)
    ]
    flat, spread = np.sort(spectrum.mean(axis=0)), np.sort(spectrum.std(axis=0))
    change, swing = np.abs(np.diff(spectrum, axis=0)).mean(), spectrum.mean(axis=1).std()
    return np.concatenate([flat, spread, moves, [change, swing]])


def test_a_simple_model_tells_the_classes_from_0_3_seconds_at_8_khz():
    rng = np.random.default_rng(0)
    labels = np.repeat(LABELS, 40)
    inputs = np.stack([features(synthesize(label, 0.3, 8000, rng)) for label in labels])
    held_out = np.arange(len(labels)) % 4 == 0
    model = ExtraTreesClassifier(200, random_state=0).fit(inputs[~held_out], labels[~held_out])
    assert model.score(inputs[held_out], labels[held_out]) > 0.9

"""`pipeline features` as its users meet it: killed, without room, twice at once, damaged, and what is said then."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from clipmill.features import create_feature
from clipmill.features.spec import FeatureSpec
from clipmill.featurestore import FeatureStore
from clipmill.featurestore.files import read_sealed
from clipmill.report.feature_picture import bin_names, plot_feature

Here = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="module")
def sound(make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 clips in 22 shards."""
    out = tmp_path_factory.mktemp("sound") / "shards"
    make(out, clips_per_shard=1)
    return out


def build(sound: Path, store: Path, *more: object) -> tuple[object, ...]:
    return (
        "features",
        "build",
        sound,
        "--feature",
        "logmel",
        "--store",
        store,
        "--device",
        "cpu",
        "--jobs",
        1,
        *more,
    )


@pytest.fixture
def built(here: Here, sound: Path, tmp_path: Path) -> FeatureStore:
    done = here(*build(sound, tmp_path / "features"))
    assert done.returncode == 0, done.stderr
    return FeatureStore(tmp_path / "features")


def bytes_of(store: Path) -> dict[str, bytes]:
    """Every byte of the only entry; of entry.json all but the date."""
    (entry,) = FeatureStore(store).entries()
    found = {path.name: path.read_bytes() for path in entry.folder.iterdir()}
    said = read_sealed(entry.folder / "entry.json")
    said.pop("as_of")
    return found | {"entry.json": json.dumps(said, sort_keys=True).encode()}


def failed(done: subprocess.CompletedProcess, code: int, *said: str) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    for text in said:
        assert text in done.stderr, done.stderr


@contextlib.contextmanager
def in_the_middle(sound: Path, store: Path, records: int) -> Iterator[subprocess.Popen]:
    """A building process, stopped while it writes a file, after so many records; killed in the end."""
    command = [sys.executable, "-m", "clipmill", *map(str, build(sound, store))]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while len(list(store.glob("*/small-*.json"))) < records or not list(store.glob("*/.*.tmp")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGSTOP)
        try:
            yield process
        finally:
            process.kill()


def test_killed_and_with_a_second_builder_beside_it_comes_to_the_same_bytes(here, built, sound, tmp_path):
    store = tmp_path / "killed"
    with in_the_middle(sound, store, 3):
        (folder,) = store.iterdir()
        failed(here(*build(sound, store)), 1, f"{folder}: another run is writing there; wait for it")
        failed(here("features", "drop", "logmel", "--store", store, "--yes"), 1, "another run is writing")
    assert list(folder.glob(".*.tmp")), "it was killed while it wrote"
    done = here("features", "get", "any", "--feature", "logmel", "--store", store)
    failed(done, 1, f"{folder}: is not finished; to finish it: pipeline features build {sound}")
    assert "is not finished" in here("features", "verify", "--store", store, "--device", "cpu").stdout
    mend = done.stderr.partition("to finish it: ")[2].strip()
    finished = here(*shlex.split(mend)[1:], "--device", "cpu", "--jobs", 1)
    assert finished.returncode == 0, finished.stderr
    assert bytes_of(store) == bytes_of(built.folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_leaves_nothing_half_made_and_the_same_command_goes_on(
    here, cold, built, sound, small_disk
):
    command = build(sound, small_disk / "features")
    (small_disk / "room").write_bytes(bytes(1_040_000))
    failed(here(*command), 1, "No space left on device; free some space and run the same command again")
    (small_disk / "room").unlink()
    done = cold(*command)  # HDF5 has its say when a process ends
    failed(done, 3, "No space left on device; the same command goes on", "22 in = ")
    (folder,) = (small_disk / "features").iterdir()
    assert 0 < len(list(folder.glob("*.h5"))) < 22
    assert not list(folder.glob(".*"))
    failed(here("features", "show", "logmel", "--store", small_disk / "features"), 1, "is not finished")
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    done = here(*command)
    assert done.returncode == 0, done.stderr
    assert bytes_of(small_disk / "features") == bytes_of(built.folder)


def test_a_damaged_file_ends_verify_with_1_and_the_command_it_says_mends_it(here, built):
    before, store = bytes_of(built.folder), ("--store", built.folder)
    (entry,) = built.entries()
    path = entry.folder / entry.info["shards"][4]["file"]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    key = entry.clips.keys_of(np.array([4]))[0]
    failed(here("features", "get", key, *store), 1, f"the feature of {key} cannot be read", "features verify")
    done = here("features", "verify", "logmel", *store, "--device", "cpu", "--jobs", 1)
    assert done.returncode == 1
    assert f"problem: {entry.id}: {path.name}: its sha256 is not the one recorded" in done.stdout
    assert f"problem: {entry.id}: {path.name}: clip {key}'s bytes are not those" in done.stdout
    assert f"UNSOUND: {entry.id}: 24 files, 22 clips" in done.stdout
    mend = done.stderr.partition("to mend: ")[2].strip()
    assert mend.endswith("--check-hashes")
    assert here(*shlex.split(mend)[1:], "--device", "cpu", "--jobs", 1).returncode == 0
    assert bytes_of(built.folder) == before
    done = here("features", "verify", *store, "--device", "cpu", "--full", "--jobs", 1)
    assert done.returncode == 0, done.stdout
    assert f"sound: {entry.id}: 24 files, 22 clips" in done.stdout
    assert "22 clips computed again on" in done.stdout
    assert "to the bit" in done.stdout


def test_built_again_it_says_that_all_is_there_and_other_settings_are_another_entry(here, built, sound):
    done = here(*build(sound, built.folder, "--json"))
    (said,) = json.loads(done.stdout)
    assert done.returncode == 0
    assert "all of it is there" in done.stderr
    assert (said["computed_files"], said["counts"]["written"], said["state"]) == (0, 22, "finished")
    done = here(
        *build(
            sound,
            built.folder,
            "--set",
            "n_mels=32",
            "--set",
            "logmel.f_max=8000",
            "--dtype",
            "float32",
            "--json",
        )
    )
    (said,) = json.loads(done.stdout)
    assert said["what"].startswith("float32, f_max 8000.0, n_mels 32, of small with root_sha256")
    listed = json.loads(here("features", "list", "--store", built.folder, "--json").stdout)
    assert {row["id"] for row in listed} == set(built.ids) == {said["id"], *built.ids}
    assert len(listed) == 2
    done = here("features", "show", "logmel", "--store", built.folder)
    failed(done, 1, "has 2 entries of logmel; name one of them: ", said["id"])
    shown = json.loads(here("features", "show", said["id"], "--store", built.folder, "--json").stdout)
    assert shown["spec"]["settings"]["n_mels"] == 32
    assert len(shown["statistics"]["mean"]) == 32
    done = here("features", "drop", said["id"], "--store", built.folder, "--yes", "--json")
    assert json.loads(done.stdout) == {"dropped": said["id"]}
    assert len(built.ids) == 1


def test_what_is_shown_and_listed_to_a_person(here, built):
    listed = here("features", "list", "--store", built.folder).stdout
    shown = here("features", "show", "logmel", "--store", built.folder).stdout
    (entry,) = built.entries()
    for text in (entry.id, "22", "finished", "float16"):
        assert text in listed
    for text in (
        "Log-mel spectrogram",
        "128 bins, in dB",
        entry.spec.sha256,
        "soxr HQ",
        "mean (dB)",
        "torch ",
    ):
        assert text in shown
    (entry.folder / "entry.json").write_text("{}")
    assert "damaged: " in here("features", "list", "--store", built.folder).stdout
    failed(here("features", "show", "logmel", "--store", built.folder), 1, "entry.json: is damaged")


def test_one_clip_as_figures_as_a_picture_and_as_numbers(here, built, tmp_path):
    (entry,) = built.entries()
    key, store = entry.clips.keys_of(np.array([3]))[0], ("--store", built.folder)
    (expected,) = built.get([key], stored=True)
    said = json.loads(here("features", "get", key, *store, "--json").stdout)
    assert said["shape"] == list(expected.shape)
    assert said["mean"] == pytest.approx(expected.double().mean().item())
    assert f"{key}: logmel [128, " in here("features", "get", key, *store).stdout
    done = here(
        "features",
        "get",
        key,
        "--feature",
        entry.id,
        *store,
        "--plot",
        tmp_path / "x.png",
        "--out",
        tmp_path / "x.npy",
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert (tmp_path / "x.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert np.array_equal(np.load(tmp_path / "x.npy"), expected.numpy())
    failed(here("features", "get", "-0RWZT-miFs_420000", *store), 1, "has no clip -0RWZT-miFs_420000")
    failed(here("features", "get", key, *store, "--plot", tmp_path / "x.doc"), 2, "allowed endings are .png")
    failed(here("features", "get", key, *store, "--out", tmp_path / "x.csv"), 2, "ends in .npy")


@pytest.mark.parametrize(("name", "axis", "some"), [
    ("logmel", "mel band, centre (Hz)", {0: "76", 127: "13616"}),
    ("cqt", "note (Hz)", {0: "33", 12: "65", 45: "440"}),
    ("chroma", "pitch class", {0: "C", 9: "A", 11: "B"}),
    ("mfcc", "coefficient", {0: "0", 63: "63"}),
    ("gfcc", "coefficient", {0: "0", 63: "63"}),
    ("tempogram", "lag (s)", {0: "0.00", 128: "1.00"}),
])  # fmt: skip
def test_the_picture_of_each_feature_says_what_its_bins_are(name, axis, some, tmp_path):
    feature = create_feature(name, sample_rate=44100)
    spec = FeatureSpec(name, feature.VERSION, feature.config, "float32", {})
    what, names = bin_names(spec, feature.bins)
    assert (what, len(names)) == (axis, feature.bins)
    assert {place: names[place] for place in some} == some
    plot_feature(np.zeros((feature.bins, 256), np.float32), spec, feature.UNIT, "nothing", tmp_path / "x.svg")
    assert f"<!-- {axis} -->" in (tmp_path / "x.svg").read_text()


@pytest.mark.parametrize(("arguments", "code", "said"), [
    (("build", "nowhere", "--feature", "logmel"), 1, "nowhere: no such shard"),
    (("build", "{sound}",), 2, "Missing option '--feature'"),
    (("build", "{sound}", "--feature", "humming"), 1, "no feature is called 'humming'"),
    (("build", "{sound}", "--feature", "logmel", "--set", "n_mels"), 2, "--set n_mels: allowed is KEY=VALUE"),
    (("build", "{sound}", "--feature", "logmel", "--set", "cqt.n_bins=3"), 2, "cqt is not asked for; allowed are logmel"),
    (("build", "{sound}", "--feature", "logmel", "--feature", "cqt", "--set", "n=3"), 2, "say of which feature: --set logmel.n=3"),
    (("build", "{sound}", "--feature", "logmel", "--set", "colour=red"), 1, "logmel has no setting colour"),
    (("build", "{sound}", "--feature", "logmel", "--set", "n_mels=0"), 1, "must be above 0"),
    (("build", "{sound}", "--feature", "logmel", "--set", "n_mels=many"), 1, "--set n_mels=many: allowed is a whole number"),
    (("build", "{sound}", "--feature", "logmel", "--set", "mel_norm=null", "--set", "f_max=high"), 1, "allowed is a number"),
    (("build", "{sound}", "--feature", "logmel", "--set", "hop=320"), 1, "has not 128 frames a second"),
    (("build", "{sound}", "--feature", "logmel", "--dtype", "int8"), 2, "'int8' is not one of"),
    (("build", "{sound}", "--feature", "logmel", "--device", "tpu"), 2, "--device tpu: allowed are auto, cpu"),
    (("build", "{sound}", "--feature", "logmel", "--partition", "x"), 2, "--partition goes with --engine slurm"),
    (("list",), 1, "features: is no feature store; `pipeline features build"),
    (("verify", "logmel"), 1, "is no feature store"),
    (("drop", "logmel", "--yes"), 1, "is no feature store"),
])  # fmt: skip
def test_what_cannot_be_done_is_said_in_a_sentence(here, sound, tmp_path, monkeypatch, arguments, code, said):
    monkeypatch.chdir(tmp_path)
    failed(here("features", *(str(word).format(sound=sound) for word in arguments)), code, said)
    assert not (tmp_path / "features").exists()


def test_the_store_may_be_named_by_the_environment(here, built, monkeypatch):
    monkeypatch.setenv("CLIPMILL_FEATURES", str(built.folder))
    assert json.loads(here("features", "list", "--json").stdout)[0]["id"] == built.ids[0]


def test_a_drop_asks_first(here, built, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    done = here("features", "drop", "logmel", "--store", built.folder)
    assert (done.returncode, "remove " in done.stderr, "kept: " in done.stderr) == (1, True, True)
    assert len(built.ids) == 1
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert here("features", "drop", "logmel", "--store", built.folder).returncode == 0
    assert built.ids == []

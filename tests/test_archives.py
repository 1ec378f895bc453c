"""The datasets that come as one archive: small copies of the real layouts, provided and prepared; and their folds."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tarfile
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pytest
import soundfile

from clipmill import tables
from clipmill.datasets import Remote, dataset_class
from clipmill.datasets.archive import Archived
from clipmill.datasets.folds import check_groups
from clipmill.datasets.ravdess import ACTORS, Ravdess, fold_of
from clipmill.datasets.speechcommands import SpeechCommands
from clipmill.datasets.tones import Tones
from clipmill.datasets.urbansound8k import UrbanSound8K
from clipmill.errors import ConfigError, FetchError, TableError
from clipmill.fetch.archives import provide
from clipmill.fetch.watch import Watch
from clipmill_manifests import facts
from conftest import sound

ARCHIVED = ("esc50", "urbansound8k", "ravdess", "speechcommands")


def wav() -> bytes:
    file = io.BytesIO()
    soundfile.write(file, sound(0.1, 16000), 16000, format="WAV")
    return file.getvalue()


WAV = wav()
US8K_HEAD = "slice_file_name,fsID,start,end,salience,fold,classID,class\n"
LAYOUTS: dict[str, dict[str, bytes]] = {
    "esc50": {
        "ESC-50-33c8ce9/meta/esc50.csv": b"filename,fold,target,category,esc10,src_file,take\n1-7-A-0.wav,1,0,dog,True,7,A\n2-8-A-36.wav,2,36,vacuum_cleaner,False,8,A\n",
        "ESC-50-33c8ce9/audio/1-7-A-0.wav": WAV,
        "ESC-50-33c8ce9/audio/2-8-A-36.wav": WAV,
    },
    "urbansound8k": {
        "UrbanSound8K/metadata/UrbanSound8K.csv": (
            US8K_HEAD + "7061-6-0-0.wav,7061,0.0,4.0,1,1,6,gun_shot\n7061-6-1-0.wav,7061,9.5,10.25,1,1,6,gun_shot\n"
            "7383-3-0-0.wav,7383,0,1,1,10,3,dog_bark\n"
        ).encode(),
        "UrbanSound8K/audio/fold1/7061-6-0-0.wav": WAV,
        "UrbanSound8K/audio/fold1/7061-6-1-0.wav": WAV,
        "UrbanSound8K/audio/fold1/._7061-6-1-0.wav": b"junk",
        "UrbanSound8K/audio/fold10/7383-3-0-0.wav": WAV,
        "UrbanSound8K/audio/fold10/stray.wav": WAV,
    },
    "ravdess": {
        f"Actor_{actor:02d}/03-01-06-01-02-01-{actor:02d}.wav": WAV for actor in (1, 7, 13, 24)
    } | {"audio_speech_actors_01-24/Actor_01/03-01-06-01-02-01-01.wav": WAV},
    "speechcommands": {
        "./validation_list.txt": b"yes/0132a06d_nohash_0.wav\nno/0132a06d_nohash_1.wav\n",
        "./testing_list.txt": b"yes/ffd2ba2f_nohash_0.wav\n",
        "./yes/0132a06d_nohash_0.wav": WAV,
        "./yes/ffd2ba2f_nohash_0.wav": WAV,
        "./zero/00b01445_nohash_2.wav": WAV,
        "./_background_noise_/white_noise.wav": WAV,
        "./_background_noise_/README.md": b"noise",
        "./README.md": b"words",
    },
}  # fmt: skip


def packed(path: Path, files: dict[str, bytes]) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(path, "w:gz") as tar:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def site(tmp_path):
    """A server of the folder `site`; it lists what was asked for."""
    folder = tmp_path / "site"
    folder.mkdir()
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            asked.append(self.path)

    service = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{service.server_port}", asked
    service.shutdown()
    service.server_close()


def official(kind: str, site, **options: object) -> Archived:
    """The dataset, with a small archive at our own server in the place of the official one."""
    folder, address, _ = site
    archive = packed(folder / facts(kind)["files"][0]["file"], LAYOUTS[kind])
    data = archive.read_bytes()
    remote = Remote(
        archive.name, (f"{address}/{archive.name}",), len(data), "sha256:" + hashlib.sha256(data).hexdigest()
    )
    base = dataset_class(kind)
    needs = property(lambda self: () if self.from_dir else (remote,))
    return dataclasses.make_dataclass(
        base.__name__, [], bases=(base,), frozen=True, namespace={"needs": needs}
    )(**options)


def rows(prepared) -> list[dict]:
    names = ("key", "source", "labels", "split", "fold", "group")
    return prepared.manifest.select(names).to_pylist()


@pytest.mark.parametrize("kind", ARCHIVED)
def test_the_archive_is_downloaded_unpacked_and_listed_once(kind, site, tmp_path):
    dataset, folder = official(kind, site), tmp_path / "data"
    for _ in range(2):
        provide(dataset, folder)
        prepared = dataset.prepare(folder)
    assert prepared.manifest.num_rows > 0
    lost = {failure.key for failure in prepared.failures}
    for row in rows(prepared):
        assert (prepared.media_root / row["source"]).is_file() == (row["key"] not in lost)
    assert len(site[2]) == 1
    assert [path.name for path in folder.iterdir()] == ["media"]


@pytest.mark.parametrize("kind", ARCHIVED)
def test_what_was_unpacked_by_hand_needs_nothing(kind, site, tmp_path):
    official_one = official(kind, site)
    provide(official_one, tmp_path / "data")
    unpacked = tmp_path / "data/media"
    dataset = official(kind, site, from_dir=unpacked)
    site[2].clear()
    provide(dataset, tmp_path / "other")
    assert rows(dataset.prepare(tmp_path / "other")) == rows(official_one.prepare(tmp_path / "data"))
    assert (site[2], (tmp_path / "other").exists()) == ([], False)


@pytest.mark.parametrize("kind", ARCHIVED)
def test_a_folder_that_is_something_else_is_refused_with_what_is_expected(kind, tmp_path):
    with pytest.raises(FetchError, match=r"has no .*; expected is what https://"):
        dataset_class(kind)(from_dir=tmp_path).prepare(tmp_path)


def test_urbansound8k_has_its_folds_and_a_slice_is_the_whole_of_its_file(site, tmp_path):
    dataset = official("urbansound8k", site)
    provide(dataset, tmp_path / "data")
    prepared = dataset.prepare(tmp_path / "data")
    assert rows(prepared) == [
        {"key": "7061-6-0-0", "source": "fold1/7061-6-0-0.wav", "labels": ["gun_shot"], "split": "all", "fold": 1, "group": "freesound-7061"},
        {"key": "7061-6-1-0", "source": "fold1/7061-6-1-0.wav", "labels": ["gun_shot"], "split": "all", "fold": 1, "group": "freesound-7061"},
        {"key": "7383-3-0-0", "source": "fold10/7383-3-0-0.wav", "labels": ["dog_bark"], "split": "all", "fold": 10, "group": "freesound-7383"},
    ]  # fmt: skip
    assert prepared.manifest["start_s"].null_count == 3
    assert prepared.failures == []


def urbansound(root: Path, *slices: tuple[str, int]) -> UrbanSound8K:
    (root / "metadata").mkdir(parents=True)
    lines = []
    for number, (source, fold) in enumerate(slices):
        name = f"{source}-3-0-{number}.wav"
        lines.append(f"{name},{source},0,4,1,{fold},3,dog_bark\n")
        (root / f"audio/fold{fold}").mkdir(parents=True, exist_ok=True)
        (root / f"audio/fold{fold}" / name).write_bytes(WAV)
    (root / "metadata/UrbanSound8K.csv").write_text(US8K_HEAD + "".join(lines))
    return UrbanSound8K(from_dir=root)


def test_a_recording_that_straddles_folds_is_refused_with_the_evidence(tmp_path):
    dataset = urbansound(tmp_path, ("9", 1), ("9", 1), ("9", 10), ("8", 2))
    with pytest.raises(TableError) as caught:
        dataset.prepare(tmp_path)
    assert "1 groups stand in several folds" in str(caught.value)
    assert "freesound-9: 2 clips in fold 1, 1 clips in fold 10" in str(caught.value)
    assert "--allow-leak" in str(caught.value)
    assert dataclasses.replace(dataset, allow_leak=True).prepare(tmp_path).manifest.num_rows == 4


def test_the_recordings_that_straddle_the_official_folds_are_known_and_let_through(tmp_path):
    known = facts("urbansound8k")["straddling"]
    dataset = urbansound(tmp_path, *((source, fold) for source in known for fold in (1, 2)))
    assert dataset.prepare(tmp_path).manifest.num_rows == 10


def test_the_recordings_that_straddle_esc50s_folds_are_known_let_through_and_told(tmp_path):
    known = facts("esc50")["straddling"]
    rows = [f"{fold}-{source}-A-0.wav,{fold},0,dog,True,{source},A" for source in known for fold in (2, 3)]
    (tmp_path / "meta").mkdir()
    (tmp_path / "audio").mkdir()
    (tmp_path / "meta/esc50.csv").write_text(
        "filename,fold,target,category,esc10,src_file,take\n" + "\n".join(rows)
    )
    for row in rows:
        (tmp_path / "audio" / row.partition(",")[0]).write_bytes(WAV)
    dataset = dataset_class("esc50")(from_dir=tmp_path)
    assert dataset.prepare(tmp_path).manifest.num_rows == 8
    assert "4 of its recordings stand in two official folds each (131943, " in dataset.hints()[0]
    assert dataclasses.replace(dataset, subset="esc10").hints() == []


def test_a_wrong_archive_never_takes_the_place_of_good_media(site, tmp_path):
    dataset = official("esc50", site)
    provide(dataset, tmp_path / "data")
    wrong = packed(tmp_path / "wrong.zip", {"holiday/a.wav": WAV})
    with pytest.raises(FetchError, match=r"has no meta/esc50\.csv"):
        provide(dataclasses.replace(dataset, archive=wrong, no_checksum=True), tmp_path / "data")
    assert dataset.prepare(tmp_path / "data").manifest.num_rows == 2


def test_ravdess_has_four_folds_of_three_men_and_three_women(site, tmp_path):
    for fold in (1, 2, 3, 4):
        actors = [actor for actor in range(1, ACTORS + 1) if fold_of(actor) == fold]
        assert (len(actors), sum(actor % 2 for actor in actors)) == (6, 3)
    dataset = official("ravdess", site)
    provide(dataset, tmp_path / "data")
    prepared = dataset.prepare(tmp_path / "data")
    assert prepared.manifest.num_rows == 1440
    assert len(prepared.failures) == 1436
    assert {failure.reason for failure in prepared.failures} == {"missing"}
    assert "is one of the 1440 recordings" in prepared.failures[0].message
    lost = {failure.key for failure in prepared.failures}
    had = [row for row in rows(prepared) if row["key"] not in lost]
    assert [(row["source"], row["labels"], row["fold"], row["group"]) for row in had] == [
        ("Actor_01/03-01-06-01-02-01-01.wav", ["fearful"], 1, "ravdess-actor-01"),
        ("Actor_07/03-01-06-01-02-01-07.wav", ["fearful"], 2, "ravdess-actor-07"),
        ("Actor_13/03-01-06-01-02-01-13.wav", ["fearful"], 3, "ravdess-actor-13"),
        ("Actor_24/03-01-06-01-02-01-24.wav", ["fearful"], 4, "ravdess-actor-24"),
    ]


def test_speechcommands_has_its_lists_as_splits_and_its_noise_apart(site, tmp_path):
    dataset = official("speechcommands", site)
    provide(dataset, tmp_path / "data")
    prepared = dataset.prepare(tmp_path / "data")
    assert [(row["key"], row["labels"], row["split"], row["group"]) for row in rows(prepared)] == [
        ("_background_noise_white_noise", [], "noise", None),
        ("no_0132a06d_nohash_1", ["no"], "valid", "speechcommands-0132a06d"),
        ("yes_0132a06d_nohash_0", ["yes"], "valid", "speechcommands-0132a06d"),
        ("yes_ffd2ba2f_nohash_0", ["yes"], "eval", "speechcommands-ffd2ba2f"),
        ("zero_00b01445_nohash_2", ["zero"], "train", "speechcommands-00b01445"),
    ]
    assert [(f.key, f.reason, f.message) for f in prepared.failures] == [
        ("no_0132a06d_nohash_1", "missing", "validation_list.txt names it, but there is no such file")
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "yes/ffd2ba2f_nohash_0.wav",
            "line 1: 'yes/ffd2ba2f_nohash_0.wav' stands in validation_list.txt too",
        ),
        (
            "maybe/ffd2ba2f_nohash_0.wav",
            "line 1: found 'maybe/ffd2ba2f_nohash_0.wav', expected WORD/SPEAKER_nohash_N.wav",
        ),
        (
            "no/0132a06d_nohash_9.wav",
            "speechcommands-0132a06d: 1 clips in split eval, 1 clips in split valid",
        ),
    ],
)
def test_lists_that_contradict_each_other_or_part_a_speaker_are_refused(tmp_path, line, said):
    (tmp_path / "validation_list.txt").write_text("yes/ffd2ba2f_nohash_0.wav\nyes/0132a06d_nohash_0.wav\n")
    (tmp_path / "testing_list.txt").write_text(f"{line}\n")
    (tmp_path / "yes").mkdir()
    (tmp_path / "yes/0132a06d_nohash_0.wav").write_bytes(WAV)
    with pytest.raises(TableError) as caught:
        SpeechCommands(from_dir=tmp_path).prepare(tmp_path)
    assert said in str(caught.value)


def manifest(*clips: tuple[str | None, str, int | None]) -> pa.Table:
    columns = {"key": [str(n) for n in range(len(clips))], "source": [f"{n}.wav" for n in range(len(clips))]}
    groups, splits, folds = ([clip[n] for clip in clips] for n in range(3))
    return tables.manifest_table(
        {**columns, "labels": [[]] * len(clips), "group": groups, "split": splits, "fold": folds}
    )


def test_groups_that_keep_to_one_side_pass_and_so_do_clips_without():
    check_groups(
        manifest(
            ("a", "all", 1),
            ("a", "all", 1),
            ("b", "all", 2),
            (None, "all", 1),
            (None, "all", 2),
            ("a", "all", None),
        )
    )
    check_groups(
        manifest(
            ("a", "balanced_train", None),
            ("a", "unbalanced_train", None),
            ("a", "noise", None),
            ("b", "eval", None),
        )
    )


def test_of_many_groups_that_straddle_three_are_named():
    clips = [(f"g{n}", "all", fold) for n in range(5) for fold in (1, 2)]
    with pytest.raises(
        TableError, match=r"5 groups stand in several folds(.|\n)*g0(.|\n)*g2(.|\n)*and 2 more"
    ):
        check_groups(manifest(*clips))


def test_an_archive_given_is_checked_and_never_removed(site, tmp_path):
    archive = site[0] / facts("esc50")["files"][0]["file"]
    dataset = official("esc50", site, archive=archive)
    provide(dataset, tmp_path / "data")
    assert dataset.prepare(tmp_path / "data").manifest.num_rows == 2
    assert archive.is_file()
    assert site[2] == []
    with pytest.raises(FetchError, match="is no file"):
        provide(dataclasses.replace(dataset, archive=tmp_path / "none.zip"), tmp_path / "data")


def test_another_archive_than_the_known_one_is_refused_with_both_checksums_or_let_through_with_a_word(
    site, tmp_path
):
    other = packed(tmp_path / "mine.zip", LAYOUTS["esc50"] | {"ESC-50-33c8ce9/more.txt": b""})
    dataset = official("esc50", site, archive=other)
    found, expected = hashlib.sha256(other.read_bytes()).hexdigest(), dataset.needs[0].checksum
    with pytest.raises(FetchError) as caught:
        provide(dataset, tmp_path / "data")
    for word in (str(other), found, expected, "--no-checksum"):
        assert word in str(caught.value)
    said: list[str] = []
    provide(dataclasses.replace(dataset, no_checksum=True), tmp_path / "data", Watch(say=said.append))
    assert len(said) == 1
    assert "taken as it is, as --no-checksum says" in said[0]
    assert dataset.prepare(tmp_path / "data").manifest.num_rows == 2


def test_the_downloaded_archive_is_kept_where_that_is_asked(site, tmp_path):
    dataset = official("ravdess", site, keep_archive=True)
    provide(dataset, tmp_path / "data")
    assert (tmp_path / "data/downloads/Audio_Speech_Actors_01-24.zip").is_file()


def test_a_download_of_another_checksum_is_not_unpacked_and_the_flags_that_mend_it_are_named(site, tmp_path):
    dataset = official("ravdess", site)
    packed(site[0] / dataset.needs[0].file, LAYOUTS["ravdess"] | {"more.txt": b""})
    with pytest.raises(FetchError, match=r"expected(.|\n)*--archive FILE(.|\n)*--mirror URL"):
        provide(dataset, tmp_path / "data")
    assert not (tmp_path / "data/media").exists()
    provide(dataclasses.replace(dataset, no_checksum=True), tmp_path / "data")
    assert dataset.prepare(tmp_path / "data").manifest.num_rows == 1440


def test_plain_files_are_downloaded_as_they_are_and_a_dataset_without_needs_is_left_alone(site, tmp_path):
    folder, address, asked = site
    (folder / "list.csv").write_text("a,b\n")

    @dataclasses.dataclass(frozen=True)
    class Lists:
        name: str = "lists"
        needs: tuple[Remote, ...] = (Remote("list.csv", (f"{address}/list.csv",)),)

    for _ in range(2):
        provide(Lists(), tmp_path / "data")  # type: ignore[arg-type]
    assert (tmp_path / "data/downloads/list.csv").read_text() == "a,b\n"
    assert len(asked) == 1
    provide(Tones(), tmp_path / "tones")
    assert not (tmp_path / "tones").exists()


def test_options_that_contradict_each_other_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="give one of them"):
        Ravdess(from_dir=tmp_path, archive=tmp_path)
    with pytest.raises(ConfigError, match="expected http:// or https://; --archive FILE takes a file"):
        Ravdess(mirror=("file:///x.zip",))
    assert Ravdess(mirror=("http://mirror/x.zip",)).needs[0].urls[-1] == "http://mirror/x.zip"


@pytest.mark.parametrize("kind", ARCHIVED)
def test_the_facts_are_complete(kind):
    about = facts(kind)
    assert {
        "title",
        "description",
        "homepage",
        "licence",
        "licence_url",
        "citation",
        "clips",
        "classes",
        "files",
    } <= about.keys()
    assert len(about["targets"]) == about["classes"]
    assert sorted(about["targets"].values()) == list(range(about["classes"]))
    for file in about["files"]:
        kind_of, _, digest = file["checksum"].partition(":")
        assert len(digest) == {"md5": 32, "sha256": 64}[kind_of]
        assert file["size"] > 1e8
        assert all(url.startswith(("https://", "http://download.tensorflow.org/")) for url in file["urls"])


def test_the_command_lists_them_with_what_fetching_needs_and_shows_one_in_full(run, tmp_path):
    listed = {
        d["name"]: d for d in json.loads(run("datasets", "--json", "--root", tmp_path).stdout)["datasets"]
    }
    assert listed["urbansound8k"]["needs"] == "6.0 GB download"
    assert listed["ravdess"]["bytes"] == 208_468_073
    assert listed["folder"]["needs"] == "a folder of your own"
    table = run("datasets", "--root", tmp_path).stdout
    assert all(name in table for name in (*ARCHIVED, "fetching needs", "2.4 GB download", "105829"))
    one = run("datasets", "urbansound8k").stdout
    assert all(
        word in one
        for word in (
            "CC BY-NC 4.0",
            "@inproceedings{salamon2014dataset",
            "pipeline fetch urbansound8k",
            "8732 clips",
        )
    )
    assert "unknown dataset 'urban'" in run("datasets", "urban").stderr

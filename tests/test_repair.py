"""Shards that were damaged are made whole; shards that grow leave the old bytes alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
import soundfile

from clipmill import tables
from clipmill.datasets.folder import Folder
from clipmill.errors import ShardError, TableError
from clipmill.fetch.fetched import state_of
from clipmill.fetch.job import fetch
from clipmill.shards.convert import convert
from clipmill.shards.job import unchanged
from clipmill.shards.plan import PLAN, ShardSpec
from clipmill.shards.read import Shards
from clipmill.shards.verify import verify
from conftest import sound

SHARD = "small-all-000001.tar"


@pytest.fixture(scope="module")
def made(fetched: Path, run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with the small collection, sharded."""
    root = tmp_path_factory.mktemp("made") / "root"
    shutil.copytree(fetched, root)
    assert run("shard", "small", "--root", root, "--clips-per-shard", 5).returncode == 3
    return root


@pytest.fixture
def shards(made: Path, tmp_path: Path) -> Path:
    """The small collection, sharded below its own root."""
    shutil.copytree(made, tmp_path / "root")
    return tmp_path / "root/small/shards/webdataset-flac-44100"


def stamps(folder: Path) -> dict[str, int]:
    """When each shard was last written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}


def damage(folder: Path, kind: str) -> None:
    tar, record = folder / SHARD, (folder / SHARD).with_suffix(".json")
    data = bytearray(tar.read_bytes())
    index = tables.read_table(folder / "index.parquet", tables.INDEX)
    if kind == "truncated tar":
        tar.write_bytes(data[: len(data) // 2])
    elif kind == "flipped byte":
        data[3000] ^= 0xFF
        tar.write_bytes(data)
    elif kind == "missing shard":
        tar.unlink()
    elif kind == "extra shard":
        (folder / "small-all-000077.tar").write_bytes(data)
    elif kind == "missing record":
        record.unlink()
    elif kind == "damaged record":
        record.write_text("{")
    elif kind == "shard and record of another":
        shutil.copy(folder / "small-all-000002.tar", tar)
        shutil.copy(folder / "small-all-000002.json", record)
    elif kind == "duplicate key":
        tables.write_table(folder / "index.parquet", index.take([0, *range(index.num_rows)]))
    elif kind == "index that disagrees":
        tables.write_table(folder / "index.parquet", index.slice(1))
    elif kind == "labels changed in the index":
        labels = pa.array([["bell"]] * index.num_rows, tables.INDEX.field("labels").type)
        tables.write_table(
            folder / "index.parquet", index.set_column(6, tables.INDEX.field("labels"), labels)
        )
    elif kind == "missing index":
        (folder / "index.parquet").unlink()
    elif kind == "failures that do not add up":
        (folder / "failures.jsonl").write_text("")
    elif kind == "counts that do not add up":
        info = tables.read_json(folder / "dataset.json")
        info["counts"]["failed"] += 1
        tables.write_json(folder / "dataset.json", info)
    elif kind == "missing plan":
        (folder / "plan.parquet").unlink()
    elif kind == "damaged plan":
        (folder / "plan.parquet").write_bytes(b"PAR1")
    elif kind in ("labels reversed", "other reasons"):
        info = tables.read_json(folder / "dataset.json")
        info["labels"].reverse() if kind == "labels reversed" else info["counts"].update(
            reasons={"silent": 2}
        )
        tables.write_json(folder / "dataset.json", info)
    elif kind == "record of no shard":
        shutil.copy(record, folder / "small-all-000077.json")
    elif kind == "a folder called like a shard":
        (folder / "small-all-000077.tar").mkdir()
    elif kind == "card of other shards":
        (folder / "croissant.json").write_text('{"version": "0", "distribution": []}')


@pytest.mark.parametrize(("kind", "touched", "problem"), [
    ("truncated tar", {SHARD}, f"{SHARD}: is cut short"),
    ("flipped byte", {SHARD}, f"{SHARD}: its sha256 is not the one recorded"),
    ("missing shard", {SHARD}, f"{SHARD}: is missing"),
    ("extra shard", set(), "small-all-000077.tar: is in the folder but not in dataset.json"),
    ("missing record", set(), f"{SHARD}: has no record small-all-000001.json that fits its size"),
    ("damaged record", set(), f"{SHARD}: its record cannot be read"),
    ("shard and record of another", {SHARD}, f"{SHARD}: its record and dataset.json disagree"),
    ("duplicate key", set(), "stands more than once in index.parquet"),
    ("index that disagrees", set(), "index.parquet has"),
    ("labels changed in the index", set(), "index.parquet and its record disagree on what it holds"),
    ("missing index", set(), "its index.parquet is missing; `pipeline verify --repair` puts it together"),
    ("missing plan", set(), "plan.parquet: is missing"),
    ("damaged plan", set(), "plan.parquet: cannot be read"),
    ("labels reversed", set(), "dataset.json: its labels are not those of plan.parquet"),
    ("other reasons", set(), "failures.jsonl: has other reasons than dataset.json says"),
    ("record of no shard", set(), "small-all-000077.json: is the record of no shard"),
    ("a folder called like a shard", set(), "small-all-000077.tar: is in the folder but not in dataset.json"),
    ("failures that do not add up", set(), "failures.jsonl: has 0 rows, dataset.json says 2"),
    ("counts that do not add up", set(), "dataset.json: counts do not reconcile"),
    ("card of other shards", set(), "croissant.json: "),
])  # fmt: skip
def test_damage_is_named_and_repair_builds_just_what_is_broken(here, shards, kind, touched, problem):
    before, files = stamps(shards), {p.name: p.read_bytes() for p in shards.iterdir()}
    damage(shards, kind)
    try:
        found = "\n".join(verify(shards).problems)
    except ShardError as error:
        found = str(error)
    assert problem in found
    done = here("verify", shards, "--repair", "--json", "--jobs", 1)
    assert done.returncode == 0, done.stderr + done.stdout
    said = json.loads(done.stdout)
    assert said["sound"]
    assert set(said["repaired"]["rebuilt"]) == touched
    after = {p.name: p.read_bytes() for p in shards.iterdir() if p.is_file()}
    if kind in ("missing record", "damaged record"):  # it has the index's figures now, in single precision
        assert after.pop((shards / SHARD).with_suffix(".json").name) != files.pop(
            (shards / SHARD).with_suffix(".json").name
        )
    assert after == files
    assert {name for name, stamp in stamps(shards).items() if before[name] != stamp} == touched
    aside = [path.name for path in shards.glob("set-aside/*")]
    assert aside == [name for name in ("small-all-000077.tar", "small-all-000077.json") if name in problem]


def test_what_comes_out_different_is_said_and_the_old_shard_kept(here, shards, collection, tmp_path):
    media = tmp_path / "media"
    shutil.copytree(collection, media)
    fetch("folder", Folder(name="small", from_dir=media), shards.parents[2])
    record = tables.read_json((shards / SHARD).with_suffix(".json"))
    source = next(source for source in record["index"]["source"] if source.endswith("wav"))
    info = soundfile.info(media / source)
    wave, rate = soundfile.read(media / source)
    soundfile.write(media / source, wave * 0.5, rate, info.subtype)  # the same size, another sound
    damage(shards, "flipped byte")
    done = here("verify", shards, "--repair")
    assert done.returncode == 1
    assert f"rebuilt, with other bytes than were recorded: {SHARD}; the old one is in" in done.stderr
    assert (shards / "set-aside" / SHARD).exists()
    assert "sound: 5 shards" in done.stdout


def test_what_is_set_aside_is_never_written_over_nor_deleted_by_another_repair(
    here, shards, collection, tmp_path
):
    media = tmp_path / "media"
    shutil.copytree(collection, media)
    fetch("folder", Folder(name="small", from_dir=media), shards.parents[2])
    whole = (shards / SHARD).read_bytes()
    (media / next(iter(tables.read_json((shards / SHARD).with_suffix(".json"))["index"]["source"]))).unlink()
    for number in range(2):
        damage(shards, "flipped byte")
        damaged = (shards / SHARD).read_bytes()
        done = here("verify", shards, "--repair", "--jobs", 1)
        assert done.returncode == (0 if number else 1), done.stderr
        if not number:
            kept = {path.name: path.read_bytes() for path in (shards / "set-aside").iterdir()}
            assert kept[SHARD] == damaged != whole
    assert {path.name: path.read_bytes() for path in (shards / "set-aside").iterdir()} == kept


def test_a_repair_keeps_away_from_a_job_at_work(run, shards):
    before = {path.name for path in shards.iterdir()}
    (shards / "small-all-000077.tar").write_bytes(b"new")
    with tables.locked(shards):
        done = run("verify", shards, "--repair", "--jobs", 1)
    assert done.returncode == 1
    assert "another run is writing there" in done.stderr
    assert {path.name for path in shards.iterdir()} == before | {"small-all-000077.tar"}


def test_other_clips_that_changed_or_went_are_no_reason_to_leave_a_shard_broken(
    here, shards, collection, tmp_path
):
    media = tmp_path / "media"
    shutil.copytree(collection, media)
    fetch("folder", Folder(name="small", from_dir=media), shards.parents[2])
    here("shard", "small", "--root", shards.parents[2], "--clips-per-shard", 5, "--overwrite", "--jobs", 1)
    gone, changed = tables.read_json(shards / "small-all-000003.json")["index"]["source"][:2]
    (media / gone).unlink()
    (media / changed).write_bytes(b"another")
    soundfile.write(media / "bell/new.wav", sound(0.5, 8000), 8000)
    fetch("folder", Folder(name="small", from_dir=media), shards.parents[2])
    (shards / "failures.jsonl").unlink()
    before = stamps(shards)
    damage(shards, "flipped byte")
    done = here("verify", shards, "--repair", "--jobs", 1)
    assert done.returncode == 0, done.stderr + done.stdout
    assert {name for name, stamp in stamps(shards).items() if before[name] != stamp} == {SHARD}
    done = here(
        "shard", "small", "--root", shards.parents[2], "--clips-per-shard", 5, "--append", "--jobs", 1
    )
    assert done.returncode == 3, done.stderr
    assert set(stamps(shards)) - set(before) == {"small-all-000005.tar"}
    assert here("verify", shards, "--jobs", 1).returncode == 0


def test_a_damaged_account_is_written_anew_by_the_command_that_made_it(here, shards):
    before = (shards / "dataset.json").read_bytes()
    (shards / "dataset.json").write_bytes(before[:200])
    done = here("verify", shards, "--repair", "--jobs", 1)
    assert done.returncode == 1
    assert "`pipeline shard` (or `convert`) with the settings of these shards writes it anew" in done.stderr
    done = here("shard", "small", "--root", shards.parents[2], "--clips-per-shard", 5, "--jobs", 1)
    assert done.returncode == 3
    assert (shards / "dataset.json").read_bytes() == before


def test_without_its_media_nothing_is_lost_to_a_repair(here, shards, tmp_path):
    facts = tables.read_json(shards.parents[1] / "fetch.json")
    tables.write_json(shards.parents[1] / "fetch.json", facts | {"media_root": str(tmp_path / "nowhere")})
    files = {p.name for p in shards.iterdir()}
    damage(shards, "flipped byte")
    done = here("verify", shards, "--repair", "--jobs", 1)
    assert done.returncode == 1
    assert "its media folder" in done.stderr
    assert {p.name for p in shards.iterdir()} == files


def test_converted_shards_are_repaired_from_what_they_were_converted_from(here, shards):
    other = shards.parent / "hdf5-pcm16-44100"
    root = convert(shards, other, "hdf5")["root_sha256"]
    (other / "small-all-000001.h5").unlink()
    done = here("verify", other, "--repair", "--jobs", 1)
    assert done.returncode == 0, done.stderr
    assert root in done.stdout


def test_repair_is_of_a_whole_folder(here, shards):
    done = here("verify", shards / SHARD, "--repair", "--jobs", 1)
    assert done.returncode == 2
    assert "--repair is of a whole folder of shards" in done.stderr


class Growing:
    """A folder of clips that grows."""

    def __init__(self, place: Path, run) -> None:
        self.media, self.root, self._run = place / "media", place, run
        self.out = place / "g/shards/webdataset-flac-44100"

    def add(self, label: str, *numbers: int) -> None:
        (self.media / label).mkdir(parents=True, exist_ok=True)
        for number in numbers:
            soundfile.write(self.media / f"{label}/{number:02d}.wav", sound(0.6, 8000, seed=number), 8000)
        fetch("folder", Folder(name="g", from_dir=self.media), self.root)

    def shard(self, *more: object):
        return self._run("shard", "g", "--root", self.root, "--clips-per-shard", 4, "--jobs", 1, *more)


def test_append_adds_new_clips_as_new_shards_and_leaves_the_old_bytes_alone(here, tmp_path):
    growing = Growing(tmp_path, here)
    growing.add("a", *range(10))
    assert growing.shard().returncode == 0
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in growing.out.glob("g-*")}
    growing.add("a", *range(10, 13))
    growing.add("b", *range(20, 23))  # and a class that was not there
    done = growing.shard()
    assert done.returncode == 1
    assert "6 clips, such as a_10" in done.stderr
    assert "--append adds them as new shards, --overwrite builds all anew" in done.stderr
    done = growing.shard("--append")
    assert done.returncode == 0, done.stderr
    assert {
        name: (p.stat().st_mtime_ns, p.read_bytes()) for name in before if (p := growing.out / name)
    } == before
    assert sorted(p.name for p in growing.out.glob("*.tar")) == [f"g-all-{n:06d}.tar" for n in range(5)]
    shards = Shards.open(growing.out)
    assert len(shards) == 16
    assert shards.labels == ["a", "b"]
    assert verify(growing.out).problems == []
    # From now on that is the plan: nothing to do, with the flag and without.
    for more in ((), ("--append",)):
        assert "all shards are there, and nothing has changed since" in growing.shard(*more).stderr
    root = tables.read_json(growing.out / "dataset.json")["root_sha256"]
    (growing.out / "g-all-000003.tar").unlink()
    assert growing.shard().returncode == 0
    assert tables.read_json(growing.out / "dataset.json")["root_sha256"] == root


def test_an_append_that_was_killed_goes_on_with_the_same_plan(here, tmp_path):
    growing = Growing(tmp_path, here)
    growing.add("a", *range(5))
    growing.shard()
    growing.add("a", *range(5, 14))
    growing.shard("--append")
    root = tables.read_json(growing.out / "dataset.json")["root_sha256"]
    for name in ("g-all-000002.json", "g-all-000004.json", "dataset.json", "index.parquet"):
        (growing.out / name).unlink()  # as if it had been killed in the middle
    assert growing.shard("--append").returncode == 0
    assert tables.read_json(growing.out / "dataset.json")["root_sha256"] == root


def test_hdf5_targets_have_no_room_for_new_classes(here, tmp_path):
    growing = Growing(tmp_path, here)
    growing.add("a", *range(5))
    growing.shard("--format", "hdf5")
    growing.add("b", 9)
    done = growing.shard("--format", "hdf5", "--append")
    assert done.returncode == 1
    assert (
        "the new clips have 1 classes, such as 'b', that the targets of the HDF5 shards there do not"
        in done.stderr
    )


def test_clips_that_are_gone_are_not_dropped_without_a_word(here, tmp_path):
    growing = Growing(tmp_path, here)
    growing.add("a", *range(5))
    growing.shard()
    (growing.media / "a/03.wav").unlink()
    growing.add("a")
    done = growing.shard()
    assert done.returncode == 1
    assert (
        "1 clips that these shards were planned for, such as a_03, are not to be had any more" in done.stderr
    )


def test_nothing_is_looked_at_twice_where_nothing_has_changed(fetched, make, tmp_path):
    made = make(tmp_path)
    spec, state = ShardSpec(clips_per_shard=5), state_of(fetched, "small")
    assert unchanged(tmp_path, spec, state) == made
    assert unchanged(tmp_path, ShardSpec(clips_per_shard=4), state) is None
    assert unchanged(tmp_path, spec, state | {"ledger.sqlite": "another"}) is None
    for name in (
        "index.parquet",
        "small-all-000001.tar",
        "small-all-000001.json",
        "plan.parquet",
        "croissant.json",
    ):
        kept = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(kept[:-1])
        if name not in ("small-all-000001.json", "plan.parquet", "croissant.json"):
            assert unchanged(tmp_path, spec, state) is None, name
        (tmp_path / name).unlink()
        assert unchanged(tmp_path, spec, state) is None, name
        (tmp_path / name).write_bytes(kept)
    assert unchanged(tmp_path, spec, state) == made


def test_a_damaged_plan_is_named(make, tmp_path):
    make(tmp_path)
    layout = tables.read_table(tmp_path / "plan.parquet", PLAN)
    tables.write_table(tmp_path / "plan.parquet", layout.replace_schema_metadata({"spec": "{}"}))
    with pytest.raises(
        TableError, match=r"plan.parquet: is no plan of shards .*; --overwrite builds all anew"
    ):
        make(tmp_path)
    (tmp_path / "plan.parquet").write_bytes(b"")
    with pytest.raises(TableError, match="cannot be read as a Parquet table"):
        make(tmp_path)


def test_a_lock_s_shards_are_repaired_as_the_lock_has_them(here, fetched, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(fetched, root)
    assert here("lock", "small", "--root", root, "--out", tmp_path / "x.lock").returncode == 0
    lock, out = tmp_path / "x.lock", root / "small/shards/s"
    done = here("shard", "small", "--root", root, "--lock", lock, "--out", out, "--jobs", 1)
    assert done.returncode == 3, done.stderr
    damage_of = out / "small-all-000000.tar"
    before = damage_of.read_bytes()
    damage_of.write_bytes(before[:-600])
    done = here("verify", out, "--repair", "--jobs", 1)
    assert done.returncode == 0, done.stderr + done.stdout
    assert damage_of.read_bytes() == before


def test_shards_of_an_append_that_was_killed_are_no_strangers_to_a_repair(here, tmp_path):
    growing = Growing(tmp_path, here)
    growing.add("a", *range(5))
    growing.shard()
    kept = {
        name: (growing.out / name).read_bytes()
        for name in ("dataset.json", "index.parquet", "failures.jsonl")
    }
    growing.add("a", *range(5, 14))
    growing.shard("--append")
    for name, data in kept.items():  # as if it had been killed before it put them together
        (growing.out / name).write_bytes(data)
    before = stamps(growing.out)
    done = here("verify", growing.out, "--repair", "--jobs", 1)
    assert done.returncode == 0, done.stderr
    assert stamps(growing.out) == before
    assert not (growing.out / "set-aside").exists()


def test_a_plan_that_was_appended_to_is_recovered_from_the_records(here, tmp_path):
    growing = Growing(tmp_path, here)
    growing.add("a", *range(5))
    growing.shard()
    growing.add("a", *range(5, 9))
    growing.shard("--append")
    plan = tables.read_table(growing.out / "plan.parquet", PLAN)
    (growing.out / "plan.parquet").unlink()
    assert here("verify", growing.out, "--repair", "--jobs", 1).returncode == 0
    assert tables.read_table(growing.out / "plan.parquet", PLAN).equals(plan)


def test_files_of_somebody_else_are_never_written_over(here, shards, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/README.md").write_text("# my project")
    for command in (("shard", "small", "--root", shards.parents[2]), ("convert", shards)):
        done = here(*command, "--out", tmp_path / "mine")
        assert done.returncode == 1
        assert "README.md: would be written over, and is no file of shards" in done.stderr
    assert (tmp_path / "mine/README.md").read_text() == "# my project"

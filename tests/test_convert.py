"""`pipeline convert`: WebDataset to HDF5 and back, sample for sample."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from clipmill import tables
from clipmill.errors import ConfigError, ShardError
from clipmill.run import Local
from clipmill.shards.convert import convert
from clipmill.shards.read import Shards
from clipmill.shards.verify import verify

KINDS = [("webdataset", "flac"), ("webdataset", "pcm16"), ("hdf5", "pcm16"), ("hdf5", "flac")]


def root_of(folder: Path) -> str:
    return tables.read_json(folder / "dataset.json")["root_sha256"]


@pytest.fixture(scope="module")
def direct(make, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Shards of each kind, made from the media."""
    place = tmp_path_factory.mktemp("direct")
    for form, encoding in KINDS:
        make(place / f"{form} {encoding}", format=form, encoding=encoding)
    return {kind: place / " ".join(kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", KINDS)
def test_what_is_converted_has_the_bytes_of_what_is_made_from_the_media(direct, tmp_path, kind, to):
    convert(direct[kind], tmp_path / "to", *to)
    assert root_of(tmp_path / "to") == root_of(direct[to])
    one, other = (
        tables.read_table(place / "index.parquet", tables.INDEX) for place in (tmp_path / "to", direct[to])
    )
    assert one.equals(other)
    assert verify(tmp_path / "to").problems == []


def test_there_and_back_is_where_it_began_from_any_number_of_jobs(make, tmp_path):
    made = make(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", "hdf5", engine=Local(2))
    back = convert(tmp_path / "b", tmp_path / "c", "webdataset", engine=Local(2))
    assert back["root_sha256"] == made["root_sha256"]
    assert back["counts"] == made["counts"]
    assert (tmp_path / "a/failures.jsonl").read_bytes() == (tmp_path / "c/failures.jsonl").read_bytes()
    before, after = Shards.open(tmp_path / "a"), Shards.open(tmp_path / "b")
    assert all(np.array_equal(before.read(row), after.read(row)) for row in range(len(before)))
    assert [before.facts(row) for row in range(len(before))] == [
        after.facts(row) for row in range(len(after))
    ]


def test_it_goes_on_where_it_ended_and_refuses_what_is_not_its_own(make, tmp_path):
    make(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", "hdf5")
    (tmp_path / "b/small-all-000001.h5").unlink()
    stamp = (tmp_path / "b/small-all-000000.h5").stat().st_mtime_ns
    root = root_of(tmp_path / "b")
    convert(tmp_path / "a", tmp_path / "b", "hdf5")
    assert (tmp_path / "b/small-all-000000.h5").stat().st_mtime_ns == stamp
    assert root_of(tmp_path / "b") == root
    with pytest.raises(ShardError, match=r"was not made from these shards with these settings; --overwrite"):
        convert(tmp_path / "a", tmp_path / "b", "hdf5", "flac")
    convert(tmp_path / "a", tmp_path / "b", "hdf5", "flac", overwrite=True)
    assert verify(tmp_path / "b").problems == []
    with pytest.raises(ConfigError, match="is the folder of the shards to be converted"):
        convert(tmp_path / "a", tmp_path / "a", "hdf5")
    with pytest.raises(ConfigError, match="allowed is the whole folder"):
        convert(tmp_path / "a/small-all-000001.tar", tmp_path / "c", "hdf5")


def test_a_damaged_clip_is_named_and_never_converted(make, tmp_path):
    make(tmp_path / "a", encoding="pcm16")
    tar = tmp_path / "a/small-all-000001.tar"
    data = bytearray(tar.read_bytes())
    data[3000] ^= 0xFF
    tar.write_bytes(data)
    with pytest.raises(ShardError, match=r"small-all-000001.tar: clip \S+'s samples are not those recorded"):
        convert(tmp_path / "a", tmp_path / "b", "hdf5")
    assert not (tmp_path / "b/dataset.json").exists()


def test_the_command_says_what_it_made_and_where(cold, make, tmp_path):
    make(tmp_path / "webdataset-flac-44100")
    done = cold("convert", tmp_path / "webdataset-flac-44100", "--jobs", 2, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["folder"] == str(tmp_path / "hdf5-pcm16-44100")
    assert "small: 22 clips in 5 hdf5 shards" in done.stderr
    assert cold("verify", tmp_path / "hdf5-pcm16-44100").returncode == 0


def test_overwriting_takes_nothing_but_its_own(make, tmp_path):
    make(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", "hdf5")
    (tmp_path / "b/small-all-000000-cleaned.h5").write_bytes(b"precious")
    files = {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    with pytest.raises(ShardError, match=r"small-all-000000-cleaned.h5: is no shard of these"):
        convert(tmp_path / "a", tmp_path / "b", "hdf5", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()} == files

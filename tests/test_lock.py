"""Locks: written, read again, and refused when they are not what was written."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipmill.datasets.folder import Folder
from clipmill.errors import ConfigError, TableError
from clipmill.fetch.job import fetch
from clipmill.fetch.lock import Lock, compare, make_lock, read_any_lock, read_lock, write_lock

KEYS = st.dictionaries(
    st.text("abc-_09", min_size=1, max_size=3), st.sampled_from(["0" * 64, "f" * 64]), max_size=8
)


def lock(contents: dict[str, str], name: str = "audioset") -> Lock:
    rows = sorted(contents.items())
    columns = {"key": [k for k, _ in rows], "split": ["eval"] * len(rows), "sha256": [c for _, c in rows]}
    return Lock(name, "2026-11-21", pa.table(columns, pa.schema([(c, pa.string()) for c in columns])))


@settings(deadline=None)
@given(KEYS, st.sampled_from(["x.lock", "x.lock.gz"]))
def test_what_was_written_is_read_again(tmp_path_factory, contents, file):
    path = tmp_path_factory.mktemp("lock") / file
    write_lock(lock(contents), path)
    again = read_any_lock(path)
    assert (again.name, again.as_of, again.id) == ("audioset", "2026-11-21", lock(contents).id)
    assert again.table.to_pydict() == lock(contents).table.to_pydict()


@settings(deadline=None)
@given(KEYS, KEYS)
def test_a_difference_names_what_stands_in_one_alone_and_what_is_another(ours, theirs):
    found = compare(lock(ours), lock(theirs))
    assert found.only_first == sorted(ours.keys() - theirs.keys())
    assert found.only_second == sorted(theirs.keys() - ours.keys())
    both = ours.keys() & theirs.keys()
    assert found.other_content == sorted(key for key in both if ours[key] != theirs[key])
    assert found.same == sum(ours[key] == theirs[key] for key in both)
    assert bool(found) == (ours != theirs)


def damaged(path: Path, how: str) -> Path:
    """A lock that something happened to."""
    made = lock({"a": "0" * 64, "b": "f" * 64})
    write_lock(made, path)
    data = path.read_bytes()
    changed = {
        "a row gone": lambda: data.replace(b"b,eval," + b"f" * 64 + b"\n", b""),
        "another hash": lambda: data.replace(b"f" * 64, b"e" * 64),
        "a row twice": lambda: data + b"b,eval," + b"f" * 64 + b"\n",
        "no head": lambda: data.partition(b"\n")[2],
        "a column gone": lambda: data.replace(b"key,split", b"key,part"),
        "another alphabet": lambda: data.replace(b"a,eval", "\u00e9,eval".encode()),
        "a byte flipped in the gzip": lambda: data[:40] + bytes([data[40] ^ 255]) + data[41:],
        "cut short": lambda: data[: len(data) // 2],
    }
    path.write_bytes(changed[how]())
    return path


@pytest.mark.parametrize(
    ("file", "how"),
    [
        *(
            ("x.lock", how)
            for how in ("a row gone", "another hash", "a row twice", "no head", "a column gone")
        ),
        *(("x.lock", how) for how in ("another alphabet", "cut short")),
        *(("x.lock.gz", how) for how in ("a byte flipped in the gzip", "cut short")),
    ],
)
def test_a_lock_that_something_happened_to_is_refused_by_name(tmp_path, file, how):
    with pytest.raises(TableError, match=rf"{file}: "):
        read_any_lock(damaged(tmp_path / file, how))


def test_a_lock_of_another_dataset_is_refused(tmp_path):
    write_lock(lock({"a": "0" * 64}, name="esc50"), tmp_path / "x.lock")
    with pytest.raises(ConfigError, match="is a lock of esc50, not of audioset"):
        read_lock(tmp_path / "x.lock", "audioset")


def test_a_dataset_of_files_is_locked_by_what_they_hold_and_what_cannot_be_read_is_left_out(
    collection, tmp_path
):
    got = fetch("folder", Folder(name="small", from_dir=collection), tmp_path)
    made, left_out = make_lock(got, jobs=2)
    assert len(made) + len(left_out) == got.manifest.num_rows
    assert made.id == make_lock(got)[0].id
    (collection / "drum" / "copy.wav").write_bytes(b"new")
    try:
        more = make_lock(fetch("folder", Folder(name="small", from_dir=collection), tmp_path))[0]
    finally:
        (collection / "drum" / "copy.wav").unlink()
    assert compare(made, more).only_second == ["drum_copy"]

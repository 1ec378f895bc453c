"""`fetch folder`: every file of a folder is a clip, or a row that says why not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from clipmill.datasets.folder import Folder, is_text
from clipmill.datasets.keys import keys_for
from clipmill.errors import ConfigError, FetchError, TableError
from conftest import sound

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=120).filter(
    lambda name: name.strip(".")
)


def put(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, sound(0.2, 8000), 8000, format="WAV")
    return root


def prepare(root: Path, table: str | None = None, **options: object):
    """List a folder, with `table` as its labels file."""
    if table is not None:
        labels = root.parent / "labels.csv"
        labels.write_bytes(table.encode())
        options["labels"] = labels
    return Folder(name="x", from_dir=root, **options).prepare(root.parent / "dest")  # type: ignore[arg-type]


def rows(prepared) -> list[dict]:
    return prepared.manifest.drop_columns(["bytes", "events"]).to_pylist()


@pytest.fixture
def media(tmp_path: Path) -> Path:
    return tmp_path / "media"


def test_subfolder_names_are_the_labels(media):
    prepared = prepare(put(media, "dog/1.wav", "dog/deep/2.wav", "cat/1.wav"))
    assert [(r["key"], r["labels"]) for r in rows(prepared)] == [
        ("cat_1", ["cat"]), ("dog_1", ["dog"]), ("dog_deep_2", ["dog"]),
    ]  # fmt: skip


def test_subfolders_named_as_splits_are_splits(media):
    prepared = prepare(put(media, "train/dog/1.wav", "Test/cat/2.wav"))
    assert [(r["split"], r["labels"]) for r in rows(prepared)] == [("eval", ["cat"]), ("train", ["dog"])]


def test_a_file_in_no_subfolder_has_no_label(media):
    assert rows(prepare(put(media, "1.wav")))[0]["labels"] == []


def test_plain_text_is_skipped_with_a_reason_and_hidden_files_are_not_looked_at(media):
    put(media, "dog/1.wav", "dog/._1.wav")
    (media / "dog/notes").write_text("not a sound: früh")
    (media / "dog/tricky.wav").write_text("named as a sound, so wanted")
    prepared = prepare(media)
    assert [r["source"] for r in rows(prepared)] == ["dog/1.wav", "dog/tricky.wav"]
    assert [(f.source, f.outcome, f.reason) for f in prepared.failures] == [
        ("dog/notes", "skipped", "not-audio")
    ]


def test_a_csv_names_files_labels_folds_groups_splits_and_stretches(media):
    put(media, "a.wav", "b.wav")
    table = "path,what,part,who,set,t0,t1\na.wav,dog,2,ann,train,0.05,0.1\nb.wav,cat,3,bob,TEST,,\n"
    prepared = prepare(
        media, table, file_column="path", label_column="what", fold_column="part", group_column="who",
        split_column="set", start_column="t0", end_column="t1",
    )  # fmt: skip
    assert rows(prepared) == [
        {"key": "a_50", "source": "a.wav", "labels": ["dog"], "fold": 2, "group": "ann", "split": "train",
         "start_s": 0.05, "end_s": 0.1},
        {"key": "b", "source": "b.wav", "labels": ["cat"], "fold": 3, "group": "bob", "split": "eval",
         "start_s": None, "end_s": None},
    ]  # fmt: skip


def test_files_are_found_by_their_last_part_where_just_one_has_it(media):
    put(media, "audio/1.wav", "x/2.wav", "y/2.wav")
    prepared = prepare(media, "filename,label\n1.wav,dog\n2.wav,cat\n")
    assert [(r["key"], r["source"]) for r in rows(prepared)] == [("1", "audio/1.wav"), ("2", "2.wav")]
    assert [(f.key, f.reason) for f in prepared.failures] == [("2", "ambiguous")]


def test_a_path_that_is_not_there_is_never_another_file_of_that_name(media):
    prepared = prepare(put(media, "cat/001.wav"), "filename,label\ndog/001.wav,dog\ncat/001.wav,cat\n")
    assert [(f.key, f.reason) for f in prepared.failures] == [("dog_001", "missing")]


def test_several_spellings_of_a_file_are_one_clip(media):
    put(media, "a.wav")
    names = ["a.wav", "./a.wav", "../media/a.wav", str(media / "a.wav")]
    prepared = prepare(media, "filename,label\n" + "".join(f"{name},l{n}\n" for n, name in enumerate(names)))
    assert [(r["source"], r["labels"]) for r in rows(prepared)] == [("a.wav", ["l0", "l1", "l2", "l3"])]


def test_two_stretches_of_one_start_are_two_clips(media):
    table = "filename,label,a,b\n1.wav,dog,0,0.1\n1.wav,dog,0,0.2\n"
    found = rows(prepare(put(media, "1.wav"), table, start_column="a", end_column="b"))
    assert len({row["key"] for row in found}) == 2


def test_semicolons_separate_columns_too_and_blank_lines_are_none(media):
    assert rows(prepare(put(media, "1.wav"), "filename;label\n1.wav;dog\n  \n"))[0]["labels"] == ["dog"]


def test_stray_files_do_not_turn_splits_into_labels(media):
    put(media, "train/dog/1.wav", "test/cat/2.wav")
    (media / "Thumbs.db").write_bytes(b"\0\1")
    assert {(r["split"], *r["labels"]) for r in rows(prepare(media))} == {
        ("eval", "cat"),
        ("train", "dog"),
        ("all",),
    }


def test_pipes_do_not_hang_and_datasets_of_our_own_are_not_media(media):
    put(media, "dog/1.wav", "mine/dog/9.wav")
    (media / "mine/fetch.json").write_text("{}")
    os.mkfifo(media / "fifo")
    (media / "dog/x").symlink_to("../fifo")
    # The link is a clip wanted, that the shard stage finds to be no regular file.
    assert [r["source"] for r in rows(prepare(media))] == ["dog/1.wav", "dog/x"]


def test_a_csv_that_names_a_missing_file_loses_that_clip_with_a_reason(media):
    prepared = prepare(put(media, "1.wav"), "filename,label\n1.wav,dog\ngone.wav,cat\n")
    assert len(rows(prepared)) == 2
    assert [(f.key, f.outcome, f.reason) for f in prepared.failures] == [("gone", "failed", "missing")]
    assert "line 3" in prepared.failures[0].message


def test_a_label_may_hold_a_comma_and_a_cell_several_labels(media):
    put(media, "1.wav", "2.wav")
    table = 'filename,label\n1.wav,"Rain, heavy"\n2.wav,dog;cat\n'
    assert [r["labels"] for r in rows(prepare(media, table))] == [["Rain, heavy"], ["dog;cat"]]
    assert [r["labels"] for r in rows(prepare(media, table, label_separator=";"))] == [
        ["Rain, heavy"],
        ["cat", "dog"],
    ]


def test_lines_of_the_same_clip_are_one_clip_with_all_its_labels(media):
    prepared = prepare(put(media, "1.wav"), "filename,label\n1.wav,dog\n1.wav,cat\n1.wav,dog\n")
    assert [r["labels"] for r in rows(prepared)] == [["cat", "dog"]]


def test_names_with_spaces_dots_and_other_alphabets_get_keys_and_keep_their_sources(media):
    put(media, "dog/bow wow.1.wav", "dog/été.wav", "dog/犬.wav")
    found = {r["source"]: r["key"] for r in rows(prepare(media))}
    assert set(found) == {"dog/bow wow.1.wav", "dog/été.wav", "dog/犬.wav"}
    assert found["dog/bow wow.1.wav"] == "dog_bow_wow_1"


def test_two_files_with_one_stem_get_two_keys(media):
    found = rows(prepare(put(media, "dog/1.wav", "dog/1.WAV", "dog/1.flac")))
    assert len({r["key"].lower() for r in found}) == 3


def test_a_name_that_is_not_utf8_is_a_row_and_no_crash(media):
    put(media, "dog/1.wav")
    os.rename(os.fsencode(media / "dog/1.wav"), os.fsencode(media / "dog") + b"/\xff\xfe.wav")
    put(media, "dog/2.wav")
    prepared = prepare(media)
    assert [(f.source, f.reason) for f in prepared.failures] == [("dog/\\xff\\xfe.wav", "bad-name")]


def test_links_that_go_round_are_followed_once(media):
    put(media, "dog/1.wav")
    (media / "dog/again").symlink_to(media)
    assert len(rows(prepare(media))) == 1


@pytest.mark.parametrize(("table", "options", "error", "said"), [
    ("filename,label\n1.wav,dog,3\n", {}, TableError, r"line 2: found 3 cells .* expected 2"),
    ("filename,label\n1.wav\n", {}, TableError, r"line 2: found 1 cells"),
    ("filename,label,f\n1.wav,dog,one\n", {"fold_column": "f"}, TableError, r"line 2: found 'one' in 'f', expected a whole number from 0 up"),
    ("filename,label,s\n1.wav,dog,holdout\n", {"split_column": "s"}, TableError, r"found split 'holdout', expected one of"),
    ("filename,label,t\n1.wav,dog,soon\n", {"start_column": "t"}, TableError, r"found 'soon' in 't', expected a number"),
    ("filename,label,a,b\n1.wav,dog,3,1\n", {"start_column": "a", "end_column": "b"}, TableError, r"expected 0 <= start"),
    ("filename,label,f\n1.wav,dog,1\n1.wav,cat,2\n", {"fold_column": "f"}, TableError, r"line 3 of the labels: '1.wav' stands in line 2"),
    ('filename,label\n1.wav,"dog\n', {}, TableError, r"line 2: unexpected end of data"),
    ("filename,label,f\n1.wav,dog,-1\n", {"fold_column": "f"}, TableError, "expected a whole number from 0 up"),
    ("filename,label,t\n1.wav,dog,nan\n", {"start_column": "t"}, TableError, "expected a number of seconds"),
    ("filename,label,label\n1.wav,dog,cat\n", {}, TableError, "has 2 columns 'label'"),
    ("filename,label\n", {}, TableError, "has no rows"),
    ("filename,label\n,dog\n", {}, TableError, "found no file name"),
    ("filename,what\n1.wav,dog\n", {}, ConfigError, "has no column 'label' for --label-column; it has filename, what"),
    ("file,label\n1.wav,dog\n", {}, ConfigError, r"no column 'filename' for --file-column; it has file, label"),
    ("filename,label\nno.wav,dog\n", {}, FetchError, "holds none of the 1 files .* check --from and the column of file names"),
])  # fmt: skip
def test_a_table_that_is_wrong_is_refused_with_line_found_and_expected(media, table, options, error, said):
    with pytest.raises(error, match=said):
        prepare(put(media, "1.wav"), table, **options)


def test_a_byte_order_mark_crlf_and_tabs_are_read(media):
    prepared = prepare(put(media, "1.wav"), "\ufefffilename\tlabel\r\n1.wav\tdog\r\n")
    assert rows(prepared)[0]["labels"] == ["dog"]


def test_a_table_in_another_encoding_is_refused(media):
    put(media, "1.wav")
    (media.parent / "l.csv").write_bytes(b"filename,label\n1.wav,\xe9t\xe9\n")
    with pytest.raises(TableError, match="cannot be read as UTF-8"):
        Folder(name="x", from_dir=media, labels=media.parent / "l.csv").prepare(media.parent / "d")


def test_a_folder_that_is_not_there_or_holds_no_sound_is_refused(media):
    with pytest.raises(FetchError, match="is no folder"):
        prepare(media)
    media.mkdir()
    with pytest.raises(FetchError, match="holds no sound files"):
        prepare(media)


def test_column_flags_without_a_table_are_refused(media):
    with pytest.raises(ConfigError, match="--fold-column needs --labels"):
        prepare(put(media, "dog/1.wav"), fold_column="fold")


@given(st.lists(NAMES, min_size=1, max_size=30, unique=True))
def test_keys_are_valid_unique_even_without_case_and_independent_of_order(names):
    keys = keys_for([(name, None, None) for name in names])
    assert all(key.isascii() and "." not in key and 0 < len(key) <= 90 for key in keys)
    assert len({key.lower() for key in keys}) == len(names)
    assert dict(zip(names, keys, strict=True)) == dict(
        zip(names[::-1], keys_for([(name, None, None) for name in names[::-1]]), strict=True)
    )


def test_text_is_told_from_bytes_even_where_the_head_that_is_read_cuts_a_character(tmp_path):
    (tmp_path / "text").write_text("x" + "ä" * 4000, encoding="utf-8")
    (tmp_path / "bytes").write_bytes(b"ID3 and then\0" * 9)
    (tmp_path / "empty").write_bytes(b"")
    assert [is_text(tmp_path / name) for name in ("text", "bytes", "empty")] == [True, False, False]

"""AudioSet's lists become a manifest, whatever has been done to them; or the error says what was done."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipmill.datasets import DATASETS, dataset_class
from clipmill.datasets.audioset import SPLITS, Audioset
from clipmill.datasets.bad_rows import YTID
from clipmill.datasets.label_table import LabelTable, matching, read_label_table
from clipmill.datasets.segment_lists import read_segments
from clipmill.errors import ConfigError, TableError
from clipmill_manifests import facts
from conftest import SHARED

HEADER = """# Segments csv created Sun Mar  5 10:54:25 2017
# num_ytids={0}, num_segs={0}, num_unique_labels=5, num_positive_labels=9
# YTID, start_seconds, end_seconds, positive_labels
"""
NAMES = {
    "/m/09x0r": "Speech",
    "/m/05zppz": "Male speech, man speaking",
    "/m/0bt9lr": "Dog",
    "/m/05tny_": "Bark",
    "/t/dd00088": "Gush",
}
ROWS = [
    '--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"',
    '-_abcdefgh-, 0.000, 10.000, "/m/0bt9lr"',
    'zzzzzzzzzzz, 5.500, 9.000, "/m/05tny_,/m/0bt9lr"',
]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "class_labels_indices.csv"
    rows = "".join(f'{number},{mid},"{name}"\n' for number, (mid, name) in enumerate(NAMES.items()))
    path.write_text(f"index,mid,display_name\n{rows}")
    return path


@pytest.fixture
def listed(tmp_path: Path, table: Path):
    """`listed(rows, ...)` is the manifest and the failures of a list with these rows."""

    def prepare(rows: list[str] | bytes, name: str = "mine.csv", header: str = "", **options: object):
        path = tmp_path / name
        path.write_bytes(
            rows if isinstance(rows, bytes) else (header + "".join(f"{row}\n" for row in rows)).encode()
        )
        options.setdefault("label_table", table)
        return Audioset(lists=(path,), **options).prepare(tmp_path / "data")  # type: ignore[arg-type]

    return prepare


def rows_of(prepared) -> list[dict]:
    return prepared.manifest.to_pylist()


# What a row becomes


def test_a_row_becomes_a_clip_of_its_video(listed):
    prepared = listed(ROWS, "eval_segments.csv", HEADER.format(3))
    assert rows_of(prepared)[0] == {
        "key": "--PJHxphWEs_30000", "source": "", "start_s": 30.0, "end_s": 40.0,
        "labels": ["Gush", "Speech"], "split": "eval", "fold": None, "group": "--PJHxphWEs",
        "bytes": None, "events": None,
    }  # fmt: skip
    assert [row["key"] for row in rows_of(prepared)] == [
        "--PJHxphWEs_30000",
        "-_abcdefgh-_0",
        "zzzzzzzzzzz_5500",
    ]
    assert prepared.media_root.name == "media"
    assert not prepared.failures


def test_labels_are_sorted_by_name_and_stand_once(listed):
    row = '--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/m/0bt9lr,/m/09x0r,/m/05tny_"'
    assert rows_of(listed([row]))[0]["labels"] == ["Bark", "Dog", "Speech"]


TIMES = st.integers(0, 40_000_000).map(lambda ms: ms / 1000)
IDS = st.from_regex(f"^{YTID}$", fullmatch=True)


@given(
    rows=st.dictionaries(
        st.tuples(IDS, TIMES),
        st.tuples(st.integers(1, 20_000), st.sets(st.sampled_from(list(NAMES)), min_size=1)),
        min_size=1,
        max_size=20,
    ),
    blank=st.sampled_from(["", " "]),
    newline=st.sampled_from(["\n", "\r\n"]),
    bom=st.booleans(),
    last=st.booleans(),
)
def test_what_is_written_in_the_official_format_is_what_is_read(
    tmp_path_factory, rows, blank, newline, bom, last
):
    path = tmp_path_factory.getbasetemp() / "round_trip.csv"
    lines = HEADER.format(len(rows)).splitlines() + [
        f",{blank}".join((ytid, f"{start:.3f}", f"{start + length / 1000:.3f}", '"' + ",".join(mids) + '"'))
        for (ytid, start), (length, mids) in rows.items()
    ]
    text = ("\ufeff" if bom else "") + newline.join(lines) + (newline if last else "")
    path.write_bytes(text.encode())
    read = read_segments(path, LabelTable(path, NAMES)).table.to_pylist()
    assert [(row["ytid"], row["start_s"], row["end_s"], row["labels"]) for row in read] == [
        (ytid, start, round(start + length / 1000, 3), sorted(NAMES[mid] for mid in mids))
        for (ytid, start), (length, mids) in rows.items()
    ]
    assert [row["key"] for row in read] == [f"{ytid}_{round(start * 1000)}" for ytid, start in rows]
    assert [row["line"] for row in read] == list(range(4, 4 + len(rows)))


@pytest.mark.parametrize(
    "row",
    [
        'zzzzzzzzzzz,5.500,9.000,"/m/05tny_,/m/0bt9lr"',
        'zzzzzzzzzzz,5.5,9,"/m/05tny_, /m/0bt9lr"',
        'zzzzzzzzzzz, 5.500, 9.000, "/m/0bt9lr,/m/05tny_"  ',
    ],
)
def test_a_list_that_was_saved_again_by_another_program_is_read(listed, row):
    (clip,) = rows_of(listed([row]))
    assert (clip["key"], clip["end_s"], clip["labels"]) == ("zzzzzzzzzzz_5500", 9.0, ["Bark", "Dog"])


def test_one_label_needs_no_quotes(listed):
    assert rows_of(listed(["zzzzzzzzzzz,5,15,/m/0bt9lr"]))[0]["labels"] == ["Dog"]


def test_lists_that_were_joined_are_read_with_the_header_of_each(listed):
    joined = [*HEADER.format(1).splitlines(), ROWS[0], "", *HEADER.format(2).splitlines(), *ROWS[1:]]
    assert len(rows_of(listed(joined))) == 3


# What is wrong with a row

GOOD = '-_abcdefgh-, 0.000, 10.000, "/m/0bt9lr"'
BAD = {
    "--PJHxphWEs, 30.000, 40.000, /m/09x0r,/t/dd00088": "the labels lost their quotes",
    '--PJHxphWEs,30,40," ""/m/09x0r","/t/dd00088"""': "the quotes around the labels are doubled",
    '1, --PJHxphWEs, 30.000, 40.000, "/m/09x0r"': "the columns are shifted: the first is '1', no id",
    '30.000, 40.000, --PJHxphWEs, "/m/09x0r"': "the columns are shifted: the first is '30.000', no id",
    '#NAME?, 30.000, 40.000, "/m/09x0r"': "a spreadsheet took an id that starts with '-' for a formula",
    '--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/m/nothing"': "unknown label id '/m/nothing'; expected the 5 ids of",
    '--PJHxphWEs, 30.000, 40.000, ""': "it has no label",
    '--PJHxphWEs, half, 40.000, "/m/09x0r"': "the start is 'half', not a number of seconds",
    '--PJHxphWEs, 30.000, 4e1, "/m/09x0r"': "the end is '4e1', not a number of seconds",
    '--PJHxphWEs, -1.000, 9.000, "/m/09x0r"': "the start is negative (-1.000 s)",
    '--PJHxphWEs, 40.000, 30.000, "/m/09x0r"': "it ends at 30.000 s, not after its start at 40.000 s",
    '--PJHxphWEs, 30.000, 30.000, "/m/09x0r"': "it ends at 30.000 s, not after its start at 30.000 s",
    '--PJHxphWEs, 43200, 43201, "/m/09x0r"': "no video is over 12 hours",
    '--PJHxphWEs, 30000, 40000, "/m/09x0r"': "it lasts from 30000 to 40000 s, over an hour: are these milliseconds?",
    '#NOM?, 30.000, 40.000, "/m/09x0r"': "#NOM? in place of the id: a spreadsheet took an id",
    '--PJHxph, 30.000, 40.000, "/m/09x0r"': "the id is '--PJHxph' (8 characters), not 11 letters",
    '--PJHxphWE., 30.000, 40.000, "/m/09x0r"': "the id is '--PJHxphWE.' (11 characters), not 11 letters",
    "--PJHxphWEs 30.000 40.000": "1 column, not 4",
    '--PJHxphWEs, 30.000, 40.000, "/m/09x0r" "/m/0bt9lr"': "the labels are '\"/m/09x0r\" \"/m/0bt9lr\"'",
    '--PJHxphWEs, 30.000, 40.000, "/m/09x0r': "a quote is never closed",
    '--PJHxphWEs, 30.000, 40.000, "Speech"': "unknown label id 'Speech'",
}  # fmt: skip


@pytest.mark.parametrize(("row", "message"), BAD.items(), ids=list(BAD.values()))
def test_a_bad_row_is_named_with_file_line_fault_and_the_flag_that_passes_it_over(listed, row, message):
    with pytest.raises(TableError) as error:
        listed([row, GOOD], header=HEADER.format(2))
    text = str(error.value)
    assert "mine.csv: 1 bad among 2 rows" in text
    assert "line 4: " in text
    assert message in text
    assert "expected: YTID, start_seconds, end_seconds" in text
    assert "--skip-bad-rows" in text


@pytest.mark.parametrize("row", BAD, ids=list(BAD.values()))
def test_bad_rows_can_be_skipped_and_are_counted(listed, row):
    prepared = listed([row, GOOD], header=HEADER.format(2), skip_bad_rows=True)
    assert [clip["key"] for clip in rows_of(prepared)] == ["-_abcdefgh-_0"]
    (failure,) = prepared.failures
    assert (failure.source, failure.outcome, failure.reason) == ("mine.csv:4", "skipped", "bad-row")
    assert BAD[row] in failure.message


def test_an_error_names_the_first_three_bad_rows_and_counts_the_rest(listed):
    with pytest.raises(TableError) as error:
        listed(['short, 1.0, 2.0, "/m/09x0r"'] * 5 + [GOOD])
    assert "5 bad among 6 rows" in str(error.value)
    assert [f"line {line}:" in str(error.value) for line in range(1, 6)] == [True] * 3 + [False] * 2
    assert "and 2 more" in str(error.value)


def test_a_label_of_a_bad_row_does_not_land_on_its_neighbour(listed):
    rows = [
        ROWS[0],
        'short, 1.0, 2.0, "/m/05zppz,/m/05zppz"',
        ROWS[1],
        ROWS[2].replace("/m/05tny_", "/m/x"),
        GOOD,
    ]
    rows[-1] = 'yyyyyyyyyyy, 0.000, 10.000, "/m/05tny_"'
    clips = rows_of(listed(rows, skip_bad_rows=True))
    assert [clip["labels"] for clip in clips] == [["Gush", "Speech"], ["Dog"], ["Bark"]]


def test_a_last_line_that_is_cut_short_is_found(listed):
    with pytest.raises(TableError, match=r"line 2: the line is cut short"):
        listed(f'{GOOD}\n--PJHxphWEs, 30.000, 40.000, "/m/09x'.encode())
    with pytest.raises(TableError, match=r"line 2: 2 columns, not 4: the line is cut short"):
        listed(f"{GOOD}\n--PJHxphWEs, 30.0".encode())


def test_bytes_that_are_not_utf8_spoil_their_own_row_alone(listed):
    text = f'{ROWS[0]}\n--PJHxphW\xe9s, 1.000, 2.000, "/m/09x0r"\n{ROWS[1]}\n'.encode("latin-1")
    with pytest.raises(TableError, match=r"line 2: bytes that are not UTF-8"):
        listed(text)
    assert len(rows_of(listed(text, skip_bad_rows=True))) == 2


# What is wrong with a list


def test_a_clip_that_stands_twice_is_refused_with_both_lines(listed):
    with pytest.raises(TableError, match=r"line 3: '-_abcdefgh-_0' stands already in line 1"):
        listed([GOOD, ROWS[0], GOOD.replace("/m/0bt9lr", "/m/09x0r")])


def test_of_a_clip_that_stands_twice_the_first_row_counts(listed):
    prepared = listed([GOOD, ROWS[0], GOOD.replace("/m/0bt9lr", "/m/09x0r")], skip_bad_rows=True)
    assert [(clip["key"], clip["labels"]) for clip in rows_of(prepared)] == [
        ("--PJHxphWEs_30000", ["Gush", "Speech"]),
        ("-_abcdefgh-_0", ["Dog"]),
    ]
    assert [failure.source for failure in prepared.failures] == ["mine.csv:3"]


def test_two_stretches_of_one_video_are_two_clips_of_one_group(listed):
    clips = rows_of(listed([GOOD, GOOD.replace("0.000, 10.000", "20.000, 30.000")]))
    assert [(clip["key"], clip["group"]) for clip in clips] == [
        ("-_abcdefgh-_0", "-_abcdefgh-"),
        ("-_abcdefgh-_20000", "-_abcdefgh-"),
    ]


def test_a_clip_of_two_lists_is_named_with_the_other_file(tmp_path, table):
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text(f"{GOOD}\n")
    both = Audioset(lists=(tmp_path / "a.csv", tmp_path / "b.csv"), label_table=table)
    with pytest.raises(TableError, match=r"b\.csv: 1 bad(.|\n)*stands already in .*a\.csv, line 1"):
        both.prepare(tmp_path)


def test_half_a_file_is_told_by_its_own_header(listed):
    with pytest.raises(TableError, match=r"line 7: the list ends after 3 rows where its header states 22160"):
        listed(ROWS, "eval_segments.csv", HEADER.format(22160))
    prepared = listed(ROWS, "eval_segments.csv", HEADER.format(22160), skip_bad_rows=True)
    assert (len(rows_of(prepared)), [f.reason for f in prepared.failures]) == (3, ["bad-row"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (HEADER.format(0).encode(), "holds no rows, only a header"),
        (b"<html>\n<head><meta http-equiv='refresh'></head></html>\n", "is a web page, not a list"),
        (b"\xef\xbb\xbf  <!DOCTYPE html>", "is a web page, not a list"),
        (GOOD.encode("utf-16"), "is UTF-16"),
    ],
)
def test_a_file_that_is_no_list_is_said_to_be_what_it_is(listed, content, message):
    for skip in (False, True):
        with pytest.raises(TableError, match=rf"mine\.csv: {message}"):
            listed(content, skip_bad_rows=skip)


def test_a_list_of_bad_rows_alone_is_no_list_even_when_they_are_skipped(listed):
    with pytest.raises(TableError, match="all 2 rows are bad; line 1: the id is 'a'"):
        listed(["a,b,c,d", "a,b,c,d"], skip_bad_rows=True)


def test_a_list_that_is_not_there_is_an_error_with_its_path(tmp_path, table):
    with pytest.raises(TableError, match=r"nowhere\.csv: cannot be read"):
        Audioset(lists=(tmp_path / "nowhere.csv",), label_table=table).prepare(tmp_path)


def test_another_file_as_the_label_table_is_refused(listed, tmp_path):
    (tmp_path / "other.csv").write_text("filename,label\na.wav,dog\n")
    with pytest.raises(TableError, match=r"other\.csv: is no table of labels"):
        listed(ROWS, label_table=tmp_path / "other.csv")


# Which clips


def test_label_names_hold_commas_themselves(table):
    known = read_label_table(table)
    assert matching(["Dog,male speech,Man speaking,/m/09x0r", "Gush", "dog"], known) == [
        "Dog", "Male speech, man speaking", "Speech", "Gush",
    ]  # fmt: skip


def test_the_longest_name_that_matches_is_meant():
    known = LabelTable(Path("t.csv"), {"/m/1": "Bee", "/m/2": "Bee, wasp, etc.", "/m/3": "wasp"})
    assert matching(["Bee, wasp, etc.,Bee,wasp"], known) == ["Bee, wasp, etc.", "Bee", "wasp"]


def test_an_unknown_label_is_refused_with_the_closest(table):
    with pytest.raises(ConfigError, match="unknown label 'Dogs'; the closest: Dog;"):
        matching(["Speech,Dogs"], read_label_table(table))


def test_labels_choose_and_exclude_whole_clips(listed):
    chosen = listed(ROWS, labels=("Dog,Gush",))
    assert [clip["labels"] for clip in rows_of(chosen)] == [["Gush", "Speech"], ["Dog"], ["Bark", "Dog"]]
    fewer = listed(ROWS, labels=("Dog",), exclude_labels=("/m/05tny_",))
    assert [clip["key"] for clip in rows_of(fewer)] == ["-_abcdefgh-_0"]
    with pytest.raises(ConfigError, match="no clip is left"):
        listed(ROWS, labels=("Male speech, man speaking",))


def test_a_limit_takes_the_first_of_each_split_in_the_order_of_its_list(tmp_path, table):
    for name, rows in (
        ("eval_segments.csv", ROWS[::-1]),
        ("own.csv", [f"yyyyyyyyyy{n}, 0, 9, /m/0bt9lr" for n in range(3)]),
    ):
        (tmp_path / name).write_text("\n".join(rows))
    dataset = Audioset(
        lists=(tmp_path / "eval_segments.csv", tmp_path / "own.csv"), label_table=table, limit=2
    )
    assert [(clip["split"], clip["key"]) for clip in rows_of(dataset.prepare(tmp_path))] == [
        ("eval", "-_abcdefgh-_0"),
        ("train", "yyyyyyyyyy0_0"),
        ("train", "yyyyyyyyyy1_0"),
        ("eval", "zzzzzzzzzzz_5500"),
    ]
    with pytest.raises(ConfigError, match="--limit 0"):
        Audioset(limit=0).prepare(tmp_path)


def test_the_split_of_a_list_is_that_of_its_official_name_or_the_one_asked_for(listed):
    assert {clip["split"] for clip in rows_of(listed(ROWS, "balanced_train_segments.csv"))} == {
        "balanced_train"
    }
    assert {clip["split"] for clip in rows_of(listed(ROWS, split=("eval",)))} == {"eval"}
    assert {clip["split"] for clip in rows_of(listed(ROWS))} == {"train"}
    with pytest.raises(ConfigError, match="of which split is it"):
        listed(ROWS, split=("eval", "balanced_train"))
    with pytest.raises(ConfigError, match="official list of eval, and --split says balanced_train"):
        listed(ROWS, "eval_segments.csv", split=("balanced_train",))
    with pytest.raises(ConfigError, match=r"must end in \.csv"):
        listed(ROWS, "mine.txt")


# Strong labels

STRONG = """segment_id\tstart_time_seconds\tend_time_seconds\tlabel
-_abcdefgh-_0\t4.000\t5.250\t/m/05tny_
-_abcdefgh-_0\t0.500\t10.000\t/m/09x0r
-_abcdefgh-_0\t0.500\t1.000\t/m/05tny_
zzzzzzzzzzz_5500\t0.000\t3.500\t/m/0bt9lr
elsewhere-1_30000\t0.000\t1.000\t/m/09x0r
"""


@pytest.fixture
def strong(tmp_path: Path):
    """`strong(...)`: the three rows, with strong labels for two of them, as the downloads lie."""
    downloads = tmp_path / "data" / "downloads"
    downloads.mkdir(parents=True)
    (tmp_path / "eval_segments.csv").write_text("\n".join(ROWS))
    (tmp_path / "audioset_eval_strong.tsv").write_text(STRONG)
    (downloads / "mid_to_display_name.tsv").write_text(
        "".join(f"{mid}\t{name}\n" for mid, name in NAMES.items())
    )

    def prepare(*names: str, **options: object):
        lists = tuple(tmp_path / name for name in names)
        return Audioset(strong=True, lists=lists, **options).prepare(tmp_path / "data")  # type: ignore[arg-type]

    prepare.root = tmp_path  # type: ignore[attr-defined]
    return prepare


def test_strong_clips_keep_their_events_in_order_of_time(strong):
    clips = rows_of(strong("eval_segments.csv", "audioset_eval_strong.tsv"))
    assert [(clip["key"], clip["end_s"], clip["split"]) for clip in clips] == [
        ("-_abcdefgh-_0", 10.0, "eval"), ("zzzzzzzzzzz_5500", 9.0, "eval"),
    ]  # fmt: skip
    assert clips[0]["labels"] == ["Bark", "Speech"]
    assert clips[0]["events"] == [
        {"label": "Bark", "start_s": 0.5, "end_s": 1.0},
        {"label": "Speech", "start_s": 0.5, "end_s": 10.0},
        {"label": "Bark", "start_s": 4.0, "end_s": 5.25},
    ]
    assert clips[1]["events"] == [{"label": "Dog", "start_s": 0.0, "end_s": 3.5}]


def test_a_strong_list_alone_gives_clips_of_ten_seconds(strong):
    clips = rows_of(strong("audioset_eval_strong.tsv"))
    assert [
        (clip["key"], clip["start_s"], clip["end_s"], clip["split"], clip["group"]) for clip in clips
    ] == [
        ("-_abcdefgh-_0", 0.0, 10.0, "eval", "-_abcdefgh-"),
        ("elsewhere-1_30000", 30.0, 40.0, "eval", "elsewhere-1"),
        ("zzzzzzzzzzz_5500", 5.5, 15.5, "eval", "zzzzzzzzzzz"),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("-_abcdefgh-_0\t0.5\t1.0\t/m/none", "unknown label id '/m/none'"),
        ("-_abcdefgh-_0\t0.5\t1.0", "3 columns, not 4"),
        ("-_abcdefgh-_0\t2.5\t1.0\t/m/0bt9lr", "it ends at 1.0 s, not after its start at 2.5 s"),
        ("-_abcdefgh-\t0.5\t1.0\t/m/0bt9lr", "the segment is '-_abcdefgh-', not an id of 11 characters"),
        ("-_abcdefgh-_0,0.5,1.0,/m/0bt9lr", "1 column, not 4"),
    ],
)
def test_a_bad_event_is_named_and_can_be_skipped(strong, row, message):
    header, _, rest = STRONG.partition("\n")
    (strong.root / "bad.tsv").write_text(f"{header}\n{row}\n{rest}")
    with pytest.raises(TableError) as error:
        strong("bad.tsv")
    assert "bad.tsv: 1 bad among 6 rows\n  line 2: " in str(error.value)
    assert message in str(error.value)
    assert "expected: YTID_startms, start_seconds" in str(error.value)
    prepared = strong("bad.tsv", skip_bad_rows=True)
    good = strong("audioset_eval_strong.tsv", split=("eval",))
    assert prepared.manifest.drop_columns("split").equals(good.manifest.drop_columns("split"))
    assert [failure.source for failure in prepared.failures] == ["bad.tsv:2"]


def test_half_of_an_official_strong_list_is_not_taken_for_the_whole(strong):
    (strong.root / "data/downloads/audioset_eval_strong.tsv").write_text(STRONG)
    with pytest.raises(TableError, match="holds 3 clips where 16996 were published: it is half a file"):
        strong("eval_segments.csv")


def test_a_strong_list_needs_the_flag(listed):
    with pytest.raises(ConfigError, match=r"mine\.tsv: a \.tsv holds strong labels; add --strong"):
        listed(STRONG.encode(), "mine.tsv")


# What it needs


@pytest.mark.parametrize(
    ("options", "files"),
    [
        ({}, ["class_labels_indices.csv", "balanced_train_segments.csv", "eval_segments.csv"]),
        ({"split": ("unbalanced_train",)}, ["class_labels_indices.csv", "unbalanced_train_segments.csv"]),
        ({"lists": (Path("my.csv"),)}, ["class_labels_indices.csv"]),
        ({"lists": (Path("my.csv"),), "label_table": Path("t.csv")}, []),
        (
            {"strong": True, "split": ("eval",)},
            ["mid_to_display_name.tsv", "eval_segments.csv", "audioset_eval_strong.tsv"],
        ),
        ({"strong": True, "lists": (Path("my.tsv"),)}, ["mid_to_display_name.tsv"]),
    ],
)
def test_just_the_official_files_that_were_not_given_are_needed(options, files):
    assert [remote.file for remote in Audioset(**options).needs] == files


def test_every_split_with_strong_labels_and_a_bare_fetch_says_how_to_get_the_rest():
    assert len(Audioset(strong=True).needs) == 6
    assert "--split unbalanced_train" in Audioset().hints()[0]
    assert not Audioset(split=("eval",)).hints()
    assert [r.file for r in Audioset().for_splits(["unbalanced_train", "train"]).needs][1:] == [
        "unbalanced_train_segments.csv"
    ]


def test_its_name_tells_strong_from_weak_and_can_be_chosen():
    assert [Audioset().name, Audioset(strong=True).name, Audioset(called="mine").name] == [
        "audioset", "audioset-strong", "mine",
    ]  # fmt: skip
    assert dataset_class("audioset") is Audioset
    assert "audioset" in DATASETS


def test_the_facts_agree_with_each_other():
    stated = facts("audioset")
    assert sum(stated["splits"][split]["clips"] for split in SPLITS) == stated["clips"]
    assert {split for paper in stated["papers"].values() for split in paper["had"]} == set(SPLITS)
    assert all(urls[0].startswith("https://") for urls in (fact["urls"] for fact in stated["files"]))


# The real lists


@pytest.mark.shared_data
def test_the_real_lists_are_whole_and_every_id_is_kept(tmp_path):
    lists = tuple(SHARED / "audioset" / f"{split}_segments.csv" for split in ("balanced_train", "eval"))
    table = SHARED / "audioset" / "class_labels_indices.csv"
    prepared = Audioset(lists=lists, label_table=table).prepare(tmp_path)
    assert prepared.manifest.num_rows == 42531
    assert not prepared.failures
    clips = rows_of(prepared)
    assert len({label for clip in clips for label in clip["labels"]}) == 527
    stated = facts("audioset")["splits"]
    for path in lists:
        split = path.name.removesuffix("_segments.csv")
        rows = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        of_split = [clip for clip in clips if clip["split"] == split]
        assert len(of_split) == len(rows) == stated[split]["clips"]
        assert {clip["group"] for clip in of_split} == {row[:11] for row in rows}
        assert sum(clip["group"].startswith("-") for clip in of_split) > 200
        assert sum(clip["end_s"] - clip["start_s"] for clip in of_split) / 3600 == pytest.approx(
            stated[split]["hours"], abs=0.06
        )
    assert sum(len(clip["labels"]) for clip in clips) == 52882 + 51804


@pytest.mark.shared_data
def test_the_real_files_are_those_whose_checksums_are_stated():
    import hashlib

    for fact in facts("audioset")["files"]:
        path = SHARED / "audioset" / fact["file"]
        if path.is_file():
            assert fact["checksum"] == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
            assert fact["size"] == path.stat().st_size

"""`--where`: what an expression means, what is refused, and what inspect, train and evaluate make of it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipmill import tables
from clipmill.errors import ConfigError, ShardError, TrainError
from clipmill.shards.read import Shards
from clipmill.shards.summary import summarize
from clipmill.shards.where import matching
from clipmill.train.checkpoint import read_run
from clipmill.train.evaluate import evaluate_run
from clipmill.train.loop import train
from clipmill.train.plan import Plan, plan_run
from clipmill.train.split import choose_split
from test_train import CPU, TINY, shards_of


def index_of(rows: int, **columns: list[Any]) -> pa.Table:
    """An index of `rows` rows, with these columns and something harmless in the others."""
    filler: dict[Any, Any] = {pa.string(): "", pa.list_(pa.string()): [], tables.EVENTS: None}
    filled = {
        field.name: columns.get(field.name, [filler.get(field.type, 0)] * rows) for field in tables.INDEX
    }
    filled["key"] = columns.get("key", [f"clip-{row}" for row in range(rows)])
    return pa.table(filled, schema=pa.schema([field.with_nullable(True) for field in tables.INDEX]))


def kept(index: pa.Table, text: str) -> list[int]:
    return [row for row, keep in enumerate(matching(index, text).to_pylist()) if keep]


FIVE = index_of(
    5,
    loudness_lufs=[-20.0, -12.0, -40.0, None, -30.0],
    silent=[0.0, 0.95, 0.2, 0.99, 0.9],
    duration_s=[5.0, 4.0, 0.5, 2.0, 10.0],
    fold=[1, 2, 3, None, 1],
    group=["ann", "bob", None, "ann", "cid"],
    split=["train", "train", "eval", "valid", "all"],
    source=["a/one.wav", "b/two.ogg", "a/dré.wav", "c.wav", "d.ogg"],
    labels=[["dog"], ["cat", "dog"], [], ["cat"], ["a dog"]],
    events=[None, [{"label": "cat", "start_s": 0.0, "end_s": 1.0}], None, [], None],
)


# What an expression means


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("silent < 0.9 and duration_s >= 1", [0]),
        ("1 <= duration_s < 5", [1, 3]),
        ("duration_s < 1 or fold == 1 and not silent > 0.5", [0, 2]),
        ("(duration_s < 1 or fold == 1) and not silent > 0.5", [0, 2]),
        ("-duration_s <= -5", [0, 4]),
        ("duration_s * 2 - 1 > +fold + 8 / 2", [0, 1, 4]),
        ("fold in [1, 3]", [0, 2, 4]),
        ("fold not in (1, -3)", [1, 2]),
        ("fold in []", []),
        ('split == "train"', [0, 1]),
        ('split != "train" and group > "b"', [4]),
        ('group in ("ann", "cid")', [0, 3, 4]),
        ('"dog" in labels', [0, 1]),
        ('"dog" not in labels', [2, 3, 4]),
        ('not "dog" in labels and "cat" in labels', [3]),
        ('".ogg" in source', [1, 4]),
        ('"é" in source', [2]),
        ("fold is None", [3]),
        ("group is not None and loudness_lufs is not None", [0, 1, 4]),
        ("events is None", [0, 2, 4]),
        ("True", [0, 1, 2, 3, 4]),
        ("1 > 2", []),
        ("  silent\n == 0 ", [0]),
        ("silent * -1 in [0]", [0]),
    ],
)
def test_an_expression_means_what_python_means_by_it(text, rows):
    assert kept(FIVE, text) == rows


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("loudness_lufs < 0", [0, 1, 2, 4]),
        ("not loudness_lufs < 0", []),
        ("loudness_lufs in [-40]", [2]),
        ("loudness_lufs not in [-40]", [0, 1, 4]),
        ("loudness_lufs < 0 or fold is None", [0, 1, 2, 3, 4]),
        ("not (loudness_lufs < 0 and fold is None)", [0, 1, 2, 4]),
        ("duration_s / (fold - 1) > 0", [1, 2]),
        ("not duration_s / (fold - 1) > 0", []),
    ],
)
def test_what_is_not_known_is_neither_true_nor_false(text, rows):
    assert kept(FIVE, text) == rows


def test_a_column_of_single_precision_holds_the_very_number_that_was_written():
    for text in ("silent == 0.9", "silent >= 0.9 and silent <= 0.9", "silent in [0.9]", "0.9 == silent"):
        assert kept(FIVE, text) == [4]


QUARTERS = st.integers(-16, 16).map(lambda n: n / 4)
CONSTANTS = QUARTERS.map(str) | st.integers(-3, 3).map(str)
NAMES = ("ann", "bob", "it's", "dré")
TABLES = st.lists(
    st.fixed_dictionaries({
        "fold": st.integers(-3, 3),
        "duration_s": QUARTERS,
        "silent": QUARTERS,
        "group": st.sampled_from(NAMES),
        "split": st.sampled_from(NAMES),
        "labels": st.lists(st.sampled_from(NAMES), max_size=3),
    }),
    max_size=6,
)  # fmt: skip
NUMBERS = st.recursive(
    CONSTANTS | st.sampled_from(["fold", "duration_s", "silent"]),
    lambda part: st.one_of(
        st.builds("{} {} {}".format, part, st.sampled_from("+-*"), part),
        st.builds("{} / {}".format, part, st.sampled_from(["2", "-4", "0.5"])),
        st.builds("({})".format, part),
        st.builds("-{}".format, part),
    ),
    max_leaves=4,
)
ORDERS = st.sampled_from(["<", "<=", ">", ">=", "==", "!="])
IN = st.sampled_from(["in", "not in"])
TEXTS = st.sampled_from(["group", "split", *map(repr, NAMES)])
CONDITIONS = st.recursive(
    st.one_of(
        st.builds("{} {} {}".format, NUMBERS, ORDERS, NUMBERS),
        st.builds("{} {} {} {} {}".format, NUMBERS, ORDERS, NUMBERS, ORDERS, NUMBERS),
        st.builds("{} {} {}".format, TEXTS, ORDERS, TEXTS),
        st.builds("{!r} {} {}".format, st.sampled_from(NAMES), IN, st.sampled_from(["labels", "group"])),
        st.builds("{} {} [{}]".format, NUMBERS, IN, st.lists(CONSTANTS, max_size=3).map(", ".join)),
        st.builds("{} {} {!r}".format, TEXTS, IN, st.lists(st.sampled_from(NAMES), max_size=3)),
    ),
    lambda part: st.one_of(
        st.builds("{} {} {}".format, part, st.sampled_from(["and", "or"]), part),
        st.builds("not {}".format, part),
        st.builds("({})".format, part),
    ),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(TABLES, CONDITIONS)
def test_it_agrees_with_pythons_own_evaluation_of_every_row(rows, text):
    index = index_of(len(rows), **{name: [row[name] for row in rows] for name in (rows or [{}])[0]})
    expected = [row for row, values in enumerate(rows) if eval(text, {"__builtins__": {}}, values)]
    assert kept(index, text) == expected


# What is refused


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is empty"),
        ("fold = 1", "cannot be read at character 6"),
        ("fold < 1 &&", "cannot be read at character"),
        ("(" * 300, "cannot be read"),
        ("-" * 100_000 + "1 < 2", "cannot be read"),
        ("fold < 1" + "0" * 400, "cannot be read"),
        ("silnt < 1", r"`silnt` at character 1 is no column \(did you mean silent\?\)"),
        ("fold == 1 and x < 2", r"`x` at character 15 is no column\."),
        ('"é" == "é" and x < 2', r"`x` at character 16 is no column\."),
        ("fold", "`fold` at character 1 is a number, where a condition such as"),
        ("fold < 1 or labels", "`labels` at character 13 is a list of texts, where a condition"),
        ("fold < 'one'", "`'one'` at character 8 is text and cannot be compared with a number"),
        ("labels == 'dog'", "cannot be compared with a list of texts"),
        ("group + 'x' == 'annx'", "`group` at character 1 is text, where a number is needed"),
        ("events < 1", "cannot be compared with a column of list"),
        ("fold == None", "`None` at character 9 is compared by `is None`"),
        ("fold is 1", "`1` at character 9 is compared by `is`, which"),
        ("fold in 3", "`3` at character 9 cannot be looked in"),
        ("key in labels", "`labels` at character 8 cannot be looked in"),
        ("fold in [1, 'a']", "`'a'` at character 13 is no constant, or not a number"),
        ("fold in [row]", "`row` at character 10 is no constant"),
        ("fold ** 2 > 1", r"`fold \*\* 2` at character 1 is not understood; allowed are"),
        ("group.upper() == 'ANN'", r"`group.upper\(\)` at character 1 is not understood"),
        ("(lambda: 1) < 2", "`lambda: 1` at character 2 is not understood"),
        ("1j < fold", "`1j` at character 1 is not understood"),
    ],
)  # fmt: skip
def test_what_is_no_expression_is_refused_with_its_place_and_the_columns(text, why):
    with pytest.raises(ConfigError, match=why) as error:
        matching(FIVE, text)
    said = str(error.value)
    assert said.startswith(f"--where {text!r}: ")
    assert said.endswith(f"Columns are {', '.join(tables.INDEX.names)}")
    assert "\n" not in said


def test_nothing_is_ever_run(tmp_path):
    with pytest.raises(ConfigError, match="is not understood"):
        matching(FIVE, f"__import__('os').mkdir({str(tmp_path / 'made')!r}) is None")
    assert not (tmp_path / "made").exists()


# Shards


@pytest.fixture(scope="module")
def easy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 clips of 0.6, 0.95, 1.3 and 1.65 s in four folds."""
    return shards_of(tmp_path_factory.mktemp("easy"))


@pytest.fixture
def folder_of(easy: Path, tmp_path: Path) -> Callable[..., Path]:
    """What stands beside the easy shards, with another index: all that inspect reads."""

    def write(index: pa.Table, rate: int = 44100) -> Path:
        told = tables.read_json(easy / "dataset.json")
        told["labels"], told["spec"]["sample_rate"] = ["a dog", "cat", "dog"], rate
        tables.write_json(tmp_path / "dataset.json", told)
        tables.write_jsonl(tmp_path / "failures.jsonl", [])
        tables.write_table(tmp_path / "index.parquet", index)
        return tmp_path

    return write


def test_shards_are_filtered_in_their_order_again_and_again_and_travel_to_workers(folder_of):
    shards = Shards.open(folder_of(FIVE))
    long = shards.take([4, 2, 0, 1]).where("duration_s >= 1")
    assert long.index["key"].to_pylist() == ["clip-4", "clip-0", "clip-1"]
    dogs = pickle.loads(pickle.dumps(long.where('"dog" in labels')))
    assert dogs.index["key"].to_pylist() == ["clip-0", "clip-1"]
    assert dogs.labels == shards.labels
    assert dogs.targets.tolist() == [[0, 0, 1], [0, 1, 1]]
    assert len(shards) == 5


def test_a_filter_that_keeps_nothing_is_said_to(folder_of):
    shards = Shards.open(folder_of(FIVE))
    with pytest.raises(ShardError, match=r"--where 'duration_s > 99' keeps none of 5 clips"):
        shards.where("duration_s > 99")


def test_shards_without_any_clip_can_be_filtered_too(folder_of):
    said = summarize(folder_of(FIVE.slice(0, 0)), "silent < 0.9 and 'dog' in labels")
    assert (said["clips"], said["clips_of"], said["silent"], said["hours"]) == (0, 0, None, 0.0)


# inspect


def test_inspect_speaks_of_the_clips_that_are_kept(here, folder_of):
    folder = folder_of(FIVE)
    done = here("inspect", folder, "--where", "silent < 0.9")
    assert done.returncode == 0, done.stderr
    assert "where silent < 0.9:\n2 of 5 clips, " in done.stdout
    assert "of the whole dataset: 24 in = 24 written" in done.stdout
    said = json.loads(here("inspect", folder, "--where", "silent < 0.9", "--json").stdout)
    assert (said["clips"], said["clips_of"], said["where"], said["whole"]) == (2, 5, "silent < 0.9", False)
    assert said["labels"] == {"a dog": 0, "cat": 0, "dog": 1}
    assert said["duration_s"]["max"] == 5.0


def test_inspect_ends_with_2_for_what_it_cannot_read_and_1_for_what_keeps_nothing(here, folder_of):
    folder = folder_of(FIVE)
    wrong = here("inspect", folder, "--where", "silnt < 1")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: --where 'silnt < 1': `silnt` at character 1 is no column")
    none = here("inspect", folder, "--where", "silent > 1")
    assert (none.returncode, none.stdout) == (1, "")
    assert "keeps none of 5 clips" in none.stderr


def test_inspect_shows_the_quality_columns_in_units_that_one_can_read(here, folder_of):
    quality = {
        "dc": [0.0, 0.00125, -0.5, 0.0, 0.0],
        "clipped": [0.0, 0.0001, 0.0, 0.0, 0.0],
        "silent": [0.0, 0.75, 0.5, 1.0, 0.0],
        "bandwidth_hz": [22050.0, 3400.0, 8000.0, 0.0, 16000.0],
    }
    folder = folder_of(index_of(5, **quality))
    said = json.loads(here("inspect", folder, "--json").stdout)
    assert said["clipped"]["max"] == pytest.approx(0.0001)
    assert said["dc"]["min"] == -0.5
    assert said["quality"] == {"clipped": 1, "more_than_half_silent": 2, "narrow": 2}
    shown = here("inspect", folder).stdout
    rows = {line.split("  ")[0]: line.split()[-6:] for line in shown.splitlines()}
    assert rows["DC (% of full scale)"][0] == "-50.000"
    assert rows["clipped (% of samples)"][4] == "0.010"
    assert rows["silent (% of time)"][:5] == ["0.0", "0.0", "50.0", "75.0", "100.0"]
    assert rows["bandwidth (kHz)"][:5] == ["0.00", "3.40", "8.00", "16.00", "22.05"]
    assert "clipped somewhere: 1 clip (20.0%)" in shown
    assert "silent for more than half of their time: 2 clips (40.0%)" in shown
    assert "without anything above 8 kHz: 2 clips (40.0%)" in shown
    fine = here(
        "inspect", folder, "--where", "clipped == 0 and silent <= 0.5 and bandwidth_hz >= 8000"
    ).stdout
    for what in ("clipped somewhere", "silent for more", "without anything"):
        assert what not in fine


def test_shards_whose_rate_has_no_room_above_8_khz_are_not_called_narrow(folder_of):
    folder = folder_of(index_of(2, bandwidth_hz=[7000.0, 7990.0]), rate=16000)
    assert summarize(folder)["quality"]["narrow"] == 0


# Training and evaluating


LONG = "duration_s >= 1"


def plan_on(folder: Path, **options: Any) -> Plan:
    return plan_run(Shards.open(folder), TINY, CPU, **options)


@pytest.fixture(scope="module")
def filtered(easy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on the longer half of the clips, fold 1 held out."""
    out = tmp_path_factory.mktemp("runs") / "long"
    train(plan_on(easy, fold=1, where=LONG), out)
    return out


def test_a_filter_thins_out_both_sides_and_the_run_keeps_it(easy, filtered):
    plan = plan_on(easy, fold=1, where=LONG)
    config = json.loads((filtered / "config.json").read_text())
    assert config["where"] == LONG
    assert config["clips"] == {"train": len(plan.split.train), "held_out": len(plan.split.held_out)}
    assert sum(config["clips"].values()) == 12
    both = plan.shards.take([*plan.split.train, *plan.split.held_out])
    assert min(both.index["duration_s"].to_pylist()) >= 1
    assert "12 clips left out by --where 'duration_s >= 1'" in plan.notes[0]


def test_a_filter_moves_no_clip_from_one_side_to_the_other():
    index = index_of(
        90, labels=[["hum"]] * 90, split=["all"] * 90, fold=[None] * 90,
        group=[f"speaker-{n % 30}" for n in range(90)], duration_s=[float(n % 7) for n in range(90)],
    )  # fmt: skip
    shards = Shards.of(Path("x"), {"labels": ["hum"]}, index)
    whole, thinned = choose_split(shards, None, 0), choose_split(shards, None, 0, where="duration_s > 2")
    assert 0 < len(thinned.held_out) < len(whole.held_out)
    assert set(thinned.held_out) <= set(whole.held_out)
    assert set(thinned.train) <= set(whole.train)


def test_groups_that_the_filter_keeps_from_meeting_are_no_leak():
    index = index_of(
        3, labels=[["hum"]] * 3, split=["all"] * 3, fold=[1, 2, 2], group=["ann", "ann", "bob"], silent=[0.0, 1.0, 0.0]
    )  # fmt: skip
    shards = Shards.of(Path("x"), {"labels": ["hum"]}, index)
    with pytest.raises(TrainError, match="both in training"):
        choose_split(shards, 1, 0)
    assert choose_split(shards, 1, 0, where="silent < 0.5").train.tolist() == [2]


def test_a_side_that_the_filter_leaves_empty_is_refused(easy):
    with pytest.raises(
        TrainError, match=r"none is left to hold out .*--where 'fold != 1'.* --fold or --where"
    ):
        plan_on(easy, fold=1, where="fold != 1")


def test_a_run_is_resumed_with_its_own_filter_only(easy, filtered):
    assert train(plan_on(easy, fold=1, where=LONG), filtered, resume=True).ran == 0
    for other in (None, "duration_s >= 1.0 "):
        with pytest.raises(TrainError, match=r"begun otherwise: .*where was 'duration_s >= 1', now"):
            train(plan_on(easy, fold=1, where=other), filtered, resume=True)


def test_a_run_from_before_there_were_filters_goes_on_and_is_scored(easy, tmp_path):
    train(plan_on(easy, fold=1), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("where") is None
    tables.write_json(tmp_path / "config.json", config)
    assert train(plan_on(easy, fold=1), tmp_path, resume=True).done
    tables.write_json(tmp_path / "config.json", config)
    assert evaluate_run(read_run(tmp_path, CPU), Shards.open(easy), CPU)["scored"] == "fold 1"


def test_a_filtered_run_gives_its_figures_again_unless_other_clips_are_asked_for(easy, filtered):
    run, shards = read_run(filtered, CPU), Shards.open(easy)
    figures = evaluate_run(run, shards, CPU)
    held_out = json.loads((filtered / "config.json").read_text())["clips"]["held_out"]
    assert (figures["scored"], figures["clips"]) == ("fold 1 where duration_s >= 1", held_out)
    assert evaluate_run(run, shards, CPU, where="True")["clips"] == 6
    assert evaluate_run(run, shards, CPU, fold=1)["clips"] == 6
    both = evaluate_run(run, shards, CPU, split="all", where="fold in [2, 3] and 'hum' in labels")
    assert both["scored"] == "split all where fold in [2, 3] and 'hum' in labels"
    assert both["clips"] == 4
    with pytest.raises(TrainError, match=r"--where 'duration_s > 9' keeps none of the 6 clips of fold 1"):
        evaluate_run(run, shards, CPU, where="duration_s > 9")


def test_the_commands_take_the_filter(here, easy, tmp_path):
    flags = ["--shards", easy, "--where", LONG, "--device", "cpu", "--workers", "0"]
    network = ["--model", "erann-3-1", "--steps", "2", "--batch-size", "4", "--crop-s", "1"]
    done = here("train", *flags, *network, "--fold", "1", "--out", tmp_path / "x", "--no-page")
    assert done.returncode == 0, done.stderr
    assert "12 clips left out by --where 'duration_s >= 1'" in done.stderr
    scored = here("evaluate", tmp_path / "x", *flags, "--fold", "2", "--json")
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)["scored"] == "fold 2 where duration_s >= 1"
    wrong = here("train", *flags[:2], "--out", tmp_path / "y", "--where", "import os")
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1].startswith("error: --where 'import os': cannot be read")
    assert not (tmp_path / "y").exists()

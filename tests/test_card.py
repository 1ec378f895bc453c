"""The dataset card and the Croissant metadata: true to the shards, valid, the same bytes from the same shards."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path

import mlcroissant
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import soundfile
import yaml
from markdown_it import MarkdownIt

import warm
from clipmill import tables
from clipmill.shards.card import COLUMNS
from clipmill.shards.job import make_shards
from clipmill.shards.metadata import check_metadata, write_metadata
from clipmill.shards.plan import ShardSpec
from clipmill_manifests import facts
from conftest import sound

HOSTILE = [
    "a|b", 'say "hi"', "it's", "<b>bold</b>", "`tick` ``", "*star* _under_ snake_case", "[link](x)", "back\\slash", "R&amp;B",
    "喵 ünï 🎵", "two\nlines", "cr:Split", "{000..003}", "$x$", "- item", "# head", "https://example.org/?a=1&b=2", "null", "~~no~~",
]  # fmt: skip

NO_DATE = '[Metadata(NAME)] Property "https://schema.org/datePublished" is recommended, but does not exist.'
FORMATS = [("webdataset", "flac"), ("webdataset", "pcm16"), ("hdf5", "pcm16"), ("hdf5", "flac")]


def carded(folder: Path) -> tuple[str, dict]:
    """Write the card of the shards in a folder; returns its text, and the Croissant as JSON."""
    dataset = tables.read_json(folder / "dataset.json")
    write_metadata(folder, dataset, tables.read_table(folder / "index.parquet", tables.INDEX))
    return (folder / "README.md").read_text(encoding="utf-8"), tables.read_json(folder / "croissant.json")


def validated(folder: Path) -> tuple[mlcroissant.Dataset, list[str]]:
    """The Croissant as mlcroissant reads it, and its warnings; an error raises."""
    read = mlcroissant.Dataset(folder / "croissant.json")
    assert not read.metadata.ctx.issues.errors
    return read, sorted(read.metadata.ctx.issues.warnings)


def plain(record: dict) -> dict:
    """A record without the record set's name before each field, and text as text."""
    said = {}
    for name, value in record.items():
        value = [plain(v) if isinstance(v, dict) else v for v in value] if isinstance(value, list) else value
        value = (
            [v.decode() if isinstance(v, bytes) else v for v in value] if isinstance(value, list) else value
        )
        said[name.rpartition("/")[2]] = value.decode() if isinstance(value, bytes) else value
    if "events" in said and said["events"] == [{"label": None, "start_s": None, "end_s": None}]:
        said["events"] = None  # how mlcroissant shows a list that is null
    return said


def cells(card: str, *heads: str) -> list[list[str]]:
    """The rows of the card's table with these heads, as a reader sees them once the Markdown is drawn."""
    rows: list[list[str]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(card):
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and rows:
            rows[-1].append("".join(child.content for child in token.children or []))
        elif token.type == "table_close":
            if tuple(rows[0]) == heads:
                return rows[1:]
            rows = []
    return []


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


@pytest.fixture(scope="session")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with three splits, folds, groups, events, a clip without labels, one lost, and labels that mean harm."""
    root = tmp_path_factory.mktemp("rich")
    for number in range(24):
        soundfile.write(root / f"{number}.wav", sound(0.3 + number / 8, 8000, seed=number), 8000)
    (root / "5.wav").write_bytes(b"RIFFjunk")
    events = [
        [{"label": HOSTILE[n % 3], "start_s": 0.1, "end_s": 0.25}] * (n % 3) if n % 2 else None
        for n in range(24)
    ]
    manifest = tables.manifest_table({
        "key": [f"c{n:02d}" for n in range(24)],
        "source": [f"{n}.wav" for n in range(24)],
        "labels": [[HOSTILE[n], HOSTILE[0]][: 1 + n % 2] if n < len(HOSTILE) else [] for n in range(24)],
        "split": [("train", "valid", "eval", "noise")[n % 4] for n in range(24)],
        "fold": pa.array([n % 3 + 1 if n % 4 else None for n in range(24)], pa.int32()),
        "group": [f"g{n // 2}" if n else None for n in range(24)],
        "end_s": [0.25 if n % 5 else None for n in range(24)],
        "events": pa.array(events, tables.EVENTS),
    })  # fmt: skip
    about = {key: value for key, value in facts("audioset").items() if isinstance(value, str)}
    about["title"] = 'Clips "of" | <all>: sorts'
    spec = ShardSpec(clips_per_shard=3, sample_rate=16000)
    make_shards("rich-set", manifest, [], root, root / "shards", spec, about=about)
    return root / "shards"


@pytest.mark.parametrize(("format_", "encoding"), FORMATS)
def test_croissant_is_valid_and_its_records_are_the_index(make, tmp_path, format_, encoding):
    make(tmp_path, format=format_, encoding=encoding)
    carded(tmp_path)
    read, warnings = validated(tmp_path)
    # A user's own folder has no paper, and may have no licence.
    assert all("recommended" in warning for warning in warnings)
    index = tables.read_table(tmp_path / "index.parquet", tables.INDEX)
    assert [plain(record) for record in read.records("clips")] == index.to_pylist()


def test_croissant_of_a_dataset_with_all_there_is_lacks_a_date_alone(rich):
    carded(rich)
    read, warnings = validated(rich)
    # A date would make equal shards give other bytes.
    assert warnings == [NO_DATE.replace("NAME", "rich-set")]
    index = tables.read_table(rich / "index.parquet", tables.INDEX)
    assert [plain(record) for record in read.records("clips")] == index.to_pylist()


def test_croissant_lists_classes_splits_and_shards(rich):
    _, said = carded(rich)
    read, _ = validated(rich)
    dataset = tables.read_json(rich / "dataset.json")
    ids = {record["labels/name"]: record["labels/id"] for record in read.records("labels")}
    assert ids == {label: place for place, label in enumerate(dataset["labels"])}
    splits = next(s for s in said["recordSet"] if s["@id"] == "splits")
    assert {row["splits/name"]: row["splits/url"] for row in splits["data"]} == {
        "train": "cr:TrainingSplit", "valid": "cr:ValidationSplit", "eval": "cr:TestSplit", "noise": None,
    }  # fmt: skip
    shards = [plain(record) for record in read.records("shards")]
    assert shards == [
        {"name": s["shard"], **{k: s[k] for k in ("sha256", "bytes", "written")}} for s in dataset["shards"]
    ]


def test_croissant_vouches_for_the_index_and_names_the_shards(rich):
    _, said = carded(rich)
    files = {part["@id"]: part for part in said["distribution"]}
    digest, size = tables.sha256_of(rich / "index.parquet")
    assert (files["index.parquet"]["sha256"], files["index.parquet"]["contentSize"]) == (digest, f"{size} B")
    found = {path.name for pattern in files["shard-files"]["includes"] for path in rich.glob(pattern)}
    assert found == {shard["shard"] for shard in tables.read_json(rich / "dataset.json")["shards"]}


def test_licence_and_citations_are_carried_along(rich):
    card, said = carded(rich)
    about = facts("audioset")
    # The lists are CC BY, the sounds are not: neither the card nor the metadata says that all of it is.
    assert front_matter(card)["license"] == "other"
    assert front_matter(card)["license_name"] == "cc-by-4.0-the-lists-the-videos-have-their-own"
    assert f"## Licence\n\n{about['licence']} (<{about['licence_url']}>)\n" in card
    assert front_matter(card)["license_link"] == about["licence_url"]
    assert said["license"] == {
        "@type": "sc:CreativeWork",
        "name": about["licence"],
        "url": about["licence_url"],
    }
    for citation in (about["citation"].strip(), about["strong_citation"].strip()):
        assert citation in said["citeAs"]
        assert f"```bibtex\n{citation}\n```" in card
    assert said["url"] == about["homepage"]


@pytest.mark.parametrize(("kind", "named"), [
    ("ravdess", "cc-by-nc-sa-4.0"), ("speechcommands", "cc-by-4.0"), ("tones", "cc0-1.0"), ("esc50", "other"), ("folder", "unknown"),
])  # fmt: skip
def test_a_plain_licence_has_the_name_that_the_hub_knows(make, tmp_path, kind, named):
    dataset = make(tmp_path)
    dataset["about"] = {key: value for key, value in facts(kind).items() if isinstance(value, str)}
    tables.write_json(tmp_path / "dataset.json", dataset)
    card, said = carded(tmp_path)
    assert front_matter(card)["license"] == named
    if named not in ("other", "unknown"):
        assert said["license"] == facts(kind)["licence_url"]
    validated(tmp_path)


def test_what_is_not_known_is_said_to_be_not_stated(make, tmp_path):
    dataset = make(tmp_path) | {"about": {}}
    tables.write_json(tmp_path / "dataset.json", dataset)
    card, said = carded(tmp_path)
    assert "## Licence\n\nNot stated.\n\n## Citation\n\nNot stated.\n" in card
    assert front_matter(card)["license"] == "unknown"
    assert not {"license", "citeAs", "url"} & set(said)
    read, warnings = validated(tmp_path)
    assert len(warnings) == 3  # licence, citation, date
    assert read.metadata.name == "small"


def test_labels_that_mean_harm_are_shown_as_they_are(rich):
    card, _ = carded(rich)
    index = tables.read_table(rich / "index.parquet", tables.INDEX)
    had = [label for labels in index["labels"].to_pylist() for label in labels]
    ids = tables.read_json(rich / "dataset.json")["labels"]
    rows = cells(card, "id", "class", "clips")
    assert {row[1]: (int(row[0]), int(row[2])) for row in rows} == {
        " ".join(label.split()): (place, had.count(label)) for place, label in enumerate(ids)
    }
    assert front_matter(card)["pretty_name"] == 'Clips "of" | <all>: sorts'
    assert f"{sum(not labels for labels in index['labels'].to_pylist())} clips have no label." in card


def test_the_card_counts_what_is_there_and_what_is_not(rich):
    card, _ = carded(rich)
    dataset = tables.read_json(rich / "dataset.json")
    index = tables.read_table(rich / "index.parquet", tables.INDEX).to_pydict()
    assert "24 in = 23 written + 1 failed + 0 skipped." in card
    assert [row[:2] for row in cells(card, "reason", "clips", "meaning")] == [["corrupt", "1"]]
    assert dataset["root_sha256"] in card
    assert dict(cells(card, "setting", "value")) == {k: str(v) for k, v in dataset["spec"].items()}
    assert dict(cells(card, "made with", "version")) == dataset["versions"]
    splits = {row[0]: (int(row[1]), row[3]) for row in cells(card, "split", "clips", "hours", "shards")}
    assert splits["train"] == (index["split"].count("train"), "rich-set-train-{000000..000001}.tar")
    assert {split: n for split, (n, _) in splits.items()} == {
        s: index["split"].count(s) for s in set(index["split"])
    }
    assert {int(fold): int(n) for fold, n in cells(card, "fold", "clips")} == {
        n: index["fold"].count(n) for n in (1, 2, 3)
    }
    measured = {
        row[0]: row[1:]
        for row in cells(card, "", "least", "lower quartile", "median", "upper quartile", "greatest")
    }
    expected = np.percentile(index["peak_db"], [0, 25, 50, 75, 100])
    assert np.allclose([float(value) for value in measured["peak_db"]], expected, atol=1e-3)


def test_the_card_of_hundreds_of_classes_lists_the_most_frequent(make, tmp_path):
    dataset = make(tmp_path)
    dataset["labels"] = [f"class {n:03d}" for n in range(400)]
    index = tables.read_table(tmp_path / "index.parquet", tables.INDEX)
    labels = pa.array([[f"class {300 + n % 3:03d}"] for n in range(index.num_rows)])
    place = index.schema.get_field_index("labels")
    write_metadata(tmp_path, dataset, index.set_column(place, index.schema.field("labels"), labels))
    card = (tmp_path / "README.md").read_text()
    assert "The 50 most frequent of 400 classes:" in card
    rows = cells(card, "id", "class", "clips")
    assert [row[1] for row in rows[:4]] == ["class 300", "class 301", "class 302", "class 000"]
    assert len(rows) == 50


@pytest.mark.parametrize(("format_", "encoding"), FORMATS)
def test_the_cards_snippets_run_as_they_are_written(make, tmp_path, format_, encoding):
    make(tmp_path, format=format_, encoding=encoding)
    card, _ = carded(tmp_path)
    index = tables.read_table(tmp_path / "index.parquet", tables.INDEX)
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(snippets) == 3
    told = [read_by(snippet, tmp_path) for snippet in snippets]
    first = index.filter(pc.equal(index["shard"], index["shard"][0]))
    for row in (index if format_ == "webdataset" else first).to_pylist():
        assert f"{row['key']} {row['labels']} {row['samples'] / 44100} s\n" in told[0]
    last = index.to_pylist()[-1]
    assert told[1] == f"{last['key']} {last['labels']} {last['samples'] / 44100} s\n"


def test_the_cards_snippets_read_the_split_that_has_most(rich):
    card, _ = carded(rich)
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert all(read_by(snippet, rich) for snippet in snippets)


def test_shards_that_were_not_built_are_left_out_of_what_is_read(make, tmp_path):
    dataset = make(tmp_path)
    index = tables.read_table(tmp_path / "index.parquet", tables.INDEX)
    (tmp_path / "small-all-000002.tar").unlink()
    dataset["shards"] = [shard for shard in dataset["shards"] if shard["shard"] != "small-all-000002.tar"]
    tables.write_json(tmp_path / "dataset.json", dataset)
    index = index.filter(pc.not_equal(index["shard"], "small-all-000002.tar"))
    tables.write_table(tmp_path / "index.parquet", index)
    card, _ = carded(tmp_path)
    (row,) = cells(card, "split", "clips", "hours", "shards")
    assert row[3] == "small-all-{000000..000001}.tar, small-all-{000003..000004}.tar"
    told = read_by(re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0], tmp_path)
    assert [line.partition(" ")[0] for line in told.splitlines()] == index["key"].to_pylist()


def read_by(snippet: str, folder: Path) -> str:
    """What a snippet prints, run in a folder by a process of its own."""
    with tempfile.NamedTemporaryFile("w", suffix=".py", encoding="utf-8") as file:
        file.write(snippet)
        file.flush()
        done = warm.run(Path(file.name), cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_equal_shards_give_equal_bytes_wherever_they_stand(rich, tmp_path):
    carded(rich)
    shutil.copytree(rich, tmp_path / "elsewhere")
    for name in ("README.md", "croissant.json"):
        (tmp_path / "elsewhere" / name).unlink()
    carded(tmp_path / "elsewhere")
    for name in ("README.md", "croissant.json"):
        text = (rich / name).read_text(encoding="utf-8")
        assert (tmp_path / "elsewhere" / name).read_text(encoding="utf-8") == text
        assert str(rich.parent) not in text


def test_a_card_that_does_not_fit_the_shards_is_told(make, tmp_path):
    make(tmp_path)
    carded(tmp_path)
    dataset = tables.read_json(tmp_path / "dataset.json")
    assert check_metadata(tmp_path, dataset) == []
    other = dataset | {"root_sha256": "f" * 64}
    version = f"1.0.0+{dataset['root_sha256'][:12]}"
    assert named(check_metadata(tmp_path, other)) == [
        f"croissant.json: is that of other shards (version {version})"
    ]
    index = tables.read_table(tmp_path / "index.parquet", tables.INDEX)
    tables.write_table(tmp_path / "index.parquet", index.slice(1))
    assert named(check_metadata(tmp_path, dataset)) == [
        "croissant.json: its sha256 of index.parquet is not the file's"
    ]
    for damage in ("{", "[]", '{"version": 1, "distribution": []}', '{"version": 1, "distribution": [1]}'):
        (tmp_path / "croissant.json").write_text(damage)
        assert [p.partition(" (")[0] for p in check_metadata(tmp_path, dataset)] == [
            "croissant.json: cannot be read"
        ]
    for name in ("README.md", "croissant.json"):
        (tmp_path / name).unlink()
    assert named(check_metadata(tmp_path, dataset)) == ["README.md: is missing", "croissant.json: is missing"]


def named(problems: list[str]) -> list[str]:
    """Problems without what mends them."""
    return [problem.partition("; `pipeline")[0] for problem in problems]


def test_shards_of_which_every_clip_was_lost_have_a_card_too(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"")
    manifest = tables.manifest_table({"key": ["a"], "source": ["a.wav"], "labels": [[]]})
    make_shards("none", manifest, [], tmp_path, tmp_path / "shards", ShardSpec())
    card, _ = carded(tmp_path / "shards")
    assert "There is no clip to read." in card
    read, _ = validated(tmp_path / "shards")
    assert list(read.records("clips")) == []


@pytest.mark.parametrize(("clips", "category"), [
    (0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (9999, "1K<n<10K"), (10_000, "10K<n<100K"), (2_084_320, "1M<n<10M"),
])  # fmt: skip
def test_the_size_is_given_in_the_hubs_words(make, tmp_path, clips, category):
    dataset = make(tmp_path)
    row = tables.read_table(tmp_path / "index.parquet", tables.INDEX).slice(0, 1)
    write_metadata(tmp_path, dataset, row.take(pa.array(np.zeros(clips, np.int64))))
    assert front_matter((tmp_path / "README.md").read_text())["size_categories"] == [category]


def test_every_column_of_the_index_is_explained(rich):
    card, said = carded(rich)
    assert list(COLUMNS) == tables.INDEX.names
    assert [
        row[0] for row in cells(card, "column", "type", "nullable", "what it holds")
    ] == tables.INDEX.names
    clips = next(s for s in said["recordSet"] if s["@id"] == "clips")
    assert [field["@id"] for field in clips["field"]] == [f"clips/{name}" for name in tables.INDEX.names]
    assert json.dumps(said).count("datePublished") == 0

"""`fetch esc50` on the archive's own layout, made small."""

from __future__ import annotations

from pathlib import Path

import pytest
import soundfile

from clipmill.datasets.esc50 import Esc50
from clipmill.errors import FetchError
from conftest import sound


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    root = tmp_path / "ESC-50-master"
    (root / "audio").mkdir(parents=True)
    (root / "meta").mkdir()
    lines = ["filename,fold,target,category,esc10,src_file,take"]
    for fold in range(1, 6):
        for target, category, esc10 in (
            (0, "dog", "True"),
            (1, "rooster", "True"),
            (36, "vacuum_cleaner", "False"),
        ):
            name = f"{fold}-{100 + fold}-A-{target}.wav"
            lines.append(f"{name},{fold},{target},{category},{esc10},{100 + fold},A")
            soundfile.write(root / "audio" / name, sound(0.3, 44100), 44100)
    (root / "meta/esc50.csv").write_text("\n".join(lines) + "\n")
    return root


def test_folds_classes_and_groups_are_the_official_ones(archive, tmp_path):
    prepared = Esc50(from_dir=archive).prepare(tmp_path)
    rows = prepared.manifest.drop_columns(["bytes", "events"]).to_pylist()
    assert len(rows) == 15
    assert rows[0] == {
        "key": "1-101-A-0", "source": "1-101-A-0.wav", "start_s": None, "end_s": None,
        "labels": ["dog"], "split": "all", "fold": 1, "group": "freesound-101",
    }  # fmt: skip
    assert {row["fold"] for row in rows} == {1, 2, 3, 4, 5}
    assert not prepared.failures


def test_the_esc10_subset_has_its_ten_classes_alone(archive, tmp_path):
    dataset = Esc50(from_dir=archive, subset="esc10")
    labels = {row["labels"][0] for row in dataset.prepare(tmp_path).manifest.to_pylist()}
    assert dataset.name == "esc10"
    assert labels == {"dog", "rooster"}


def test_a_clip_that_the_archive_lost_is_a_row(archive, tmp_path):
    (archive / "audio/3-103-A-0.wav").unlink()
    prepared = Esc50(from_dir=archive).prepare(tmp_path)
    assert prepared.manifest.num_rows == 15
    assert [(f.key, f.reason) for f in prepared.failures] == [("3-103-A-0", "missing")]


def test_another_folder_is_refused_with_what_is_expected(tmp_path):
    with pytest.raises(FetchError, match=r"has no meta/esc50.csv; expected is what https://"):
        Esc50(from_dir=tmp_path).prepare(tmp_path)

"""Evaluating a run and hearing files with it: whole clips, honest counts, one row for every file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from clipmill.audio import prepare_file
from clipmill.augment import to_float
from clipmill.errors import ConfigError, TrainError
from clipmill.shards.read import Shards
from clipmill.train.checkpoint import Run, read_run
from clipmill.train.evaluate import evaluate_run, score_clips
from clipmill.train.loop import train
from clipmill.train.predict import predict_files, score_samples
from test_train import CLASSES, CPU, RATE, TINY, lines, plan_of, shards_of, sound_of


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shards_of(tmp_path_factory.mktemp("easy"))


@pytest.fixture(scope="module")
def folder(where: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run that held out fold 1."""
    out = tmp_path_factory.mktemp("runs") / "short"
    train(plan_of(where, fold=1), out)
    return out


@pytest.fixture(scope="module")
def trained(folder: Path) -> Run:
    return read_run(folder, CPU)


def write(path: Path, seconds: float, rate: int = RATE, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    soundfile.write(path, 0.2 * rng.standard_normal(round(seconds * rate)), rate)
    return path


# Evaluating


def test_a_run_is_scored_on_the_clips_it_held_out_and_gives_the_figures_it_gave(folder, trained, where):
    figures = evaluate_run(trained, Shards.open(where), CPU)
    shown = max(lines(folder, "eval"), key=lambda row: row["accuracy"])
    for name in ("clips", "accuracy", "map", "auc", "f1", "loss"):
        assert figures[name] == pytest.approx(shown[name]), name
    assert figures["scored"] == "fold 1"
    assert [row["label"] for row in figures["per_class"]] == list(CLASSES)
    assert np.sum(figures["confusion"]) == figures["clips"] == 6
    json.dumps(figures, allow_nan=False)


def test_the_last_weights_are_the_averaged_ones_of_the_last_step(folder, where):
    figures = evaluate_run(read_run(folder, CPU, "last"), Shards.open(where), CPU)
    assert figures["accuracy"] == lines(folder, "eval")[-1]["accuracy"]
    assert figures["loss"] == pytest.approx(lines(folder, "eval")[-1]["loss"])


def test_other_clips_are_scored_when_asked_for(trained, where):
    shards = Shards.open(where)
    assert evaluate_run(trained, shards, CPU, fold=3)["scored"] == "fold 3"
    everything = evaluate_run(trained, shards, CPU, split="all")
    assert everything["clips"] == len(shards)
    both = evaluate_run(trained, shards, CPU, fold=2, split="all")
    assert (both["scored"], both["clips"]) == ("fold 2 and split all", 6)
    with pytest.raises(
        TrainError, match=r"no clip is in fold 7; its folds are 1, 2, 3, 4 \(--fold\), its splits all"
    ):
        evaluate_run(trained, shards, CPU, fold=7)


def test_a_clips_scores_do_not_depend_on_what_it_is_scored_with(trained, where):
    shards = Shards.open(where)
    together = score_clips(trained.model, trained.features, shards, "softmax", CPU).scores
    with torch.inference_mode():
        for row in range(0, len(shards), 5):
            wave = to_float(torch.from_numpy(shards.read(row)))[None]
            alone = trained.model(trained.features(wave)).softmax(1)[0]
            np.testing.assert_allclose(together[row], alone, atol=2e-5)


def test_shards_of_other_classes_or_another_rate_are_refused(trained, tmp_path):
    labels = [["horn"] if n % 3 else ["hum"] for n in range(12)]
    other = shards_of(tmp_path / "labels", 12, labels=labels)
    with pytest.raises(TrainError, match=r"unknown to the run: horn; lacking: hiss, whistle"):
        evaluate_run(trained, Shards.open(other), CPU)
    trained.config["sample_rate"] = 8000
    try:
        same = Shards.open(shards_of(tmp_path / "rate", 12))
        with pytest.raises(TrainError, match=r"is at 16000 Hz, .* trained at 8000 Hz; .*--sample-rate 8000"):
            evaluate_run(trained, same, CPU)
    finally:
        trained.config["sample_rate"] = RATE


def test_a_folder_that_is_no_run_and_weights_of_another_model_are_named(folder, tmp_path):
    with pytest.raises(TrainError, match=r"holds no config\.json, so it is no run"):
        read_run(tmp_path, CPU)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(TrainError, match=r"best\.safetensors: is not there; the run has not been evaluated"):
        read_run(tmp_path, CPU)
    (tmp_path / "best.safetensors").write_bytes((folder / "best.safetensors").read_bytes()[:1000])
    with pytest.raises(TrainError, match=r"best\.safetensors: cannot be read"):
        read_run(tmp_path, CPU)
    (tmp_path / "best.safetensors").write_bytes((folder / "best.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model": "erann-1-2"}))
    with pytest.raises(TrainError, match=r"its weights are not those of erann-1-2"):
        read_run(tmp_path, CPU)
    (tmp_path / "config.json").write_text('{"model": "erann-1-2"}')
    with pytest.raises(TrainError, match=r"is no run's config"):
        read_run(tmp_path, CPU)


# Predicting


def test_a_short_file_is_heard_whole(trained, tmp_path):
    path = write(tmp_path / "a.wav", 2.4)
    (heard,) = predict_files(trained, [path], CPU)
    assert heard.seconds == 2.4
    samples = prepare_file(path, RATE)
    with torch.inference_mode():
        expected = trained.model(trained.features(to_float(torch.from_numpy(samples))[None])).softmax(1)[0]
    np.testing.assert_allclose(heard.scores, expected, atol=1e-6)


def test_a_long_file_is_the_mean_of_its_windows_by_their_length(trained, tmp_path):
    samples = prepare_file(write(tmp_path / "a.wav", 6.7), RATE)
    whole = [score_samples(trained, samples[at * RATE : (at + 3) * RATE], CPU, 3) for at in (0, 3, 6)]
    expected = (3 * whole[0] + 3 * whole[1] + whole[2]) / 7
    np.testing.assert_allclose(score_samples(trained, samples, CPU, 3), expected, atol=1e-6)
    assert float(score_samples(trained, samples, CPU, 3).sum()) == pytest.approx(1.0)


def test_any_format_and_rate_is_heard_and_the_likeliest_come_first(trained, tmp_path):
    files = [
        write(tmp_path / f"a b.{kind}", 1.2, rate)
        for kind, rate in (("flac", 48000), ("ogg", 22050), ("mp3", 44100))
    ]
    for heard in predict_files(trained, files, CPU):
        row = heard.row(trained.labels, top=2)
        probabilities = [p["probability"] for p in row["predictions"]]
        assert len(probabilities) == 2
        assert probabilities == sorted(probabilities, reverse=True)
        assert len(heard.row(trained.labels, top=99)["predictions"]) == 3


def test_a_bad_file_is_a_row_with_its_reason(trained, tmp_path):
    (tmp_path / "empty.wav").write_bytes(b"")
    heard = list(predict_files(trained, [tmp_path / "gone.wav", tmp_path / "empty.wav"], CPU))
    assert [p.reason for p in heard] == ["missing", "empty"]
    assert heard[0].row(trained.labels, 3).keys() == {"file", "reason", "message"}
    with pytest.raises(ConfigError, match="--window 0"):
        list(predict_files(trained, [], CPU, window_s=0))


# As a user runs them


def test_the_commands_print_tables_json_and_the_documented_exit_codes(
    folder, where, tmp_path, run: Callable[..., Any]
):
    good = tmp_path / "gut und schön.wav"
    soundfile.write(good, sound_of("hum", 1.5, 9), RATE)
    (tmp_path / "bad.wav").write_text("no sound")
    shown = run("evaluate", folder, "--shards", where)
    assert shown.returncode == 0, shown.stderr
    assert "accuracy" in shown.stdout
    assert all(label in shown.stdout for label in CLASSES)
    some = run("predict", folder, good, tmp_path / "bad.wav", "--json", "--top", "1")
    assert some.returncode == 3, some.stderr
    rows = [json.loads(line) for line in some.stdout.splitlines()]
    assert rows[0]["file"] == str(good)
    assert rows[0]["seconds"] == 1.5
    assert len(rows[0]["predictions"]) == 1
    assert rows[1]["reason"]
    none = run("predict", folder, tmp_path / "bad.wav")
    assert none.returncode == 1
    assert "Traceback" not in none.stderr
    absent = run("evaluate", tmp_path, "--shards", where, "--json")
    assert (absent.returncode, absent.stdout) == (1, "")
    assert absent.stderr.startswith("error: ")


def test_evaluate_prints_every_figure_as_json(folder, where, run: Callable[..., Any]):
    done = run("evaluate", folder, "--shards", where, "--json", "--weights", "last")
    figures = json.loads(done.stdout)
    assert figures.keys() >= {
        "accuracy",
        "map",
        "auc",
        "d_prime",
        "f1",
        "per_class",
        "confusion",
        "confusions",
    }
    assert figures["model"] == TINY.model

"""Evaluating a run and hearing files with it: whole clips, honest counts, one row for every file."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from clipmill.audio import prepare_file, stream
from clipmill.augment import to_float
from clipmill.cli import main
from clipmill.cli import predict as predict_cli
from clipmill.cli.evaluate import command as evaluate_command
from clipmill.cli.predict import command as predict_command
from clipmill.datasets.folder import scan
from clipmill.errors import ConfigError, TrainError
from clipmill.shards.read import Shards
from clipmill.train import listen, predict
from clipmill.train.checkpoint import Run, read_run
from clipmill.train.device import SECONDS_AT_ONCE
from clipmill.train.evaluate import evaluate_run, score_clips
from clipmill.train.inputs import find_sources
from clipmill.train.loop import train
from clipmill.train.predict import cut_windows, predict_files
from test_train import CLASSES, CPU, RATE, TINY, lines, plan_of, shards_of, sound_of


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shards_of(tmp_path_factory.mktemp("easy"), 12)


@pytest.fixture(scope="module")
def folder(where: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run that held out fold 1."""
    out = tmp_path_factory.mktemp("runs") / "short"
    train(plan_of(where, replace(TINY, steps=2, eval_every=1, learning_rate=1e-4), fold=1), out)
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
    assert np.sum(figures["confusion"]) == figures["clips"] == 3
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
    assert (both["scored"], both["clips"]) == ("fold 2 and split all", 3)
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
    with pytest.raises(
        TrainError, match=rf"it is no run, but it holds some: .*; name one of them, such as {folder.parent}/"
    ):
        read_run(folder.parent, CPU)
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


def test_a_long_file_is_the_mean_of_its_windows_by_their_length(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "WINDOW_S", 3)
    samples = prepare_file(write(tmp_path / "a.wav", 6.7), RATE)[: round(6.7 * RATE)]
    files = [tmp_path / "a.wav"]
    for n in range(3):
        files.append(tmp_path / f"{n}.wav")
        soundfile.write(files[-1], samples[3 * n * RATE : 3 * (n + 1) * RATE], RATE)
    sound_s: list[float] = []
    whole, *parts = predict_files(trained, files, CPU, heard=sound_s.append)
    expected = np.average([part.scores for part in parts], axis=0, weights=[3, 3, 0.7])
    np.testing.assert_allclose(whole.scores, expected, atol=1e-6)
    assert float(whole.scores.sum()) == pytest.approx(1.0)
    assert sum(sound_s) == pytest.approx(2 * 6.7)


def test_any_format_and_rate_is_heard_and_the_likeliest_come_first(trained, tmp_path):
    files = [
        write(tmp_path / f"a b.{kind}", 1.2, rate)
        for kind, rate in (("flac", 48000), ("ogg", 22050), ("mp3", 44100))
    ]
    for heard in predict_files(trained, files, CPU):
        (row,) = heard.rows(trained.labels, top=2)
        probabilities = [p["probability"] for p in row["predictions"]]
        assert len(probabilities) == 2
        assert probabilities == sorted(probabilities, reverse=True)
        assert len(heard.rows(trained.labels)[0]["predictions"]) == 3
        above = heard.rows(trained.labels, threshold=probabilities[1])[0]["predictions"]
        assert all(p["probability"] >= probabilities[1] for p in above)


def test_a_files_scores_do_not_depend_on_what_else_is_heard_nor_on_threads(trained, tmp_path):
    seconds = [0.3, 2.0, 11.2, 1.0, 2.0, 0.9, 2.2, 4.1]
    files = [write(tmp_path / f"{n}.wav", s, seed=n) for n, s in enumerate(seconds)]
    together = list(predict_files(trained, files, CPU, workers=2))
    assert [heard.file for heard in together] == list(map(str, files))
    assert [heard.seconds for heard in together] == seconds
    for path, heard in zip(files, together, strict=True):
        (alone,) = predict_files(trained, [path], CPU, workers=0)
        np.testing.assert_allclose(heard.scores, alone.scores, atol=2e-5)


@pytest.mark.parametrize(("seconds", "window", "hop"), [(7.3, 2.0, 2.0), (7.3, 2.0, 0.5), (6.0, 2.0, 2.0),
                         (7.3, 0.25, 1.0), (0.4, 2.0, 1.0), (10.0, 0.3, 0.1)])  # fmt: skip
def test_windows_begin_every_hop_until_one_reaches_the_end(seconds, window, hop):
    samples = np.arange(round(seconds * 1000), dtype=np.int16)
    blocks = np.array_split(samples, 7)
    cut_up = cut_windows(blocks, 1000, window, hop)
    found = [(start, np.concatenate(pieces)) for start, pieces in cut_up]
    assert [start for start, _ in found] == [round(n * hop * 1000) for n in range(len(found))]
    for start, cut in found:
        np.testing.assert_array_equal(cut, samples[start : start + round(window * 1000)])
    ends = [start + len(cut) for start, cut in found]
    assert all(end < len(samples) for end in ends[:-1])
    assert ends[-1] == len(samples) or found[-1][0] + hop * 1000 >= len(samples)


def test_each_window_is_heard_as_if_it_were_a_file(trained, tmp_path):
    path = write(tmp_path / "a.wav", 5.3)
    samples = prepare_file(path, RATE)[: round(5.3 * RATE)]
    sound_s: list[float] = []
    (heard,) = predict_files(trained, [path], CPU, window_s=1.5, hop_s=0.75, heard=sound_s.append)
    assert sum(sound_s) == pytest.approx(5.3)  # though windows overlap, and are padded
    assert heard.starts_s == [0, 0.75, 1.5, 2.25, 3, 3.75, 4.5]
    assert heard.ends_s == [1.5, 2.25, 3, 3.75, 4.5, 5.25, 5.3]
    assert not heard.more
    for start, end, scores in zip(heard.starts_s, heard.ends_s, heard.scores, strict=True):
        soundfile.write(tmp_path / "b.wav", samples[round(start * RATE) : round(end * RATE)], RATE)
        (alone,) = predict_files(trained, [tmp_path / "b.wav"], CPU)
        np.testing.assert_allclose(scores, alone.scores, atol=2e-5)
    row = heard.rows(trained.labels, top=1)[6]
    assert (row["start_s"], row["end_s"], row["seconds"]) == (4.5, 5.3, 0.8)


def test_windows_of_a_long_file_come_in_parts_before_its_end_is_known(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "_HEAD_S", 3.0)  # so that 20 s are long
    monkeypatch.setattr(stream, "HELD_S", 1.0)
    monkeypatch.setattr(stream, "_READ", RATE)
    monkeypatch.setattr(listen, "WINDOWS_A_PART", 8)
    path = write(tmp_path / "a.flac", 20)
    parts = list(predict_files(trained, [path], CPU, window_s=1))
    assert [len(part.scores) for part in parts] == [8, 8, 4]
    assert [part.more for part in parts] == [True, True, False]
    assert [part.seconds for part in parts] == [None, None, 20]
    assert [start for part in parts for start in part.starts_s] == list(range(20))
    data = bytearray(path.read_bytes())
    data[len(data) * 7 // 10] ^= 0xFF
    path.write_bytes(data)
    *parts, failed = predict_files(trained, [path], CPU, window_s=1)
    assert all(part.more for part in parts)
    count = sum(len(part.scores) for part in parts)
    assert 8 < count < 14
    assert failed.reason == "corrupt"
    assert failed.message.endswith(f"; what was heard in the {count} windows before stands")
    (failed,) = predict_files(trained, [path], CPU)
    assert (failed.reason, failed.scores) == ("corrupt", None)


def test_answers_come_while_there_is_more_to_hear(trained, tmp_path, monkeypatch):
    """Endless inputs, among them a length that no batch is ever full of."""
    monkeypatch.setitem(SECONDS_AT_ONCE, "cpu", 4)
    files = [write(tmp_path / "rare.wav", 3), *[write(tmp_path / f"{n}.wav", 1, seed=n) for n in range(4)]]
    answers = list(islice(predict_files(trained, _then(files[0], cycle(files[1:])), CPU), 40))
    assert answers[0].file == str(files[0])
    assert all(heard.scores is not None for heard in answers)


def _then(first: Path, rest: Any) -> Any:
    yield first
    yield from rest


def test_a_bad_file_is_a_row_with_its_reason(trained, tmp_path):
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no sound")
    os.mkfifo(tmp_path / "pipe.wav")
    files = [tmp_path / name for name in ("gone.wav", "empty.wav", "notes.txt", "pipe.wav")]
    heard = list(predict_files(trained, files, CPU))
    assert [p.reason for p in heard] == ["missing", "empty", "not-audio", "unreadable"]
    assert "`pipeline predict RUN -` hears what comes on stdin" in heard[3].message
    assert heard[0].rows(trained.labels)[0].keys() == {"file", "reason", "message"}


def test_windows_that_cannot_be_are_refused(trained):
    for wrong in (0, float("nan"), float("inf"), -1):
        with pytest.raises(ConfigError, match=r"--window .*: allowed are 0\.01 s up"):
            predict_files(trained, [], CPU, window_s=wrong)
    with pytest.raises(ConfigError, match="--hop 0: allowed are"):
        predict_files(trained, [], CPU, window_s=1, hop_s=0)
    with pytest.raises(ConfigError, match="give that too"):
        predict_files(trained, [], CPU, hop_s=1)


def test_a_network_that_diverged_is_named(folder, tmp_path):
    run = read_run(folder, CPU)
    with torch.no_grad():
        next(run.model.parameters()).fill_(float("nan"))
    with pytest.raises(TrainError, match="answers NaN: its training has diverged"):
        list(predict_files(run, [write(tmp_path / "a.wav", 1)], CPU))


def test_of_many_lengths_no_more_wait_than_there_is_room_for(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(listen, "_LENGTHS", 2)
    files = [write(tmp_path / f"{n}.wav", n + 0.5, seed=n) for n in range(4)]
    assert [heard.seconds for heard in predict_files(trained, files, CPU)] == [0.5, 1.5, 2.5, 3.5]


def test_memory_that_runs_out_is_named_with_what_helps(trained, where, tmp_path, monkeypatch):
    def full(*_: Any) -> Any:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(trained.model, "forward", full)
    with pytest.raises(
        TrainError, match=r"memory runs out with 2 s of sound in a window; a shorter --window"
    ):
        list(predict_files(trained, [write(tmp_path / "a.wav", 1.3)], CPU))
    with pytest.raises(TrainError, match=r"memory runs out with clips of up to 2 s; --where 'duration_s < "):
        score_clips(trained.model, trained.features, Shards.open(where), "softmax", CPU)


def test_links_that_lead_in_a_circle_are_files_that_cannot_be_read(trained, tmp_path):
    write(tmp_path / "a.wav", 0.5)
    (tmp_path / "l.wav").symlink_to("l.wav")
    (tmp_path / "gone.wav").symlink_to("nowhere.wav")
    heard = list(predict_files(trained, find_sources([str(tmp_path)]), CPU))
    assert [p.reason for p in heard] == [None, "missing", "unreadable"]
    assert scan(tmp_path) == (["a.wav", "gone.wav", "l.wav"], [])


def test_a_folder_is_its_sound_files_sorted_at_any_depth(tmp_path):
    for name in ("b/2.WAV", "b/1.ogg", "a.flac", "c.txt", ".hidden.wav", ".git/x.wav", "d/notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "b" / "again").symlink_to(tmp_path)
    (tmp_path / "bare").mkdir()
    found = list(find_sources([str(tmp_path), str(tmp_path / "bare"), "c.txt"]))
    names = [os.path.relpath(source.name, tmp_path) for source in found[:3]]
    assert names == ["a.flac", "b/1.ogg", "b/2.WAV"]
    assert (found[3].reason, found[3].message[:37]) == ("missing", "the folder holds no sound files (.wav")
    assert (found[4].name, found[4].reason) == ("c.txt", None)


# As a user runs them


def by_command(command: Any, *arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """A command in this process: exit code, stdout, stderr."""
    code = command.main([str(a) for a in arguments], standalone_mode=False)
    return code, *capsys.readouterr()


def test_evaluate_prints_a_table(folder, where, capsys):
    code, out, _ = by_command(evaluate_command, folder, "--shards", where, "--device", "cpu", capsys=capsys)
    assert code == 0
    assert "accuracy" in out
    assert all(label in out for label in CLASSES)


def test_evaluate_prints_every_figure_as_json(folder, where, capsys):
    flags = ("--shards", where, "--json", "--weights", "last", "--device", "cpu")
    figures = json.loads(by_command(evaluate_command, folder, *flags, capsys=capsys)[1])
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


def test_evaluate_says_where_the_run_learnt_from_the_clips(folder, where, capsys):
    flags = ("--shards", where, "--device", "cpu", "--json")
    _, out, err = by_command(evaluate_command, folder, *flags, capsys=capsys)
    held_out = json.loads(out)
    assert (held_out["learnt_from"], "note: " in err) == (0, False)
    fold = 1 if held_out["scored"] != "fold 1" else 2
    code, out, err = by_command(evaluate_command, folder, *flags, "--fold", fold, capsys=capsys)
    figures = json.loads(out)
    clips = figures["clips"]
    assert (code, figures["learnt_from"]) == (0, clips)
    assert (
        f"note: {folder} learnt from {clips} of the {clips} clips of fold {fold}, so these figures flatter it"
        in err
    )


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """A folder of two sound files, one with a name in Latin-1, and one that is none."""
    place = tmp_path / "media"
    place.mkdir()
    soundfile.write(place / "gut und schön.wav", sound_of("hum", 1.5, 9), RATE)
    write(place / "z.wav", 0.5).rename(place / os.fsdecode(b"z\xfc.wav"))
    (place / "bad.wav").write_text("no sound")
    return place


def heard_by(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    return by_command(predict_command, *arguments, "--device", "cpu", capsys=capsys)


def test_json_has_a_line_for_each_file_and_names_that_can_be_had_back(folder, media, capsys):
    code, out, err = heard_by(folder, media, "--format", "jsonl", "--top", 1, capsys=capsys)
    assert code == 3
    bad, good, latin = map(json.loads, out.splitlines())
    assert (bad["file"], bad["reason"]) == (str(media / "bad.wav"), "corrupt")
    assert (good["file"], good["seconds"], len(good["predictions"])) == (
        str(media / "gut und schön.wav"),
        1.5,
        1,
    )
    assert os.fsencode(latin["file"]) == os.fsencode(media) + b"/z\xfc.wav"
    assert err == "3 in = 2 heard + 1 failed (1 corrupt)\n"


def test_csv_has_no_file_without_a_line(folder, media, monkeypatch, capsys):
    monkeypatch.setattr(listen, "probabilities", lambda logits, loss: torch.full_like(logits, 1 / 3))
    code, out, err = heard_by(folder, media, "--format", "csv", "--threshold", 0.5, capsys=capsys)
    assert code == 3
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["file"].rpartition("/")[2] for row in rows] == [
        "bad.wav",
        "gut und schön.wav",
        "z\\udcfc.wav",
    ]
    assert [(row["start_s"], row["end_s"], row["reason"], row["label"]) for row in rows] == [
        ("", "", "corrupt", ""),
        ("0.0", "1.5", "", ""),
        ("0.0", "0.5", "", ""),
    ]
    assert "bad.wav: corrupt: " in err
    good = media / "gut und schön.wav"
    wide = list(csv.DictReader(io.StringIO(
        heard_by(folder, good, "--format", "csv", "--all-labels", "--window", "1", capsys=capsys)[1]
    )))  # fmt: skip
    assert [(row["start_s"], row["end_s"]) for row in wide] == [("0.0", "1.0"), ("1.0", "1.5")]
    assert list(wide[0]) == ["file", "start_s", "end_s", "reason", *CLASSES]
    assert sum(float(wide[0][label]) for label in CLASSES) == pytest.approx(1, abs=1e-5)


def test_a_list_may_name_folders_and_what_is_missing(folder, media, tmp_path, capsys):
    (tmp_path / "list").write_text(f"{media}/gut und schön.wav\n\n{tmp_path}/gone.ogg\r\n{media}\n")
    code, out, err = heard_by(folder, "--files-from", tmp_path / "list", capsys=capsys)
    assert code == 3
    assert len(out.splitlines()) == 6
    assert err == "5 in = 3 heard + 2 failed (1 missing, 1 corrupt)\n"
    code, _, err = heard_by(folder, media / "bad.wav", capsys=capsys)
    assert (code, err) == (1, "1 in = 0 heard + 1 failed (1 corrupt)\n")
    (tmp_path / "none").touch()
    assert heard_by(folder, "--files-from", tmp_path / "none", capsys=capsys)[0] == 1


def test_names_cannot_write_to_the_terminal(folder, media, capsys):
    evil = "\x1b[31mred\nline.wav"
    (media / "bad.wav").rename(media / evil)
    for form in ("table", "csv"):
        _, out, err = heard_by(folder, media / evil, "--format", form, capsys=capsys)
        shown = out if form == "table" else err
        assert "\x1b" not in shown
        assert r"/\x1b[31mred\nline.wav" in shown
    assert next(csv.reader(out.splitlines(keepends=True)[1:]))[0] == str(media / evil)


@pytest.fixture
def main_stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run the whole command in this process, with this for stdin; returns its exit code."""

    def ends(stdin: Any, *arguments: object) -> Any:
        kept = signal.getsignal(signal.SIGTERM)
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(sys, "argv", ["pipeline", "predict", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            return end.code
        finally:
            signal.signal(signal.SIGTERM, kept)

    return ends


def test_stdin_is_a_sound_file(folder, media, main_stdin, capsys):
    with open(media / "gut und schön.wav", encoding="latin-1") as sound:
        assert main_stdin(sound, folder, "-", "--device", "cpu") == 0
    out, err = capsys.readouterr()
    assert err == "1 in = 1 heard + 0 failed\n"
    assert out.splitlines()[1].startswith("-         1.50  ")


def test_a_stdin_that_is_closed_and_a_list_that_is_not_there_are_wrong_usage(folder, main_stdin, capsys):
    for wrong in (["-"], ["--files-from", "-"]):
        assert main_stdin(None, folder, *wrong) == 2
        assert "- reads from stdin, which is closed here" in capsys.readouterr().err
    assert main_stdin(None, folder, "--files-from", folder / "gone", "--device", "cpu") == 2
    assert capsys.readouterr().err == f"error: --files-from {folder / 'gone'}: No such file or directory\n"


def test_a_reader_that_goes_ends_it_without_a_word(folder, media, main_stdin, monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    with monkeypatch.context() as patched, open(writing, "w") as stdout:
        patched.setattr(sys, "stdout", stdout)
        patched.setattr(sys, "stderr", sys.stderr)  # click puts others in their places
        assert main_stdin(None, folder, media / "gut und schön.wav", "--device", "cpu") == 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), writing)  # lest closing it fails as well
    assert capsys.readouterr().err == ""


def end_with(error: Exception) -> None:
    with predict_cli._codecs_silenced():
        os.write(2, b"chatter, and last words")
        print("said", file=sys.stderr)
        raise error


def test_the_last_words_of_libraries_are_shown_where_nobody_foresaw_the_end(monkeypatch, tmp_path):
    monkeypatch.setattr(predict_cli, "LAST_WORDS", 10)
    kept = os.dup(2)
    with open(tmp_path / "stderr", "w+") as shown:
        os.dup2(shown.fileno(), 2)
        try:
            for error in (ConfigError("foreseen"), RuntimeError("not")):
                monkeypatch.setattr(sys, "stderr", sys.__stderr__)
                with pytest.raises(type(error)):
                    end_with(error)
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        assert (tmp_path / "stderr").read_text() == "said\nsaid\nlast words"


def test_an_interrupt_ends_it(folder, media):
    """At an endless list of one file, once its first answer has come."""
    command = [sys.executable, "-m", "clipmill", "predict", folder, "--files-from", "-", "--format", "jsonl"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:

        def feed() -> None:
            try:
                while True:
                    child.stdin.write(f"{media}/gut und schön.wav\n")
            except (BrokenPipeError, ValueError):
                pass

        threading.Thread(target=feed, daemon=True).start()
        assert json.loads(child.stdout.readline())["seconds"] == 1.5
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "Traceback" not in err

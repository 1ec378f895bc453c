"""The pages of a run and of several: whole, true to the figures, safe with any label, and with what is missing said."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner, Result
from matplotlib.image import imread

from clipmill.augment import to_float
from clipmill.cli.report import command
from clipmill.errors import TrainError
from clipmill.loader import Feed
from clipmill.report.clips import logmel_png
from clipmill.report.folds_page import write_folds_page
from clipmill.report.own_shards import _range, own_shards
from clipmill.report.run_files import read_metrics
from clipmill.report.run_page import write_run_page
from clipmill.shards.locate import _resolve
from clipmill.shards.read import Shards
from clipmill.train.checkpoint import read_run
from clipmill.train.evaluate import evaluate_clips, evaluate_run
from clipmill.train.loop import train
from clipmill.train.objective import clip_loss
from test_train import CPU, RATE, TINY, plan_of, shards_of

ODD = '<b>&"x'
NAMES = (ODD, "hum", "whistle's </script>")
SHORT = replace(TINY, steps=1, eval_every=1)
PAGES = shutil.ignore_patterns("report.html", "evaluation.json")


class Seen(HTMLParser):
    """What a browser makes of a page: its elements with their attributes, the text of each, and rows of cells."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.tables: list[list[list[str]]] = []
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self._open, "elements are left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img"):
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("style", "script"):
            self.text.append(data)
        if {"td", "th"} & set(self._open):
            self.tables[-1][-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def table(self, first: str) -> list[list[str]]:
        """The rows under the head of the table whose first head is this."""
        return next(table[1:] for table in self.tables if table and table[0][0] == first)

    @property
    def said(self) -> str:
        return " ".join(self.text)


def labelled_shards(root: Path, several: bool = False) -> Path:
    labels = [[NAMES[n % 3], "hum"] if several and n % 3 == 0 else [NAMES[n % 3]] for n in range(24)]
    return shards_of(root, labels=labels)


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labelled_shards(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def run(where: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that held out fold 1, with its page."""
    out = tmp_path_factory.mktemp("runs") / "<i>run & co"
    train(plan_of(where, fold=1), out)
    write_run_page(out, Shards.open(where), CPU, hardest=4)
    return out


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "copy", ignore=PAGES)


def evaluation(run: Path) -> dict[str, Any]:
    return json.loads((run / "evaluation.json").read_text())


def report(*arguments: object) -> Result:
    return CliRunner().invoke(command, [*map(str, arguments), "--device", "cpu"], standalone_mode=False)


# The figures and the hardest clips from one scoring


def test_the_hardest_clips_are_those_of_the_highest_loss_and_come_with_what_was_heard(run, where):
    trained, shards = read_run(run, CPU), Shards.open(where)
    found = evaluate_clips(trained, shards, CPU, hardest=99)
    assert found.figures == evaluate_run(trained, shards, CPU)
    losses = [clip.loss for clip in found.hardest]
    assert len(losses) == found.figures["clips"] == 6
    assert losses == sorted(losses, reverse=True)
    assert np.mean(losses) == pytest.approx(found.figures["loss"])
    assert evaluate_clips(trained, shards, CPU, hardest=2).hardest == found.hardest[:2]
    for clip in found.hardest:
        assert clip.key == shards.keys_of(np.array([clip.row]))[0]
        assert clip.labels == tuple(shards.index["labels"][clip.row].as_py())
        assert clip.shard == shards.index["shard"][clip.row].as_py()
        with torch.inference_mode():
            wave = to_float(torch.from_numpy(shards.read(clip.row)))[None]
            logits = trained.model(trained.features(wave))
        targets = torch.from_numpy(shards.targets_of(np.array([clip.row])))
        assert clip.loss == pytest.approx(float(clip_loss(logits, targets, "softmax")), abs=1e-4)
        best = logits.softmax(1)[0].sort(descending=True)
        assert [label for label, _ in clip.heard] == [shards.labels[c] for c in best.indices.tolist()]
        assert [p for _, p in clip.heard] == pytest.approx(best.values.tolist(), abs=1e-4)


# The page of a run


def test_the_page_needs_nothing_but_itself(run):
    seen = Seen(run / "report.html")
    assert {"charset": "utf-8"} in seen.all("meta")
    assert not seen.all("link")
    assert not any("src" in script for script in seen.all("script"))
    for tag, attributes in seen.tags:
        for name, value in attributes.items():
            assert "http:" not in str(value), (tag, name)
            assert "https:" not in str(value), (tag, name)
            if name in ("src", "href", "data", "poster", "srcset", "action"):
                assert str(value).startswith(("data:", "#")), (tag, name)
    text = (run / "report.html").read_text()
    assert "@import" not in text
    assert "url(" not in text


def test_what_the_data_say_is_never_markup(run):
    seen = Seen(run / "report.html")
    text = (run / "report.html").read_text()
    assert ODD not in text
    assert text.count("</script>") == 1
    assert not seen.all("i")
    assert "<i>run & co" in seen.said
    assert [row[0] for row in seen.table("true \\ heard as")] == list(NAMES)
    assert {row[0] for row in seen.table("class")} == set(NAMES)


def test_every_hard_clip_can_be_seen_and_heard_sample_for_sample(run, where):
    seen, shards = Seen(run / "report.html"), Shards.open(where)
    players, hardest = seen.all("audio"), evaluation(run)["hardest"]
    assert len(players) == len(hardest) == len(seen.all("img")) == 4
    for player, clip in zip(players, hardest, strict=True):
        assert "controls" in player
        kind, _, data = str(player["src"]).partition(";base64,")
        assert kind == "data:audio/flac"
        samples, rate = soundfile.read(io.BytesIO(base64.b64decode(data)), dtype="int16")
        assert rate == RATE
        np.testing.assert_array_equal(samples, shards.read(clip["row"]))
        assert clip["key"] in seen.said
    for picture in seen.all("img"):
        data = base64.b64decode(str(picture["src"]).removeprefix("data:image/png;base64,"))
        assert imread(io.BytesIO(data)).ndim == 3


def test_the_figures_are_those_of_evaluate(run, where):
    kept = evaluation(run)
    hardest, step = kept.pop("hardest"), kept.pop("step")
    trained = read_run(run, CPU)
    found = evaluate_clips(trained, Shards.open(where), CPU, hardest=4)
    assert kept == found.figures
    assert hardest == json.loads(json.dumps([asdict(clip) for clip in found.hardest]))
    evals = read_metrics(run / "metrics.jsonl")[0]["eval"]
    assert step == max(evals, key=lambda row: row["accuracy"])["step"]
    seen = Seen(run / "report.html")
    rows = {row[0]: row[1:] for row in seen.table("figure")}
    assert rows["accuracy"] == [f"{kept['accuracy']:.3f}", f"{evals[-1]['accuracy']:.3f}"]
    assert rows["calibration error"][0] == f"{kept['ece']:.3f}"
    assert rows["clips"] == ["6", "6"]


def test_the_confusions_add_up_and_the_classes_stand_by_their_precision(run):
    seen, kept = Seen(run / "report.html"), evaluation(run)
    cells = [[int(cell or 0) for cell in row[1:]] for row in seen.table("true \\ heard as")]
    assert cells == kept["confusion"]
    assert np.sum(cells) == kept["clips"]
    aps = [float(row[2]) for row in seen.table("class") if row[2] != "–"]  # noqa: RUF001
    assert len(aps) == 3
    assert aps == sorted(aps)


def test_several_classes_a_clip_have_no_confusions(tmp_path):
    where = labelled_shards(tmp_path, several=True)
    train(plan_of(where, SHORT), tmp_path / "run")
    write_run_page(tmp_path / "run", Shards.open(where), CPU, hardest=1)
    seen = Seen(tmp_path / "run" / "report.html")
    assert "heard as" not in seen.said
    assert evaluation(tmp_path / "run")["confusion"] is None
    assert "accuracy" not in [row[0] for row in seen.table("figure")]
    assert len(seen.all("audio")) == 1


def test_no_clip_needs_to_be_heard(copied, where):
    write_run_page(copied, Shards.open(where), CPU, hardest=0)
    assert not Seen(copied / "report.html").all("audio")
    assert evaluation(copied)["hardest"] == []


def test_a_run_that_was_stopped_early_has_a_page_of_what_there_is(where, tmp_path):
    out, plan = tmp_path / "run", plan_of(where, fold=1)
    stopped = train(
        replace(plan, recipe=replace(plan.recipe, eval_every=100, steps=100)), out, stop=lambda: True
    )
    assert not stopped.done
    with open(out / "metrics.jsonl", "a") as file:
        file.write(
            '{"kind": "bad", "key": "a", "shard": "s.tar", "reason": "corrupt", "message": "<u>", "step": 1}\n'
        )
        file.write('{"kind": "train", "step": 2, "loss": NaN, "data_wait": 0.5}\n{"kind": "train", "lo')
    page = write_run_page(out, Shards.open(where), CPU)
    seen = Seen(page)
    assert "has not been evaluated yet" in seen.said
    assert "--resume goes on" in seen.said
    assert "1 line of metrics.jsonl cannot be read" in seen.said
    assert "1 clip could not be read" in seen.said
    assert "waiting for data" in seen.said
    assert not (out / "evaluation.json").exists()


def test_a_run_without_any_metrics_still_has_its_figures(copied, where):
    (copied / "metrics.jsonl").unlink()
    seen = Seen(write_run_page(copied, Shards.open(where), CPU, hardest=1))
    assert "there are no curves" in seen.said
    assert not seen.all("polyline")
    assert seen.table("figure")


def test_a_folder_that_is_no_run_is_refused(where, tmp_path):
    with pytest.raises(TrainError, match="so it is no run"):
        write_run_page(tmp_path, Shards.open(where), CPU)
    assert not (tmp_path / "report.html").exists()


def test_a_long_clip_is_drawn_small_and_a_rate_without_mel_bins_not_at_all():
    samples = np.random.default_rng(0).integers(-9000, 9000, 20 * RATE).astype(np.int16)
    picture = logmel_png(samples, RATE)
    assert picture is not None
    assert imread(io.BytesIO(picture)).shape[:2] == (64, 320)
    assert logmel_png(samples[:1000], 200) is None
    assert logmel_png(np.zeros(RATE, np.int16), RATE) is not None


# The page of several runs


@pytest.fixture(scope="module")
def folds(where: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs and a third that is not there yet, as cross-validation leaves them."""
    folder = tmp_path_factory.mktemp("folds") / "easy"
    runs: list[dict[str, Any]] = []
    shutil.copytree(run, folder / "fold1-seed0", ignore=PAGES)
    train(plan_of(where, SHORT, fold=2), folder / "fold2-seed0")
    for fold in (1, 2):
        name = f"fold{fold}-seed0"
        evals = read_metrics(folder / name / "metrics.jsonl")[0]["eval"]
        best = max(evals, key=lambda row: row["accuracy"])
        runs.append({"run": name, "fold": fold, "seed": 0, "done": True, "best": best, "last": evals[-1]})
    runs.append({"run": "fold3-seed0", "fold": 3, "seed": 0, "done": False, "best": None, "last": None})
    told: dict[str, Any] = {"main_figure": "accuracy", "runs": runs}
    for prefix, which in (("", "best"), ("last_", "last")):
        values = {name: [run[which][name] for run in runs[:2]] for name in ("accuracy", "map", "loss")}
        told[f"{prefix}mean"] = {name: float(np.mean(found)) for name, found in values.items()}
        told[f"{prefix}deviation"] = {name: float(np.std(found, ddof=1)) for name, found in values.items()}
    (folder / "crossval.json").write_text(json.dumps(told))
    written = report(folder, "--hardest", 2)
    assert written.return_value == 0, written.output
    return folder


def test_a_folder_of_runs_has_a_page_over_all_of_them_and_one_of_each(folds):
    seen = Seen(folds / "report.html")
    told = json.loads((folds / "crossval.json").read_text())
    links = [str(a["href"]) for a in seen.all("a") if not str(a["href"]).startswith("#")]
    assert links == ["fold1-seed0/report.html", "fold2-seed0/report.html"]
    assert all((folds / link).is_file() for link in links)
    rows = {row[0]: row[1:] for row in seen.table("figure")}
    assert rows["accuracy"][0] == f"{told['mean']['accuracy']:.3f}"
    assert rows["accuracy"][1] == f"{told['deviation']['accuracy']:.3f}"
    assert len(seen.table("run")) == 3
    assert "not finished yet: fold3-seed0" in seen.said
    assert f"± {told['deviation']['map']:.3f}" in seen.said


def test_confusions_are_summed_and_classes_averaged_over_the_runs(folds):
    seen = Seen(folds / "report.html")
    found = [evaluation(folds / name) for name in ("fold1-seed0", "fold2-seed0")]
    cells = [[int(cell or 0) for cell in row[1:]] for row in seen.table("true \\ heard as")]
    assert cells == np.sum([one["confusion"] for one in found], axis=0).tolist()
    rows = {row[0]: row for row in seen.table("class")}
    for c, label in enumerate(NAMES):
        assert int(rows[label][1]) == sum(one["per_class"][c]["clips"] for one in found)
        assert float(rows[label][2]) == pytest.approx(
            np.mean([o["per_class"][c]["ap"] for o in found]), abs=6e-4
        )
    worst = max((clip for one in found for clip in one["hardest"]), key=lambda clip: clip["loss"])
    assert seen.table("clip")[0][0] == worst["key"]
    assert len(seen.table("clip")) == 4
    assert not seen.all("audio")


def test_what_is_lacking_for_the_sums_is_said(folds, tmp_path):
    folder = shutil.copytree(folds, tmp_path / "folds")
    (folder / "fold2-seed0" / "evaluation.json").write_text("{")
    seen = Seen(write_folds_page(folder))
    assert "without an evaluation.json" in seen.said
    assert "fold2-seed0, fold3-seed0" in seen.said
    assert np.sum([int(cell or 0) for row in seen.table("true \\ heard as") for cell in row[1:]]) == 6
    (folder / "crossval.json").write_text('{"runs": []}')
    with pytest.raises(TrainError, match=r"lacks main_figure\); the same `pipeline train`"):
        write_folds_page(folder)


def test_before_any_run_is_evaluated_the_page_says_what_is_to_come(tmp_path):
    rows = [{"run": "fold1-seed0", "fold": 1, "seed": 0, "done": False, "best": None, "last": None}]
    empty = dict.fromkeys(("main_figure", "mean", "deviation", "last_mean", "last_deviation"))
    (tmp_path / "crossval.json").write_text(json.dumps({**empty, "runs": rows}))
    seen = Seen(write_folds_page(tmp_path))
    assert "not finished yet: fold1-seed0" in seen.said
    assert "0 of them done" in seen.said


# As a user runs it


def test_the_command_finds_the_runs_own_shards_and_says_where_the_page_is(copied):
    done = report(copied, "--hardest", 1)
    assert done.return_value == 0, done.output
    assert f"report: {copied / 'report.html'}" in done.output
    assert "not the very shards" not in (copied / "report.html").read_text()


def test_shards_that_are_gone_are_asked_for_and_other_ones_are_told(copied, where, tmp_path):
    moved = shutil.copytree(where, tmp_path / "moved")
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "shards": [str(tmp_path / "gone")]}))
    lost = report(copied)
    assert isinstance(lost.exception, TrainError)
    assert "say where they are with --shards" in str(lost.exception)
    assert report(copied, "--shards", moved).return_value == 0
    assert "not the very shards" not in (copied / "report.html").read_text()
    (copied / "config.json").write_text(json.dumps({**config, "root_sha256": "0" * 64}))
    assert report(copied).return_value == 0
    assert "not the very shards" in (copied / "report.html").read_text()


def test_of_a_run_on_some_shards_the_very_same_are_opened(where, tmp_path):
    odd = shutil.copytree(where, tmp_path / "odd{1,2} set")
    for place in (where, odd):
        for names in (["easy-all-000000.tar"], ["easy-all-000000.tar", "easy-all-000001.tar"]):
            some = Shards.open(f"{where}/{{{','.join(names)}}}" if len(names) > 1 else where / names[0])
            config = {"shards": [str(place)], "files": some.some_files}
            (tmp_path / "config.json").write_text(json.dumps(config))
            again = own_shards(tmp_path)
            assert (again.some_files, len(again)) == (some.some_files, len(some))
            assert again.root_sha256 == some.root_sha256


def test_files_of_shards_may_have_commas_and_braces_in_their_names(tmp_path):
    names = ["a,b.tar", "c{d}.tar", "e{1..3}.tar"]
    for name in names:
        (tmp_path / name).touch()
    for some in (names, *([name] for name in names)):
        assert _resolve(_range(str(tmp_path), some)) == (str(tmp_path), some)


def test_parts_of_a_config_that_are_nothing_are_passed_over(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "clips": None, "versions": None}))
    assert report(copied, "--hardest", 1).return_value == 0


def test_one_run_whose_shards_are_gone_does_not_stop_the_others(folds, tmp_path):
    folder = shutil.copytree(folds, tmp_path / "folds", ignore=PAGES)
    config = json.loads((folder / "fold1-seed0" / "config.json").read_text())
    (folder / "fold1-seed0" / "config.json").write_text(json.dumps({**config, "shards": ["/gone"]}))
    done = report(folder, "--hardest", 1)
    assert done.return_value == 3, done.output
    assert "no page: " in done.output
    assert "fold1-seed0: the shards that it was trained on cannot be opened" in done.output
    assert (folder / "fold2-seed0" / "report.html").is_file()
    assert "fold1-seed0, fold3-seed0" in Seen(folder / "report.html").said


def test_a_run_whose_name_is_no_utf8_has_its_page(run, tmp_path, monkeypatch):
    named = tmp_path / os.fsdecode(b"r\xfcn")
    shutil.copytree(run, named, ignore=PAGES)
    monkeypatch.chdir(named)
    assert report(".", "--hardest", 1).return_value == 0
    assert r"r\udcfcn" in Seen(named / "report.html").said
    (named / "best.safetensors").unlink()  # safetensors opens no such path
    done = report(named)
    assert done.return_value == 0, done.exception
    assert os.fsencode(named) in done.stdout_bytes
    assert r"r\udcfcn" in Seen(named / "report.html").said


def test_a_step_of_millions_is_told_to_the_last_digit(copied, where):
    with open(copied / "metrics.jsonl", "a") as file:
        row = lines_of(copied)[-1] | {"step": 1234567}
        file.write(json.dumps(row) + "\n")
    seen = Seen(write_run_page(copied, Shards.open(where), CPU, hardest=0))
    assert "last (step 1234567)" in seen.said


def lines_of(run: Path) -> list[dict[str, Any]]:
    return read_metrics(run / "metrics.jsonl")[0]["eval"]


def test_a_clip_that_cannot_be_read_is_counted_on_the_page(copied, where, tmp_path):
    broken = shutil.copytree(where, tmp_path / "broken")
    shards = Shards.open(broken)
    entry = shards.index.slice(int(np.flatnonzero(shards.folds == 1)[0]), 1).to_pylist()[0]
    with open(broken / entry["shard"], "r+b") as file:
        file.seek(entry["offset"])
        file.write(bytes(entry["length"]))
    told: list[Any] = []
    write_run_page(copied, Shards.open(broken), CPU, feed=Feed(max_bad=0.5), hardest=1, tell=told.append)
    assert [bad.key for bad in told] == [entry["key"]]
    seen = Seen(copied / "report.html")
    assert "1 clip could not be read" in seen.said
    assert report(copied, "--shards", broken, "--max-bad", 0.5).return_value == 3


def test_recipe_fields_stand_on_the_page(run):
    seen = Seen(run / "report.html")
    for field, value in asdict(TINY).items():
        assert field in seen.said
        assert str(value) in seen.said

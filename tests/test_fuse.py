"""Fusing runs: the same clips for all, every combination, honest refusals, and a fused model that works as a run."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from clipmill import tables
from clipmill.cli import fuse as fuse_cli
from clipmill.errors import ConfigError, TrainError
from clipmill.shards.convert import convert
from clipmill.shards.read import Shards
from clipmill.train.checkpoint import Described, Run, read_run
from clipmill.train.crossval import FIGURES, cross_validate, parts_of
from clipmill.train.evaluate import evaluate_run, score_clips
from clipmill.train.fuse import Comparison, Row, Ways, fuse_runs
from clipmill.train.fused import Fused, read_tagger, write_fused
from clipmill.train.fusion import METHODS, fit_weights, fuse
from clipmill.train.loop import train
from clipmill.train.metrics import measure_scores
from clipmill.train.plan import plan_run
from clipmill.train.predict import predict_files
from clipmill.train.split import learnt_from
from test_train import CLASSES, CPU, RATE, TINY, plan_of, shards_of

SHORT = replace(TINY, steps=3, eval_every=3, learning_rate=3e-4, ema_decay=0.5, specaugment=False)
"""Just enough that the answers are not all certain."""

Command = Callable[..., Any]


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shards_of(tmp_path_factory.mktemp("easy"), 24, seconds=0.8)


@pytest.fixture(scope="module")
def runs(where: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three runs that held out fold 1 and know nothing of fold 2: with another order of the classes, and on waveforms
    at another rate."""
    root, shards = tmp_path_factory.mktemp("runs"), Shards.open(where)
    turned = shards.with_labels(CLASSES[::-1])
    asked = (("a", shards, "erann-3-1"), ("b", turned, "erann-3-1"), ("c", shards, "eat-s-speech"))
    for seed, (name, clips, model) in enumerate(asked):
        recipe = replace(SHORT, model=model)
        train(plan_run(clips, recipe, CPU, fold=1, seed=seed, where="fold != 2"), root / name)
    return [root / name for name, _, _ in asked]


@pytest.fixture(scope="module")
def found(runs: list[Path], where: Path) -> Comparison:
    return fuse_runs(runs, Shards.open(where), CPU)


def copy(run: Path, out: Path, **config: Any) -> Path:
    """The same run somewhere else, with other values in its config.json."""
    shutil.copytree(run, out, ignore=shutil.ignore_patterns("*.pt", "events*"))
    told = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**told, **config}))
    return out


def answers(run: Run, shards: Shards) -> np.ndarray:
    """Probabilities `[clips, classes]` in the order of `CLASSES`."""
    scores = score_clips(run.model, run.features, shards, run.loss, CPU).scores
    return scores[:, [run.labels.index(label) for label in CLASSES]]


def row_of(found: Comparison, some: tuple[int, ...], method: str | None) -> Row:
    (row,) = [row for row in found.rows if (row.runs, row.method) == (some, method)]
    return row


# Which figures come of it


def test_each_run_alone_has_the_figures_of_evaluate(found, runs, where):
    for number, folder in enumerate(runs):
        alone = evaluate_run(read_run(folder, CPU), Shards.open(where), CPU)
        assert row_of(found, (number,), None).figures == pytest.approx(
            {name: alone[name] for name in FIGURES}
        )


def test_every_combination_is_measured_by_every_method_on_classes_by_name(found, runs, where):
    assert [(row.runs, row.method) for row in found.rows] == [
        *(((run,), None) for run in range(3)),
        *((some, m) for size in (2, 3) for some in combinations(range(3), size) for m in METHODS),
    ]
    held_out = plan_of(where, fold=1).held_out
    alone = torch.from_numpy(np.stack([answers(read_run(run, CPU), held_out) for run in runs])).double()
    for row in found.rows[3:]:
        fused = fuse(alone[list(row.runs)], str(row.method), "softmax", row.weights)
        figures = measure_scores(held_out.targets, fused.float().numpy(), list(CLASSES), "softmax")
        # The network on waveforms answers nearly the same of all clips: their ranks are rounding.
        ranked = ("accuracy", "f1", "map", "auc") if 2 not in row.runs else ("accuracy", "f1")
        for name in (*ranked, "ece"):
            assert row.figures[name] == pytest.approx(figures[name], abs=1e-5), (row, name)
        truth = torch.from_numpy(held_out.targets).argmax(1)
        nll = -fused.gather(1, truth[:, None]).log().mean()
        assert row.figures["loss"] == pytest.approx(float(nll), rel=1e-4)
    assert found.accounts == [{"scored": "fold 1 where fold != 2", "asked": 6, "clips": 6, "unread": 0}]


def test_the_command_prints_a_tick_for_each_run_and_a_column_for_each_method(runs, where, here):
    done = here("fuse", *runs, "--shards", where, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    text = done.stdout.splitlines()
    assert text[0] == "fold 1 where fold != 2: 6 in = 6 scored + 0 failed"
    assert text[1].split() == ["run", "model", "feature", "accuracy", "map", "f1"]
    assert [line.split()[0] for line in text[2:5]] == ["1", "2", "3"]
    assert text[4].split()[1:4] == [str(runs[2]), "eat-s-speech", "waveform"]
    for figure in ("accuracy", "map", "f1"):
        at = text.index(f"{figure}, fused")
        assert text[at + 1].split() == ["1", "2", "3", *METHODS]
        ticks = [line.count("✓") for line in text[at + 2 : at + 6]]
        assert ticks == [2, 2, 2, 3]
        places = [[n for n, c in enumerate(line[:7]) if c == "✓"] for line in text[at + 2 : at + 6]]
        assert places == [[0, 3], [0, 6], [3, 6], [0, 3, 6]]
    assert "Traceback" not in done.stderr


def test_json_and_csv_say_all_of_it(runs, where, tmp_path, here):
    asked = ("fuse", *runs, "--shards", where, "--device", "cpu", "--method", "wa", "--method", "deng")
    done = here(*asked, "--weights", "2,1,1", "--json", "--csv", tmp_path / "t.csv")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    names = [str(run) for run in runs]
    assert [one["run"] for one in told["runs"]] == names
    assert [one["feature"] for one in told["runs"]] == ["logmel", "logmel", "waveform"]
    assert len(told["rows"]) == 3 + 4 * 2
    assert [row["runs"] for row in told["rows"][-2:]] == [names, names]
    assert told["rows"][-2]["weights"] == [0.5, 0.25, 0.25]
    assert (told["fitted"], told["unread_clips"]) == (None, [])
    rows = list(csv.DictReader(io.StringIO((tmp_path / "t.csv").read_text())))
    assert len(rows) == len(told["rows"])
    for line, row in zip(rows, told["rows"], strict=True):
        assert [line[name] == "1" for name in names] == [name in row["runs"] for name in names]
        assert line["method"] == (row["method"] or "")
        assert line["weights"] == " ".join(map(str, row["weights"] or []))
        for name in FIGURES:
            assert line[name] == ("" if row["figures"][name] is None else str(row["figures"][name]))


def test_where_the_terminal_knows_no_ticks_crosses_stand(found, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "latin-1"))
    fuse_cli._print(found, Ways())
    sys.stdout.seek(0)
    assert "\nx  x " in sys.stdout.read()


def test_many_runs_are_fused_without_their_combinations_and_not_with_them(runs, where):
    whole = fuse_runs(runs, Shards.open(where), CPU, Ways(every=False))
    assert [row.runs for row in whole.rows] == [(0,), (1,), (2,), *[(0, 1, 2)] * 4]
    with pytest.raises(ConfigError, match=r"13 runs have 8,178 combinations: .* up to 12 runs, or --no-comb"):
        Ways().check(13)
    Ways(every=False).check(13)


# Weights


def test_given_weights_are_shares_of_the_runs_that_take_part(runs, where, found):
    given = fuse_runs(runs, Shards.open(where), CPU, Ways(("wa", "ds"), (4, 1, 1)))
    assert row_of(given, (0, 1, 2), "wa").weights == pytest.approx((4 / 6, 1 / 6, 1 / 6))
    assert row_of(given, (1, 2), "wa").weights == (0.5, 0.5)
    assert row_of(given, (0, 2), "wa").weights == pytest.approx((0.8, 0.2))
    assert row_of(given, (0, 2), "ds") == row_of(found, (0, 2), "ds")


def test_weights_are_fitted_on_a_fold_that_no_run_learnt_from(runs, where, here):
    shards = Shards.open(where)
    found = fuse_runs(runs, shards, CPU, Ways(("wa",), fit_fold=2))
    assert found.fitted == {"scored": "fold 2", "asked": 6, "clips": 6, "unread": 0}
    fold = shards.take(shards.folds == 2)
    alone = torch.from_numpy(np.stack([answers(read_run(run, CPU), fold) for run in runs])).double()
    targets = torch.from_numpy(fold.targets)
    for some in ((0, 1), (1, 2), (0, 1, 2)):
        wanted = fit_weights(alone[list(some)], targets, "softmax")
        assert row_of(found, some, "wa").weights == pytest.approx(wanted, abs=1e-3)
    done = here("fuse", *runs[:2], "--shards", where, "--device", "cpu", "--method", "wa", "--fit-fold", 2)
    assert "weights fitted on fold 2: 6 in = 6 scored + 0 failed" in done.stdout
    assert done.stdout.splitlines()[2].split()[-1] == "weight"


def test_weights_are_not_fitted_on_clips_that_a_run_learnt_from_or_that_judge(runs, where):
    shards = Shards.open(where)
    with pytest.raises(
        TrainError, match=r"a: learnt from 6 of the 6 clips of fold 3, so --fit-fold 3 .*fold != 3"
    ):
        fuse_runs(runs, shards, CPU, Ways(fit_fold=3))
    with pytest.raises(TrainError, match=r"--fit-fold 1: 6 of its 6 clips are to be scored too"):
        fuse_runs(runs, shards, CPU, Ways(fit_fold=1))
    with pytest.raises(TrainError, match=r"no clip is in fold 7"):
        fuse_runs(runs, shards, CPU, Ways(fit_fold=7))


@pytest.mark.parametrize(
    ("ways", "said"),
    [
        (Ways(weights=(1, 2)), r"--weights 1,2: allowed is a number above 0 for each of the 3 RUNs"),
        (Ways(weights=(1, 0, 2)), r"--weights 1,0,2: .*leave a run away that is to have none"),
        (Ways(weights=(1, float("nan"), 2)), r"--weights 1,nan,2: allowed"),
        (Ways(weights=(1, 1, 1), fit_fold=2), r"--weights and --fit-fold: allowed is one of them"),
        (Ways(("ds",), weights=(1, 1, 1)), r"--weights: only --method wa has weights"),
        (Ways(("ds",), fit_fold=2), r"--fit-fold: only --method wa has weights"),
    ],
)
def test_weights_that_cannot_be_are_refused_before_anything_is_read(ways, said, runs, where):
    with pytest.raises(ConfigError, match=said):
        fuse_runs(runs, Shards.open(where), CPU, ways)


# Which runs and clips go together


def test_runs_that_held_out_different_clips_need_a_fold_that_none_learnt_from(runs, where, tmp_path):
    shards = Shards.open(where)
    other = copy(runs[1], tmp_path / "other", held_out={"by": "fold", "value": 3})
    with pytest.raises(TrainError, match=r"held out different clips: .*a: fold 1 .*other: fold 3 .*--fold K"):
        fuse_runs([runs[0], other], shards, CPU)
    with pytest.raises(TrainError, match=r"other: learnt from 6 of the 6 clips of fold 1, .*--allow-leak"):
        fuse_runs([runs[0], other], shards, CPU, fold=1)
    allowed = fuse_runs([runs[0], other], shards, CPU, fold=1, allow_leak=True)
    assert allowed.accounts[0]["scored"] == "fold 1"
    assert allowed.held_out is None
    both = fuse_runs([runs[0], other], shards, CPU, fold=2)  # which neither knows
    assert both.accounts[0]["clips"] == 6


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"labels": ["hiss", "hum", "horn"]},
            r"different classes: only .*a has whistle; only .*b has horn\. Allowed",
        ),
        ({"loss": "sigmoid"}, r"a was trained with --loss softmax, and .*b with sigmoid: allowed is one"),
        ({"sample_rate": 8000}, r"a was trained with a sample rate in Hz of 16000, and .*b with 8000"),
    ],
)
def test_runs_of_other_classes_another_loss_or_rate_are_refused(config, said, runs, where, tmp_path):
    with pytest.raises(TrainError, match=said):
        fuse_runs([runs[0], copy(runs[0], tmp_path / "b", **config)], Shards.open(where), CPU)


def test_what_is_no_run_or_not_two_is_named(runs, where, tmp_path):
    shards = Shards.open(where)
    for folders, kind, said in (
        ([runs[0]], ConfigError, r"1 RUN given: allowed are two or more"),
        ([runs[0], runs[1], Path(f"{runs[0]}/../a")], ConfigError, r"a: is given twice"),
        ([runs[0], tmp_path / "nowhere"], TrainError, r"nowhere: holds no config\.json, so it is no run"),
    ):
        with pytest.raises(kind, match=said):
            fuse_runs(folders, shards, CPU)
    unborn = copy(runs[0], tmp_path / "unborn")
    (unborn / "best.safetensors").unlink()
    with pytest.raises(
        TrainError, match=r"unborn: has no best\.safetensors yet; let it train on with --resume"
    ):
        fuse_runs([runs[0], unborn], shards, CPU)
    (unborn / "config.json").write_text('{"model": "erann-3-1"}')
    with pytest.raises(TrainError, match=r"is no run's config: it lacks dataset, features"):
        fuse_runs([runs[0], unborn], shards, CPU)
    spoilt = copy(runs[0], tmp_path / "spoilt")
    (spoilt / "best.safetensors").write_bytes((spoilt / "best.safetensors").read_bytes()[:1000])
    with pytest.raises(TrainError, match=r"spoilt.best\.safetensors: cannot be read"):
        fuse_runs([runs[0], spoilt], shards, CPU)


def test_the_rows_that_a_run_learnt_from_are_known_from_its_config(where, tmp_path):
    shards = Shards.open(where)
    for options in ({"fold": 1}, {"fold": 3, "where": 'fold != 2 and key != "clip-005"'}):
        plan = plan_run(shards, TINY, CPU, allow_missing=True, **options)
        assert np.flatnonzero(learnt_from(shards, plan.config)).tolist() == plan.split.train.tolist()
    first = str(where / "easy-all-000000.tar")
    plan = plan_of([first], fold=2)  # of some of the shards
    assert learnt_from(shards, plan.config).sum() == len(plan.split.train) < len(shards) / 2
    splits = ["train" if n % 4 else "eval" for n in range(12)]
    own = shards_of(tmp_path / "splits", 12, split=splits, fold=[None] * 12)
    plan = plan_of(own)
    assert np.flatnonzero(learnt_from(Shards.open(own), plan.config)).tolist() == plan.split.train.tolist()
    plain = shards_of(tmp_path / "plain", 12, fold=[None] * 12)
    plan = plan_of(plain, allow_missing=True, seed=3)  # holds out some groups
    assert np.flatnonzero(learnt_from(Shards.open(plain), plan.config)).tolist() == plan.split.train.tolist()
    convert(plain, tmp_path / "h5", "hdf5")
    assert learnt_from(Shards.open(tmp_path / "h5"), plan.config).all(), (
        "which groups were held out is not known"
    )
    assert not learnt_from(shards, {**plan.config, "dataset": "other"}).any()


def test_a_clip_that_cannot_be_read_is_left_out_of_all_and_counted(runs, where, tmp_path, here):
    damaged = Path(shutil.copytree(where, tmp_path / "shards"))
    shards = Shards.open(damaged)
    row = int(np.flatnonzero(shards.folds == 1)[0])
    shard, offset, length = (shards.columns[name][row].as_py() for name in ("shard", "offset", "length"))
    with open(damaged / shard, "r+b") as file:
        file.seek(offset + length // 2)
        file.write(bytes(50))
    asked = ("fuse", *runs[:2], "--shards", damaged, "--device", "cpu", "--method", "ds")
    done = here(*asked)
    assert done.returncode == 3, done.stderr
    assert "6 in = 5 scored + 1 failed" in done.stdout
    assert done.stderr.count("cannot be read") == 1, "told once, not for each run"
    (key,) = shards.keys_of(np.array([row]))
    told = json.loads(here(*asked, "--json").stdout)
    assert [bad["key"] for bad in told["unread_clips"]] == [key]
    assert told["accounts"][0] | {"scored": ""} == {"scored": "", "asked": 6, "clips": 5, "unread": 1}
    none = here(*asked, "--max-bad", "0")
    assert (none.returncode, "more than --max-bad 0 allows" in none.stderr) == (1, True)


def test_a_network_that_answers_nan_is_named(runs, where, tmp_path):
    from safetensors.torch import load_file, save_file

    sick = copy(runs[0], tmp_path / "sick")
    weights = load_file(sick / "best.safetensors")
    weights["fc2.bias"] = torch.full_like(weights["fc2.bias"], float("nan"))
    save_file(weights, sick / "best.safetensors")
    with pytest.raises(TrainError, match=r"sick: the network answers NaN"):
        fuse_runs([runs[0], sick], Shards.open(where), CPU)


# Cross-validations


@pytest.fixture(scope="module")
def validations(where: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two of them, of folds 1 and 3."""
    root = tmp_path_factory.mktemp("validations")
    for name, batch in (("x", 4), ("y", 5)):
        recipe = replace(SHORT, steps=2, eval_every=2, batch_size=batch)
        cross_validate(
            parts_of([1, 3], 1, 0),
            root / name,
            lambda part, place, recipe=recipe: train(
                plan_of(where, recipe, fold=part.fold, seed=part.seed), place
            ),
        )
    return [root / "x", root / "y"]


def test_of_cross_validations_the_runs_of_a_fold_are_fused_and_the_figures_are_means(
    validations, where, here
):
    shards = Shards.open(where)
    found = fuse_runs(validations, shards, CPU)
    folds = [fuse_runs([v / f"fold{k}-seed0" for v in validations], shards, CPU) for k in (1, 3)]
    assert len(found.rows) == 2 + len(METHODS)
    for n, row in enumerate(found.rows):
        for name in ("accuracy", "map", "f1", "loss"):
            values = [fold.rows[n].figures[name] for fold in folds]
            assert row.figures[name] == pytest.approx(mean(values))
            assert row.deviation is not None
            assert row.deviation[name] == pytest.approx(stdev(values))
    for n, validation in enumerate(validations):
        told = json.loads((validation / "crossval.json").read_text())
        assert found.rows[n].figures["accuracy"] == pytest.approx(told["mean"]["accuracy"])
    assert [(one["part"], one["scored"]) for one in found.accounts] == [
        ("fold1-seed0", "fold 1"),
        ("fold3-seed0", "fold 3"),
    ]
    done = here("fuse", *validations, "--shards", where, "--device", "cpu", "--method", "wa")
    assert done.stdout.startswith("what 2 runs of each held out: 12 in = 12 scored + 0 failed")
    row = found.rows[2]
    assert row.deviation is not None
    assert f"✓  ✓  {row.figures['accuracy']:.3f} ± {row.deviation['accuracy']:.3f}" in done.stdout


def test_cross_validations_that_do_not_match_are_refused(validations, runs, where, tmp_path, here):
    shards = Shards.open(where)
    with pytest.raises(
        ConfigError, match=r"x is a cross-validation, and .*a is not: allowed are RUNs of one kind"
    ):
        fuse_runs([validations[0], runs[0]], shards, CPU)
    for flag in ("fold", "split"):
        with pytest.raises(ConfigError, match=rf"--{flag}: goes with single runs"):
            fuse_runs(validations, shards, CPU, **{flag: {"fold": 1, "split": "all"}[flag]})
    with pytest.raises(ConfigError, match=r"--fit-fold: goes with single runs"):
        fuse_runs(validations, shards, CPU, Ways(fit_fold=1))
    other = Path(shutil.copytree(validations[1], tmp_path / "other"))
    told = json.loads((other / "crossval.json").read_text())
    (other / "crossval.json").write_text(json.dumps({**told, "runs": told["runs"][:1]}))
    with pytest.raises(
        TrainError, match=r"x has fold1-seed0, fold3-seed0, and .*other has fold1-seed0: allowed"
    ):
        fuse_runs([validations[0], other], shards, CPU)
    shutil.copy(validations[1] / "crossval.json", other)
    (other / "fold3-seed0" / "best.safetensors").unlink()
    with pytest.raises(TrainError, match=r"fold3-seed0: has no best\.safetensors yet; .*--resume goes on"):
        fuse_runs([validations[0], other], shards, CPU)
    (other / "crossval.json").write_text("[")
    with pytest.raises(TrainError, match=r"crossval\.json: cannot be read"):
        fuse_runs([validations[0], other], shards, CPU)
    done = here("fuse", *validations, "--shards", where, "--method", "ds", "--out", tmp_path / "out")
    assert (done.returncode, "writes a model of single runs" in done.stderr) == (2, True)


# The fused model


@pytest.fixture(scope="module")
def tree(found: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of the runs and, beside them, their fused model by Deng."""
    root = tmp_path_factory.mktemp("tree")
    copies = [Described(copy(run.folder, root / run.folder.name), run.config) for run in found.runs]
    write_fused(root / "fused", copies, "deng", None, found.held_out)
    return root


@pytest.fixture
def fused(tree: Path, tmp_path: Path) -> Path:
    """The fused model in a copy of the tree."""
    return Path(shutil.copytree(tree, tmp_path / "tree")) / "fused"


def test_a_fused_model_is_evaluated_as_a_run_with_the_figures_of_the_table(tree, found, where, here):
    fused = tree / "fused"
    done = here("evaluate", fused, "--shards", where, "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    row = row_of(found, (0, 1, 2), "deng")
    for name in FIGURES:
        assert told[name] == pytest.approx(row.figures[name], rel=1e-4), name
    assert told["scored"] == "fold 1 where fold != 2"
    assert told["model"] == "deng of erann-3-1, erann-3-1, eat-s-speech"


def test_a_fused_model_hears_files_as_its_runs_do_together(tree, runs, tmp_path, here):
    rng = np.random.default_rng(0)
    path = tmp_path / "a.wav"
    soundfile.write(path, 0.2 * rng.standard_normal(3 * RATE), RATE)
    alone = []
    for folder in runs:
        run = read_run(folder, CPU)
        (heard,) = predict_files(run, [path], CPU)
        alone.append(heard.scores[[run.labels.index(label) for label in CLASSES]])
    wanted = fuse(torch.from_numpy(np.stack(alone)).double()[:, None], "deng", "softmax")[0]
    done = here("predict", tree / "fused", path, "--device", "cpu", "--top", 3, "--format", "jsonl")
    assert done.returncode == 0, done.stderr
    told = {one["label"]: one["probability"] for one in json.loads(done.stdout)["predictions"]}
    assert [told[label] for label in CLASSES] == pytest.approx(wanted.tolist(), abs=2e-6)


def test_equal_runs_give_equal_bytes_and_a_tree_may_be_moved(fused, runs, where, tmp_path, here):
    told = json.loads((fused / "fusion.json").read_text())
    assert [one["run"] for one in told["members"]] == ["../a", "../b", "../c"]
    assert told["members"][0]["sha256"] == tables.sha256_of(runs[0] / "best.safetensors")[0]
    assert (told["method"], told["weights"], told["labels"]) == ("deng", None, list(CLASSES))
    assert (told["held_out"], told["where"]) == ({"by": "fold", "value": 1}, "fold != 2")
    again = fused.parent / "again"
    places = [fused.parent / name for name in "abc"]
    made = here("fuse", *places, "--shards", where, "--device", "cpu", "--method", "deng", "--out", again)
    assert f"fused model: {again}; `pipeline predict {again} FILE` hears with it" in made.stderr
    assert (again / "fusion.json").read_bytes() == (fused / "fusion.json").read_bytes()
    moved = fused.parent.rename(tmp_path / "moved")
    assert read_tagger(moved / "fused", CPU).labels == list(CLASSES)


def test_a_changed_or_lost_run_is_refused_by_its_name(fused, where, here):
    weights = fused.parent / "b" / "best.safetensors"
    before = weights.read_bytes()
    shutil.copy(fused.parent / "a" / "best.safetensors", weights)
    done = here("evaluate", fused, "--shards", where, "--device", "cpu")
    assert done.returncode == 1
    assert f"its run {weights.parent} has changed since it was fused" in done.stderr
    weights.write_bytes(before)
    read_tagger(fused, CPU)
    weights.parent.rename(fused.parent / "elsewhere")
    gone = here("predict", fused, "x.wav", "--device", "cpu")
    assert gone.returncode == 1
    assert f"its run {weights.parent} is not there" in gone.stderr
    (fused.parent / "elsewhere").rename(weights.parent)
    told = json.loads((weights.parent / "config.json").read_text())
    (weights.parent / "config.json").write_text(json.dumps({**told, "loss": "sigmoid"}))
    with pytest.raises(TrainError, match=r"b is of other classes, another loss or another rate now"):
        read_tagger(fused, CPU)


def test_a_damaged_fusion_json_is_told(fused):
    told = json.loads((fused / "fusion.json").read_text())
    for wrong, said in (
        ("{", r"fusion\.json: cannot be read as JSON"),
        ('{"method": "ds"}', r"fusion\.json: is damaged: it lacks held_out, labels"),
        (json.dumps({**told, "members": ["../a"]}), r"fusion\.json: is damaged"),
        (json.dumps({**told, "members": []}), r"fusion\.json: is damaged"),
    ):
        (fused / "fusion.json").write_text(wrong)
        with pytest.raises(TrainError, match=said):
            read_tagger(fused, CPU)


def test_what_does_not_take_a_fused_model_says_so(tree, where, runs, here):
    fused = tree / "fused"
    for command in (
        ("export", fused, "--format", "torch"),
        ("report", fused),
        ("train", "--shards", where, "--device", "cpu", "--init", fused, "--out", fused.parent / "z"),
        ("fuse", fused, runs[0], "--shards", where),
    ):
        done = here(*command)
        assert done.returncode == 1, command
        assert "is a fused model, which `pipeline predict` and `pipeline evaluate` take" in done.stderr
    done = here("train", "--shards", where, "--device", "cpu", "--steps", 1, "--no-page", "--out", fused)
    assert (done.returncode, "holds a fused model; another --out" in done.stderr) == (1, True)
    last = here("evaluate", fused, "--shards", where, "--weights", "last")
    assert (last.returncode, "leave --weights last out" in last.stderr) == (1, True)


def test_a_model_is_written_of_one_method_into_a_folder_of_its_own(tree, runs, where, tmp_path, here):
    asked = ("fuse", *runs, "--shards", where, "--device", "cpu")
    for methods in ((), ("--method", "wa", "--method", "ds")):
        done = here(*asked, *methods, "--out", tmp_path / "x")
        assert (done.returncode, "choose it with one --method" in done.stderr) == (2, True)
    for folder, name in ((tree / "fused", "fusion.json"), (runs[0], "config.json")):
        done = here(*asked, "--method", "ds", "--out", folder)
        assert done.returncode == 1
        assert f"already holds a model ({name}); choose another --out" in done.stderr
    assert not (tmp_path / "x").exists()


def test_of_runs_that_held_out_different_clips_it_is_said_which_to_score(runs, where, tmp_path, here):
    other = copy(runs[1], tmp_path / "other", held_out={"by": "fold", "value": 3})
    asked = ("--shards", where, "--device", "cpu")
    made = here(
        "fuse",
        runs[0],
        other,
        *asked,
        "--fold",
        2,
        "--method",
        "wa",
        "--fit-fold",
        4,
        "--out",
        tmp_path / "f",
    )
    assert "learnt from 6 of the 6 clips of fold 4" in made.stderr
    made = here(
        "fuse",
        runs[0],
        other,
        *asked,
        "--fold",
        2,
        "--method",
        "wa",
        "--weights",
        "3,1",
        "--out",
        tmp_path / "f",
    )
    assert made.returncode == 0, made.stderr
    assert json.loads((tmp_path / "f" / "fusion.json").read_text())["weights"] == [0.75, 0.25]
    done = here("evaluate", tmp_path / "f", *asked)
    assert (done.returncode, "its runs held out different clips; say which" in done.stderr) == (1, True)
    for fold, told in ((2, False), (4, True)):  # both learnt from 4
        done = here("evaluate", tmp_path / "f", *asked, "--fold", fold)
        assert (done.returncode, "learnt from 6 of the 6 clips of fold 4" in done.stderr) == (0, told)


def test_the_shortest_hearing_of_the_runs_is_that_of_the_fused_model(runs):
    members = [read_run(run, CPU) for run in runs]
    assert Fused(members, list(CLASSES), "ds", None).longest is None
    members[0].model.longest = 300  # frames, of which a second has 128
    assert Fused(members, list(CLASSES), "ds", None).longest == 2 * RATE


@pytest.mark.parametrize("method", METHODS)
def test_clips_of_several_classes_are_fused_class_by_class(method, multi, tmp_path):
    where, runs, found = multi
    shards = Shards.open(where)
    row = next(row for row in found.rows if row.method == method)
    assert row.figures["accuracy"] is None
    write_fused(tmp_path, found.runs, method, row.weights, found.held_out)
    fused = read_tagger(tmp_path, CPU)
    told = evaluate_run(fused, shards, CPU)
    for name in ("map", "auc", "f1", "ece", "loss"):
        assert told[name] == pytest.approx(row.figures[name], rel=1e-4), name
    held_out = plan_of(where, fold=1).held_out
    alone = np.stack([answers(read_run(run, CPU), held_out) for run in runs])
    wanted = fuse(torch.from_numpy(alone).double(), method, "sigmoid")
    np.testing.assert_allclose(answers(fused, held_out), wanted, atol=1e-5)


def test_without_an_accuracy_there_is_no_table_of_it(multi, here):
    where, runs, _ = multi
    done = here("fuse", *runs, "--shards", where, "--device", "cpu", "--method", "murphy")
    assert (done.returncode, "accuracy" in done.stdout, "map, fused" in done.stdout) == (0, False, True)


@pytest.fixture(scope="module")
def multi(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path], Comparison]:
    """Two runs on clips of one or two classes, and what comes of fusing them."""
    root = tmp_path_factory.mktemp("multi")
    labels = [["hum", "hiss"] if n % 3 == 1 else [CLASSES[n % 3]] for n in range(24)]
    where = shards_of(root, 24, seconds=0.8, labels=labels)
    for seed in range(2):
        train(plan_of(where, SHORT, fold=1, seed=seed), root / f"{seed}")
    runs = [root / "0", root / "1"]
    return where, runs, fuse_runs(runs, Shards.open(where), CPU)


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        ("--weights x,1", 2, "allowed are numbers with commas between, such as 3,1"),
        ("--method max", 2, "'max' is not one of 'wa', 'ds', 'murphy', 'deng'"),
        ("--device tpu", 2, "--device tpu: allowed are"),
        ("--where loud>1", 2, "`loud` at character 1 is no column"),
        ("--where fold==3", 1, "keeps none of the 6 clips of fold 1"),
        ("--fold 3", 1, "learnt from 6 of the 6 clips of fold 3, so its figures would flatter it"),
        ("--fold 9", 1, "no clip is in fold 9; its folds are 1, 2, 3, 4"),
        ("--out .", 2, "--out: writes a model of one method"),
    ],
)
def test_nonsense_is_answered_in_a_line(flags, code, said, runs, where, here):
    done = here("fuse", *runs, "--shards", where, *flags.split())
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_fuses_as_the_cpu_does(tree, method, where, tmp_path):
    shards = Shards.open(where)
    told = json.loads((tree / "fused" / "fusion.json").read_text())
    out = Path(shutil.copytree(tree, tmp_path / "tree")) / "fused"
    weights = [0.5, 0.3, 0.2] if method == "wa" else None
    (out / "fusion.json").write_text(json.dumps({**told, "method": method, "weights": weights}))
    found = []
    for device in (CPU, torch.device("cuda")):
        run = read_tagger(out, device)
        found.append(score_clips(run.model, run.features, shards, run.loss, device).scores)
    np.testing.assert_allclose(*found, atol=1e-3)

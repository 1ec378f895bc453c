"""Training: what is held out, what is exact to resume, what is refused, and that it learns."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from torch import nn

import warm
from clipmill import tables
from clipmill.cli.evaluate import command as evaluate_command
from clipmill.cli.train import _run
from clipmill.errors import ConfigError, ShardError, TableError, TrainError
from clipmill.features import FrontEnd
from clipmill.loader import Feed, Loader
from clipmill.shards.convert import convert
from clipmill.shards.job import make_shards
from clipmill.shards.plan import ShardSpec
from clipmill.shards.read import Shards
from clipmill.train.checkpoint import read_last, read_run
from clipmill.train.device import pick_device
from clipmill.train.ema import Ema, decay_at
from clipmill.train.evaluate import evaluate_run
from clipmill.train.loop import Outcome, train
from clipmill.train.objective import choose_loss, clip_loss
from clipmill.train.plan import Plan, plan_run
from clipmill.train.prepare import Preparation
from clipmill.train.ranks import Ranks
from clipmill.train.recipes import Recipe
from clipmill.train.split import choose_split, held_out_again
from conftest import SHALLOW

pytestmark = pytest.mark.usefixtures("shallow")

RATE = 16000
CPU = torch.device("cpu")
TINY = Recipe(
    "tiny", "erann-3-1", steps=4, batch_size=4, learning_rate=1e-3, crop_s=1.0, ema_decay=0.9, eval_every=2
)
CLASSES = ("hiss", "hum", "whistle")


def sound_of(label: str, seconds: float, seed: int) -> np.ndarray:
    """One clip of a class that cannot be mistaken: noise, a low tone or a high one."""
    rng = np.random.default_rng(seed)
    time_s = np.arange(round(seconds * RATE)) / RATE
    frequency = {"hum": 120.0, "whistle": 3000.0}.get(label.split("+")[0], 0.0) * rng.uniform(0.9, 1.1)
    wave = np.sin(2 * np.pi * frequency * time_s) if frequency else rng.standard_normal(len(time_s)) / 3
    return 0.3 * wave + 0.01 * rng.standard_normal(len(time_s))


def shards_of(root: Path, clips: int = 24, *, seconds: float | None = None, **columns: list[Any]) -> Path:
    """Real shards of `clips` easy clips of 1 or 2 s, or of `seconds`; columns replace those of the manifest."""
    media = root / "media"
    media.mkdir(parents=True)
    labels = [CLASSES[n % 3] for n in range(clips)]
    names = [f"clip-{n:03d}" for n in range(clips)]
    for n, (label, stem) in enumerate(zip(labels, names, strict=True)):
        soundfile.write(media / f"{stem}.wav", sound_of(label, seconds or 0.6 + (n % 4) * 0.35, n), RATE)
    manifest = tables.manifest_table({
        "key": names,
        "source": [f"{stem}.wav" for stem in names],
        "labels": [[label] for label in labels],
        "fold": [1 + n // 3 % 4 for n in range(clips)],
        **columns,
    })  # fmt: skip
    spec = ShardSpec(sample_rate=RATE, clips_per_shard=10)
    make_shards("easy", manifest, [], media, root / "shards", spec)
    return root / "shards"


@pytest.fixture(scope="module")
def easy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shards_of(tmp_path_factory.mktemp("easy"))


def plan_of(where: Path | list[Any], recipe: Recipe = TINY, **options: Any) -> Plan:
    return plan_run(Shards.open(where), recipe, CPU, **options)


def lines(out: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def same_state(one: Any, other: Any) -> bool:
    """Bit for bit, whatever tensors, dicts and lists it holds."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_state(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same_state, one, other))
    return bool(one == other)


@pytest.fixture(scope="module")
def taught(easy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run to take weights from."""
    out = tmp_path_factory.mktemp("runs") / "taught"
    train(plan_of(easy), out)
    return out


# What a run leaves behind


def test_a_run_learns_and_leaves_what_it_says_it_leaves(tmp_path):
    recipe = Recipe("x", "erann-3-1", steps=32, batch_size=8, learning_rate=1e-3, crop_s=1.0, mixup="none",
                    ema_decay=0.8, eval_every=8)  # fmt: skip
    where, out = shards_of(tmp_path, seconds=1.0), tmp_path / "run"
    plan = plan_of(where, recipe, fold=2)
    seen: list[tuple[int, str]] = []
    outcome = train(plan, out, update=lambda done, facts: seen.append((done, facts)))
    assert outcome.done
    assert outcome.step == outcome.ran == 32
    assert outcome.best is not None
    assert outcome.best["accuracy"] >= 0.8
    config = json.loads((out / "config.json").read_text())
    assert config["held_out"] == {"by": "fold", "value": 2}
    assert config["labels"] == list(CLASSES)
    assert config["model"] == "erann-3-1"
    assert config["sample_rate"] == config["features"]["sample_rate"] == RATE
    assert config["clips"] == {"train": 18, "held_out": 6}
    assert config["root_sha256"] == Shards.open(where).info["root_sha256"]
    assert FrontEnd(**config["features"]).config == config["features"]
    losses = [row["loss"] for row in lines(out, "train")]
    assert losses[-1] < losses[0]
    assert [row["step"] for row in lines(out, "eval")] == [8, 16, 24, 32]
    assert list(out.glob("events.out.tfevents.*"))
    state = torch.load(out / "last.pt", weights_only=True)
    assert state["step"] == 32
    best = load_file(out / "best.safetensors")
    assert best.keys() == state["ema"].keys()
    assert "norm.running_mean" in best
    assert [done for done, _ in seen] == list(range(1, 33))
    assert "accuracy" in seen[-1][1]
    assert sorted(path.name.partition(".")[0] for path in out.iterdir()) == [
        "best",
        "config",
        "events",
        "last",
        "metrics",
        "previous",
    ]


def test_ties_keep_the_earlier_weights(easy, tmp_path):
    """A learning rate too small to change any answer leaves every evaluation equal."""
    recipe = Recipe(
        "x", "erann-3-1", steps=3, batch_size=2, learning_rate=1e-12, crop_s=1.0, ema_decay=0.0, eval_every=1
    )
    outcome = train(plan_of(easy, recipe), tmp_path)
    accuracies = [row["accuracy"] for row in lines(tmp_path, "eval")]
    assert outcome.best is not None
    assert outcome.best["step"] == 1 + accuracies.index(max(accuracies))


def test_clips_with_several_labels_are_learnt_by_sigmoid_and_judged_by_map(tmp_path):
    labels = [["hum", "hiss"] if n % 3 == 1 else [CLASSES[n % 3]] for n in range(24)]
    outcome = train(plan_of(shards_of(tmp_path, labels=labels)), tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["loss"] == "sigmoid"
    assert outcome.best is not None
    assert outcome.best["main_figure"] == "map"
    assert outcome.best["accuracy"] is None
    assert outcome.best["map"] > 0


# Resuming


def calling() -> list[str]:
    """The names of the functions that are being called."""
    return [frame.name for frame in traceback.extract_stack()]


def command(where: Path | str, out: Path, *more: str) -> list[str]:
    """What follows `python -m`."""
    flags = "--fold 1 --model erann-3-1 --steps 16 --batch-size 4 --crop-s 1 --eval-every 8 --save-every 2 --device cpu --no-page"
    return ["clipmill", "train", "--shards", str(where), "--out", str(out), *flags.split(), *more]


def started(where: Path | str, out: Path, *more: str) -> warm.Program:
    """The command, in a process of its own."""
    return warm.start(*command(where, out, *more), first=SHALLOW)


def signal_after_first_save(out: Path, process: warm.Program, number: int) -> str:
    while not (out / "last.pt").exists():
        assert process.poll() is None, process.said("err")
        time.sleep(0.005)
    process.send_signal(number)
    return process.communicate(timeout=120)[1]


def test_killed_and_resumed_is_bit_for_bit_the_undisturbed_run(easy, tmp_path):
    """Eight steps with all augmentations, against four, a SIGKILL, and four."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    flags = (
        *("--steps", "8", "--eval-every", "4", "--save-every", "4", "--log-batches"),
        *("--mixup", "between-class", "--pitch-semitones", "2", "--stretch", "0.2", "--noise-snr-db", "10"),
    )
    done = started(easy, straight, *flags)
    assert done.communicate(timeout=120)[0].startswith("best: accuracy")
    assert done.returncode == 0
    killed = started(easy, broken, *flags)
    signal_after_first_save(broken, killed, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    assert read_last(broken)["step"] == 4
    # A line that was being written when the power went.
    with open(broken / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "lo')
    # Other workers, the same clips.
    resumed = started(easy, broken, *flags, "--resume", "--workers", "2")
    assert "going on from step" in resumed.communicate(timeout=120)[1]
    assert resumed.returncode == 0
    assert same_state(read_last(straight), read_last(broken))
    assert (straight / "best.safetensors").read_bytes() == (broken / "best.safetensors").read_bytes()
    measured = {"clips_per_s", "data_wait"}
    kept, whole = (
        [{name: value for name, value in row.items() if name not in measured} for row in lines(out, "train")]
        for out in (broken, straight)
    )
    assert kept == whole
    assert lines(broken, "eval") == lines(straight, "eval")
    assert (straight / "batches.jsonl").read_text() == (broken / "batches.jsonl").read_text()


def test_sigterm_saves_the_step_it_stands_at_and_says_how_to_go_on(easy, tmp_path):
    process = started(easy, tmp_path, "--steps", "4000", "--eval-every", "4000", "--workers", "1")
    said = signal_after_first_save(tmp_path, process, signal.SIGTERM)
    assert process.returncode == 130
    assert "--resume goes on" in said
    assert "Traceback" not in said
    assert f"stopped at step {read_last(tmp_path)['step']} of 4000" in said


def test_told_to_stop_when_all_is_done_but_the_page_a_run_is_done_without_it(easy, tmp_path, capsys):
    how = {"log_batches": False, "save_every": None, "page": True, "wandb": None}
    plan = plan_of(easy, replace(TINY, eval_every=TINY.steps))  # which is saved once, at its end
    outcome = _run(plan, tmp_path, ranks=Ranks(), stop=(tmp_path / "last.pt").exists, resume=False, how=how)
    assert outcome.done
    assert not (tmp_path / "report.html").exists()
    said = f"no page: told to stop, when all else was done; `pipeline report {tmp_path}` makes it"
    assert said in capsys.readouterr().err
    assert _run(plan, tmp_path, ranks=Ranks(), stop=lambda: False, resume=True, how=how).done
    assert (tmp_path / "report.html").exists()


def test_stopping_and_resuming_in_one_process_changes_nothing(easy, tmp_path):
    plan = plan_of(easy)
    train(plan, tmp_path / "straight")
    made: list[int] = []
    stopped = train(
        plan, tmp_path / "broken", update=lambda done, facts: made.append(done), stop=lambda: len(made) == 2
    )
    assert not stopped.done
    assert stopped.step == 3
    said: list[str] = []
    outcome = train(plan, tmp_path / "broken", resume=True, say=said.append)
    assert said == ["going on from step 3 of 4"]
    assert outcome.ran == 1
    assert same_state(read_last(tmp_path / "straight"), read_last(tmp_path / "broken"))


def test_two_processes_do_not_train_in_one_folder(easy, tmp_path):
    with tables.locked(tmp_path), pytest.raises(TableError, match="another run is writing there"):
        train(plan_of(easy), tmp_path)


def test_the_callers_random_stream_does_not_decide_a_run(easy, tmp_path):
    for seed, name in ((1, "a"), (2, "b")):
        torch.manual_seed(seed)
        train(plan_of(easy), tmp_path / name)
    assert same_state(read_last(tmp_path / "a"), read_last(tmp_path / "b"))


def test_resuming_a_finished_run_says_so_and_more_steps_train_on(easy, tmp_path):
    first = train(plan_of(easy), tmp_path)
    assert train(plan_of(easy), tmp_path, resume=True) == Outcome(4, True, 0, first.best, first.last)
    longer = Recipe(**{**TINY.__dict__, "steps": 6})
    assert train(plan_of(easy, longer), tmp_path, resume=True).ran == 2
    assert json.loads((tmp_path / "config.json").read_text())["recipe"]["steps"] == 6
    with pytest.raises(TrainError, match="steps was 6, now 4"):
        train(plan_of(easy), tmp_path, resume=True)


def test_resuming_where_nothing_was_saved_starts_from_the_beginning_and_says_so(easy, tmp_path):
    said: list[str] = []
    assert train(plan_of(easy), tmp_path, resume=True, say=said.append).ran == 4
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).unlink()
    assert train(plan_of(easy), tmp_path, resume=True, say=said.append).ran == 4
    assert ["starting from the beginning" in line for line in said] == [True, True]


# What is refused


def test_a_folder_with_a_run_is_never_written_over(easy, tmp_path):
    train(plan_of(easy), tmp_path)
    before = (tmp_path / "best.safetensors").read_bytes()
    with pytest.raises(TrainError, match=r"already holds a run; --resume .* another --out"):
        train(plan_of(easy), tmp_path)
    other = Recipe(**{**TINY.__dict__, "learning_rate": 0.5, "mixup": "none"})
    with pytest.raises(
        TrainError, match=r"learning_rate was 0.001, now 0.5; mixup was 'between-class', now 'none'"
    ):
        train(plan_of(easy, other), tmp_path, resume=True)
    with pytest.raises(TrainError, match=r"held_out\.value was 1, now 3"):
        train(plan_of(easy, fold=3), tmp_path, resume=True)
    assert (tmp_path / "best.safetensors").read_bytes() == before


@pytest.mark.parametrize("damage", [b"", b"junk", b"PK\x03\x04junk"])
def test_after_a_damaged_last_pt_a_run_goes_on_from_the_save_before_it(taught, easy, tmp_path, damage):
    out = Path(shutil.copytree(taught, tmp_path / "run"))
    (out / "last.pt").write_bytes(damage)
    said: list[str] = []
    assert train(plan_of(easy), out, resume=True, say=said.append).ran == 2
    assert "last.pt: cannot be read" in said[0]
    assert "going on from the save before it" in said[0]
    assert said[1] == "going on from step 2 of 4"
    assert same_state(read_last(taught), read_last(out))
    for name in ("last.pt", "previous.pt"):
        (out / name).write_bytes(damage)
    with pytest.raises(TrainError, match=r"previous.pt: cannot be read .* remove it"):
        train(plan_of(easy), out, resume=True)


def test_a_run_stopped_in_the_midst_of_an_evaluation_begins_with_it_when_it_goes_on(taught, easy, tmp_path):
    made: list[int] = []
    stopped = train(plan_of(easy), tmp_path, update=lambda done, facts: made.append(done),
                    stop=lambda: len(made) == 1 and "score_clips" in calling())  # fmt: skip
    assert (stopped.step, stopped.done, stopped.last) == (2, False, None)
    assert read_last(tmp_path)["last"] is None
    assert train(plan_of(easy), tmp_path, resume=True).ran == 2
    assert same_state(read_last(taught), read_last(tmp_path))
    assert lines(tmp_path, "eval") == lines(taught, "eval")


def test_a_loss_that_is_no_number_names_the_step_and_the_flag(easy, tmp_path):
    wild = Recipe(**{**TINY.__dict__, "learning_rate": 1e30})
    with pytest.raises(TrainError, match=r"(?s)the loss is nan at step \d .*--learning-rate"):
        train(plan_of(easy, wild), tmp_path)
    assert not (tmp_path / "best.safetensors").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_shard_is_named_with_the_clip_whatever_the_workers(easy, tmp_path, workers):
    where = shutil.copytree(easy, tmp_path / "shards")
    plan = plan_of(where, feed=Feed(workers))
    for shard in where.glob("*.tar"):
        shard.write_bytes(b"\0" * shard.stat().st_size)
    with pytest.raises(ShardError, match=r"\.tar: clip clip-\d+ cannot be read"):
        train(plan, tmp_path / "run")


def test_clips_held_out_that_cannot_be_read_end_a_run_only_when_it_is_saved_and_are_in_no_figure(
    easy, tmp_path
):
    where = Path(shutil.copytree(easy, tmp_path / "shards"))
    shards = Shards.open(where)
    held = np.flatnonzero(shards.folds == 1)
    for row in held[:2].tolist():
        shard, offset, length = (shards.columns[name][row].as_py() for name in ("shard", "offset", "length"))
        with open(where / shard, "r+b") as file:
            file.seek(offset + length // 2)
            file.write(bytes(50))
    with pytest.raises(ShardError, match=r"2 of 6 clips cannot be read, more than --max-bad 0.01 allows"):
        train(plan_of(where, fold=1), tmp_path / "run")
    assert read_last(tmp_path / "run")["step"] == 2
    plan = plan_of(where, fold=1, feed=Feed(max_bad=0.5))
    assert train(plan, tmp_path / "run", resume=True).done
    assert [(row["clips"], row["unread"]) for row in lines(tmp_path / "run", "eval")] == [(4, 2), (4, 2)]
    asked = [str(tmp_path / "run"), "--shards", str(where), "--device", "cpu", "--max-bad", "0.5"]
    assert evaluate_command.main(asked, standalone_mode=False) == 3
    bad = lines(tmp_path / "run", "bad")
    assert sorted({row["key"] for row in bad}) == sorted(shards.keys_of(held[:2]))
    assert {row["step"] for row in bad} == {2, 4}


def test_a_run_that_loses_too_many_clips_to_learn_from_saves_the_step_it_stands_at(easy, tmp_path):
    where = Path(shutil.copytree(easy, tmp_path / "shards"))
    shards, recipe = Shards.open(where), replace(TINY, steps=9, batch_size=2, eval_every=9)
    order = plan_of(where, recipe, fold=1)
    fourth, fifth = (order.sampler.rows(np.array([position]))[0] for position in (8, 10))
    learnt = np.flatnonzero(shards.folds != 1)
    for row in learnt[[fourth, fifth]].tolist():
        shard, offset, length = (shards.columns[name][row].as_py() for name in ("shard", "offset", "length"))
        with open(where / shard, "r+b") as file:
            file.seek(offset + length // 2)
            file.write(bytes(50))
    with pytest.raises(ShardError, match="2 of 18 clips cannot be read"):
        train(order, tmp_path / "run")
    assert 0 < read_last(tmp_path / "run")["step"] <= 5
    plan = plan_of(where, recipe, fold=1, feed=Feed(max_bad=0.5))
    said: list[str] = []
    assert train(plan, tmp_path / "run", resume=True, say=said.append).done
    assert any("going on from step" in line for line in said)


def test_a_run_is_resumed_and_scored_with_the_shards_that_it_was_begun_with_alone(easy, tmp_path):
    first, second = (str(easy / f"easy-all-00000{number}.tar") for number in (0, 1))
    recipe = replace(TINY, steps=2)
    train(plan_of([first], recipe, fold=1), tmp_path / "run")
    with pytest.raises(TrainError, match=r"begun otherwise: .*files was"):
        train(plan_of([second], recipe, fold=1), tmp_path / "run", resume=True)


def test_a_run_over_several_sets_is_scored_on_each_alone_and_in_any_order(easy, tmp_path):
    labels = [["hum"], ["horn"], ["hiss", "horn"]] * 4
    other = shards_of(tmp_path / "other", 12, labels=labels, fold=[1, 2, 3, 4] * 3)
    train(plan_of([easy, other], fold=1), tmp_path / "run")
    run = read_run(tmp_path / "run", CPU)
    whole = evaluate_run(run, Shards.open([easy, other]), CPU)
    turned = evaluate_run(run, Shards.open([other, easy]), CPU)
    assert (turned["map"], turned["clips"]) == (pytest.approx(whole["map"]), whole["clips"])
    assert evaluate_run(run, Shards.open(other), CPU)["clips"] == 3
    assert evaluate_run(run, Shards.open(easy), CPU)["clips"] == 6


def test_a_stream_of_what_is_no_tar_leaves_nothing_in_the_way(easy, tmp_path):
    convert(easy, tmp_path / "h5", "hdf5")
    with pytest.raises(ConfigError, match="--access stream reads tars alone"):
        plan_of(tmp_path / "h5", fold=1, feed=Feed(access="stream"))


def test_a_model_that_is_none_is_refused_before_anything_is_written(easy, tmp_path):
    with pytest.raises(ConfigError, match=r"--model resnet: .*erann-"):
        plan_of(easy, Recipe("x", "resnet", steps=1))


def test_devices_are_checked():
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ConfigError, match="allowed are auto, cpu, cuda"):
        pick_device("tpu")
    with pytest.raises(ConfigError, match=r"finds .* CUDA device.*--device cpu"):
        pick_device("cuda:99")


def test_the_command_ends_bad_usage_with_one_line_and_its_code(easy, tmp_path, here):
    wrong = here("train", "--shards", easy, "--steps", "0")
    assert (wrong.returncode, wrong.stderr.strip()) == (
        2,
        "error: --steps 0 and --epochs 0: allowed is any number above 0 for one of them",
    )
    absent = here("train", "--shards", easy, "--fold", "9", "--out", tmp_path / "x")
    assert absent.returncode == 1
    assert (
        absent.stderr.strip() == "error: no clip is in fold 9: there are 1, 2, 3, 4; choose one with --fold"
    )
    assert not (tmp_path / "x").exists()


# What is held out


def table_of(
    folds: list[int],
    splits: list[str] | None = None,
    groups: list[str] | None = None,
    labels: list[list[str]] | None = None,
) -> Shards:
    """An index alone, without any audio: choosing what to hold out needs no more."""
    n = len(folds)
    rows: dict[str, Any] = {
        "key": [f"clip-{i}" for i in range(n)],
        "labels": labels or [["hum"]] * n,
        "split": splits or ["all"] * n,
        "fold": [None if fold < 0 else fold for fold in folds],
        "group": groups or [None] * n,
        "events": [None] * n,
    }
    filler = {pa.string(): "", pa.float64(): 0.0, pa.float32(): 0.0}
    columns = {f.name: rows.get(f.name, [filler.get(f.type, 0)] * n) for f in tables.INDEX}
    return Shards.of(Path("x"), {"labels": ["hum"]}, pa.table(columns, schema=tables.INDEX))


def split_of(table: Shards, fold: int | None = None, **options: Any) -> tuple[list[int], list[int], str]:
    split = choose_split(table, fold, 0, **options)
    again = held_out_again(table, split.by, split.value)
    assert again.tolist() == split.held_out.tolist()
    return split.train.tolist(), split.held_out.tolist(), split.why


def test_a_fold_is_held_out_and_all_others_are_trained_on():
    assert split_of(table_of([1, 2, 3, -1]), 2) == ([0, 2, 3], [1], "fold 2 is held out")


def test_without_a_fold_the_datasets_own_split_counts_and_valid_before_eval():
    table = table_of([-1] * 4, ["train", "eval", "valid", "train"])
    assert split_of(table)[:2] == ([0, 3], [2])
    assert split_of(table_of([-1] * 3, ["train", "eval", "train"]))[:2] == ([0, 2], [1])


def test_a_fold_keeps_the_datasets_own_eval_clips_out_of_training():
    assert split_of(table_of([1, 2, 2, 1], ["train", "train", "eval", "eval"]), 1)[:2] == ([1], [0, 3])


def test_without_splits_the_lowest_fold_is_held_out_and_it_says_so():
    trained, held_out, why = split_of(table_of([3, 2, 2, 5]))
    assert (trained, held_out) == ([0, 3], [1, 2])
    assert "--fold chooses another" in why


def test_without_folds_whole_groups_are_held_out_by_the_seed():
    groups = [f"speaker-{n % 30}" for n in range(90)]
    trained, held_out, why = split_of(table_of([-1] * 90, groups=groups))
    assert len(held_out) == 9
    assert not {groups[n] for n in trained} & {groups[n] for n in held_out}
    assert "seed 0" in why
    other = choose_split(table_of([-1] * 90, groups=groups), None, 1)
    assert other.held_out.tolist() != held_out


def test_a_group_on_both_sides_is_named_unless_that_is_allowed():
    table = table_of([1, 2, 2, 1], groups=["ann", "ann", "bob", "cid"])
    with pytest.raises(TrainError, match=r"1 group stands both .*: ann\. .*--allow-leak"):
        split_of(table, 1)
    assert split_of(table, 1, allow_leak=True)[:2] == ([1, 2], [0, 3])


def test_clips_without_a_label_stand_on_neither_side_and_are_counted():
    table = table_of([1, 1, 2, 2], labels=[["hum"], [], ["hum"], []])
    assert split_of(table, 1) == ([2], [0], "fold 1 is held out; 2 clips without a label left out")


def test_a_side_without_clips_is_refused():
    with pytest.raises(TrainError, match="none is left to train on"):
        split_of(table_of([1, 1]), 1)
    with pytest.raises(TrainError, match=r"these clips have no folds; leave --fold away"):
        split_of(table_of([-1, -1]), 1)


def test_a_class_without_clips_to_learn_from_is_told(tmp_path):
    folds = [1 if n % 3 == 2 else 2 for n in range(24)]
    shards = shards_of(tmp_path, fold=folds)
    with pytest.raises(TrainError, match=r"no clip to train on has whistle, .* with --allow-missing"):
        plan_of(shards, fold=1)
    plan = plan_of(shards, fold=1, allow_missing=True)
    assert any("whistle" in note and "cannot be learnt" in note for note in plan.notes)


# Its parts


def test_the_average_is_equation_6_and_holds_batch_norms_statistics():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    ema = Ema(model, 0.9, warmup=False)
    expected = {name: tensor.clone().double() for name, tensor in model.state_dict().items()}
    for step in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(8, 3))
        ema.update(step)
        for name, tensor in model.state_dict().items():
            expected[name] = 0.9 * expected[name] + 0.1 * tensor.double()
    for name, tensor in ema.module.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6)
        else:
            assert int(tensor) == 5
    assert not ema.module.training


def test_the_warm_up_forgets_the_first_weights_and_then_equals_the_paper():
    assert decay_at(0, 0.999, True) == 0.1
    assert decay_at(8_989, 0.999, True) < 0.999
    assert decay_at(8_990, 0.999, True) == 0.999
    assert decay_at(0, 0.999, False) == 0.999


def test_losses_of_hard_targets_are_the_textbooks():
    logits, targets = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    expected = (np.log1p(np.exp(-2)) + np.log(2)) / 2
    assert float(clip_loss(logits, targets, "softmax")) == pytest.approx(expected)
    # Several labels share what one would have.
    both = float(clip_loss(logits[:1], torch.ones(1, 2), "softmax"))
    assert both == pytest.approx((np.log1p(np.exp(-2)) + 2 + np.log1p(np.exp(-2))) / 2)
    binary = (np.log1p(np.exp(-2)) + 3 * np.log(2)) / 4
    assert float(clip_loss(logits, targets, "sigmoid")) == pytest.approx(binary)
    assert choose_loss(np.array([1, 1, 0])) == "softmax"
    assert choose_loss(np.array([1, 2])) == "sigmoid"
    assert choose_loss(np.array([1, 2]), "softmax") == "softmax"


def test_a_steps_noise_is_its_seeds_alone(easy):
    batch = next(Loader(Shards.open(easy), 4).batches())
    features = FrontEnd(RATE, feature={"name": "logmel"})
    for mixup in ("none", "standard", "between-class", "between-class-logmel"):
        recipe = replace(TINY, mixup=mixup, pitch_semitones=2.0, stretch=0.2, noise_snr_db=10.0)
        one, other, third = (Preparation(recipe, features, seed)(batch, 0) for seed in (1, 1, 2))
        assert same_state(one, other)
        assert not torch.equal(one[0], third[0])
        assert one[0].shape == (4, 128, 128)
        torch.testing.assert_close(one[1].sum(1), torch.ones(4))
    plain = Recipe(**{**TINY.__dict__, "mixup": "none", "specaugment": False, "crop_s": 0.0})
    inputs, targets = Preparation(plain, features, 0)(batch, 0)
    assert inputs.shape[2] == 128 * int(batch.lengths.max()) // RATE
    assert torch.equal(targets, batch.targets)


def test_stripes_are_at_most_an_eighth_of_the_picture(easy):
    """Of a chromagram's 12 notes two stripes of 8 would leave some clips none."""
    batch = next(Loader(Shards.open(easy), 24).batches())
    features = FrontEnd(RATE, feature={"name": "chroma"})
    recipe = replace(TINY, mixup="none", mask_frames=1, mask_bins=8)
    bare = Preparation(replace(recipe, specaugment=False), features, 0)(batch, 0)[0]
    striped = Preparation(recipe, features, 0)(batch, 0)[0]
    notes = ((striped != bare).float().mean(2) > 0.5).sum(1)
    assert set(notes.tolist()) == {0, 1, 2}


# From other weights


def test_weights_that_know_the_clips_held_out_are_said_to(easy, taught):
    fold = json.loads((taught / "config.json").read_text())["held_out"]["value"]
    assert not any("learnt from" in note for note in plan_of(easy, fold=fold, init=taught).notes)
    other = plan_of(easy, fold=1 + fold % 4, init=taught)
    assert f"{taught} learnt from 6 of the 6 clips held out here" in other.notes[1]


def test_a_run_begins_with_the_weights_that_it_is_given_and_says_what_came_over(easy, taught, tmp_path):
    plan = plan_of(easy, replace(TINY, steps=1, learning_rate=1e-12), init=taught)
    assert plan.notes[0].startswith(
        f"weights of {taught}: 99 tensors taken over, 380,133 of 380,133 parameters"
    )
    assert plan.config["init"]["sha256"] == tables.sha256_of(taught / "best.safetensors")[0]
    assert str(plan.default_out).endswith("-init")
    train(plan, tmp_path / "run")
    given, learnt = load_file(taught / "best.safetensors"), load_file(tmp_path / "run" / "best.safetensors")
    assert all(
        torch.allclose(given[name], learnt[name], atol=1e-6)
        for name in given
        if name.endswith("conv1.weight")
    )


def test_other_classes_get_all_but_the_last_layer(taught, tmp_path):
    labels = [[("hum", "hiss", "whistle", "beep")[n % 4]] for n in range(24)]
    where = shards_of(tmp_path, labels=labels)
    plan = plan_of(where, init=taught)
    assert "drawn anew, the last layers: fc2.weight, fc2.bias" in plan.notes[0]
    assert plan.config["init"]["head"] == "fresh"
    assert train(plan, tmp_path / "run").done


def test_a_resumed_run_that_was_given_weights_is_the_undisturbed_one(easy, taught, tmp_path):
    train(plan_of(easy, init=taught), tmp_path / "whole")
    stop = iter([False, True, True])
    train(plan_of(easy, init=taught), tmp_path / "halves", stop=lambda: next(stop))
    with pytest.raises(TrainError, match=r"begun otherwise: init\.sha256 was '.*', now None\. Give"):
        train(plan_of(easy), tmp_path / "halves", resume=True)
    train(plan_of(easy, init=taught), tmp_path / "halves", resume=True)
    assert same_state(read_last(tmp_path / "whole"), read_last(tmp_path / "halves"))


@pytest.mark.parametrize("where_to", [("--out", "x"), ("--folds", "1", "--model", "erann-3-1")])
def test_a_run_that_has_saved_its_state_goes_on_whatever_became_of_the_weights_it_began_with(
    easy, taught, tmp_path, here, monkeypatch, where_to
):
    """As for a job that is put back in line: they trained on, and then moved."""
    monkeypatch.chdir(tmp_path)
    source = Path(shutil.copytree(taught, tmp_path / "source"))
    asked = (
        "train",
        "--shards",
        easy,
        "--device",
        "cpu",
        "--eval-every",
        1,
        "--crop-s",
        0.5,
        "--batch-size",
        2,
    )
    asked = (*asked, "--no-page", "--init", source, *where_to)
    assert here(*asked, "--steps", 1).returncode == 0
    [config] = [path for path in tmp_path.rglob("config.json") if source not in path.parents]
    began = json.loads(config.read_text())["init"]
    other = config.with_name("best.safetensors")
    refused = here(*asked, "--steps", 2, "--resume", "--init", other)
    assert re.search(r"begun otherwise: init\.sha256 was '.*', now '.*'\. ", refused.stderr)
    shutil.copy(other, source)
    assert here(*asked, "--steps", 2, "--resume").returncode == 0
    shutil.rmtree(source)
    resumed = here(*asked, "--steps", 3, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "going on from step 2 of 3" in resumed.stderr
    assert json.loads(config.read_text())["init"] == began
    new = here(*asked, "--steps", 1, "--out", "new")
    assert new.returncode == 1
    assert f"{source}: is not there; allowed is" in new.stderr


def test_the_command_takes_the_network_of_the_weights_unless_told(easy, taught, tmp_path, here):
    asked = ("train", "--shards", easy, "--device", "cpu", "--steps", 1, "--eval-every", 1, "--crop-s", 0.5)
    done = here(*asked, "--init", taught, "--out", tmp_path / "x")
    assert done.returncode == 0, done.stderr
    assert "erann-3-1, 1 steps" in done.stderr
    assert f"weights of {taught}: 99 tensors taken over" in done.stderr
    wrong = here(*asked, "--init", taught, "--model", "cnn14", "--out", tmp_path / "z")
    assert wrong.returncode == 1
    assert f"error: {taught / 'best.safetensors'}: 0 of" in wrong.stderr
    assert not (tmp_path / "z").exists()

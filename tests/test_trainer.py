"""What a trainer is asked for beyond one plain run: precision, memory, patience, several runs, others who listen."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clipmill.cli.train import command as train_command
from clipmill.errors import ClipmillError, ConfigError, TrainError
from clipmill.features import FrontEnd
from clipmill.loader import Batch, Feed, Loader
from clipmill.shards.read import Shards
from clipmill.train.checkpoint import read_run
from clipmill.train.crossval import Part, cross_validate, parts_of, refreshed
from clipmill.train.export import export_run
from clipmill.train.learner import Learner, backward, make_optimizer
from clipmill.train.log import Meter
from clipmill.train.loop import Outcome, train
from clipmill.train.objective import clip_loss
from clipmill.train.prepare import Preparation, crop_samples, read_samples
from clipmill.train.ranks import Ranks
from test_train import CPU, RATE, TINY, lines, plan_of, shards_of

pytestmark = pytest.mark.usefixtures("shallow")

PLAIN = replace(TINY, mixup="none", specaugment=False)


@pytest.fixture(scope="module")
def easy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shards_of(tmp_path_factory.mktemp("easy"))


class Watched(nn.Module):
    """A network without BatchNorm that keeps what dtypes it met."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 3)
        self.met: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        inside = self.layer(x)
        self.met += [x.dtype, inside.dtype]
        return inside


# Precision and memory


@pytest.mark.parametrize("clips", [8, 5, 2])
def test_the_gradient_of_a_step_in_parts_is_that_of_the_whole(clips):
    x, targets = torch.randn(clips, 6), torch.eye(3)[torch.arange(clips) % 3]
    found = []
    for accumulate in (1, 3):
        network = Watched()
        loss = backward(
            network, x, targets, replace(PLAIN, accumulate=accumulate, precision="fp32"), "softmax"
        )
        found.append((loss, network.layer.weight.grad))
    torch.testing.assert_close(found[0], found[1])


def test_in_bf16_the_network_alone_is_and_features_weights_gradients_and_loss_stay_float32(easy):
    network = Watched()
    loss = backward(
        network, torch.randn(4, 6), torch.eye(3)[[0, 1, 2, 0]], replace(PLAIN, precision="bf16"), "softmax"
    )
    assert network.met == [torch.float32, torch.bfloat16]
    assert loss.dtype == network.layer.weight.grad.dtype == network.layer.weight.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        heard, _ = Preparation(PLAIN, FrontEnd(RATE, feature={"name": "logmel"}), 0)(
            next(Loader(Shards.open(easy), 4).batches()), 0
        )
    assert heard.dtype == torch.float32


def test_bf16_on_a_cpu_where_torch_is_not_sound_is_told(easy):
    assert any(
        "--precision fp32 is safe" in note for note in plan_of(easy, replace(TINY, precision="bf16")).notes
    )
    assert not any("bf16" in note for note in plan_of(easy).notes)


@pytest.mark.parametrize("workers", [0, 1])
def test_memory_that_runs_out_is_named_with_the_flags_that_take_less(easy, tmp_path, workers):
    endless = plan_of(easy, replace(TINY, crop_s=1e8), feed=Feed(workers))
    said = (
        "memory runs out with 4 clips of 1e+08 s in each step; each of these takes less: a smaller --batch-size, "
        "--accumulate 2, a shorter --crop-s"
    )
    with pytest.raises(TrainError, match=f"^{re.escape(said)}$"):
        train(endless, tmp_path)


def test_what_a_gpu_has_no_room_for_in_a_step_is_named_alike(easy, tmp_path, monkeypatch):
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Learner, "step", full)
    with pytest.raises(TrainError, match=r"^memory runs out with 1 clip of up to 2 s in each step; "):
        train(plan_of(easy, replace(TINY, batch_size=1, crop_s=0.0)), tmp_path)


def test_gradients_are_clipped_to_the_norm(easy):
    for clip_norm in (0.0, 1e-3):
        learner = Learner(plan_of(easy, replace(TINY, clip_norm=clip_norm)), Ranks())
        norms: list[float] = []

        def measure(optimizer: torch.optim.Optimizer, *_: Any, found: list[float] = norms) -> None:
            gradients = [p.grad.norm() for group in optimizer.param_groups for p in group["params"]]
            found.append(float(torch.stack(gradients).norm()))

        learner.optimizer.register_step_pre_hook(measure)
        learner.step(next(Loader(Shards.open(easy), 4, crop=RATE).batches()), 0)
        assert norms[0] == pytest.approx(1e-3, rel=1e-3) if clip_norm else norms[0] > 1e-2


def test_kernels_decay_and_biases_and_batch_norm_do_not():
    network = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3))
    optimizer = make_optimizer(network, replace(PLAIN, weight_decay=0.5, learning_rate=0.1))
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in network.named_parameters():
        factor = 0.95 if name == "0.weight" else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name].detach())


def test_label_smoothing_gives_all_classes_a_share():
    logits, targets = torch.randn(4, 5), torch.eye(5)[:4]
    smooth = 0.9 * targets + 0.1 / 5
    expected = -(smooth * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(clip_loss(logits, targets, "softmax", 0.1), expected)
    torch.testing.assert_close(
        clip_loss(logits, targets, "sigmoid", 0.1), clip_loss(logits, targets, "sigmoid")
    )


@pytest.mark.gpu
def test_a_compiled_run_in_bf16_learns_on_a_gpu_and_goes_on(easy, tmp_path):
    recipe = replace(TINY, compile=True, precision="bf16")
    from clipmill.train.plan import plan_run

    plan = plan_run(Shards.open(easy), recipe, torch.device("cuda"))
    made: list[int] = []
    train(plan, tmp_path, update=lambda done, facts: made.append(done), stop=lambda: len(made) == 2)
    assert train(plan, tmp_path, resume=True).done


def test_a_network_that_cannot_be_compiled_names_the_flag(easy, tmp_path, monkeypatch):
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with (
        config.patch({"cpp.cxx": (None, "/nonexistent/compiler")}),
        pytest.raises(TrainError, match=r"^--compile: .*; without --compile nothing needs a compiler$"),
    ):
        train(plan_of(easy, replace(TINY, compile=True)), tmp_path / "run")


# Augmentation of a batch


def test_a_clip_is_treated_alike_by_any_number_of_ranks(easy):
    """Each of two ranks, shown the others' clips, makes of its own what one process makes of them."""

    class Shown(Ranks):
        whole: dict[tuple[int, ...], Tensor]

        def widest(self, size: int) -> int:
            return size

        def joined(self, part: Tensor) -> Tensor:
            return next(
                each for each in seen if self.own(each).shape == part.shape and self.own(each).equal(part)
            )

    shards, features = Shards.open(easy), FrontEnd(RATE, feature={"name": "logmel"})
    recipe = replace(TINY, batch_size=8, mixup="between-class", pitch_semitones=2.0, noise_snr_db=10.0)
    batch = next(Loader(shards, 8, crop=read_samples(recipe, RATE)).batches())
    seen: list[Tensor] = []

    class Seeing(Ranks):
        def joined(self, part: Tensor) -> Tensor:
            seen.append(part)
            return part

    whole, targets = Preparation(recipe, features, 0, Seeing())(batch, 3)
    for rank in range(2):
        ranks = Shown(rank, 2)
        part = Batch(*(ranks.own(each) for each in batch))
        ours, labels = Preparation(recipe, features, 0, ranks)(part, 3)
        torch.testing.assert_close(ours, ranks.own(whole), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(labels, ranks.own(targets))


def test_mixing_log_mels_takes_the_labels_and_partners_that_mixing_sound_takes(easy):
    batch, features = (
        next(Loader(Shards.open(easy), 8, crop=RATE).batches()),
        FrontEnd(RATE, feature={"name": "logmel"}),
    )
    made = {
        mixup: Preparation(replace(PLAIN, mixup=mixup), features, 0)(batch, 0)
        for mixup in ("none", "between-class", "between-class-logmel")
    }
    assert torch.equal(made["between-class"][1], made["between-class-logmel"][1])
    plain, mixed = made["none"][0], made["between-class-logmel"][0]
    low, high = plain.amin(), plain.amax()
    assert ((mixed >= low) & (mixed <= high)).all(), "levels lie between those that they are mixed from"
    assert not torch.equal(mixed, plain)


def test_what_may_be_played_faster_is_read_for_longer(easy, tmp_path):
    recipe = replace(TINY, stretch=0.25)
    assert read_samples(recipe, RATE) == 1.25 * crop_samples(recipe, RATE) == 1.25 * RATE
    train(plan_of(easy, recipe), tmp_path)
    batch = next(Loader(Shards.open(easy), 4, crop=read_samples(recipe, RATE)).batches())
    assert Preparation(recipe, FrontEnd(RATE, feature={"name": "logmel"}), 0)(batch, 0)[0].shape == (
        4,
        128,
        128,
    )


def heard_of(lengths_s: list[float], seed: int = 0) -> tuple[Tensor, Tensor]:
    """From where to where crops of 4 s, at 0.8 to 1.25 times the speed, are heard of clips read up to 5 s: seconds `[B]`.

    The clips are tones that rise by 400 Hz a second, so that a pitch says where it stands.
    """
    time_s, lengths = torch.arange(5 * RATE) / RATE, (torch.tensor(lengths_s) * RATE).long()
    tone = (3000 * torch.sin(2 * math.pi * (500 + 200 * time_s) * time_s)).short()
    waves = tone.repeat(len(lengths), 1).masked_fill(time_s >= lengths[:, None] / RATE, 0)
    batch = Batch(waves, lengths, torch.eye(len(lengths)), torch.arange(len(lengths)))
    recipe = replace(PLAIN, crop_s=4.0, stretch=0.25)
    sound, _ = Preparation(recipe, FrontEnd(RATE), seed)(batch, 0)
    assert sound.shape == (len(lengths), 4 * RATE)
    tenths = sound.unflatten(1, (-1, RATE // 10)) * torch.hann_window(RATE // 10)
    loudest_s = (10.0 * torch.fft.rfft(tenths).abs().argmax(2) - 500) / 400
    return loudest_s[:, 0], loudest_s.amax(1)


def test_a_stretched_crop_is_heard_from_any_place_where_it_fits():
    clips = [5.0] * 200
    first, last = heard_of(clips)
    lasts = last - first
    room = 5 - lasts
    assert lasts.min() == pytest.approx(3.2, abs=0.2)
    assert lasts.max() == pytest.approx(5.0, abs=0.2)
    roomy = room > 1
    place = first[roomy] / room[roomy]
    assert place.mean() == pytest.approx(1 / 2, abs=0.1)
    assert place.std() == pytest.approx(1 / math.sqrt(12), abs=0.05)
    assert last[roomy].max() > 4.8, "the end of the clip, not at the highest speed alone"
    assert torch.equal(heard_of(clips)[0], first)
    assert not torch.equal(heard_of(clips, seed=1)[0], first)


def test_a_clip_shorter_than_its_stretched_crop_is_heard_from_its_beginning_to_its_end():
    lengths_s = [3.0, 2.0, 1.0] * 10
    first, last = heard_of(lengths_s)
    assert first.max() < 0.15
    torch.testing.assert_close(last, torch.tensor(lengths_s), rtol=0, atol=0.15)


def test_what_is_read_in_part_is_stretched_as_what_came_whole(easy):
    recipe = replace(PLAIN, crop_s=0.8, stretch=0.25)
    shards, features = Shards.open(easy), FrontEnd(RATE)
    read, whole = (Loader(shards, 8, crop=crop).assemble(2).batch for crop in (read_samples(recipe, RATE), 0))
    prepare = Preparation(recipe, features, 0)
    assert torch.equal(prepare(read, 2)[0], prepare(whole, 2)[0])


# Ending early


def test_a_run_that_loses_its_patience_is_over_and_stays_so(easy, tmp_path):
    recipe = replace(TINY, steps=50, learning_rate=1e-12, ema_decay=0.0, eval_every=1, patience=3)
    outcome = train(plan_of(easy, recipe), tmp_path)
    assert outcome.best is not None
    assert (outcome.done, outcome.step) == (True, outcome.best["step"] + 3)
    again = train(plan_of(easy, recipe), tmp_path, resume=True)
    assert (again.done, again.ran, again.step) == (True, 0, outcome.step)
    patient = replace(recipe, patience=outcome.step + 1)
    assert train(plan_of(easy, patient), tmp_path, resume=True).ran > 0, "more patience goes on"


# What is refused


def test_a_recipe_made_for_trained_weights_asks_for_them(easy):
    with pytest.raises(
        ConfigError, match=r"--recipe tiny goes on from trained weights: name them with --init"
    ):
        plan_of(easy, replace(TINY, init=True))


def test_weights_that_know_another_log_mel_are_not_gone_on_from(easy, tmp_path):
    """As of a run at another sample rate, or a file exported from it: its bins mean other sounds."""
    source = tmp_path / "source"
    train(plan_of(easy), source)
    config = json.loads((source / "config.json").read_text())
    config["features"] = FrontEnd(44100, feature={"name": "logmel"}).config
    (source / "config.json").write_text(json.dumps(config))
    exported = tmp_path / "source.safetensors"
    export_run(read_run(source, CPU), "safetensors", exported)
    for init in (source, source / "best.safetensors", exported):
        said = f"{re.escape(str(init))}: was trained on another logmel .*sample_rate 44100 and not 16000"
        with pytest.raises(TrainError, match=f"^{said}.*`pipeline shard --sample-rate 44100` makes shards"):
            plan_of(easy, init=init)


def test_ranks_that_cannot_share_a_batch_are_told_before_anything_is_written(easy):
    with pytest.raises(
        ConfigError, match=r"--batch-size 4 cannot be shared by 3 ranks: give a multiple of 3"
    ):
        plan_of(easy, ranks=3)


def test_a_crop_of_less_than_a_sample_is_not_taken_for_whole_clips(easy):
    said = "--crop-s 1e-09: is no sample or frame long, at 16000 a second; allowed is 0 (whole clips) or 6e-05 and more"
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}$"):
        plan_of(easy, replace(TINY, crop_s=1e-9))


def test_a_flag_that_kept_a_run_from_its_first_step_can_be_mended(easy, tmp_path):
    with pytest.raises(TrainError, match="the loss is nan"):
        train(plan_of(easy, replace(TINY, learning_rate=1e30)), tmp_path)
    assert train(plan_of(easy), tmp_path, resume=True).done


def test_a_run_that_has_nothing_to_show_keeps_its_folder_from_no_other(easy, tmp_path):
    """As where --wandb cannot log in: the same command, or another, begins there without --resume."""

    def refusing(out: Path, start: int) -> Any:
        raise ConfigError("--wandb clipmill: no API key")

    with pytest.raises(ConfigError, match="no API key"):
        train(plan_of(easy), tmp_path, sinks=[refusing])
    said: list[str] = []
    assert train(plan_of(easy, fold=3), tmp_path, say=said.append).done
    assert said == []
    with pytest.raises(TrainError, match="already holds a run"):
        train(plan_of(easy), tmp_path)


def test_torchrun_goes_on_with_the_run_that_it_began_and_with_no_other(easy, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    train(plan_of(easy), tmp_path)
    assert train(plan_of(easy), tmp_path).ran == 0, "begun by this start of torchrun"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "second")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(TrainError, match="already holds a run; --resume goes on"):
        train(plan_of(easy), tmp_path)
    # What torchrun calls a start without a name is gone on with after a restart alone.
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    train(plan_of(easy), tmp_path, resume=True)
    assert train(plan_of(easy), tmp_path).ran == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    with pytest.raises(TrainError, match="already holds a run"):
        train(plan_of(easy), tmp_path)


def test_log_mels_that_are_not_there_cannot_be_mixed(easy):
    recipe = replace(TINY, model="eat-s-1s", mixup="between-class-logmel")
    with pytest.raises(ConfigError, match=r"--mixup between-class-logmel: eat-s-1s takes waveforms"):
        plan_of(easy, recipe)


def test_a_loss_that_is_no_number_is_named_with_its_step_and_what_helps(tmp_path):
    meter = Meter(tmp_path, 4, Ranks())
    for step, loss in ((1, 1.0), (2, math.nan)):
        meter.step(step, torch.tensor(loss), 0.1, 0.0, look=False)
    with pytest.raises(
        TrainError, match=r"the loss is nan at step 2 .*--learning-rate, .*--clip-norm.*--precision fp32"
    ):
        meter.step(3, torch.tensor(1.0), 0.1, 0.0, look=True)


# What it says


def test_the_meter_tells_the_mean_loss_the_speed_and_the_share_of_time_spent_waiting(tmp_path):
    meter = Meter(tmp_path, 4, Ranks())
    assert meter.facts(None) == ""
    for step in range(1, 10):
        assert meter.step(step, torch.tensor(float(step)), 0.1, 0.0, look=False) is None
    figures = meter.step(10, torch.tensor(10.0), 0.1, 1e9, look=False)
    assert figures is not None
    assert (figures["loss"], figures["learning_rate"], figures["data_wait"]) == (5.5, 0.1, 1.0)
    assert figures["clips_per_s"] > 0
    assert meter.facts(None) == "loss 5.500, waiting for data 100%"
    last = {"main_figure": "accuracy", "accuracy": 0.25}
    assert meter.facts(last) == "loss 5.500, waiting for data 100%, accuracy 0.250"


def test_tensorboard_and_whoever_else_listens_hear_the_figures_of_metrics_jsonl(easy, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Listener:
        def __init__(self) -> None:
            self.heard: dict[tuple[str, int], float] = {}
            self.closed = False

        def scalars(self, figures: dict[str, float], step: int) -> None:
            self.heard |= {(name, step): value for name, value in figures.items()}

        def close(self) -> None:
            self.closed = True

    listener = Listener()
    train(plan_of(easy), tmp_path, sinks=[lambda out, start: listener])
    assert listener.closed
    board = EventAccumulator(str(tmp_path)).Reload()
    for kind, name in (("train", "loss"), ("train", "data_wait"), ("eval", "accuracy"), ("eval", "ece")):
        for row in lines(tmp_path, kind):
            assert listener.heard[f"{kind}/{name}", row["step"]] == row[name]
        told = {event.step: event.value for event in board.Scalars(f"{kind}/{name}")}
        assert told == {row["step"]: pytest.approx(row[name], rel=1e-6) for row in lines(tmp_path, kind)}


def test_weights_and_biases_hears_them_where_it_is_installed(easy, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    from clipmill.train.log import WandB

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("a", "b"):
        train(plan_of(easy), tmp_path / name, sinks=[partial(WandB, "clipmill", {"seed": 0})])
        [kept] = (tmp_path / name / "wandb").glob("offline-run-*/*.wandb")
        deadline = (
            time.monotonic() + 20
        )  # another process writes it, and on a busy machine ends after the run
        while b"train/loss" not in kept.read_bytes():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert (tmp_path / name / "wandb.id").read_text() in kept.name, "a run there for each run here"


# Several runs


def test_all_folds_come_with_the_first_seed_and_then_with_the_next():
    assert [part.name for part in parts_of([1, 2], 2, 5)] == [
        "fold1-seed5",
        "fold2-seed5",
        "fold1-seed6",
        "fold2-seed6",
    ]
    assert [part.name for part in parts_of([None], 2, 0)] == ["seed0", "seed1"]


def test_what_is_known_of_runs_that_are_not_reached_is_kept(easy, tmp_path):
    train(plan_of(easy, fold=2), tmp_path / "fold2-seed0")
    stopped = Outcome(1, False, 1, None, None)
    summary = cross_validate(parts_of([1, 2], 1, 0), tmp_path, lambda part, place: stopped)
    assert [(row["run"], row["done"]) for row in summary["runs"]] == [
        ("fold1-seed0", False),
        ("fold2-seed0", True),
    ]
    assert summary["mean"]["accuracy"] == summary["runs"][1]["best"]["accuracy"]


def test_mean_and_deviation_are_of_the_runs_that_are_done(tmp_path):
    accuracies = {("fold1", 0): 0.5, ("fold2", 0): 0.7, ("fold1", 1): 0.9}

    def run(part: Part, place: Path) -> Outcome:
        value = accuracies.get((f"fold{part.fold}", part.seed))
        figures = value and {"main_figure": "accuracy", "accuracy": value, "map": None, "step": 4}
        return Outcome(4 if value else 2, value is not None, 4, figures or None, figures or None)

    summary = cross_validate(parts_of([1, 2], 2, 0), tmp_path, run)
    values = list(accuracies.values())
    assert summary["mean"]["accuracy"] == summary["last_mean"]["accuracy"] == pytest.approx(mean(values))
    assert summary["deviation"]["accuracy"] == pytest.approx(stdev(values))
    assert summary["mean"]["map"] is None
    assert [row["done"] for row in summary["runs"]] == [True, True, True, False]
    assert summary["runs"][3]["step"] == 2
    assert [row["mean"]["accuracy"] for row in summary["by_seed"]] == [pytest.approx(0.6), 0.9]
    assert json.loads((tmp_path / "crossval.json").read_text()) == summary
    with pytest.raises(TrainError, match=r"crossval.json: cannot be read"):
        refreshed(tmp_path / "nowhere")


FLAGS = "--device cpu --model erann-3-1 --steps 4 --batch-size 4 --crop-s 0.5 --eval-every 2"


def test_cross_validation_makes_all_runs_tells_them_and_goes_on_where_it_was(easy, tmp_path, capsys):
    out = tmp_path / "cv"
    asked = [*("--shards", str(easy), "--folds", "1,3", "--repeats", "2", "--out", str(out)), *FLAGS.split()]
    assert train_command.main(asked, standalone_mode=False) == 0
    done = capsys.readouterr()
    told = json.loads((out / "crossval.json").read_text())
    assert [(row["run"], row["done"]) for row in told["runs"]] == [
        (name, True) for name in ("fold1-seed0", "fold3-seed0", "fold1-seed1", "fold3-seed1")
    ]
    best = [max(row["accuracy"] for row in lines(out / row["run"], "eval")) for row in told["runs"]]
    assert told["mean"]["accuracy"] == pytest.approx(np.mean(best))
    assert told["deviation"]["accuracy"] == pytest.approx(np.std(best, ddof=1))
    assert re.search(rf"mean +{np.mean(best):.3f} ", done.out)
    assert done.err.count("recipe small-cpu") == 1, "said once, not for each run"
    assert all((out / part / "report.html").is_file() for part in (".", "fold1-seed0", "fold3-seed1"))
    with pytest.raises(TrainError, match="already holds 4 of these 4 runs; --resume goes on"):
        train_command.main(asked, standalone_mode=False)
    for name in ("last.pt", "previous.pt"):
        (out / "fold3-seed1" / name).unlink()
    before = (out / "fold3-seed1" / "best.safetensors").read_bytes()
    assert train_command.main([*asked, "--resume"], standalone_mode=False) == 0
    assert (out / "fold3-seed1" / "best.safetensors").read_bytes() == before
    assert capsys.readouterr().err.count("is finished already") == 3
    assert json.loads((out / "crossval.json").read_text()) == told


def test_other_folds_that_are_made_later_in_a_folder_join_its_mean_if_they_are_made_alike(tmp_path):
    # Folds of unlike sizes, so that a pass over the clips takes 2 steps without the first, and 3 without another.
    where, out = shards_of(tmp_path, fold=[1] * 12 + [2] * 6 + [3] * 6), tmp_path / "cv"
    asked = ["--shards", str(where), "--out", str(out), *FLAGS.replace("--steps 4", "--epochs 0.5").split()]
    for folds in ("1", "2"):
        assert train_command.main([*asked, "--no-page", "--folds", folds], standalone_mode=False) == 0
    told = json.loads((out / "crossval.json").read_text())
    assert [(row["run"], row["done"], row["step"]) for row in told["runs"]] == [
        ("fold1-seed0", True, 2),
        ("fold2-seed0", True, 3),
    ]
    best = [row["best"]["accuracy"] for row in told["runs"]]
    assert told["mean"]["accuracy"] == pytest.approx(mean(best))
    for flags, said in (
        (("--learning-rate", "0.5"), r"learning_rate was \S+, now 0\.5"),
        (("--epochs", "1"), "steps was 2, now 5"),
        (("--no-specaugment",), "specaugment was True, now False"),
    ):
        begun = rf"fold1-seed0: this run was begun otherwise: {said}\. The mean is over all runs of a folder"
        with pytest.raises(TrainError, match=begun):
            train_command.main([*asked, "--folds", "3", *flags], standalone_mode=False)
    assert not (out / "fold3-seed0").exists()
    assert json.loads((out / "crossval.json").read_text()) == told


@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_a_folder_holds_one_run_or_several_and_never_both(easy, tmp_path, resume):
    one, several = tmp_path / "one", tmp_path / "several"
    train(plan_of(easy), one, stop=lambda: True)
    cross_validate(parts_of([1, 2], 1, 0), several, lambda part, place: Outcome(0, False, 0, None, None))
    asked = ["--shards", str(easy), *FLAGS.split(), *resume]
    before = [sorted(folder.iterdir()) for folder in (one, several)]
    with pytest.raises(
        TrainError, match=r"one: holds a single run \(config\.json\); several .* another --out"
    ):
        train_command.main([*asked, "--folds", "1,2", "--out", str(one)], standalone_mode=False)
    with pytest.raises(
        TrainError, match=r"several: holds several runs \(crossval\.json\); --out with .* of one"
    ):
        train_command.main([*asked, "--out", str(several)], standalone_mode=False)
    assert [sorted(folder.iterdir()) for folder in (one, several)] == before


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("--folds", "1,9"), 1, "no clip is in fold 9: there are 1, 2, 3, 4; choose one with --fold"),
        (
            ("--folds", "some"),
            2,
            "--folds some: allowed are all, or numbers with commas between, such as 1,3",
        ),
        (("--folds", "all", "--fold", "1"), 2, "--fold and --folds: allowed is one of them"),
        (("--partition", "gpu"), 2, "--partition goes with --engine slurm, not with local"),
        (("--gpus", "0"), 2, "--gpus goes with --engine slurm, not with local"),
        (
            ("--engine", "slurm", "--slurm", "account"),
            2,
            "--slurm account: allowed is NAME=VALUE, such as account=x",
        ),
    ],
)
def test_what_cannot_be_is_named_before_anything_begins(easy, tmp_path, flags, code, said):
    with pytest.raises(ClipmillError, match=f"^{re.escape(said)}$") as raised:
        train_command.main(
            ["--shards", str(easy), "--out", str(tmp_path / "x"), *flags], standalone_mode=False
        )
    assert raised.value.exit_code == code
    assert not (tmp_path / "x").exists()

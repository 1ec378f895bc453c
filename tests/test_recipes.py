"""Recipes: the papers' numbers, files of one's own, and what is refused with the flag that mends it."""

from __future__ import annotations

import re
from dataclasses import fields, replace

import pytest
import torch
from torch import nn

from clipmill.cli.train import command as train_command
from clipmill.errors import ConfigError
from clipmill.train.recipes import (
    Recipe,
    as_toml,
    choose_recipe,
    describe,
    learning_rate_at,
    list_recipes,
    read_recipe,
)
from clipmill_models import outline_model
from conftest import REPO

RECIPES = list_recipes()


def test_every_recipe_can_be_built_described_and_has_a_network_and_a_line_on_where_it_is_from():
    for name, recipe in RECIPES.items():
        assert recipe.name == name
        assert recipe.model in describe(recipe)
        assert recipe.about
        assert outline_model(recipe.model, 10).name == recipe.model
    for dataset in (
        "tones",
        "esc10",
        "esc50",
        "audioset",
        "urbansound8k",
        "ravdess",
        "speechcommands",
        "any",
    ):
        for device in ("cpu", "cuda"):
            for init in (False, True):
                assert choose_recipe(dataset, device, init=init)[0].name in RECIPES


JOURNAL = {
    # section: model, steps, batch, rate, schedule, crop, mixup, semitones, eval_every
    "audioset": ("erann-1-6", 500_000, 32, 1e-3, "one-cycle", 8.0, "between-class", 0.0, 5_000),
    "esc50-scratch": ("erann-1-3", 20_000, 32, 2e-4, "constant", 4.0, "between-class", 0.0, 500),
    "esc50-finetune": ("erann-2-5", 2_000, 32, 1e-4, "constant", 4.0, "between-class", 0.0, 100),
    "urbansound8k-scratch": ("erann-1-4", 20_000, 32, 2e-4, "constant", 0.0, "between-class", 0.0, 500),
    "urbansound8k-finetune": ("erann-2-6", 5_000, 32, 1e-4, "constant", 0.0, "between-class", 0.0, 250),
    "ravdess-scratch": ("erann-0-4", 20_000, 32, 2e-4, "constant", 3.0, "between-class", 2.0, 500),
    "ravdess-finetune": ("erann-0-6", 2_000, 32, 1e-4, "constant", 3.0, "between-class", 2.0, 100),
}


@pytest.mark.parametrize("name", JOURNAL)
def test_the_journals_experiments_are_as_section_4_has_them(name):
    recipe = RECIPES[name]
    assert JOURNAL[name] == (
        recipe.model, recipe.steps, recipe.batch_size, recipe.learning_rate, recipe.schedule, recipe.crop_s,
        recipe.mixup, recipe.pitch_semitones, recipe.eval_every,
    )  # fmt: skip
    assert recipe.specaugment
    assert not recipe.ema_warmup, "Eq. 6 to the letter"
    assert (recipe.ema_decay, recipe.weight_decay, recipe.clip_norm) == (0.999, 0.0, 0.0)
    assert recipe.init == name.endswith("finetune")


def test_table_3_differs_from_its_base_by_one_thing_each():
    base = RECIPES["audioset-ablation"]
    assert (base.model, base.crop_s, base.mixup, base.specaugment) == (
        "erann-2-5",
        8.0,
        "between-class",
        True,
    )
    assert (base.sampling, base.loss) == ("balanced", "sigmoid")
    changed = {
        "audioset-no-mixup": {"mixup": "none"},
        "audioset-standard-mixup": {"mixup": "standard"},
        "audioset-logmel-mixup": {"mixup": "between-class-logmel"},
        "audioset-no-specaugment": {"specaugment": False},
        "audioset-crop-4": {"model": "erann-2-6", "crop_s": 4.0},
        "audioset-crop-8": {"model": "erann-2-6"},
        "audioset-crop-10": {"model": "erann-2-6", "crop_s": 10.0},
    }
    for name, changes in changed.items():
        ablation = RECIPES[name]
        assert ablation == replace(base, name=name, about=ablation.about, **changes)


@pytest.mark.parametrize(
    ("name", "epochs", "clips", "steps"),
    [
        ("gmme-esc50", 3_500, 1_600, 43_750),
        ("gmme-urbansound8k", 1_500, 7_859, 92_098),
        ("gmme-speechcommands", 300, 84_843, 198_851),
    ],
)
def test_gmmes_experiments_are_told_in_epochs_and_become_steps_once_the_clips_are_known(
    name, epochs, clips, steps
):
    recipe = RECIPES[name]
    assert (recipe.epochs, recipe.batch_size, recipe.learning_rate) == (epochs, 128, 3e-4)
    assert (recipe.schedule, recipe.ema_decay, recipe.label_smoothing) == ("one-cycle", 0.995, 0.1)
    assert (recipe.weight_decay, recipe.warmup, recipe.clip_norm) == (1e-5, 0.1, 1.0)
    assert recipe.pad_s == (4.0 if name == "gmme-urbansound8k" else 0.0)
    assert recipe.for_clips(clips).steps == steps
    assert recipe.for_clips(clips).for_clips(5).steps == steps, "decided once"
    assert choose_recipe("esc50", "cuda", name, steps=7)[0].for_clips(1_600).steps == 7


def test_a_recipe_is_chosen_by_dataset_device_and_whether_there_are_weights_and_any_field_can_be_changed():
    recipe, why = choose_recipe("esc50", "cuda", steps=7, mixup=None)
    assert (recipe.name, recipe.steps, recipe.mixup) == ("esc50-scratch", 7, "between-class")
    assert why == "recipe esc50-scratch: for esc50 on cuda, changed by --steps"
    assert choose_recipe("esc50", "cuda", init=True)[0].name == "esc50-finetune"
    assert choose_recipe("esc50", "cpu", "scratch")[0] == RECIPES["scratch"].on("cpu")
    assert [choose_recipe("x", device)[0].precision for device in ("cpu", "cuda")] == ["fp32", "bf16"]
    assert choose_recipe("x", "cuda", precision="fp32")[0].precision == "fp32"


def test_every_field_has_its_flag_and_every_flag_its_field():
    flags = {parameter.name for parameter in train_command.params}
    assert {field.name for field in fields(Recipe)} - {"name", "about", "init"} <= flags
    # The page on training names them all.
    page = (REPO / "docs" / "training.md").read_text()
    assert all(f"`{name}`" in page for name in RECIPES), [name for name in RECIPES if f"`{name}`" not in page]


def test_steps_replace_epochs_and_epochs_steps_wherever_they_stand(tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text('extends = "gmme-esc50"\nsteps = 1000\n')
    assert read_recipe(mine).for_clips(1_600).steps == 1000
    assert choose_recipe("x", "cpu", "scratch", epochs=2.0)[0].for_clips(64).steps == 4
    with pytest.raises(ConfigError, match="--steps 3 and --epochs 2: allowed is one of them"):
        choose_recipe("x", "cpu", "scratch", epochs=2.0, steps=3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learning_rate": -1}, "--learning-rate -1: allowed is any number above 0"),
        ({"learning_rate": float("nan")}, "--learning-rate nan: allowed"),
        ({"steps": 0}, "--steps 0 and --epochs 0: allowed is any number above 0 for one of them"),
        ({"epochs": 0.0}, "--steps 0 and --epochs 0: allowed is any number above 0 for one of them"),
        ({"batch_size": 0}, "--batch-size 0: allowed"),
        ({"crop_s": -1.0}, "--crop-s -1: allowed is 0 (whole clips) or any number of seconds"),
        (
            {"mixup": "cutmix"},
            "--mixup 'cutmix': allowed are none, standard, between-class, between-class-logmel",
        ),
        ({"precision": "fp16"}, "--precision 'fp16': allowed are auto, fp32, bf16"),
        ({"noise_snr_db": 90.0}, "--noise-snr-db 90.0: allowed is -40 to 40 dB, or inf for none"),
        ({"stretch": -0.5}, "--stretch -0.5: allowed is 0 (none) to 3"),
        ({"pitch_semitones": 30.0}, "--pitch-semitones 30: allowed is 0 (none) to 24"),
        ({"label_smoothing": 1.0}, "--label-smoothing 1: allowed is 0 (none) to below 1"),
        ({"accumulate": 0}, "--accumulate 0: allowed is any whole number from 1 up"),
        ({"steps": "many"}, "--steps 'many': allowed is a value of type int"),
    ],
)
def test_a_value_that_cannot_be_names_its_flag_and_what_is_allowed(changes, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        choose_recipe("esc50", "cpu", "scratch", **changes)


def test_noise_of_a_recipe_can_be_switched_off():
    assert choose_recipe("esc50", "cpu", "gmme-esc50", noise_snr_db=float("inf"))[0].noise_snr_db is None


def test_what_recipes_prints_is_a_file_that_says_the_same(tmp_path, here):
    for name, recipe in RECIPES.items():
        path = tmp_path / f"{name}.toml"
        path.write_text(as_toml(recipe))
        assert read_recipe(path) == recipe
    listed = here("recipes")
    assert listed.returncode == 0
    assert all(name in listed.stdout for name in RECIPES)
    assert here("recipes", "ravdess-scratch").stdout == as_toml(RECIPES["ravdess-scratch"])


def test_a_file_of_ones_own_may_hold_what_differs_alone(tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text('extends = "esc50-scratch"\npitch_semitones = 1\nabout = "with pitch"\n')
    recipe, why = choose_recipe("esc50", "cpu", str(mine), steps=5)
    assert recipe == replace(
        RECIPES["esc50-scratch"].on("cpu"), name="mine", about="with pitch", pitch_semitones=1.0, steps=5
    )
    assert why == f"recipe mine: asked for, {mine}, changed by --steps"
    (tmp_path / "other.toml").write_text('extends = "mine"\n')
    assert read_recipe(tmp_path / "other.toml").pitch_semitones == 1.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps = ", "mine.toml: is no TOML"),
        ('extends = "mine"', "mine.toml: extends 'mine', which is itself"),
        ('extends = "nothing"', "mine.toml: extends 'nothing', which is not there"),
        ('extends = "scratch"\nstep = 3', "mine.toml: has no field step: allowed are extends, about, "),
        ("steps = 3", "mine.toml: names no model"),
        ('extends = "scratch"\nsteps = 3.5', "mine.toml: --steps 3.5: allowed is a value of type int"),
    ],
)
def test_a_file_that_is_no_recipe_says_why(tmp_path, text, said):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(said)):
        choose_recipe("esc50", "cpu", str(path))


def test_a_recipe_that_is_not_there_names_those_that_are():
    with pytest.raises(
        ConfigError, match=r"--recipe best: no such recipe; there are audioset, audioset-ablation, "
    ):
        choose_recipe("esc50", "cpu", "best")
    with pytest.raises(ConfigError, match=r"nowhere/best.toml: cannot be read"):
        choose_recipe("esc50", "cpu", "nowhere/best.toml")


@pytest.mark.parametrize(("steps", "warmup"), [(10, 0.3), (37, 0.3), (1000, 0.3), (37, 0.1), (1000, 0.1)])
def test_one_cycle_is_torchs(steps, warmup):
    recipe = Recipe("x", "erann-1-1", steps=steps, learning_rate=3e-3, schedule="one-cycle", warmup=warmup)
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=warmup)
    for step in range(steps):
        assert learning_rate_at(recipe, step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        schedule.step()
    assert learning_rate_at(Recipe("x", "m", steps=3), 2) == 2e-4


@pytest.mark.parametrize(("steps", "warmup"), [(10, 0.1), (1, 0.3), (5, 0.0)])
def test_a_warm_up_of_a_step_or_less_begins_near_the_highest_rate(steps, warmup):
    recipe = Recipe("x", "m", steps=steps, learning_rate=3e-3, schedule="one-cycle", warmup=warmup)
    rates = [learning_rate_at(recipe, step) for step in range(steps)]
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] <= rates[0] <= 3e-3

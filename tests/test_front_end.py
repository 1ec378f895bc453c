"""What stands between the shards' sound and each network: its rate, its log-mel, and a run that trains behind it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipmill.errors import FeatureError, TrainError
from clipmill.features import FrontEnd, LogMel
from clipmill.shards.read import Shards
from clipmill.train.checkpoint import read_run
from clipmill.train.evaluate import evaluate_run
from clipmill.train.lengths import longest_s
from clipmill.train.loop import train
from clipmill.train.plan import plan_run
from clipmill.train.predict import predict_files
from clipmill.train.recipes import Recipe
from clipmill_models import create_model, outline_model
from conftest import sound
from test_train import RATE, shards_of

CPU = torch.device("cpu")


def snr_db(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(10 * np.log10((wanted**2).mean() / ((got - wanted) ** 2).mean()))


@pytest.mark.parametrize(
    ("before", "after"), [(44100, 32000), (44100, 22050), (44100, 16000), (16000, 22050)]
)
def test_sound_at_another_rate_is_soxrs_to_70_db(before: int, after: int) -> None:
    wave = sound(1.0, before, seed=after).astype(np.float32)
    low_passed = soxr.resample(soxr.resample(wave, before, 0.4 * after), 0.4 * after, before)[:before]
    got = FrontEnd(before, after)(torch.from_numpy(low_passed)[None])[0].numpy()
    wanted = soxr.resample(low_passed, before, after, quality="VHQ")
    assert len(got) == after
    assert snr_db(got[500:-500], wanted[500 : len(got) - 500]) > 70


def test_what_lies_above_the_new_rates_half_is_silent() -> None:
    time_s = torch.arange(44100, dtype=torch.float64) / 44100
    above = torch.sin(2 * torch.pi * 12000 * time_s).float()[None]
    assert FrontEnd(44100, 22050)(above)[0, 500:-500].abs().max() < 1e-4


def test_the_log_mel_is_made_at_the_networks_rate() -> None:
    wave = torch.from_numpy(sound(2.0, 44100).astype(np.float32))[None]
    whole = FrontEnd.of(outline_model("cnn14", 3), 44100)
    settings = whole.config["feature"]["settings"]
    assert whole.config["resample_to"] == settings["sample_rate"] == 32000
    assert torch.equal(whole(wave), LogMel(**settings)(FrontEnd(44100, 32000)(wave)))


def test_a_network_of_any_rate_hears_the_shards_own() -> None:
    front_end = FrontEnd.of(outline_model("erann-1-1", 3), 22050)
    assert front_end.config == FrontEnd(22050, feature={"name": "logmel"}).config
    assert (front_end.resample_to, front_end.bins) == (None, 128)


def test_the_bins_are_those_that_the_network_was_built_for() -> None:
    assert FrontEnd.of(outline_model("erann-1-1", 3, in_bins=64), 44100).bins == 64


@pytest.mark.parametrize("name", ["erann-1-1", "cnn14", "eat-s", "wavegram-erann-1-1"])
def test_its_config_is_plain_json_and_restores_it(name: str) -> None:
    front_end = FrontEnd.of(outline_model(name, 3), 44100)
    again = FrontEnd(**json.loads(json.dumps(front_end.config)))
    wave = torch.randn(2, 44100)
    assert again.config == front_end.config
    assert torch.equal(again(wave), front_end(wave))


def test_rates_that_share_next_to_nothing_are_refused_before_their_filters_fill_the_memory() -> None:
    with pytest.raises(FeatureError, match="44101 Hz does not go to 22050 Hz, with which it shares but 1"):
        FrontEnd(44101, 22050)


@pytest.mark.parametrize("wave", [torch.zeros(9), torch.zeros(1, 0), torch.zeros(1, 9, dtype=torch.int16)])
@pytest.mark.parametrize("rate", [16000, 44100])
def test_what_is_no_waveform_is_refused_before_networks_on_waveforms_too(
    wave: torch.Tensor, rate: int
) -> None:
    with pytest.raises(FeatureError, match=r"allowed is floating point in -1..1 of shape \[batch, samples\]"):
        FrontEnd(rate, None if rate == 16000 else 16000)(wave)


def test_a_log_mel_at_another_rate_than_the_sounds_is_refused() -> None:
    with pytest.raises(FeatureError, match="logmel is of 16000 Hz: allowed is 32000, the sound's"):
        FrontEnd(44100, 32000, {"name": "logmel", "settings": {"sample_rate": 16000}})


def test_with_another_networks_hop_a_frame_stands_on_every_hop_and_nothing_is_padded() -> None:
    logmel = LogMel(sample_rate=32000, n_fft=1024, win_length=1024, hop=320, n_mels=64)
    assert logmel.frames_per_s is None
    for samples in (100, 32000, 32001, 47999):
        assert logmel(torch.randn(1, samples)).shape[2] == logmel.frames(samples) == samples // 320 + 1


# A run behind it


@pytest.fixture(scope="module")
def easy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shards_of(tmp_path_factory.mktemp("easy"), clips=12, seconds=1.0)


@pytest.fixture(scope="module")
def heard(easy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of a network on waveforms of 41 kHz, from shards at 16 kHz."""
    recipe = Recipe("x", "wavegram-erann-3-1", steps=2, batch_size=4, crop_s=0.7, eval_every=2)
    out = tmp_path_factory.mktemp("runs") / "waveforms"
    plan = plan_run(Shards.open(easy), recipe, CPU, fold=1)
    assert "no SpecAugment: wavegram-erann-3-1 takes waveforms" in plan.notes
    outcome = train(plan, out)
    assert outcome.last is not None
    return out, outcome.last


def test_a_network_on_waveforms_of_another_rate_is_trained_and_scored_again_alike(easy, heard) -> None:
    out, last = heard
    run = read_run(out, CPU, "last")
    assert run.config["features"] == {
        "sample_rate": RATE,
        "resample_to": 40960,
        "feature": None,
        "least_s": 0.0,
    }
    assert evaluate_run(run, Shards.open(easy), CPU)["loss"] == pytest.approx(last["loss"], rel=1e-5)


def test_shorter_clips_are_padded_to_as_much_as_a_recipe_says_wherever_they_are_heard(easy, tmp_path) -> None:
    """As GMME has it of UrbanSound8K. Else a network would be asked about lengths that it never learnt from."""
    recipe = Recipe(
        "x",
        "wavegram-erann-3-1",
        steps=2,
        batch_size=4,
        pad_s=3.0,
        mixup="none",
        specaugment=False,
        eval_every=2,
    )
    outcome = train(plan_run(Shards.open(easy), recipe, CPU, fold=1), tmp_path / "run")
    run = read_run(tmp_path / "run", CPU, "last")
    heard = run.features(torch.ones(1, RATE // 2))
    assert heard.shape == (1, 3 * 40960)
    assert not heard[:, 41000:].any()
    assert run.features.places(RATE) == 3 * 40960
    assert run.features(torch.ones(1, 4 * RATE)).shape == (1, 4 * 40960)
    assert outcome.last is not None
    assert evaluate_run(run, Shards.open(easy), CPU)["loss"] == pytest.approx(outcome.last["loss"], rel=1e-5)
    short = sound(0.5, RATE)
    soundfile.write(tmp_path / "short.wav", short, RATE)
    soundfile.write(tmp_path / "long.wav", np.concatenate([short, np.zeros(round(2.5 * RATE))]), RATE)
    one, other = predict_files(run, [tmp_path / "short.wav", tmp_path / "long.wav"], CPU)
    assert one.scores == pytest.approx(other.scores, abs=1e-5)


def test_and_predicts(heard, tmp_path) -> None:
    soundfile.write(tmp_path / "a.wav", sound(2.0, RATE), RATE)
    (found,) = predict_files(read_run(heard[0], CPU), [tmp_path / "a.wav"], CPU)
    assert found.scores is not None
    assert found.scores.sum() == pytest.approx(1, abs=1e-5)


def test_a_network_with_a_log_mel_of_its_own_gets_it_from_the_shards_rate(easy, tmp_path) -> None:
    recipe = Recipe("x", "cnn14", steps=1, batch_size=2, crop_s=0.5, eval_every=1)
    plan = plan_run(Shards.open(easy), recipe, CPU, fold=1)
    assert plan.config["features"]["resample_to"] == 32000
    assert plan.config["features"]["feature"]["settings"]["hop"] == 320
    network = create_model("cnn14", 3).eval()
    with torch.inference_mode():
        assert network(FrontEnd(**plan.config["features"])(torch.randn(1, RATE))).shape == (1, 3)


# A network of limited length


def test_a_clip_longer_than_the_network_takes_is_told_before_anything_is_trained(tmp_path) -> None:
    pytest.importorskip("transformers", reason="AST needs the library transformers")
    shards = Shards.open(shards_of(tmp_path, clips=12, seconds=5.2))
    recipe = Recipe("x", "ast-512", steps=1, batch_size=2)
    with pytest.raises(
        TrainError,
        match=r"the longest clip to train on is 6 s long .* takes clips of up to 5 s; --crop-s 5 cuts",
    ):
        plan_run(shards, recipe, CPU, fold=1)
    cropped = Recipe("x", "ast-512", steps=1, batch_size=2, crop_s=1.0)
    with pytest.raises(TrainError, match=r"the longest clip held out .* --where 'duration_s <= 5' leaves"):
        plan_run(shards, cropped, CPU, fold=1)


@pytest.mark.parametrize(("name", "most"), [("ast", 10), ("ast-512", 5)])
def test_a_network_of_fixed_length_says_how_many_whole_seconds_it_hears(name: str, most: int) -> None:
    pytest.importorskip("transformers", reason="AST needs the library transformers")
    network = outline_model(name, 3)
    for rate in (16000, 44100):
        assert longest_s(network, FrontEnd.of(network, rate)) == most


def test_other_networks_hear_any_length() -> None:
    network = outline_model("cnn14", 3)
    assert longest_s(network, FrontEnd.of(network, 44100)) == float("inf")


@given(
    st.sampled_from(["erann-1-1", "cnn14", "eat-s"]),
    st.sampled_from([16000, 22050, 44100]),
    st.integers(700, 50000),
)
@settings(max_examples=20, deadline=None)
def test_the_places_foretold_are_those_that_come(name: str, rate: int, samples: int) -> None:
    front_end = FrontEnd.of(outline_model(name, 3), rate)
    assert front_end(torch.zeros(1, samples)).shape[-1] == front_end.places(samples)

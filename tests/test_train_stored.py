"""Training from a feature store: what training from sound gives, without the sound; and what cannot be, by name."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from clipmill.cli.evaluate import command as evaluate_command
from clipmill.cli.train import command as train_command
from clipmill.errors import ConfigError, FeatureError, ShardError, TrainError
from clipmill.features import StoredFrontEnd, create_feature
from clipmill.featurestore import FeatureStore, make_features
from clipmill.loader import Loader
from clipmill.shards.read import Shards
from clipmill.train.checkpoint import read_last, read_run
from clipmill.train.loop import Outcome, train
from clipmill.train.plan import Plan, plan_run
from clipmill.train.predict import predict_files
from clipmill.train.prepare import Preparation
from test_train import CPU, TINY, lines, plan_of, same_state, shards_of, sound_of

PLAIN = replace(TINY, mixup="none")


@pytest.fixture(scope="module")
def easy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shards_of(tmp_path_factory.mktemp("easy"))


@pytest.fixture(scope="module")
def store(easy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log-mel and the chromagram of the easy clips, to the bit."""
    folder = tmp_path_factory.mktemp("stores") / "features"
    shards = Shards.open(easy)
    for name in ("logmel", "chroma"):
        assert not make_features(shards, folder, create_feature(name, sample_rate=16000), "float32").stopped
    return folder


def stored_plan(store: Path, recipe: Any = PLAIN, feature: str = "logmel", **options: Any) -> Plan:
    return plan_run(FeatureStore(store).entry(feature).clips, recipe, CPU, **options)


def flags(out: Path, *more: str) -> list[str]:
    """A short run with nothing that needs waveforms."""
    told = {
        "--model": "erann-3-1",
        "--steps": 4,
        "--batch-size": 4,
        "--crop-s": 1.0,
        "--eval-every": 2,
        "--fold": 1,
    }
    words = [str(word) for pair in told.items() for word in pair]
    return [*words, "--mixup", "none", "--no-page", "--device", "cpu", "--out", str(out), *more]


# The same as from sound


def test_whole_clips_of_one_length_train_to_the_bit_as_from_their_sound(store, easy, tmp_path):
    """Float32 features are those that sound gives; SpecAugment, sampling and targets know of no difference."""
    recipe = replace(PLAIN, crop_s=0.0, steps=2)
    where = "duration_s > 1"  # all of 2 s
    from_sound = train(plan_run(Shards.open(easy), recipe, CPU, where=where), tmp_path / "sound")
    from_store = train(stored_plan(store, recipe, where=where), tmp_path / "store")
    assert from_sound.done
    assert from_store.done
    for name in ("model", "ema", "optimizer"):
        assert same_state(read_last(tmp_path / "sound")[name], read_last(tmp_path / "store")[name]), name
    said = ("step", "loss", "accuracy", "map")
    for kind in ("train", "eval"):
        one, other = (
            [[row.get(name) for name in said] for row in lines(tmp_path / side, kind)]
            for side in ("sound", "store")
        )
        assert one == other


def test_crops_are_of_whole_frames_of_the_clips_that_the_sampler_would_choose_of_sound(store, easy):
    sound, stored = plan_of(easy, PLAIN, fold=1), stored_plan(store, fold=1)
    positions = np.arange(50)
    assert np.array_equal(sound.sampler.rows(positions), stored.sampler.rows(positions))
    clips = stored.clips
    batch = next(Loader(clips, 4, sampler=stored.sampler, crop=128).batches())
    assert batch.waves.shape == (4, 128, 128)
    for crop, row in zip(batch.waves, batch.rows.tolist(), strict=True):
        whole = np.empty((1, clips.samples[row], clips.bins), clips.dtype)
        assert not clips.read_into(np.array([row]), whole)
        places = [at for at in range(len(whole[0]) - 127) if np.array_equal(whole[0, at : at + 128], crop)]
        assert places, "a stretch of the clip as it is stored"


def test_behind_a_shorter_clip_stands_what_the_feature_makes_of_silence(store):
    clips = FeatureStore(store).entry("logmel").clips
    shorter = int(np.flatnonzero(clips.samples == 128)[0])
    longer = int(np.flatnonzero(clips.samples == 256)[0])
    room = np.empty((2, 256, clips.bins), clips.dtype)
    assert not clips.read_into(np.array([shorter, longer]), room)
    assert (room[0, 128:] == -100).all(), "dB, and not 0 dB, which is loud"
    front_end = StoredFrontEnd(clips.spec.create(), torch.from_numpy(clips.silence))
    assert front_end.padded(torch.from_numpy(room[:, :128].copy()), 200)[:, 128:].eq(-100).all()


def test_standard_mixing_of_features_mixes_them_and_their_targets_alike(store):
    plan = stored_plan(store, replace(PLAIN, mixup="standard-features", specaugment=False), fold=1)
    batch = next(Loader(plan.clips, 4, sampler=plan.sampler, crop=128).batches())
    heard, targets = Preparation(plan.recipe, plan.front_end(), 0)(batch, 0)
    assert heard.shape == (4, 128, 128)
    plain, given = batch.waves.transpose(1, 2), batch.targets
    assert not torch.equal(heard, plain)

    def is_mixed(k: int, other: int) -> bool:
        # The first clip's share, by least squares.
        apart = plain[k] - plain[other]
        r = float((apart * (heard[k] - plain[other])).sum() / apart.square().sum().clamp(min=1e-9))
        sides = (plain, heard, 1e-2), (given, targets, 1e-4)
        return all(torch.allclose(r * x[k] + (1 - r) * x[other], y[k], atol=atol) for x, y, atol in sides)

    assert all(any(is_mixed(k, other) for other in range(4)) for k in range(4))


# A run from the store


@pytest.fixture(scope="module")
def straight(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the chromagram by the command, which was given no sound."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    code = train_command.main(
        ["--features", str(store), "--feature", "chroma", *flags(out)], standalone_mode=False
    )
    assert code == 0
    return out


def test_a_run_says_which_features_it_was_made_from(straight, store, easy):
    config = json.loads((straight / "config.json").read_text())
    entry = FeatureStore(store).entry("chroma")
    assert config["stored"] == {"place": str(entry.folder.resolve()), "spec": entry.spec.sha256}
    assert config["features"]["feature"]["name"] == "chroma"
    assert config["sample_rate"] == 16000
    assert config["shards"] == [str(easy.resolve())]
    assert config["root_sha256"] == Shards.open(easy).root_sha256


def test_stopped_and_resumed_it_is_to_the_bit_the_run_that_was_not(straight, store, tmp_path):
    recipe = replace(PLAIN, crop_s=1.0)
    assert train(stored_plan(store, recipe, fold=1), tmp_path / "whole").done
    stops = iter([False, True])
    stopped = train(stored_plan(store, recipe, fold=1), tmp_path / "parts", stop=lambda: next(stops, True))
    assert not stopped.done
    assert train(stored_plan(store, recipe, fold=1), tmp_path / "parts", resume=True) == Outcome(
        4, True, 4 - stopped.step, *(read_last(tmp_path / "whole")[name] for name in ("best", "last"))
    )
    assert same_state(read_last(tmp_path / "whole")["model"], read_last(tmp_path / "parts")["model"])


def test_a_run_is_not_gone_on_with_from_sound_or_from_another_entry(straight, store, easy):
    for clips in (
        ["--shards", str(easy), "--feature", "chroma"],
        ["--features", str(store), "--feature", "logmel"],
    ):
        with pytest.raises(TrainError, match=r"was begun otherwise: .*(stored|feature)"):
            train_command.main([*clips, *flags(straight, "--resume")], standalone_mode=False)


def test_it_is_scored_alike_on_the_store_and_on_the_sound(straight, store, easy, capsys):
    found = []
    for clips in (["--features", str(store)], ["--shards", str(easy)]):
        assert (
            evaluate_command.main([str(straight), *clips, "--device", "cpu", "--json"], standalone_mode=False)
            == 0
        )
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["clips"] == found[1]["clips"] > 0
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5)


def test_it_predicts_what_is_heard_in_files(straight, tmp_path):
    soundfile.write(tmp_path / "a.wav", sound_of("hum", 2.0, 1), 16000)
    (found,) = predict_files(read_run(straight, CPU), [tmp_path / "a.wav"], CPU)
    assert found.scores is not None
    assert found.scores.sum() == pytest.approx(1, abs=1e-5)


def test_its_page_has_the_hardest_clips_with_their_sound_from_where_that_still_lies(straight, store, here):
    done = here("report", straight, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "data:audio/flac" in (straight / "report.html").read_text()


def test_online_and_stored_are_one_feature(store, easy, tmp_path):
    """`--feature` without a store computes what the store holds."""
    code = train_command.main(
        ["--shards", str(easy), "--feature", "chroma", *flags(tmp_path / "online")], standalone_mode=False
    )
    assert code == 0
    config = json.loads((tmp_path / "online" / "config.json").read_text())
    assert config["stored"] is None
    assert config["features"]["feature"] == {
        "name": "chroma", "version": FeatureStore(store).entry("chroma").spec.version,
        "settings": dict(FeatureStore(store).entry("chroma").spec.settings),
    }  # fmt: skip


def test_of_two_entries_of_a_feature_the_one_that_the_network_has_seen_is_chosen(
    straight, store, easy, tmp_path, capsys
):
    copy = tmp_path / "features"
    shutil.copytree(store, copy)
    other = create_feature("chroma", sample_rate=16000, n_chroma=24)
    made = make_features(Shards.open(easy), copy, other, "float32").entry
    evaluate = [str(straight), "--device", "cpu", "--json", "--features"]
    assert evaluate_command.main([*evaluate, str(copy)], standalone_mode=False) == 0
    assert json.loads(capsys.readouterr().out)["clips"] > 0
    with pytest.raises(FeatureError, match="not what the network was trained on: n_chroma 24 and not 12"):
        evaluate_command.main([*evaluate, str(made.folder)], standalone_mode=False)
    with pytest.raises(FeatureError, match=r"not what the network was trained on: logmel and not chroma"):
        evaluate_command.main(
            [*evaluate, str(FeatureStore(store).entry("logmel").folder)], standalone_mode=False
        )
    train = ["--feature", "chroma", *flags(tmp_path / "x"), "--features"]
    with pytest.raises(
        FeatureError, match=r"has 2 entries of chroma; name one of them: .* as --features STORE/ENTRY"
    ):
        train_command.main([*train, str(copy)], standalone_mode=False)
    assert train_command.main([*train, str(made.folder)], standalone_mode=False) == 0


# What cannot be


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"mixup": "between-class"},
            "--mixup between-class: needs waveforms, .*--mixup none .or standard-features.,",
        ),
        ({"mixup": "between-class-logmel"}, "--mixup between-class-logmel: needs waveforms"),
        ({"mixup": "standard"}, "--mixup standard: needs waveforms"),
        ({"pitch_semitones": 2.0}, "--pitch-semitones 2: needs waveforms, .*--pitch-semitones 0"),
        ({"stretch": 0.2}, "--stretch 0.2: needs waveforms, .*--stretch 0"),
        ({"noise_snr_db": 10.0}, "--noise-snr-db 10.0: needs waveforms, .*--noise-snr-db inf"),
        ({"feature": "chroma"}, "--feature chroma: these clips .* are stored as logmel"),
    ],
)
def test_what_needs_waveforms_is_refused_by_name(store, change, told):
    with pytest.raises(ConfigError, match=told):
        stored_plan(store, replace(PLAIN, **change), fold=1)


def test_several_that_cannot_be_are_told_together(store):
    recipe = replace(PLAIN, mixup="between-class", pitch_semitones=2.0, stretch=0.1)
    with pytest.raises(
        ConfigError, match=r"--mixup between-class, --pitch-semitones 2, --stretch 0\.1: needs"
    ):
        stored_plan(store, recipe, fold=1)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("wavegram-erann-3-1", "takes waveforms, not a feature such as logmel"),
        ("cnn14", "takes its own log-mel"),
    ],
)
def test_networks_that_take_something_else_are_refused(store, model, told):
    with pytest.raises(FeatureError, match=told):
        stored_plan(store, replace(PLAIN, model=model), fold=1)


def test_a_stream_is_refused_for_a_store_is_read_at_random(store, tmp_path):
    with pytest.raises(ConfigError, match=r"--access stream: .*feature store"):
        train_command.main(
            ["--features", str(store), "--feature", "logmel", *flags(tmp_path / "x", "--access", "stream")],
            standalone_mode=False,
        )


def test_a_store_of_other_shards_than_those_given_is_refused(store, tmp_path):
    other = shards_of(tmp_path / "other", clips=12)
    with pytest.raises(ShardError, match="was computed from other shards"):
        train_command.main(
            ["--features", str(store), "--feature", "logmel", "--shards", str(other), *flags(tmp_path / "x")],
            standalone_mode=False,
        )


def test_one_of_two_clip_sources_must_be_given(tmp_path):
    with pytest.raises(ConfigError, match="--shards SHARDS says where the clips are; or --features STORE"):
        train_command.main(flags(tmp_path / "x"), standalone_mode=False)


def test_a_damaged_feature_is_replaced_and_told_like_damaged_sound(store, tmp_path):
    copy = tmp_path / "features"
    shutil.copytree(store, copy)
    entry = FeatureStore(copy).entry("logmel")
    file = next(iter(sorted(entry.folder.glob("*.h5"))))
    data = bytearray(file.read_bytes())
    data[4096::5000] = bytes(byte ^ 1 for byte in data[4096::5000])
    file.write_bytes(data)
    plan = plan_run(entry.clips, replace(PLAIN, steps=12, eval_every=12), CPU, fold=1)
    with pytest.raises(ShardError, match="cannot be read"):
        train(plan, tmp_path / "strict")
    told = lines(tmp_path / "strict", "bad")
    assert told
    assert "not those that were written" in told[0]["message"]

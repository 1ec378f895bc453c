"""The feature spec: the same hash on every machine, and words for every difference."""

from __future__ import annotations

import json
import random
import tarfile
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from clipmill.errors import FeatureError, ShardError
from clipmill.features import LogMel, create_feature
from clipmill.features.spec import FeatureSpec
from clipmill.shards.read import Shards


class Made:
    """What a spec looks at of shards."""

    def __init__(self, **spec: Any) -> None:
        self.info: dict[str, Any] = {
            "spec": {
                "format": "webdataset", "encoding": "flac", "sample_rate": 44100, "clips_per_shard": 256, "seed": 0,
                "decoder": "auto", "keep_silent": False, **spec,
            },
            "versions": {
                "av": "18.1.0", "clipmill": "0.1.0", "h5py": "3.16.0", "imageio-ffmpeg": "0.8.1", "libsndfile": "1.2.2",
                "numpy": "2.4.6", "pyarrow": "26.0.1", "soundfile": "0.14.0", "soxr": "1.1.0",
            },
        }  # fmt: skip


SETTINGS = {
    "sample_rate": 44100, "n_fft": 1380, "win_length": 1380, "hop": 345, "f_min": 50.0, "f_max": 14000.0,
    "n_mels": 128, "mel_scale": "slaney", "mel_norm": None, "floor": 1e-10,
}  # fmt: skip


def spec(**settings: Any) -> FeatureSpec:
    return FeatureSpec.of(create_feature("logmel", sample_rate=44100, **settings), Made())


def test_canonical_json_and_its_hash_never_change():
    fixed = FeatureSpec(
        "logmel", 1, SETTINGS, "float16", {"sample_rate": 44100, "versions": {"soxr": "1.1.0"}}
    )
    assert fixed.json == (
        '{"dtype":"float16","feature":"logmel","settings":{"f_max":14000.0,"f_min":50.0,"floor":1e-10,"hop":345,'
        '"mel_norm":null,"mel_scale":"slaney","n_fft":1380,"n_mels":128,"sample_rate":44100,"win_length":1380},'
        '"sound":{"sample_rate":44100,"versions":{"soxr":"1.1.0"}},"version":1}'
    )
    assert fixed.sha256 == "250a1f9e629db6aae1e158c5f236535a4f7690ef073b603c32a794c6d85e9922"


values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()
)


@given(
    st.builds(
        FeatureSpec,
        feature=st.text(),
        version=st.integers(),
        settings=st.dictionaries(st.text(), values),
        dtype=st.sampled_from(["float16", "float32"]),
        sound=st.dictionaries(st.text(), values | st.dictionaries(st.text(), values)),
    ),
    st.randoms(use_true_random=False),
)
def test_json_gives_back_the_spec_whatever_the_order_of_its_fields(one: FeatureSpec, rng: random.Random):
    again = FeatureSpec(**json.loads(one.json))
    assert (again, again.sha256, hash(again)) == (one, one.sha256, hash(one))
    assert one.difference(again) == ""
    shuffled = list(json.loads(one.json).items())
    rng.shuffle(shuffled)
    settings = list(one.settings.items())
    rng.shuffle(settings)
    assert FeatureSpec(**{**dict(shuffled), "settings": dict(settings)}).sha256 == one.sha256


@given(st.dictionaries(st.text(), values, min_size=1), st.data())
def test_another_value_is_another_hash_and_is_named(settings: dict[str, Any], data: st.DataObject):
    name = data.draw(st.sampled_from(sorted(settings)))
    other = data.draw(values.filter(lambda value: json.dumps(value) != json.dumps(settings[name])))
    one, two = (FeatureSpec("x", 1, said, "float32", {}) for said in (settings, {**settings, name: other}))
    assert one.sha256 != two.sha256
    assert one != two
    assert f"settings.{name} is {settings[name]}, the store has {other}" in one.difference(two)


def test_every_field_that_differs_is_named_with_both_values():
    found = spec(n_mels=64, hop=320).difference(spec())
    assert found == (
        "settings.hop is 320, the store has 345; settings.n_fft is 1280, the store has 1380; "
        "settings.n_mels is 64, the store has 128; settings.win_length is 1280, the store has 1380"
    )
    bare = FeatureSpec("logmel", 2, {"a": 1}, "float32", {})
    assert bare.difference(FeatureSpec("logmel", 1, {"b": 1}, "float32", {})) == (
        "settings.a is 1, the store has none; settings.b is not given, the store has 1; version is 2, the store has 1"
    )


def test_whole_numbers_where_fractions_may_stand_are_the_same_settings():
    assert spec(f_min=50, f_max=14000).sha256 == spec(f_min=50.0, f_max=14000.0).sha256 == spec().sha256
    assert spec(floor=1).sha256 == spec(floor=1.0).sha256


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ({"format": "hdf5"}, True),
        ({"encoding": "pcm16"}, True),
        ({"clips_per_shard": 5}, True),
        ({"seed": 1}, True),
        ({"keep_silent": True}, True),
        ({"decoder": "ffmpeg"}, False),
    ],
)
def test_of_the_shards_counts_what_decides_samples_and_nothing_else(changed, same):
    made = FeatureSpec.of(create_feature("logmel", sample_rate=44100), Made(**changed))
    assert (made == spec()) is same
    assert set(made.sound["versions"]) == {
        "av",
        "clipmill",
        "imageio-ffmpeg",
        "libsndfile",
        "soundfile",
        "soxr",
    }


def test_what_is_changed_later_does_not_change_the_spec():
    settings = {"a": 1}
    one = FeatureSpec("x", 1, settings, "float32", {})
    before = one.sha256
    settings["a"] = 2
    assert (one.sha256, one.settings) == (before, {"a": 1})


def test_the_spec_makes_the_module_that_computed_it():
    made = spec(n_mels=40).create()
    assert isinstance(made, LogMel)
    assert made.config == create_feature("logmel", sample_rate=44100, n_mels=40).config


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"dtype": "int8"}, "--dtype int8: allowed are float16, float32"),
        ({"settings": {"a": float("nan")}}, "a spec of logmel is no JSON"),
        ({"settings": {"a": {1, 2}}}, "a spec of logmel is no JSON"),
    ],
)
def test_what_is_no_spec_is_refused(broken, said):
    fields = {"feature": "logmel", "version": 1, "settings": SETTINGS, "dtype": "float16", "sound": {}}
    with pytest.raises(FeatureError, match=said):
        FeatureSpec(**{**fields, **broken})


def test_other_code_settings_or_features_are_refused_by_name():
    fields = json.loads(spec().json)
    for changed, said in [
        ({"version": 99}, "logmel was computed by version 99 of its code"),
        ({"settings": {**SETTINGS, "window": "hann"}}, "logmel has no setting window"),
        ({"feature": "humming"}, "no feature is called 'humming'"),
    ]:
        with pytest.raises(FeatureError, match=said):
            FeatureSpec(**{**fields, **changed}).create()


def test_a_feature_of_another_rate_is_refused_with_the_command_that_makes_such_shards():
    with pytest.raises(FeatureError, match=r"allowed is 44100.*pipeline shard --sample-rate 32000"):
        FeatureSpec.of(create_feature("logmel", sample_rate=32000), Made())


def test_shards_that_others_made_are_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(44100, np.int16), 44100)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "a.wav", "a.wav")
    with pytest.raises(ShardError, match="others made these shards"):
        FeatureSpec.of(create_feature("logmel", sample_rate=44100), Shards.open(tmp_path / "x.tar"))

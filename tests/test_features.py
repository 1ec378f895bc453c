"""What holds for every feature: frames, silence, batches, number types, settings. The numbers: test_features_reference."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clipmill.errors import FeatureError
from clipmill.features import FEATURES, Feature, Framing, LogMel, create_feature
from clipmill.features.cqt import Cqt
from conftest import REPO, sound

RATES = [8000, 16000, 22050, 32000, 44100, 48000]
NAMES = list(FEATURES)
SMALL = 8000
"""Hz, where nothing depends on the rate."""


@cache
def feature(name: str, rate: int = SMALL) -> Feature:
    return create_feature(name, sample_rate=rate)


@cache
def sounds(clips: int = 3, seconds: float = 1.3, rate: int = SMALL) -> Tensor:
    """Chords over noise, each 12 dB under the one before: float32 `[clips, samples]`."""
    waves = [sound(seconds, rate, seed=clip, level=0.3 / 4**clip) for clip in range(clips)]
    return torch.from_numpy(np.stack(waves).astype(np.float32))


@pytest.fixture
def threads() -> Iterator[None]:
    """What the test sets is set back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# Frames


@given(
    name=st.sampled_from(NAMES),
    rate=st.sampled_from(RATES),
    seconds=st.floats(0, 2),
    more=st.integers(1, 9),
)
@settings(max_examples=25, deadline=None)
def test_any_length_gives_the_log_mels_frames(name: str, rate: int, seconds: float, more: int) -> None:
    samples = int(seconds * rate) + more
    found = feature(name, rate)(torch.zeros(1, samples))
    frames = LogMel(sample_rate=rate).frames(samples)
    assert found.shape == (1, feature(name, rate).bins, frames)
    assert frames == 128 * math.ceil(samples / rate) == feature(name, rate).frames(samples)
    assert found.dtype == torch.float32
    assert found.is_contiguous()


@pytest.mark.parametrize("name", NAMES)
def test_what_comes_hops_later_comes_as_many_frames_later(name: str) -> None:
    rate, hop = SMALL, Framing(SMALL).hop
    wave = torch.zeros(1, 4 * rate)
    wave[:, rate : 2 * rate] = sounds(1, 1.0)
    first, second = feature(name)(wave), feature(name)(wave.roll(37 * hop, 1))
    within = 0.1 if name == "cqt" else 1e-3  # where filters cancel a sound, rounding is all that is left
    torch.testing.assert_close(second[..., 37 + 64 : -64], first[..., 64 : -64 - 37], rtol=1e-4, atol=within)


@pytest.mark.parametrize("name", ["logmel", "gfcc", "chroma", "cqt"])
def test_a_frame_is_centred_on_its_hop(name: str) -> None:
    rate, hop = 44100, Framing(44100).hop
    wave = torch.zeros(1, rate)
    wave[:, 60 * hop] = 1.0
    found = feature(name, rate)(wave)[0]
    heard = (found - found[:, :1]).abs().amax(0)[:128]
    # The window of a filter of the constant-Q transform begins half a sample later, librosa's and ours.
    torch.testing.assert_close(heard[45:60].flip(0), heard[61:76], rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_the_bins_are_as_told_and_fit_under_half_the_rate(name: str) -> None:
    bins = {rate: feature(name, rate).bins for rate in RATES}
    fixed = {"logmel": 128, "mfcc": 64, "gfcc": 64, "chroma": 12, "tempogram": 256}
    expected = {8000: 72, 16000: 84, 22050: 96, 32000: 96, 44100: 108, 48000: 108}
    assert bins == (expected if name == "cqt" else dict.fromkeys(RATES, fixed.get(name)))


# Silence and other extremes


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rate", [8000, 44100])
def test_silence_is_finite_and_the_same_in_every_frame(name: str, rate: int) -> None:
    found = feature(name, rate)(torch.zeros(1, rate))
    assert found.isfinite().all()
    assert (found == found[..., :1]).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("samples", [1, 2, 100, SMALL + 1])
def test_clips_of_any_shortness_are_finite(name: str, samples: int) -> None:
    found = feature(name)(torch.ones(2, samples))
    assert found.isfinite().all()
    assert found.shape[2] == 128 * math.ceil(samples / SMALL)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("level", [1e-30, 1e-6, 1.0, 1e3])
def test_any_level_is_finite(name: str, level: float) -> None:
    assert feature(name)(level * torch.sign(sounds())).isfinite().all()


@pytest.mark.parametrize("name", ["chroma", "tempogram"])
def test_shares_are_of_the_frames_largest(name: str) -> None:
    found = feature(name)(sounds(seconds=1.0))
    torch.testing.assert_close(found.amax(1), (found.amax(1) > 0).float(), rtol=0, atol=1e-6)
    assert found.min() > -1e-5
    assert feature(name)(torch.zeros(1, SMALL)).abs().max() == 0


# Batches


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rate", [8000, 44100])
def test_a_clip_is_the_same_to_the_bit_in_any_batch_and_with_any_threads(
    name: str, rate: int, threads: None
) -> None:
    waves = torch.cat([sounds(3, 1.3, rate), sounds(4, 1.3, rate).flip(1)])
    extract = feature(name, rate)
    torch.set_num_threads(1)
    with torch.inference_mode():
        alone = torch.cat([extract(wave[None]) for wave in waves])
        for count in (1, 2):
            torch.set_num_threads(count)
            for clips in (1, 2, 7):
                assert torch.equal(extract(waves[:clips]), alone[:clips])


@pytest.mark.parametrize(("name", "settings"), [
    ("logmel", {"n_mels": 50}),
    ("mfcc", {"n_mfcc": 20, "n_mels": 40}),
    ("gfcc", {"n_gfcc": 30, "n_filters": 50}),
    ("chroma", {"n_chroma": 24}),
    ("tempogram", {"window_frames": 100}),
    ("cqt", {"f_min": 27.5, "n_bins": 88}),
    ("cqt", {"bins_per_octave": 36}),
    ("cqt", {"bins_per_octave": 48, "f_min": 110.0}),
    ("cqt", {"sample_rate": 16000}),
])  # fmt: skip
def test_so_it_is_with_other_settings_and_where_it_is_a_second_short(
    name: str, settings: dict[str, Any]
) -> None:
    extract = create_feature(name, **{"sample_rate": 44100, **settings})
    waves = sounds(3, 1.0, extract.settings.sample_rate)
    with torch.inference_mode():
        alone = torch.cat([extract(wave[None]) for wave in waves])
        assert torch.equal(extract(waves), alone)


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_a_batch_are_computed_as_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waves = sounds(3, 2.3)
    whole = feature(name)(waves)
    for at_once in (1, 2**16, 2**18):
        monkeypatch.setattr("clipmill.features.spectrum.AT_ONCE_ON_CPU", at_once)
        assert torch.equal(feature(name)(waves), whole)


def test_the_loudest_of_a_tempograms_clip_is_not_that_of_the_batch() -> None:
    waves = sounds(2, 1.0)
    quiet = feature("tempogram")(torch.stack([waves[0], 1e-4 * waves[1]]))[1]
    torch.testing.assert_close(quiet, feature("tempogram")(1e-4 * waves[1:])[0], rtol=0, atol=0)
    assert quiet.any()


@pytest.mark.parametrize("name", NAMES)
def test_a_frame_does_not_depend_on_how_long_its_clip_is(name: str) -> None:
    if name == "tempogram":
        pytest.skip("its onsets are cut off under the loudest of the clip")
    wave = sounds(1, 4.0)
    torch.testing.assert_close(
        feature(name)(wave[:, : 3 * SMALL])[..., :256], feature(name)(wave)[..., :256], rtol=0, atol=0
    )


# Number types


@pytest.mark.parametrize("name", NAMES)
def test_it_is_float32_under_autocast_and_of_other_number_types(name: str) -> None:
    extract, wave = feature(name), sounds()
    expected = extract(wave)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(extract(wave), expected)
    assert torch.equal(extract(wave.double()), expected)
    for small in (torch.float16, torch.bfloat16):
        assert torch.equal(extract(wave.to(small)), extract(wave.to(small).float()))


@pytest.mark.parametrize("name", NAMES)
def test_views_are_as_good_as_copies(name: str) -> None:
    waves = sounds(2, 1.3)
    spread = torch.stack([waves, -waves], 2).transpose(0, 1).contiguous().transpose(0, 1)[..., 0]
    assert not spread.is_contiguous()
    assert torch.equal(feature(name)(spread), feature(name)(waves))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_waveform_is_told_what_is(name: str) -> None:
    for wave in (torch.zeros(8000), torch.zeros(1, 0), torch.zeros(1, 9, dtype=torch.int16)):
        with pytest.raises(
            FeatureError, match=r"allowed is floating point in -1..1 of shape \[batch, samples\]"
        ):
            feature(name)(wave)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_gives_the_numbers_of_the_cpu(name: str) -> None:
    wave = sounds(3, 1.3, 44100)
    here = feature(name, 44100)
    there = copy.deepcopy(here).cuda()(wave.cuda())
    assert there.is_cuda
    within = {"logmel": 1e-2, "mfcc": 1e-2, "cqt": 0.1}.get(name, 1e-4)
    torch.testing.assert_close(there.cpu(), here(wave), rtol=0, atol=within)


# Settings


CHANGED: dict[str, dict[str, Any]] = {
    "logmel": {"n_mels": 40},
    "mfcc": {"n_mfcc": 20, "n_mels": 40, "mel_scale": "htk", "floor": 1e-6},
    "gfcc": {"n_gfcc": 20, "n_filters": 30, "n_fft": 1000, "f_max": 3000.0},
    "chroma": {"n_chroma": 24, "n_fft": 1500},
    "cqt": {"n_bins": 50, "bins_per_octave": 24, "f_min": 100.0},
    "tempogram": {"window_frames": 99, "top_db": 60.0, "n_fft": 400, "n_mels": 40},
}
"""Other settings than the defaults, for 8 kHz."""


@pytest.mark.parametrize("changes", [False, True], ids=["defaults", "changed"])
@pytest.mark.parametrize("name", NAMES)
def test_the_config_restores_the_numbers_through_json(name: str, changes: bool) -> None:
    first = create_feature(name, sample_rate=SMALL, **(CHANGED[name] if changes else {}))
    second = create_feature(name, **json.loads(json.dumps(first.config)))
    assert second.config == first.config
    assert None not in {key: value for key, value in first.config.items() if key != "mel_norm"}.values()
    assert set(first.config) == {field.name for field in fields(type(first).SETTINGS)}
    found = first(sounds())
    assert torch.equal(second(sounds()), found)
    assert torch.equal(pickle.loads(pickle.dumps(first))(sounds()), found)
    assert torch.equal(copy.deepcopy(first)(sounds()), found)
    assert found.isfinite().all()


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("mfcc", {"n_mfcc": 129}, "n_mfcc is 129: allowed is 1 to n_mels, which is 128"),
        ("mfcc", {"n_mfcc": 0}, "n_mfcc is 0: allowed is 1 to n_mels"),
        ("mfcc", {"hop": 320}, "mfcc has no setting hop: allowed are sample_rate, n_mfcc"),
        ("mfcc", {"f_min": 2e4}, "f_min is 20000.0 Hz: allowed is 0 up to f_max, which is 14000.0 Hz"),
        ("mfcc", {"sample_rate": 4000}, "16 of 128 mel filters catch no bin"),
        ("gfcc", {"n_gfcc": 65, "n_filters": 64}, "n_gfcc is 65: allowed is 1 to n_filters, which is 64"),
        ("gfcc", {"n_fft": 1024}, "win_length is 1380 and n_fft 1024: allowed is 2 <= win_length <= n_fft <= 44100"),
        ("gfcc", {"f_min": -1.0}, "f_min is -1.0 Hz: allowed is 0 up to f_max, which is 14000.0 Hz"),
        ("gfcc", {"sample_rate": 100}, "allowed is 128 Hz and more"),
        ("chroma", {"n_fft": 50000}, "n_fft is 50000: allowed is 2 to the sample rate, 44100"),
        ("chroma", {"n_chroma": 13}, "n_chroma is 13: allowed are multiples of 12"),
        ("cqt", {"n_bins": 115}, "n_bins is 115: allowed is 1 to 113, which fit between f_min, 32.7"),
        ("cqt", {"sample_rate": 8000, "f_min": 4000.0}, r"n_bins is 0: allowed is 1 to 0"),
        ("cqt", {"f_min": 0.0}, "f_min is 0.0 Hz: allowed is 4.3 Hz and more where bins_per_octave is 12"),
        ("cqt", {"bins_per_octave": 0}, "bins_per_octave is 0: must be above 0"),
        ("cqt", {"floor": 1e-20}, "floor is 1e-20: allowed is 1.1e-19 and more"),
        ("mfcc", {"floor": 1e-60}, "floor is 1e-60: allowed is 1.2e-38 and more"),
        ("cqt", {"f_min": math.nan}, "f_min is nan: allowed is a finite number"),
        ("tempogram", {"window_frames": 1}, "window_frames is 1: allowed is 2 to 7680, a minute"),
        ("tempogram", {"top_db": 0.0}, "top_db is 0.0: must be above 0"),
        ("tempogram", {"n_fft": 50000}, "n_fft 50000: allowed is 2 <= win_length <= n_fft <= 44100"),
        ("mel", {}, "no feature is called 'mel': allowed are logmel, mfcc, gfcc, chroma, cqt, tempogram"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_told_what_can(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(FeatureError, match=message):
        create_feature(name, **given)


def test_the_lowest_and_the_narrowest_filters_that_are_allowed_can_be() -> None:
    wave = sounds(1, 1.0, 2000)
    for changes in ({"f_min": 5.0}, {"f_min": 33.0, "bins_per_octave": 48}, {"f_min": 900.0, "n_bins": 1}):
        assert create_feature("cqt", sample_rate=2000, **changes)(wave).isfinite().all()


def test_nothing_is_kept_between_clips_and_nothing_is_learnt() -> None:
    for name in NAMES:
        extract = create_feature(name, sample_rate=SMALL)
        before = {key: value.clone() for key, value in extract.named_buffers()}
        extract(sounds(3, 2.3)), extract(sounds(1, 1.0))
        assert {key: value.shape for key, value in extract.named_buffers()} == {
            key: value.shape for key, value in before.items()
        }
        assert all(torch.equal(value, before[key]) for key, value in extract.named_buffers())
        assert list(extract.parameters()) == []


@pytest.mark.parametrize("rate", RATES)
def test_a_constant_q_filter_is_as_long_as_its_notes_periods_want(rate: int) -> None:
    extract = feature("cqt", rate)
    assert isinstance(extract, Cqt)
    s = extract.settings
    assert s.quality == pytest.approx(1 / (2 ** (1 / 6) - 1) * (2 ** (1 / 6) + 1))
    assert int(s.halves[0]) == int(s.quality * rate / s.f_min / 2)
    assert extract.size % 2 == 0
    assert extract.size >= 128 + 2 * extract.before


# Documents


@pytest.mark.parametrize("name", NAMES)
def test_the_documents_tell_of_every_setting(name: str) -> None:
    text = (REPO / "docs" / "features.md").read_text()
    section = text.split(f"\n## `{name}`")[1].split("\n## ")[0]
    assert all(f"`{field.name}`" in section for field in fields(FEATURES[name].SETTINGS))
    row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
    assert row.endswith(f"| {feature(name, 44100).bins} | {FEATURES[name].UNIT} |")

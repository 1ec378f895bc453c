"""LogMel: the paper's frame counts, the numbers against a plain formula, every sample rate, and its settings."""

from __future__ import annotations

import json
import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipmill.errors import FeatureError
from clipmill.features import LogMel

RATES = [8000, 11025, 16000, 22050, 24000, 32000, 44100, 48000, 96000]


def sounds(rate: int, seconds: float, clips: int = 2) -> np.ndarray:
    """Chords with a swell over noise, at levels 20 dB apart: float32 `[clips, samples]`."""
    rng = np.random.default_rng(rate)
    time = np.arange(int(rate * seconds)) / rate
    chords = [sum(np.sin(2 * np.pi * f * time) for f in rng.uniform(60, 0.4 * rate, 5)) for _ in range(clips)]
    swell = 0.5 + 0.5 * np.sin(2 * np.pi * 1.5 * time)
    noise = rng.standard_normal((clips, len(time)))
    level = 0.1 ** np.arange(clips)[:, None]
    return (level * (0.1 * np.stack(chords) * swell + 0.02 * noise)).astype(np.float32)


@cache
def log_mel_at(rate: int) -> LogMel:
    return LogMel(sample_rate=rate)


def slaney_mel(hz: float) -> float:
    """Linear to 1 kHz at 200/3 Hz a mel, then 27 mels for every factor of 6.4."""
    return hz * 3 / 200 if hz < 1000 else 15 + 27 * math.log(hz / 1000) / math.log(6.4)


def slaney_hz(mel: float) -> float:
    return mel * 200 / 3 if mel < 15 else 1000 * math.exp((mel - 15) * math.log(6.4) / 27)


def plain_log_mel(
    wave: np.ndarray, rate: int, n_fft: int, hop: int, f_min: float, f_max: float
) -> np.ndarray:
    """The textbook's log-mel of one clip of whole seconds, in float64: `[128, frames]`."""
    seconds = len(wave) // rate
    wave = np.pad(wave.astype(np.float64), (0, max(0, (128 * seconds - 1) * hop - len(wave))))
    around = np.pad(wave, n_fft // 2, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    frames = [np.fft.rfft(window * around[i * hop : i * hop + n_fft]) for i in range(128 * seconds)]
    power = np.abs(np.array(frames).T) ** 2
    edges = [slaney_hz(mel) for mel in np.linspace(slaney_mel(f_min), slaney_mel(f_max), 130)]
    filters = np.zeros((128, n_fft // 2 + 1))
    for m in range(128):
        low, centre, high = edges[m : m + 3]
        for k in range(n_fft // 2 + 1):
            hz = k * rate / n_fft
            filters[m, k] = max(0.0, min((hz - low) / (centre - low), (high - hz) / (high - centre)))
        filters[m] *= 2 / (high - low)
    return 10 * np.log10(np.maximum(filters @ power, 1e-10))


# Frames


@given(st.floats(0.1, 60))
@settings(max_examples=15, deadline=None)
def test_any_length_gives_128_frames_for_every_second_begun(seconds: float) -> None:
    samples = int(44100 * seconds)
    assert log_mel_at(44100)(torch.zeros(1, samples)).shape == (1, 128, 128 * math.ceil(samples / 44100))


@given(st.integers(1, 48000 * 60), st.sampled_from(RATES))
def test_the_frame_count_is_known_beforehand_at_every_rate(samples: int, rate: int) -> None:
    assert log_mel_at(rate).frames(samples) == 128 * -(-samples // rate)


@pytest.mark.parametrize("rate", RATES)
def test_every_rate_gives_128_frames_a_second(rate: int) -> None:
    log_mel = log_mel_at(rate)
    assert [log_mel(torch.zeros(2, rate * s + extra)).shape[2] for s in (1, 7) for extra in (-5, 0, 1)] == [
        128, 128, 256, 896, 896, 1024,
    ]  # fmt: skip


def test_a_part_of_a_second_is_the_second_that_ends_in_zeros() -> None:
    wave = torch.from_numpy(sounds(44100, 1.0))
    wave[:, 30000:] = 0
    assert torch.equal(LogMel()(wave[:, :30000]), LogMel()(wave))


def test_long_clips_end_in_silence_where_the_hop_falls_short() -> None:
    noise = torch.empty(1, 30 * 44100).uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(0))
    log_mel = log_mel_at(44100)(noise)
    assert (log_mel[..., -1] == -100).all()
    assert (log_mel[..., -6] > -60).all()


# Numbers


def test_a_transform_of_an_odd_size_gives_all_its_frames() -> None:
    assert LogMel(n_fft=1381)(torch.zeros(1, 441000)).shape[2] == 1280
    assert LogMel(n_fft=1381, hop=320)(torch.zeros(1, 320 * 9)).shape[2] == 10


# 692 is 4 times the prime 173, and transforms of such a size lose precision: how much is the processor's.
@pytest.mark.parametrize(("rate", "n_fft", "hop", "f_max", "within_db"), [
    (44100, 1380, 345, 14000, 1e-3), (32000, 1000, 250, 14000, 1e-3), (22050, 692, 173, 11025, 3e-3),
])  # fmt: skip
def test_the_numbers_are_the_textbooks_within_thousandths_of_a_db(
    rate: int, n_fft: int, hop: int, f_max: float, within_db: float
) -> None:
    waves = sounds(rate, 2)
    ours = log_mel_at(rate)(torch.from_numpy(waves)).numpy()
    for clip, wave in zip(ours, waves, strict=True):
        assert np.abs(clip - plain_log_mel(wave, rate, n_fft, hop, 50, f_max)).max() < within_db


def test_silence_is_minus_100_db() -> None:
    assert (LogMel()(torch.zeros(1, 44100)) == -100).all()


def test_clips_do_not_see_each_other() -> None:
    waves = torch.from_numpy(sounds(44100, 1, clips=3))
    assert torch.allclose(LogMel()(waves)[1:2], LogMel()(waves[1:2]), atol=1e-4)


def test_features_stay_float32_under_autocast() -> None:
    wave = torch.from_numpy(sounds(44100, 1))
    with torch.autocast("cpu", torch.bfloat16):
        under = LogMel()(wave)
    assert under.dtype == torch.float32
    assert torch.equal(under, LogMel()(wave))


@pytest.mark.gpu
def test_a_gpu_gives_the_numbers_of_the_cpu_within_a_hundredth_of_a_db() -> None:
    wave = torch.from_numpy(sounds(44100, 2))
    with torch.autocast("cuda", torch.bfloat16):
        there = LogMel().cuda()(wave.cuda()).cpu()
    assert (there - LogMel()(wave)).abs().max() < 1e-2


# Settings


def test_the_defaults_are_the_papers() -> None:
    config = LogMel().config
    assert {key: config[key] for key in ("sample_rate", "n_fft", "win_length", "hop", "n_mels")} == {
        "sample_rate": 44100, "n_fft": 1380, "win_length": 1380, "hop": 345, "n_mels": 128,
    }  # fmt: skip
    assert (config["f_min"], config["f_max"]) == (50, 14000)


@pytest.mark.parametrize(
    "given", [{}, {"sample_rate": 22050}, {"n_fft": 2048, "n_mels": 64, "mel_scale": "htk"}]
)
def test_the_config_restores_the_numbers_through_json(given: dict[str, int]) -> None:
    first = LogMel(**given)
    second = LogMel(**json.loads(json.dumps(first.config)))
    wave = torch.from_numpy(sounds(first.config["sample_rate"], 1))
    assert second.config == first.config
    assert torch.equal(second(wave), first(wave))


def test_the_upper_edge_is_capped_at_half_the_rate_and_the_config_says_so() -> None:
    assert [LogMel(sample_rate=rate).config["f_max"] for rate in (16000, 22050, 32000)] == [
        8000,
        11025,
        14000,
    ]


@pytest.mark.parametrize("rate", RATES)
def test_no_filter_is_empty_at_any_rate(rate: int) -> None:
    noise = 0.1 * torch.randn(1, rate, generator=torch.Generator().manual_seed(0))
    assert (log_mel_at(rate)(noise) > -90).all(), "each hears noise, well above the floor"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hop": 0}, "hop is 0: allowed is 1 to the sample rate, 44100"),
        (
            {"sample_rate": 4000},
            "16 of 128 mel filters catch no bin .* allowed is a larger n_fft, fewer n_mels",
        ),
        ({"sample_rate": 16000, "mel_scale": "htk"}, "1 of 128 mel filters catch no bin"),
        ({"sample_rate": 100}, "allowed is 128 Hz and more"),
        ({"n_fft": 1000}, "win_length is 1380 and n_fft 1000: allowed is"),
        ({"f_min": 15000.0}, "allowed is 0 up to f_max, which is 14000.0 Hz"),
        ({"n_mels": 0}, "must be above 0"),
        ({"mel_scale": "bark"}, "allowed are 'slaney' or 'htk'"),
        ({"n_mel": 64}, "logmel has no setting n_mel: allowed are sample_rate, n_fft"),
        ({"f_max": math.nan}, "f_max is nan: allowed is a finite number"),
    ],
)
def test_settings_that_cannot_be_are_told_what_can(given: dict[str, object], message: str) -> None:
    with pytest.raises(FeatureError, match=message):
        LogMel(**given)


@pytest.mark.parametrize(
    "wave", [torch.zeros(44100), torch.zeros(1, 0), torch.zeros(1, 9, dtype=torch.int16)]
)
def test_what_is_no_waveform_is_told_what_is(wave: torch.Tensor) -> None:
    with pytest.raises(FeatureError, match=r"allowed is floating point in -1..1 of shape \[batch, samples\]"):
        LogMel()(wave)

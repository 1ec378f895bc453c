"""The quality columns: each by its definition, and loudness against pyloudnorm, which shares no code with it."""

from __future__ import annotations

import math

import numpy as np
import pyloudnorm
import pytest
import soundfile

from clipmill.audio import measure, resample, to_int16
from conftest import SHARED

RATES = (8000, 22050, 32000, 44100, 48000, 96000)


def pcm(wave: np.ndarray) -> np.ndarray:
    return to_int16(np.asarray(wave, np.float32))


def noise(count: int, level: float = 0.1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, level, count)


def by_pyloudnorm(samples: np.ndarray, rate: int) -> float | None:
    with np.errstate(all="ignore"):
        loudness = float(pyloudnorm.Meter(rate).integrated_loudness(samples / 32768))
    return loudness if math.isfinite(loudness) else None


def signals(count: int, rate: int) -> dict[str, np.ndarray]:
    time = np.arange(count) / rate
    return {
        "noise": noise(count),
        "next to nothing": noise(count, 2e-4),
        "tone": 0.5 * np.sin(2 * np.pi * 997 * time),
        "rumble under a tone": 0.8 * np.sin(2 * np.pi * 15 * time) + 0.01 * np.sin(2 * np.pi * 1000 * time),
        "direct current": np.full(count, 0.9),
        "impulses": 0.9 * (np.arange(count) % (rate // 7) == 5),
        "the absolute gate": noise(count, 0.2) * 10 ** (-4 * (2 * time % 1)),
        "the relative gate": noise(count, 0.3) * (0.01 + (time % 1 < 0.3)),
        "silence": np.zeros(count),
    }


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("seconds", [0.4, 0.43, 0.45, 0.4501, 0.5, 1.237, 5.0])
def test_loudness_is_pyloudnorms_to_a_hundredth(rate, seconds):
    for name, wave in signals(math.ceil(seconds * rate), rate).items():
        samples = pcm(wave)
        assert measure(samples, rate)["loudness_lufs"] == pytest.approx(
            by_pyloudnorm(samples, rate), abs=0.01
        ), name


@pytest.mark.parametrize("rate", [3999, 11025, 44101, 192000])
def test_loudness_is_right_where_100_ms_is_no_whole_number_of_samples(rate):
    samples = pcm(signals(3 * rate + 7, rate)["the relative gate"])
    assert measure(samples, rate)["loudness_lufs"] == pytest.approx(by_pyloudnorm(samples, rate), abs=0.01)


@pytest.mark.shared_data
def test_loudness_of_real_clips_is_pyloudnorms_to_a_hundredth():
    clips = sorted((SHARED / "esc10/audio").glob("*.ogg"))[::6]
    assert len(clips) == 34
    for clip in clips:
        samples, rate = soundfile.read(clip, dtype="int16")
        assert measure(samples, rate)["loudness_lufs"] == pytest.approx(
            by_pyloudnorm(samples, rate), abs=0.01
        )


def test_there_is_no_loudness_under_400_ms_nor_at_rates_that_cannot_hold_the_filter():
    assert measure(pcm(noise(17_639)), 44100)["loudness_lufs"] is None
    assert measure(pcm(noise(17_640)), 44100)["loudness_lufs"] is not None
    assert measure(pcm(noise(30_000)), 3000)["loudness_lufs"] is None


@pytest.mark.parametrize("count", [0, 1, 2, 31, 300, 1023, 1025])
def test_the_shortest_clips_have_every_figure(count):
    found = measure(pcm(noise(count)), 44100)
    assert found.pop("loudness_lufs") is None
    assert all(math.isfinite(value) for value in found.values())


def test_dc_is_the_mean():
    assert measure(np.array([16384, 0, -8192, 0], np.int16), 44100)["dc"] == 2048 / 32768


@pytest.mark.parametrize(("samples", "share"), [
    ([32767, 0, 0, -32768], 0.0), ([32767, 32767, 0, 0], 0.5), ([0, -32768, -32768, -32768], 0.75),
    ([32767, -32768, 32767, -32768], 0.0), ([32767, 32767, -32768, -32768], 1.0), ([32766, 32766, 0, 0], 0.0),
    ([32767, 32767, 0, 32767, 0, 32767, 32767, 0], 0.5),
])  # fmt: skip
def test_clipped_is_the_share_of_samples_at_the_rails_beside_another(samples, share):
    assert measure(np.array(samples, np.int16), 44100)["clipped"] == share


def test_silent_is_the_share_of_the_time_in_windows_that_never_reach_minus_60_db():
    samples = np.full(4410, 32, np.int16)  # five windows of 882
    assert measure(samples, 44100)["silent"] == 1.0
    samples[882] = -33
    assert measure(samples, 44100)["silent"] == 0.8
    assert measure(samples[: 4 * 882 + 441], 44100)["silent"] == pytest.approx(3.5 / 4.5)


def test_bandwidth_shows_what_a_sound_was_before_it_came_to_this_rate():
    assert measure(pcm(noise(220_500)), 44100)["bandwidth_hz"] == 22050
    # The window lets a sound that ends abruptly reach a little further: 0.35 kHz at -20 dB, less where it is softer.
    telephone = pcm(resample(noise(40_000).astype(np.float32), 8000, 44100))
    assert 4000 <= measure(telephone, 44100)["bandwidth_hz"] < 4500
    spectrum = np.fft.rfft(noise(220_500, 0.01))
    spectrum[5 * 16_000 :] = 0
    assert 16_000 <= measure(pcm(np.fft.irfft(spectrum)), 44100)["bandwidth_hz"] < 16_500


def test_bandwidth_of_nothing_and_of_rounding_alone_is_zero():
    assert measure(np.zeros(44100, np.int16), 44100)["bandwidth_hz"] == 0
    assert measure(pcm(noise(44100, 0.5 / 32768)), 44100)["bandwidth_hz"] == 0


def test_bandwidth_is_that_of_what_sounds_however_short():
    samples = np.zeros(441_000, np.int16)
    samples[200_000:201_000] = pcm(noise(1000))
    assert measure(samples, 44100)["bandwidth_hz"] > 21_000

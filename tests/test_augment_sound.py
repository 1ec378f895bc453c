"""Augmentations of sound: the vocoder against librosa, noise against statistics and a plain formula."""

from __future__ import annotations

import math

import librosa
import numpy as np
import pytest
import soundfile
import torch
from scipy import stats
from torch import Tensor

from clipmill.augment import add_white_noise, pitch_shift, time_stretch
from clipmill.augment.noise import white_noise
from clipmill.augment.pitch import read, spline_response
from clipmill.errors import FeatureError
from conftest import SHARED

CLIPS, SAMPLES, RATE = 6, 6000, 16000


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def noise(device: torch.device | str = "cpu", clips: int = CLIPS, samples: int = SAMPLES) -> Tensor:
    """Clips of noise, each 6 dB below the one before."""
    level = 0.5 ** torch.arange(clips)[:, None]
    generator = torch.Generator().manual_seed(0)
    return (0.5 * level * torch.randn(clips, samples, generator=generator)).to(device)


def sine(frequency_hz: float, rate: int, samples: int) -> Tensor:
    return (0.5 * torch.sin(2 * math.pi * frequency_hz / rate * torch.arange(samples).double())).float()


def below_db(error: np.ndarray, signal: np.ndarray) -> float:
    """How far an error lies below a signal."""
    return float(10 * np.log10(np.square(signal).sum() / np.square(error).sum()))


# Stretching and pitch

SEMITONES = (2.0, -2.0, 0.37, -4.0, 4.0, 0.0)
PACES = (0.7, 0.93, 1.0001, 1.21, 1.4, 1.0)


def music(rate: int, samples: int) -> np.ndarray:
    """Noise that swells, on 16 bits, with nothing in its top fifth: float64 `[6, samples]`."""
    rng = np.random.default_rng(0)
    spectrum = np.fft.rfft(rng.standard_normal((CLIPS, samples)))
    spectrum[:, int(0.8 * spectrum.shape[1]) :] = 0
    swell = 1 + np.sin(2 * np.pi * 3 * np.arange(samples) / rate)
    return np.round(0.1 * swell * np.fft.irfft(spectrum, samples) * 32768) / 32768


# librosa is given float64: on float32 it adds up phases in float32, and is off by -32 dB itself.


@pytest.mark.parametrize(("rate", "n_fft"), [(44100, 2048), (16000, 1024)])
def test_a_stretched_clip_is_librosas_at_its_own_rate_within_60_db(
    rate: int, n_fft: int, device: torch.device
) -> None:
    clips, samples = music(rate, 20001), 23000
    wave = torch.tensor(clips, dtype=torch.float32, device=device)
    rates = torch.tensor(PACES, device=device, dtype=torch.float64)
    stretched = time_stretch(wave, rates, 0.7, samples, rate).cpu().numpy()
    for clip, pace, ours in zip(clips, PACES, stretched, strict=True):
        theirs = librosa.effects.time_stretch(clip, rate=pace, n_fft=n_fft)[:samples]
        assert below_db(ours[: len(theirs)] - theirs, theirs) > 60
        assert not ours[len(theirs) :].any()


@pytest.mark.parametrize(("rate", "n_fft"), [(44100, 2048), (16000, 1024)])
def test_a_shifted_clip_is_librosas_at_its_own_semitones_within_60_db(
    rate: int, n_fft: int, device: torch.device
) -> None:
    clips = music(rate, 20001)
    wave = torch.tensor(clips, dtype=torch.float32, device=device)
    shifted = pitch_shift(wave, torch.tensor(SEMITONES, device=device), 4.0, rate).cpu().numpy()
    # librosa's resampler ends below half the rate, and hears the end as a click: both are left out.
    for clip, semitones, ours in zip(clips, SEMITONES, shifted, strict=True):
        theirs = librosa.effects.pitch_shift(clip, sr=rate, n_steps=semitones, n_fft=n_fft)
        error = lowpassed(ours - theirs, 0.85)[n_fft:-n_fft]
        assert below_db(error, theirs[n_fft:-n_fft]) > 60


def lowpassed(wave: np.ndarray, share: float) -> np.ndarray:
    """Without what lies above this share of half the sample rate."""
    spectrum = np.fft.rfft(wave)
    spectrum[int(share * len(spectrum)) :] = 0
    return np.fft.irfft(spectrum, len(wave))


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("name", "semitones"),
    [("1-100032-A-0", 2.0), ("2-100786-A-1", 1.3), ("3-143119-A-21", -4.0), ("4-125929-A-40", 0.7)],
)
def test_real_clips_are_shifted_as_by_librosa(name: str, semitones: float) -> None:
    pcm, rate = soundfile.read(SHARED / f"esc10/audio/{name}.ogg", dtype="int16")
    clip = pcm / 32768.0
    wave = torch.tensor(clip, dtype=torch.float32)[None]
    ours = pitch_shift(wave, torch.tensor([semitones]), 4.0, rate)[0].numpy()
    theirs = librosa.effects.pitch_shift(clip, sr=rate, n_steps=semitones)
    # What librosa's resampler cuts off at the top moves down with the rest.
    error = lowpassed(ours - theirs, 0.85 * min(1.0, 2 ** (semitones / 12)))[2048:-2048]
    assert below_db(error, theirs[2048:-2048]) > 55


def test_no_semitones_and_the_rate_one_give_the_clip_back_to_the_bit() -> None:
    wave = noise()
    assert torch.equal(pitch_shift(wave, torch.zeros(CLIPS), 2.0, RATE), wave)
    assert torch.equal(time_stretch(wave, torch.ones(CLIPS), 0.8, SAMPLES, RATE), wave)
    assert torch.equal(time_stretch(wave, torch.ones(CLIPS), 0.8, 100, RATE), wave[:, :100])


@pytest.mark.parametrize(("semitones", "heard_hz"), [(12.0, 2000), (-12.0, 500), (7.0, 1498.3)])
def test_a_tone_is_heard_so_many_semitones_higher_about_as_loud_as_it_was(
    semitones: float, heard_hz: float
) -> None:
    tone = sine(1000, RATE, 16000)
    shifted = pitch_shift(tone[None], torch.tensor([semitones]), 12.0, RATE)[0, 4000:12000]
    spectrum = torch.fft.rfft(shifted * torch.hann_window(8000)).abs()
    assert spectrum.argmax().item() * RATE / 8000 == pytest.approx(heard_hz, abs=2)
    # The bins around a tone drift apart a little in phase, in librosa too.
    assert 10 * math.log10(shifted.square().mean().item() / 0.125) == pytest.approx(0, abs=1.5)


def test_a_tone_that_would_pass_half_the_sample_rate_is_gone() -> None:
    tone = sine(5000, RATE, 16000)
    shifted = pitch_shift(tone[None], torch.tensor([12.0]), 12.0, RATE)[0, 2000:-2000]
    assert shifted.abs().max() < 1e-3


@pytest.mark.parametrize(("frequency_hz", "error_db"), [(1000, 100), (14000, 83), (22050, 53)])
def test_reading_between_samples_errs_as_little_as_is_promised(frequency_hz: float, error_db: float) -> None:
    share = frequency_hz / 88200
    splines = torch.sin(2 * math.pi * share * torch.arange(5000).double()) / spline_response(
        torch.tensor(share)
    )
    places = 2 + 4990 * torch.rand(1, 5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = torch.sin(2 * math.pi * share * places)
    error = read(splines.float()[None], places) - exact
    assert below_db(error.numpy(), exact.numpy()) > error_db


def test_what_lies_beyond_the_bounds_is_taken_for_them() -> None:
    wave = noise(clips=2)
    far, near = torch.tensor([-9.0, 9.0]), torch.tensor([-2.0, 2.0])
    assert torch.equal(pitch_shift(wave, far, 2.0, RATE), pitch_shift(wave, near, 2.0, RATE))
    far, near = torch.tensor([0.1, 1.0]), torch.tensor([0.5, 1.0])
    assert torch.equal(time_stretch(wave, far, 0.5, 9000, RATE), time_stretch(wave, near, 0.5, 9000, RATE))


@pytest.mark.parametrize("samples", [1, 2, 300])
def test_clips_shorter_than_a_window_and_silent_ones_stay_finite(samples: int) -> None:
    wave = noise(clips=3, samples=samples)
    wave[1] = 0
    shifted = pitch_shift(wave, torch.tensor([2.0, 1.0, -2.0]), 2.0, RATE)
    stretched = time_stretch(wave, torch.tensor([0.8, 0.9, 1.2]), 0.8, 500, RATE)
    assert shifted.shape == wave.shape
    assert stretched.shape == (3, 500)
    assert shifted.isfinite().all()
    assert stretched.isfinite().all()
    assert not shifted[1].any()
    assert not stretched[1].any()


def test_bounds_that_cannot_be_are_an_error() -> None:
    with pytest.raises(FeatureError, match=r"slowest is 0: allowed is a rate above 0"):
        time_stretch(noise(), torch.ones(CLIPS), 0, SAMPLES, RATE)
    with pytest.raises(FeatureError, match=r"most is -1 semitones: allowed is 0 and more"):
        pitch_shift(noise(), torch.ones(CLIPS), -1, RATE)


# Noise


def plain_noise(seed: int, samples: int) -> np.ndarray:
    """The noise of one seed in words of 32 bits, two numbers at a time."""

    def hashed(x: int) -> int:
        x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
        x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    low, high = seed % 2**32, (seed >> 32) % 2**32
    first = hashed(low ^ hashed(high ^ 0x9E3779B9))
    second = hashed(high ^ hashed(first ^ low))
    made: list[float] = []
    for place in range(0, samples, 2):
        a, b = (hashed(hashed(n ^ first) ^ second) / 2**32 for n in (place, place + 1))
        radius = math.sqrt(-2 * math.log(a + 2**-33))
        made += [radius * math.cos(2 * math.pi * b), radius * math.sin(2 * math.pi * b)]
    return np.array(made[:samples])


SEEDS = torch.tensor([0, 1, 2, 3, 2**31, 2**32, 2**53 - 1, 2**62 + 1, -1, -(2**63)])


def test_noise_is_a_hash_of_seed_and_place_alone(device: torch.device) -> None:
    made = white_noise(
        SEEDS.to(device), 501
    ).cpu()  # in float32: 3e-4 is a rounding of a uniform number near 1
    for seed, row in zip(SEEDS.tolist(), made, strict=True):
        np.testing.assert_allclose(row.numpy(), plain_noise(seed, 501), atol=5e-4)
    assert torch.equal(white_noise(SEEDS, 300), white_noise(SEEDS, 501)[:, :300])


def test_noise_is_standard_normal_white_and_different_for_every_seed() -> None:
    made = white_noise(SEEDS, 2**16).double().numpy()
    assert np.abs(made.mean(1)).max() < 4 / 256
    assert np.abs(made.std(1) - 1).max() < 4 / 256 / math.sqrt(2)
    assert np.abs(stats.kurtosis(made, axis=1)).max() < 4 * math.sqrt(24) / 256
    assert min(stats.kstest(row, "norm").pvalue for row in made) > 0.001
    correlation = np.corrcoef(made) - np.eye(len(made))
    assert np.abs(correlation).max() < 4.5 / 256
    # White: no place says anything of those behind it, nor of those of another seed; all lags at once.
    spectra = np.fft.rfft(made)
    for one, other in [(0, 0), (1, 1), (0, 1), (1, 2), (5, 8)]:
        lags = np.fft.irfft(spectra[one] * spectra[other].conj()) / 2**16
        assert np.abs(lags[1:]).max() < 6 / 256


def test_clips_come_to_the_ratio_asked_for(device: torch.device) -> None:
    wave, snr_db = (
        noise(device, samples=50000),
        torch.tensor([-10.0, 0.0, 5.0, 10.0, 30.0, 60.0], device=device),
    )
    added = add_white_noise(wave, snr_db, torch.arange(CLIPS, device=device)) - wave
    reached = 10 * torch.log10(wave.square().mean(1) / added.square().mean(1))
    assert reached.tolist() == pytest.approx(snr_db.tolist(), abs=0.15)
    level = (wave.square().mean(1, keepdim=True) * 10 ** (-snr_db[:, None] / 10)).sqrt()
    expected = level * white_noise(torch.arange(CLIPS, device=device), 50000)
    torch.testing.assert_close(added, expected, rtol=0, atol=1e-6)


def test_silence_stays_silent_and_infinitely_little_noise_is_none() -> None:
    wave = noise()
    wave[0] = 0
    noisy = add_white_noise(wave, torch.tensor([0.0] + [math.inf] * 5), torch.arange(CLIPS))
    assert torch.equal(noisy, wave)

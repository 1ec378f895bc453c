"""The features' numbers beside librosa's and spafe's, on made-up and on real clips; the constant-Q transform's exactly."""

from __future__ import annotations

from functools import cache
from typing import Any

import librosa
import numpy as np
import pytest
import scipy.fft
import scipy.signal
import soundfile
import torch
from numpy.typing import NDArray
from spafe.fbanks.gammatone_fbanks import gammatone_filter_banks
from spafe.features.gfcc import gfcc
from spafe.utils.preprocessing import SlidingWindow

from clipmill.features import Feature, Framing, create_feature
from clipmill.features.chroma import chroma_filters
from clipmill.features.cqt import Cqt
from clipmill.features.gfcc import gammatone_filters
from conftest import SHARED, sound

Array = NDArray[Any]

WITHIN = {
    # feature: (the largest difference, the mean one), in the feature's own unit; and what the reference is.
    "logmel": (0.01, 1e-4),  # dB: librosa's melspectrogram and power_to_db
    "mfcc": (4e-3, 3e-4),  # of values up to 1131: librosa's mfcc of that log-mel
    "mfcc of ours": (2e-3, 3e-4),  # librosa's mfcc of our log-mel: nothing but the cosine transform
    "gfcc": (1e-5, 1e-6),  # of values up to 8: spafe's gfcc, with our filters
    "gfcc of spafe": (0.03, 3e-3),  # with spafe's, which it divides by what a bin shows of their peaks
    "gammatone": (1e-12, 1e-13),  # of 1: spafe's filters of order=1, divided in the same way
    "chroma": (5e-6, 5e-7),  # of 1: librosa's chroma_stft
    "chroma filters": (1e-12, 1e-13),  # of 1: librosa's
    "tempogram": (1e-5, 5e-7),  # of 1: librosa's onset_strength and tempogram
    # dB, where the magnitude is within so much of the clip's largest:
    "cqt, 40 dB": (0.001, 3e-5),  # convolution with librosa's filters in float64
    "cqt, 80 dB": (0.03, 2e-4),
    "cqt, any": (0.5, 5e-4),
    "cqt of librosa, 40 dB": (0.1, 0.01),  # librosa's cqt(sparsity=0), which leaves negative frequencies out
    "cqt of librosa, 60 dB": (0.6, 0.02),
    "sparse cqt of librosa, 20 dB": (1.5, 0.1),  # and with its default, 1 % of each filter left out
    "sparse cqt of librosa, 40 dB": (6.0, 0.2),
}
"""How far from the references the numbers may be."""


def check(what: str, ours: Array, theirs: Array) -> None:
    largest, mean = WITHIN[what]
    difference = np.abs(np.asarray(ours, np.float64) - theirs)
    assert difference.shape == theirs.shape
    assert difference.max() <= largest, f"{what}: {difference.max()}"
    assert difference.mean() <= mean, f"{what}: {difference.mean()}"


@cache
def feature(name: str, rate: int) -> Feature:
    return create_feature(name, sample_rate=rate)


def computed(name: str, rate: int, wave: Array) -> Array:
    return feature(name, rate)(torch.from_numpy(wave)[None])[0].numpy()


@cache
def made_up(rate: int) -> Array:
    """A chord over noise that begins, stops and begins again, 1.3 s: float32."""
    wave = sound(1.3, rate, seed=rate)
    time = np.arange(len(wave)) / rate
    return (wave * (np.sin(2 * np.pi * 3 * time) > -0.3)).astype(np.float32)


@cache
def real(place: int, rate: int) -> Array:
    """1.3 s of one of ESC-10's clips: float32."""
    wave, found = soundfile.read(sorted((SHARED / "esc10" / "audio").glob("*.ogg"))[place], dtype="float32")
    return librosa.resample(wave[: round(1.3 * found)], orig_sr=found, target_sr=rate)


def waves(rate: int, places: tuple[int, ...]) -> list[Array]:
    return [made_up(rate)] if not places else [real(place, rate) for place in places]


REAL = pytest.param((7, 60, 110, 190), marks=pytest.mark.shared_data, id="real")
CLIPS = pytest.mark.parametrize("places", [pytest.param((), id="made up"), REAL])
AT_RATES = pytest.mark.parametrize("rate", [8000, 22050, 44100])


def padded(wave: Array, rate: int) -> Array:
    """With zeros behind, as ours pads it."""
    return Framing(rate).padded(torch.from_numpy(wave)[None])[0].numpy()


def librosas_logmel(wave: Array, rate: int, **settings: Any) -> Array:
    s = feature("logmel", rate).settings
    power = librosa.feature.melspectrogram(
        y=padded(wave, rate), sr=rate, n_fft=s.n_fft, hop_length=s.hop, fmin=s.f_min, fmax=s.f_max, n_mels=s.n_mels,
        pad_mode="reflect",
    )  # fmt: skip
    return librosa.power_to_db(power[:, : Framing(rate).frames(len(wave))], top_db=None, **settings)


@AT_RATES
@CLIPS
def test_log_mels_and_mfccs_are_librosas(rate: int, places: tuple[int, ...]) -> None:
    for wave in waves(rate, places):
        ours, theirs = computed("logmel", rate, wave), librosas_logmel(wave, rate)
        check("logmel", ours, theirs)
        check("mfcc", computed("mfcc", rate, wave), librosa.feature.mfcc(S=theirs, n_mfcc=64))
        check("mfcc of ours", computed("mfcc", rate, wave), librosa.feature.mfcc(S=ours, n_mfcc=64))


@AT_RATES
@CLIPS
def test_chromagrams_are_librosas(rate: int, places: tuple[int, ...]) -> None:
    n_fft = feature("chroma", rate).settings.n_fft
    check(
        "chroma filters",
        chroma_filters(rate, n_fft, 12).numpy(),
        librosa.filters.chroma(sr=rate, n_fft=n_fft, tuning=0, dtype=np.float64),
    )
    for wave in waves(rate, places):
        theirs = librosa.feature.chroma_stft(
            y=padded(wave, rate), sr=rate, n_fft=n_fft, hop_length=Framing(rate).hop, tuning=0, norm=np.inf,
            pad_mode="reflect",
        )  # fmt: skip
        check("chroma", computed("chroma", rate, wave), theirs[:, : Framing(rate).frames(len(wave))])


@pytest.mark.parametrize("n_chroma", [12, 24, 36])
def test_chroma_filters_of_finer_classes_are_librosas(n_chroma: int) -> None:
    theirs = librosa.filters.chroma(sr=22050, n_fft=2047, n_chroma=n_chroma, tuning=0, dtype=np.float64)
    check("chroma filters", chroma_filters(22050, 2047, n_chroma).numpy(), theirs)


@AT_RATES
@CLIPS
def test_tempograms_are_librosas(rate: int, places: tuple[int, ...]) -> None:
    s = feature("tempogram", rate).settings
    hop = Framing(rate).hop
    for wave in waves(rate, places):
        onsets = librosa.onset.onset_strength(
            y=padded(wave, rate), sr=rate, hop_length=hop, n_fft=s.n_fft, fmin=s.f_min, fmax=s.f_max,
            n_mels=s.n_mels, pad_mode="reflect",
        )[: Framing(rate).frames(len(wave))]  # fmt: skip
        theirs = librosa.feature.tempogram(
            onset_envelope=onsets, sr=rate, hop_length=hop, win_length=s.window_frames
        )
        check("tempogram", computed("tempogram", rate, wave), theirs)


def test_a_tempogram_with_librosas_own_settings_is_librosas() -> None:
    rate, wave = 22050, made_up(22050)
    ours = create_feature(
        "tempogram", sample_rate=rate, window_frames=384, n_fft=2048, f_min=0.0, f_max=rate / 2
    )
    onsets = librosa.onset.onset_strength(y=padded(wave, rate), sr=rate, hop_length=173, pad_mode="reflect")
    theirs = librosa.feature.tempogram(onset_envelope=onsets[:256], sr=rate, hop_length=173)
    check("tempogram", ours(torch.from_numpy(wave)[None])[0].numpy(), theirs)


def spafes_gfcc(wave: Array, rate: int, **filters: Any) -> Array:
    """spafe's, of frames that lie as ours do, with a window like ours: its last sample is 0."""
    s = feature("gfcc", rate).settings
    around = np.pad(padded(wave, rate).astype(np.float64), (s.win_length // 2, s.win_length), mode="reflect")
    window = SlidingWindow((s.win_length + 1.5) / rate, (Framing(rate).hop + 0.5) / rate, "hanning")
    found = gfcc(
        around, rate, s.n_gfcc, pre_emph=False, window=window, nfilts=s.n_filters, nfft=s.n_fft, **filters
    )
    return found[: Framing(rate).frames(len(wave))].T


@AT_RATES
@CLIPS
def test_gfccs_are_spafes(rate: int, places: tuple[int, ...]) -> None:
    s = feature("gfcc", rate).settings
    ours = gammatone_filters(rate, s.n_fft, s.n_filters, s.f_min, s.f_max).numpy()
    theirs, _ = gammatone_filter_banks(s.n_filters, s.n_fft, rate, s.f_min, s.f_max, order=1)
    for wave in waves(rate, places):
        found = computed("gfcc", rate, wave)
        check("gfcc", found, spafes_gfcc(wave, rate, fbanks=ours))
        check("gfcc of spafe", found, spafes_gfcc(wave, rate, fbanks=theirs))


@AT_RATES
def test_gammatone_filters_are_spafes_but_for_what_it_divides_them_by(rate: int) -> None:
    s = feature("gfcc", rate).settings
    ours = gammatone_filters(rate, s.n_fft, s.n_filters, s.f_min, s.f_max).numpy()
    theirs, _ = gammatone_filter_banks(s.n_filters, s.n_fft, rate, s.f_min, s.f_max, order=1)
    check("gammatone", ours / ours.max(1, keepdims=True), theirs)
    assert 0.95 < ours.max(1).min() < 1 + 1e-9


def test_spafes_defaults_take_the_order_of_the_filters_for_an_exponent_of_their_bandwidth() -> None:
    theirs, _ = gammatone_filter_banks(64, 4096, 44100, 50, 14000)
    right, _ = gammatone_filter_banks(64, 4096, 44100, 50, 14000, order=1)
    assert np.abs(theirs - right).max() > 0.25


def test_with_a_transform_as_long_as_the_window_spafes_lowest_filters_would_be_the_same() -> None:
    theirs, _ = gammatone_filter_banks(128, 1380, 44100, 50, 14000, order=1)
    assert len(set(theirs.argmax(1).tolist())) < 110
    assert gammatone_filters(44100, 1380, 128, 50, 14000).max(1).values.min() < 0.7
    n_fft = feature("gfcc", 44100).settings.n_fft
    theirs, _ = gammatone_filter_banks(128, n_fft, 44100, 50, 14000, order=1)
    assert len(set(theirs.argmax(1).tolist())) > 125


# The constant-Q transform


def exact_cqt(wave: Array, rate: int) -> Array:
    """Magnitudes of the convolution with librosa's filters, in float64, of all the frames."""
    extract = feature("cqt", rate)
    assert isinstance(extract, Cqt)
    hop, frames = Framing(rate).hop, Framing(rate).frames(len(wave))
    freqs = librosa.cqt_frequencies(n_bins=extract.bins, fmin=extract.settings.f_min)
    lengths, _ = librosa.filters.wavelet_lengths(freqs=freqs, sr=rate)
    filters, _ = librosa.filters.wavelet(freqs=freqs, sr=rate, dtype=np.complex128)
    wave = np.pad(wave.astype(np.float64), (0, frames * hop - len(wave)))
    found = np.empty((extract.bins, frames))
    for bin, (filter, length) in enumerate(zip(filters, lengths, strict=True)):
        heard = np.flatnonzero(filter)
        # What lies `lag` samples behind a frame is multiplied with the filter's value as far before its middle.
        after = len(filter) // 2 - heard[0]
        convolved = scipy.signal.oaconvolve(wave, filter[heard[0] : heard[-1] + 1] * np.sqrt(length))[after:]
        found[bin] = np.abs(convolved[: frames * hop : hop])
    return found


def decibels(magnitude: Array) -> Array:
    return 20 * np.log10(np.maximum(magnitude, 1e-5))


def check_near_the_loudest(what: str, ours: Array, theirs: Array, limits: dict[str, float]) -> None:
    for limit, below in limits.items():
        near = theirs > theirs.max() - below
        check(f"{what}, {limit}", ours[near], theirs[near])


@pytest.mark.parametrize("rate", [8000, 44100])
@CLIPS
def test_the_constant_q_transform_is_the_convolution_with_librosas_filters(
    rate: int, places: tuple[int, ...]
) -> None:
    for wave in waves(rate, places[:2]):
        theirs = decibels(exact_cqt(wave, rate))
        limits = {"40 dB": 40.0, "80 dB": 80.0, "any": np.inf}
        check_near_the_loudest("cqt", computed("cqt", rate, wave), theirs, limits)


@CLIPS
def test_the_constant_q_transform_is_about_librosas(places: tuple[int, ...]) -> None:
    rate = 16000
    extract = feature("cqt", rate)
    for wave in waves(rate, places[:2]):
        ours = computed("cqt", rate, wave)
        for sparsity, what, limits in (
            (0.0, "cqt of librosa", {"40 dB": 40.0, "60 dB": 60.0}),
            (0.01, "sparse cqt of librosa", {"20 dB": 20.0, "40 dB": 40.0}),
        ):
            theirs = librosa.cqt(
                padded(wave, rate), sr=rate, hop_length=Framing(rate).hop, fmin=extract.settings.f_min,
                n_bins=extract.bins, tuning=0, sparsity=sparsity,
            )[:, : ours.shape[1]]  # fmt: skip
            check_near_the_loudest(what, ours, decibels(np.abs(theirs)), limits)


def test_a_tone_is_loudest_at_its_note_and_as_loud_as_its_filter_says() -> None:
    rate, bin = 44100, 57  # A5
    extract = feature("cqt", rate)
    assert isinstance(extract, Cqt)
    hz = float(extract.settings.frequencies[bin])
    assert hz == pytest.approx(880, rel=1e-4)
    tone = torch.sin(2 * torch.pi * hz * torch.arange(2 * rate, dtype=torch.float64) / rate)
    found = extract(tone[None])[0, :, 128]
    assert int(found.argmax()) == bin
    # Half of the tone's amplitude turns the filter's way; the root of the filter's length is its gain.
    expected = 20 * np.log10(0.5 * np.sqrt(extract.settings.quality * rate / hz))
    assert float(found[bin]) == pytest.approx(expected, abs=1e-3)


def test_behind_a_loud_tone_silence_is_at_the_floor() -> None:
    rate = 44100
    extract = feature("cqt", rate)
    assert isinstance(extract, Cqt)
    stops = round(0.3 * rate)
    wave = np.zeros(rate, np.float32)
    wave[:stops] = np.sin(2 * np.pi * 1000 * np.arange(stops) / rate) * np.hanning(stops)
    found = computed("cqt", rate, wave)
    assert found.max() > 20
    for bin, half in enumerate(extract.settings.halves.tolist()):
        assert found[bin, (stops + half) // extract.hop + 2 :].max(initial=-100) == -100


def test_the_cosine_transform_is_scipys() -> None:
    dct = feature("mfcc", 44100).get_buffer("dct").numpy()
    assert np.abs(dct - scipy.fft.dct(np.eye(128), norm="ortho", axis=0)[:64].T).max() < 5e-6

"""Mixup: standard and between classes, against plain formulas, and what it is meant to be to the ear."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from clipmill.augment import loudness_db, mix_by_loudness, mix_standard, partners
from clipmill.augment.mixup import a_weighting_db

CLIPS, SAMPLES, RATE = 6, 6000, 16000
TURNED = [1, 2, 3, 4, 5, 0]


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


def plain_loudness_db(wave: np.ndarray, rate: int) -> float:
    """Tokozume et al. 2018, window by window and bin by bin."""
    n_fft = {44100: 4096, 16000: 2048}[rate]
    wave = np.pad(wave.astype(np.float64), (0, max(0, n_fft - len(wave))))
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    loudest = 10 ** (-80 / 10)
    for start in range(0, len(wave) - n_fft + 1, n_fft // 2):
        spectrum = np.abs(np.fft.rfft(window * wave[start : start + n_fft])) ** 2
        total = 0.0
        for k in range(1, n_fft // 2 + 1):
            f = k * rate / n_fft
            response = 12194**2 * f**4 / ((f**2 + 20.6**2) * (f**2 + 12194**2))
            response /= math.sqrt((f**2 + 107.7**2) * (f**2 + 737.9**2))
            total += spectrum[k] * 10 ** (max(-80.0, 2 + 20 * math.log10(response)) / 10)
        loudest = max(loudest, total)
    return 10 * math.log10(loudest)


def ratios(device: torch.device | str = "cpu", clips: int = CLIPS) -> Tensor:
    return torch.linspace(0.05, 0.95, clips, device=device)


def mixed_by_loudness(
    wave: Tensor, r: Tensor, partner: list[int] = TURNED, *, add_energies: bool = True
) -> tuple[Tensor, Tensor]:
    """Clips of 16 kHz, each of a class of its own, mixed with their partners."""
    gain, targets = loudness_db(wave, RATE), torch.eye(len(wave), device=wave.device)
    return mix_by_loudness(
        wave, targets, gain, wave[partner], targets[partner], gain[partner], r, add_energies=add_energies
    )


@pytest.mark.parametrize("rate", [16000, 44100])
@pytest.mark.parametrize("samples", [1000, 10000])
def test_loudness_is_the_authors_formula_within_a_hundredth_of_a_db(
    rate: int, samples: int, device: torch.device
) -> None:
    wave = noise(device, samples=samples)
    expected = [plain_loudness_db(clip, rate) for clip in wave.cpu().numpy()]
    assert loudness_db(wave, rate).tolist() == pytest.approx(expected, abs=0.01)


def test_loudness_weighs_frequencies_as_the_ear_does() -> None:
    assert a_weighting_db(torch.tensor([1000.0, 100.0, 10000.0, 0.0])).tolist() == pytest.approx(
        [0.0, -19.1, -2.5, -80.0], abs=0.1
    )


def test_silence_is_minus_80_db_loud() -> None:
    assert loudness_db(torch.zeros(2, SAMPLES), RATE).tolist() == pytest.approx([-80, -80], abs=1e-4)


def test_partners_are_a_permutation_and_every_one_is_as_likely() -> None:
    u = torch.rand(6000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    orders = [tuple(partners(row).tolist()) for row in u]
    counts = {order: orders.count(order) for order in set(orders)}
    assert all(sorted(order) == [0, 1, 2] for order in counts)
    assert (u.gather(1, torch.tensor(orders)).diff(dim=1) > 0).all()
    assert len(counts) == 6
    assert stats.chisquare(list(counts.values())).pvalue > 0.001


def test_standard_mixup_mixes_signals_and_labels_in_one_ratio(device: torch.device) -> None:
    wave, targets, r = noise(device), torch.eye(CLIPS, device=device), ratios(device)
    mixed, labels = mix_standard(wave, targets, wave[TURNED], targets[TURNED], r)
    for clip, (partner, share) in enumerate(zip(TURNED, r.tolist(), strict=True)):
        torch.testing.assert_close(mixed[clip], share * wave[clip] + (1 - share) * wave[partner])
        torch.testing.assert_close(labels[clip], share * targets[clip] + (1 - share) * targets[partner])


@pytest.mark.parametrize("add_energies", [True, False])
def test_between_class_mixup_is_the_papers_formula_clip_by_clip(
    add_energies: bool, device: torch.device
) -> None:
    wave, targets = noise(device), torch.eye(CLIPS, device=device)
    mixed, labels = mixed_by_loudness(wave, ratios(device), add_energies=add_energies)
    gains = [plain_loudness_db(clip, RATE) for clip in wave.cpu().numpy()]
    for clip, (partner, r) in enumerate(zip(TURNED, ratios().tolist(), strict=True)):
        p = 1 / (1 + 10 ** ((gains[clip] - gains[partner]) / 20) * (1 - r) / r)
        expected = p * wave[clip] + (1 - p) * wave[partner]
        if add_energies:
            expected /= math.sqrt(p**2 + (1 - p) ** 2)
        torch.testing.assert_close(mixed[clip], expected, atol=1e-3, rtol=0)
        torch.testing.assert_close(labels[clip], r * targets[clip] + (1 - r) * targets[partner])


def test_between_class_mixup_makes_both_clips_sound_in_the_ratio_of_their_labels() -> None:
    wave = torch.stack([sine(1000, RATE, SAMPLES), sine(1500, RATE, SAMPLES) / 100])
    mixed, labels = mixed_by_loudness(wave, torch.tensor([0.3, 0.8]), [1, 0])
    spectrum = torch.fft.rfft(mixed[0, :4800]).abs()
    heard = 10 ** (a_weighting_db(torch.tensor([1000.0, 1500.0])) / 20) * spectrum[[300, 450]]
    assert (heard / heard.sum()).tolist() == pytest.approx(labels[0].tolist(), abs=0.01)


@pytest.mark.parametrize("r", [0.0, 1e-7, 0.5, 1.0])
def test_silent_clips_mix_to_finite_values_alone_and_with_loud_ones(r: float, device: torch.device) -> None:
    wave = noise(device)
    wave[::2] = 0
    for some in (wave, torch.zeros_like(wave)):
        mixed, labels = mixed_by_loudness(some, torch.full((CLIPS,), r, device=device))
        assert mixed.isfinite().all()
        torch.testing.assert_close(labels.sum(1), torch.ones(CLIPS, device=device))


def test_a_ratio_of_zero_is_the_partner_alone_and_one_the_clip() -> None:
    wave = noise(clips=2)
    mixed, labels = mixed_by_loudness(wave, torch.tensor([0.0, 1.0]), [1, 0])
    assert torch.equal(mixed, wave[[1, 1]])
    assert torch.equal(labels, torch.eye(2)[[1, 1]])


def test_levels_of_a_clip_that_meets_itself_stay_as_they_are() -> None:
    levels = 10 * noise().reshape(CLIPS, 30, 200) - 50
    gain, targets = torch.zeros(CLIPS), torch.eye(CLIPS)
    mixed, _ = mix_by_loudness(levels, targets, gain, levels, targets, gain, ratios(), add_energies=False)
    torch.testing.assert_close(mixed, levels)

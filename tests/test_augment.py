"""Augmentations: each against a slow plain formula, from the same draws; seeded; row by row; without a host sync."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from clipmill.augment import (
    crop,
    loudness_db,
    mix_between_class,
    mix_by_loudness,
    mix_standard,
    specaugment,
    to_float,
)
from clipmill.augment.mixup import a_weighting_db

CLIPS, SAMPLES, RATE = 6, 6000, 16000


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def seeded(device: torch.device | str = "cpu", seed: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def noise(device: torch.device | str = "cpu", clips: int = CLIPS, samples: int = SAMPLES) -> Tensor:
    """Clips of noise, each 6 dB below the one before."""
    level = 0.5 ** torch.arange(clips)[:, None]
    return (0.5 * level * torch.randn(clips, samples, generator=seeded())).to(device)


def one_hot(clips: int = CLIPS, device: torch.device | str = "cpu") -> Tensor:
    return torch.eye(clips, device=device)


AUGMENTATIONS: dict[str, Callable[[torch.device, int], Tensor]] = {
    "crop": lambda device, seed: crop(
        noise(device), torch.full((CLIPS,), SAMPLES, device=device), 1000, seeded(device, seed)
    ),
    "mix_standard": lambda device, seed: mix_standard(
        noise(device), one_hot(device=device), seeded(device, seed)
    )[0],
    "mix_between_class": lambda device, seed: mix_between_class(
        noise(device), one_hot(device=device), RATE, seeded(device, seed)
    )[0],
    "specaugment": lambda device, seed: specaugment(
        noise(device).reshape(CLIPS, 30, 200), seeded(device, seed)
    ),
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_generators_seed_decides_everything(name: str, device: torch.device) -> None:
    run = AUGMENTATIONS[name]
    torch.manual_seed(1)
    first = run(device, 7)
    torch.manual_seed(2)
    assert torch.equal(run(device, 7), first)
    assert not torch.equal(run(device, 8), first)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_nothing_waits_for_the_device(name: str) -> None:
    # A fake tensor has no values: reading one back would raise.
    with FakeTensorMode(allow_non_fake_inputs=True):
        AUGMENTATIONS[name](torch.device("cpu"), 0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_nothing_waits_for_the_gpu(name: str) -> None:
    wave, targets, generator = noise("cuda"), one_hot(device="cuda"), seeded("cuda")
    lengths = torch.full((CLIPS,), SAMPLES, device="cuda")
    run = {
        "crop": lambda: crop(wave, lengths, 1000, generator),
        "mix_standard": lambda: mix_standard(wave, targets, generator),
        "mix_between_class": lambda: mix_between_class(wave, targets, RATE, generator),
        "specaugment": lambda: specaugment(wave.reshape(CLIPS, 30, 200), generator),
    }[name]
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Crop


@pytest.mark.parametrize("dtype", [torch.int16, torch.float32])
def test_a_crop_is_one_unbroken_window_of_its_own_clip(dtype: torch.dtype, device: torch.device) -> None:
    # Every sample names its clip and its place.
    wave = (1000 * torch.arange(CLIPS)[:, None] + torch.arange(1, 301)).to(device, dtype)
    lengths = torch.tensor([300, 200, 101, 100, 99, 1], device=device)
    seen = []
    for seed in range(20):
        cropped = crop(wave, lengths, 100, seeded(device, seed))
        assert cropped.dtype == dtype
        for clip, length in enumerate(lengths.tolist()):
            row = cropped[clip].tolist()
            whole = [1000 * clip + place for place in range(1, length + 1)] + [0] * 100
            start = int(row[0]) - 1000 * clip - 1
            assert row == whole[start : start + 100]
            assert 0 <= start <= max(0, length - 100)
        seen.append(cropped[:, 0].tolist())
    assert [len({row[clip] for row in seen}) for clip in (3, 4, 5)] == [1, 1, 1]
    assert len({row[0] for row in seen}) > 10


def test_every_place_where_the_window_fits_is_as_likely() -> None:
    wave = torch.arange(13).expand(20000, 13)
    starts = crop(wave, torch.full((20000,), 12), 8, seeded())[:, 0]
    counts = torch.bincount(starts, minlength=6)
    assert counts[5] == 0
    assert (counts[:5] - 4000).abs().max() < 300


def test_a_window_longer_than_the_batch_is_filled_with_zeros() -> None:
    cropped = crop(torch.ones(2, 10), torch.tensor([10, 4]), 16, seeded())
    assert cropped.sum(1).tolist() == [10, 4]


def test_to_float_is_exact_division_by_32768() -> None:
    pcm = torch.tensor([-32768, -1, 0, 1, 32767], dtype=torch.int16)
    assert to_float(pcm).tolist() == [-1.0, -1 / 32768, 0.0, 1 / 32768, 32767 / 32768]


# Mixup


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


def draws(device: torch.device, seed: int) -> tuple[list[int], list[float]]:
    """The partners and ratios that a mixup draws first from this seed."""
    generator = seeded(device, seed)
    partner = torch.randperm(CLIPS, generator=generator, device=device)
    return partner.tolist(), torch.rand(CLIPS, generator=generator, device=device).tolist()


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


def test_standard_mixup_mixes_signals_and_labels_in_one_ratio(device: torch.device) -> None:
    wave, targets = noise(device), one_hot(device=device)
    mixed, labels = mix_standard(wave, targets, seeded(device, 3))
    for clip, (partner, r) in enumerate(zip(*draws(device, 3), strict=True)):
        assert torch.allclose(mixed[clip], r * wave[clip] + (1 - r) * wave[partner], atol=1e-6)
        assert torch.allclose(labels[clip], r * targets[clip] + (1 - r) * targets[partner], atol=1e-6)


def test_between_class_mixup_is_the_papers_formula_clip_by_clip(device: torch.device) -> None:
    wave, targets = noise(device), one_hot(device=device)
    mixed, labels = mix_between_class(wave, targets, RATE, seeded(device, 3))
    gains = [plain_loudness_db(clip, RATE) for clip in wave.cpu().numpy()]
    for clip, (partner, r) in enumerate(zip(*draws(device, 3), strict=True)):
        p = 1 / (1 + 10 ** ((gains[clip] - gains[partner]) / 20) * (1 - r) / r)
        expected = (p * wave[clip] + (1 - p) * wave[partner]) / math.sqrt(p**2 + (1 - p) ** 2)
        assert torch.allclose(mixed[clip], expected, atol=1e-3)
        assert torch.allclose(labels[clip], r * targets[clip] + (1 - r) * targets[partner], atol=1e-6)


def test_between_class_mixup_makes_both_clips_sound_in_the_ratio_of_their_labels() -> None:
    time = torch.arange(SAMPLES) / RATE
    wave = torch.stack(
        [0.5 * torch.sin(2 * math.pi * 1000 * time), 0.005 * torch.sin(2 * math.pi * 1500 * time)]
    )
    seed = next(s for s in range(99) if torch.randperm(2, generator=seeded(seed=s)).tolist() == [1, 0])
    mixed, labels = mix_between_class(wave, one_hot(2), RATE, seeded(seed=seed))
    spectrum = torch.fft.rfft(mixed[0, :4800]).abs()
    heard = 10 ** (a_weighting_db(torch.tensor([1000.0, 1500.0])) / 20) * spectrum[[300, 450]]
    assert (heard / heard.sum()).tolist() == pytest.approx(labels[0].tolist(), abs=0.01)


def test_silent_clips_mix_to_finite_values_alone_and_with_loud_ones(device: torch.device) -> None:
    wave = noise(device)
    wave[::2] = 0
    for seed in range(20):
        for batch in (wave, torch.zeros_like(wave)):
            mixed, labels = mix_between_class(batch, one_hot(device=device), RATE, seeded(device, seed))
            assert mixed.isfinite().all()
            assert torch.allclose(labels.sum(1), torch.ones(CLIPS, device=device))


def test_a_ratio_of_zero_is_the_partner_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    partner = torch.tensor([1, 0])
    monkeypatch.setattr("clipmill.augment.mixup._draw", lambda x, generator: (partner, torch.zeros(2)))
    wave = noise(clips=2)
    mixed, labels = mix_between_class(wave, one_hot(2), RATE, seeded())
    assert torch.equal(mixed, wave[partner])
    assert torch.equal(labels, one_hot(2)[partner])


def test_signals_of_any_shape_mix_by_a_loudness_that_is_given() -> None:
    wave = noise()
    flat, _ = mix_by_loudness(wave, one_hot(), loudness_db(wave, RATE), seeded())
    shaped, _ = mix_by_loudness(wave.reshape(CLIPS, 30, 200), one_hot(), loudness_db(wave, RATE), seeded())
    assert torch.equal(shaped.flatten(1), flat)


# SpecAugment


def masked_axes(before: Tensor, after: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For each clip, which bins and which frames were blanked."""
    for masked in before != after:
        yield masked.all(1), masked.all(0)


def stripes(mask: Tensor) -> int:
    """How many unbroken stretches a mask `[size]` holds."""
    edges = torch.diff(torch.cat([torch.zeros(1), mask.float().cpu()]))
    return int((edges == 1).sum())


def test_masks_are_whole_stripes_at_the_clips_own_mean(device: torch.device) -> None:
    log_mel = 10 * torch.randn(40, 64, 300, generator=seeded()).to(device) - 50
    masked = specaugment(log_mel, seeded(device))
    for clip, (bins, frames) in enumerate(masked_axes(log_mel, masked)):
        blank = bins[:, None] | frames[None, :]
        assert torch.equal(masked[clip][~blank], log_mel[clip][~blank])
        assert torch.allclose(masked[clip][blank], log_mel[clip].mean())
        assert stripes(bins) <= 2
        assert stripes(frames) <= 2
        assert bins.sum() <= 2 * 8
        assert frames.sum() <= 2 * 64


def test_every_clip_has_masks_of_its_own_of_every_width_up_to_the_one_given() -> None:
    log_mel = torch.randn(2000, 8, 40, generator=seeded())
    masked = specaugment(log_mel, seeded(), time_masks=1, time_width=4, freq_masks=0)
    frames = torch.stack([frames for _, frames in masked_axes(log_mel, masked)])
    counts = torch.bincount(frames.sum(1), minlength=6)
    assert counts[5] == 0
    assert (counts[:5] - 400).abs().max() < 90
    # Masked by w frames in a fifth of the clips, for w = 1 to 4, each place of the 41 - w as likely.
    touched = frames.float().mean(0)
    assert touched[4:-4].mean() == pytest.approx(sum(w / (41 - w) for w in range(1, 5)) / 5, rel=0.1)
    assert touched[[0, -1]].tolist() == pytest.approx(
        [sum(1 / (41 - w) for w in range(1, 5)) / 5] * 2, rel=0.4
    )


def test_masks_wider_than_the_clip_stop_at_its_edge() -> None:
    log_mel = torch.randn(50, 4, 6, generator=seeded())
    masked = specaugment(log_mel, seeded(), time_width=1000, freq_width=1000)
    assert masked.shape == log_mel.shape
    assert masked.isfinite().all()


def test_without_masks_nothing_changes() -> None:
    log_mel = torch.randn(3, 8, 40, generator=seeded())
    assert torch.equal(specaugment(log_mel, seeded(), time_masks=0, freq_masks=0), log_mel)

"""Augmentations: each against a slow plain formula of the same numbers, and the laws that all of them keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from clipmill.augment import (
    add_white_noise,
    crop,
    loudness_db,
    mix_by_loudness,
    mix_standard,
    partners,
    pitch_shift,
    specaugment,
    time_stretch,
    to_float,
)
from clipmill.errors import FeatureError

CLIPS, SAMPLES, RATE = 6, 6000, 16000

Batch = dict[str, Tensor]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=seeded(seed), dtype=torch.float64)


def noise(device: torch.device | str = "cpu", clips: int = CLIPS, samples: int = SAMPLES) -> Tensor:
    """Clips of noise, each 6 dB below the one before."""
    level = 0.5 ** torch.arange(clips)[:, None]
    return (0.5 * level * torch.randn(clips, samples, generator=seeded())).to(device)


def one_hot(clips: int = CLIPS, device: torch.device | str = "cpu") -> Tensor:
    return torch.eye(clips, device=device)


# The laws of all


def batch(device: torch.device | str = "cpu") -> Batch:
    """All that any augmentation takes, a row a clip."""
    wave, targets, u, turned = noise(), one_hot(), uniform(CLIPS), [1, 2, 3, 4, 5, 0]
    rows = {
        "wave": wave,
        "lengths": torch.tensor([6000, 5000, 3001, 3000, 2999, 1]),
        "logmel": 10 * torch.randn(CLIPS, 30, 200, generator=seeded()) - 50,
        "targets": targets,
        "other": wave[turned],
        "other_targets": targets[turned],
        "gain_db": loudness_db(wave, RATE),
        "other_gain_db": loudness_db(wave, RATE)[turned],
        "u": u,
        "u8": uniform(CLIPS, 8),
        "semitones": 4 * u - 2,
        "rates": 0.8 + 0.4 * u,
        "snr_db": 20 * u,
        "seeds": torch.arange(CLIPS),
    }
    return {name: value.to(device) for name, value in rows.items()}


AUGMENTATIONS: dict[str, Callable[[Batch], Tensor]] = {
    "crop": lambda b: crop(b["wave"], b["lengths"], 3000, b["u"]),
    "to_float": lambda b: to_float((b["wave"] * 10000).to(torch.int16)),
    "mix_standard": lambda b: torch.cat(
        mix_standard(b["wave"], b["targets"], b["other"], b["other_targets"], b["u"]), 1
    ),
    "mix_by_loudness": lambda b: torch.cat(
        mix_by_loudness(
            b["wave"], b["targets"], b["gain_db"], b["other"], b["other_targets"], b["other_gain_db"], b["u"]
        ),
        1,
    ),
    "loudness_db": lambda b: loudness_db(b["wave"], RATE),
    "specaugment": lambda b: specaugment(b["logmel"], b["u8"]),
    "pitch_shift": lambda b: pitch_shift(b["wave"], b["semitones"], 2.0, RATE),
    "time_stretch": lambda b: time_stretch(b["wave"], b["rates"], 0.8, 7000, RATE),
    "add_white_noise": lambda b: add_white_noise(b["wave"], b["snr_db"], b["seeds"]),
}

WHOLE = {name: run(batch()) for name, run in AUGMENTATIONS.items()}


@pytest.mark.parametrize("name", AUGMENTATIONS)
@settings(max_examples=10, deadline=None)
@given(rows=st.lists(st.integers(0, CLIPS - 1), min_size=1, max_size=8))
def test_what_a_clip_becomes_depends_on_no_other_clip(name: str, rows: list[int]) -> None:
    some = AUGMENTATIONS[name]({key: value[rows] for key, value in batch().items()})
    torch.testing.assert_close(some, WHOLE[name][rows], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_a_gpu_makes_of_a_clip_what_a_cpu_does(name: str) -> None:
    torch.testing.assert_close(AUGMENTATIONS[name](batch("cuda")).cpu(), WHOLE[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_autocast_leaves_it_in_float32(name: str, device: torch.device) -> None:
    rows = batch(device)
    plain = AUGMENTATIONS[name](rows)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        cast = AUGMENTATIONS[name](rows)
    assert cast.dtype == torch.float32
    assert torch.equal(cast, plain)


@pytest.mark.parametrize("name", [*AUGMENTATIONS, "partners"])
def test_nothing_waits_for_the_device(name: str) -> None:
    # A fake tensor has no values: reading one back would raise.
    rows = batch()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {key: mode.from_tensor(value) for key, value in rows.items()}
        partners(fake["u"]) if name == "partners" else AUGMENTATIONS[name](fake)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*AUGMENTATIONS, "partners"])
def test_nothing_waits_for_the_gpu(name: str) -> None:
    rows = batch("cuda")
    run = {**AUGMENTATIONS, "partners": lambda b: partners(b["u"])}[name]
    run(rows)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Crop


@pytest.mark.parametrize("dtype", [torch.int16, torch.float32])
def test_a_crop_starts_where_its_number_says_and_ends_in_zeros(
    dtype: torch.dtype, device: torch.device
) -> None:
    # Every sample names its clip and its place.
    wave = (1000 * torch.arange(CLIPS)[:, None] + torch.arange(1, 301)).to(device, dtype)
    lengths = [300, 200, 101, 100, 99, 1]
    for seed in range(20):
        u = uniform(CLIPS, seed=seed)
        cropped = crop(wave, torch.tensor(lengths, device=device), 100, u.to(device))
        assert cropped.dtype == dtype
        for clip, length in enumerate(lengths):
            whole = [1000 * clip + place for place in range(1, length + 1)] + [0] * 100
            start = math.floor(u[clip].item() * (max(0, length - 100) + 1))
            assert cropped[clip].tolist() == whole[start : start + 100]


def test_every_place_where_the_window_fits_is_as_likely() -> None:
    wave = torch.arange(13).expand(20000, 13)
    starts = crop(wave, torch.full((20000,), 12), 8, uniform(20000))[:, 0]
    counts = torch.bincount(starts, minlength=6)
    assert counts[5] == 0
    assert (counts[:5] - 4000).abs().max() < 300


@pytest.mark.parametrize("u", [1 - 2**-53, 1.0])
def test_the_largest_number_gives_the_last_window(u: float) -> None:
    last = crop(torch.arange(1, 13)[None], torch.tensor([12]), 8, torch.tensor([u], dtype=torch.float64))
    assert last.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12]]


def test_a_window_longer_than_the_batch_is_filled_with_zeros() -> None:
    cropped = crop(torch.ones(2, 10), torch.tensor([10, 4]), 16, uniform(2))
    assert cropped.sum(1).tolist() == [10, 4]


def test_a_window_of_which_less_is_needed_may_reach_past_the_clip() -> None:
    wave = torch.arange(1, 11).expand(2, 10)
    lengths, needed, u = torch.tensor([10, 6]), torch.tensor([6, 8]), torch.ones(2, dtype=torch.float64)
    assert crop(wave, lengths, 10, u, needed).tolist() == [
        [5, 6, 7, 8, 9, 10, 0, 0, 0, 0],
        [1, 2, 3, 4, 5, 6, 0, 0, 0, 0],
    ]


def test_to_float_is_exact_division_by_32768() -> None:
    pcm = torch.tensor([-32768, -1, 0, 1, 32767], dtype=torch.int16)
    assert to_float(pcm).tolist() == [-1.0, -1 / 32768, 0.0, 1 / 32768, 32767 / 32768]


# SpecAugment


def masked_axes(before: Tensor, after: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For each clip, which bins and which frames were blanked."""
    for masked in before != after:
        yield masked.all(1), masked.all(0)


def test_masks_are_the_stripes_that_the_numbers_say_at_the_clips_own_mean(device: torch.device) -> None:
    clips, bins, frames = 40, 64, 300
    log_mel = 10 * torch.randn(clips, bins, frames, generator=seeded()) - 50
    u = uniform(clips, 8)
    masked = specaugment(log_mel.to(device), u.to(device)).cpu()
    for clip, numbers in enumerate(u.tolist()):
        expected = log_mel[clip].clone()
        for stripe in range(4):
            size, most = (frames, 64) if stripe < 2 else (bins, 8)
            width = math.floor(numbers[2 * stripe] * (most + 1))
            start = math.floor(numbers[2 * stripe + 1] * (size - width + 1))
            stripes = expected.T if stripe < 2 else expected
            stripes[start : start + width] = log_mel[clip].mean()
        torch.testing.assert_close(masked[clip], expected)


def test_every_clip_has_masks_of_its_own_of_every_width_up_to_the_one_given() -> None:
    log_mel = torch.randn(2000, 8, 40, generator=seeded())
    masked = specaugment(log_mel, uniform(2000, 2), time_masks=1, time_width=4, freq_masks=0)
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
    masked = specaugment(log_mel, uniform(50, 8), time_width=1000, freq_width=1000)
    assert masked.shape == log_mel.shape
    assert masked.isfinite().all()


def test_without_masks_nothing_changes() -> None:
    log_mel = torch.randn(3, 8, 40, generator=seeded())
    assert torch.equal(specaugment(log_mel, uniform(3, 0), time_masks=0, freq_masks=0), log_mel)


def test_too_few_numbers_for_the_masks_are_an_error() -> None:
    with pytest.raises(FeatureError, match=r"\(3, 4\): 3 clips with 2 \+ 2 stripes take \(3, 8\)"):
        specaugment(torch.zeros(3, 8, 40), uniform(3, 4))

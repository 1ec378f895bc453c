"""A batch as it is learnt from: augmented sound, its features, soft targets; all on the device.

Every random number is a function of (seed, position) and of what it is for: a clip is treated alike on any device, by
any number of ranks, resumed or not.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
from clipmill.errors import ConfigError
from clipmill.features import FrontEnd, StoredFrontEnd
from clipmill.loader import Batch, crop_places, draws
from clipmill.train.ranks import Ranks
from clipmill.train.recipes import LOUDEST_SNR_DB, Recipe

_USES = {"crop": 1, "stretch": 1, "pitch": 1, "snr": 1, "noise": 1, "partner": 1, "ratio": 1, "masks": 8}
"""How many numbers of a clip each augmentation takes; a new one is added at the end, so that the others keep theirs."""


def crop_samples(recipe: Recipe, rate: int) -> int:
    """Samples of a clip that a network learns from, at `rate` Hz; 0: all.

    Raises:
        ConfigError: the crop is shorter than a sample.
    """
    samples = round(recipe.crop_s * rate)
    if recipe.crop_s and not samples:
        raise ConfigError(
            f"--crop-s {recipe.crop_s:g}: is no sample or frame long, at {rate} a second; allowed is 0 (whole clips) "
            f"or {1 / rate:.1g} and more"
        )
    return samples


def read_samples(recipe: Recipe, rate: int) -> int:
    """Samples of a clip that are read: more than the crop where it may be played faster; 0: all."""
    return math.ceil(crop_samples(recipe, rate) * (1 + recipe.stretch))


class Preparation:
    """What the trainer does to each batch before the network: augmentation and features.

    Args:
        recipe: which augmentations, and how strong.
        features: the front end, on the device; a stored feature's takes no augmentation of waveforms.
        seed: of the run.
        ranks: whose batch it is: mixing takes partners from all of it.
    """

    def __init__(
        self,
        recipe: Recipe,
        features: FrontEnd | StoredFrontEnd,
        seed: int,
        ranks: Ranks = Ranks(),  # noqa: B008 - frozen
    ) -> None:
        self.recipe, self.features, self.seed, self.ranks = recipe, features, seed, ranks

    def __call__(self, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """The batch of a step (from 0), of this rank.

        Returns:
            float32 feature `[B, bins, frames]`, or `[B, samples]` for a network on waveforms, which
            SpecAugment leaves alone; and soft targets float32 `[B, classes]`.
        """
        recipe, rate = self.recipe, self.features.sample_rate
        waves, lengths, targets = batch[:3]
        u = self._draws(step, len(waves), waves.device)
        wanted = read_samples(recipe, rate)
        if wanted and waves.shape[1] != wanted:  # as from a stream: else no more than that was read
            waves = crop(waves, lengths, wanted, self.ranks.own(u["crop"])[:, 0])
        elif not wanted and self.ranks.count > 1:
            waves = self.features.padded(waves, self.ranks.widest(waves.shape[1]))
        own = {name: self.ranks.own(part) for name, part in u.items()}
        sound = self._changed(to_float(waves), lengths.clamp(max=waves.shape[1]), own)
        gain = loudness_db(sound, rate) if recipe.mixup.startswith("between-class") else None
        if recipe.mixup in ("standard", "between-class"):
            sound, targets = self._mixed(sound, targets, gain, u)
        heard = self.features(sound)
        if recipe.mixup in ("between-class-logmel", "standard-features"):
            heard, targets = self._mixed(heard, targets, gain, u)
        if recipe.specaugment and self.features.feature is not None:
            _, bins, frames = heard.shape
            bins, frames = min(recipe.mask_bins, bins // 8), min(recipe.mask_frames, frames // 8)
            heard = specaugment(heard, self.ranks.own(u["masks"]), time_width=frames, freq_width=bins)
        return heard, targets

    def _draws(self, step: int, clips: int, device: torch.device) -> dict[str, Tensor]:
        """Uniform numbers for the clips of the whole step, those of other ranks too: float64 `[count * B, numbers]`."""
        size = clips * self.ranks.count
        positions: NDArray[np.int64] = np.arange(step * size, (step + 1) * size, dtype=np.int64)
        numbers = draws(self.seed, positions, sum(_USES.values()))
        # The loader's own: of a crop within what was read, all places in the clip are then as likely.
        numbers[:, 0] = crop_places(self.seed, positions)
        table = torch.from_numpy(numbers)
        if device.type == "cuda":  # one copy for all of them, that nobody waits for
            table = table.pin_memory().to(device, non_blocking=True)
        return dict(zip(_USES, table.split(list(_USES.values()), 1), strict=True))

    def _changed(self, sound: Tensor, lengths: Tensor, u: dict[str, Tensor]) -> Tensor:
        """Each clip stretched, shifted in pitch and made noisy by its own numbers: `[B, crop]`.

        More was read than is heard at most speeds: what is heard begins at a random place of it.
        """
        recipe, rate = self.recipe, self.features.sample_rate
        if recipe.stretch:
            fastest = 1 + recipe.stretch
            speeds = torch.exp((2 * u["stretch"][:, 0] - 1) * math.log(fastest)).float()
            samples = crop_samples(recipe, rate) or sound.shape[1]
            heard = (samples * speeds.double()).ceil().long()
            sound = crop(sound, lengths, sound.shape[1], u["crop"][:, 0], heard)
            sound = time_stretch(sound, speeds, 1 / fastest, samples, rate)
        if recipe.pitch_semitones:
            semitones = ((2 * u["pitch"][:, 0] - 1) * recipe.pitch_semitones).float()
            sound = pitch_shift(sound, semitones, recipe.pitch_semitones, rate)
        if recipe.noise_snr_db is not None:
            snr_db = recipe.noise_snr_db + u["snr"][:, 0] * (LOUDEST_SNR_DB - recipe.noise_snr_db)
            sound = add_white_noise(sound, snr_db.float(), (u["noise"][:, 0] * 2**53).long())
        return sound

    def _mixed(
        self, x: Tensor, targets: Tensor, gain_db: Tensor | None, u: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Each clip with its partner, who may be another rank's."""
        ranks = self.ranks
        partner, r = ranks.own(partners(u["partner"][:, 0])), ranks.own(u["ratio"])[:, 0].float()
        others, other_targets = ranks.joined(x)[partner], ranks.joined(targets)[partner]
        if gain_db is None:
            return mix_standard(x, targets, others, other_targets, r)
        other_gain_db = ranks.joined(gain_db)[partner]
        return mix_by_loudness(
            x, targets, gain_db, others, other_targets, other_gain_db, r, add_energies=x.ndim == 2
        )

"""Augmentations: batched, on the batch's own device, without a loop over clips or a wait for the device.

Every draw comes from a `torch.Generator` that is passed in and lives on the batch's device
(a CPU and a GPU draw different numbers from one seed). A trainer that seeds it by
(seed, step) makes a step's randomness a pure function of the two.

    wave = to_float(crop(pcm, lengths, samples, generator))                  # [B, samples]
    wave, targets = mix_between_class(wave, targets, sample_rate, generator)
    logmel = specaugment(log_mel(wave), generator)                           # [B, bins, frames]
"""

from clipmill.augment.crop import crop, to_float
from clipmill.augment.mixup import loudness_db, mix_between_class, mix_by_loudness, mix_standard
from clipmill.augment.specaugment import specaugment

__all__ = [
    "crop",
    "loudness_db",
    "mix_between_class",
    "mix_by_loudness",
    "mix_standard",
    "specaugment",
    "to_float",
]

"""Augmentations: batched, on the batch's own device, without a loop over clips or a wait for the device.

All that is random comes in as numbers, some for each clip, and what a clip becomes depends on them and
on nothing else in the batch but the partner it is given. Made from (seed, position), as by
`clipmill.loader.orders`, they give the same clips on a CPU and on a GPU, to rounding, however clips are
dealt out to batches and ranks. Here u is uniform, float64 from 0 to 1, all else follows from such numbers:

    wave = to_float(crop(pcm, lengths, samples, u))                              # [B, samples]
    wave = time_stretch(wave, rates, 0.8, samples, sample_rate)                  # rates from 0.8 on
    wave = pitch_shift(wave, semitones, 2.0, sample_rate)                        # semitones of -2 to 2
    wave = add_white_noise(wave, snr_db, seeds)                                  # seeds int64
    other, gain_db = partners(u), loudness_db(wave, sample_rate)
    wave, targets = mix_by_loudness(
        wave, targets, gain_db, wave[other], targets[other], gain_db[other], r
    )
    logmel = specaugment(log_mel(wave), u)                                       # [B, bins, frames]
"""

from clipmill.augment.crop import crop, to_float
from clipmill.augment.mixup import loudness_db, mix_by_loudness, mix_standard, partners
from clipmill.augment.noise import add_white_noise
from clipmill.augment.pitch import pitch_shift
from clipmill.augment.specaugment import specaugment
from clipmill.augment.stretch import time_stretch

__all__ = [
    "add_white_noise",
    "crop",
    "loudness_db",
    "mix_by_loudness",
    "mix_standard",
    "partners",
    "pitch_shift",
    "specaugment",
    "time_stretch",
    "to_float",
]

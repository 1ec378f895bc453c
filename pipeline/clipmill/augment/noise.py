"""White noise, clip by clip, from a hash of counters: the same on any device, and whatever else is drawn."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WORD = 2**32 - 1


def add_white_noise(wave: Tensor, snr_db: Tensor, seeds: Tensor) -> Tensor:
    """Each clip with Gaussian noise of its own, so much below its mean power over the window.

    Silence stays silent, and +inf dB leaves a clip as it is, to the bit.

    Args:
        wave: `[B, samples]` floating point. The zeros behind a clip count, and get noise.
        snr_db: `[B]` floating point, the clip's power over the noise's in dB, on the average of many clips;
            above -inf.
        seeds: `[B]` int64; see `white_noise`.

    Returns:
        `[B, samples]` float32, under autocast too.
    """
    with torch.autocast(wave.device.type, enabled=False):
        wave = wave.float()
        power = wave.square().mean(1)
        level = power.sqrt() * torch.pow(10.0, -snr_db.float() / 20.0)
        return torch.addcmul(wave, level[:, None], white_noise(seeds, wave.shape[1]))


def white_noise(seeds: Tensor, samples: int) -> Tensor:
    """Standard normal noise `[B, samples]` float32, of which a clip's depends on its seed alone.

    A shorter one is the beginning of a longer one. Devices differ in the last bits of logarithms and cosines.
    Sample pairs are numbered, and their numbers hashed twice under two words of the seed, into two words that
    Box and Muller (1958) turn into two normal numbers.

    Args:
        seeds: `[B]` int64; all 64 bits count.
        samples: length of the noise, up to 2^32.
    """
    low, high = (seeds & _WORD)[:, None], ((seeds >> 32) & _WORD)[:, None]
    first = _hashed(low ^ _hashed(high ^ 0x9E3779B9))
    second = _hashed(high ^ _hashed(first ^ low))
    words = torch.arange(samples + samples % 2, device=seeds.device)
    # The first word alone would give clips that share it, but for some low bits, one noise in another order.
    words = _hashed(_hashed(words ^ first) ^ second)
    radius = ((words[:, 0::2].float() + 0.5) * 2.0**-32).log().mul(-2.0).sqrt()
    angle = words[:, 1::2].float() * (2 * math.pi * 2.0**-32)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(1)[:, :samples]


def _hashed(words: Tensor) -> Tensor:
    """lowbias32 (Wellons, hash-prospector), a bijection of 32-bit words in which each bit depends on all."""
    # int64 holds them without a sign. The factors are taken as signed, so that no product passes 63 bits.
    words = words ^ (words >> 16)
    words.mul_(0x7FEB352D).bitwise_and_(_WORD)
    words.bitwise_xor_(words >> 15)
    words.mul_(0x846CA68B - 2**32).bitwise_and_(_WORD)
    return words.bitwise_xor_(words >> 16)
